"""Errors for users, each with the exit code of the process."""


class BigDSSMError(Exception):
    """Base of all errors of this package; the message is one sentence that a user can act on."""

    exit_code = 1


class ConfigError(BigDSSMError):
    """An invalid configuration or command line; raised before anything is written."""

    exit_code = 2


class DataError(BigDSSMError):
    """Input tables, shards, indexes or catalogues that are missing, damaged or of another schema."""

    exit_code = 3


class UnavailableError(DataError):
    """Data at a URL that is temporarily unavailable; completed work is kept for another attempt."""


class CheckpointError(BigDSSMError):
    """A checkpoint or model folder that is missing, damaged or belongs to another schema or run."""

    exit_code = 4


class DivergedError(BigDSSMError):
    """Training has diverged: too many consecutive non-finite steps."""

    exit_code = 5


class PeerError(BigDSSMError):
    """A rank that died, hangs, or is inconsistent with the others."""

    exit_code = 6


class DiskFullError(BigDSSMError):
    """A file of table rows that has no space left."""

    exit_code = 7


class Preempted(BigDSSMError):
    """A run that was stopped from outside after saving its state (75 is EX_TEMPFAIL: restart it)."""

    exit_code = 75
