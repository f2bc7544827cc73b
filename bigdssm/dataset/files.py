"""Names of a dataset's files that several rooms know."""

COUNTS_FILE = "counts.arrow"  # of a partition: the train positives of each document that has some
KEYS_SUFFIX = ".keys.npy"  # of sorted keys, see keys.py
SEQUENCE_KEYS_FILE = f"sequences{KEYS_SUFFIX}"
