"""Source tables of every format, read in parts as Arrow batches."""
