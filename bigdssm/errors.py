"""The errors a user can cause or meet; each carries the exit code its process ends with."""


class BigDSSMError(Exception):
    """Base of every error this package raises on purpose; the message is one sentence a user can act on."""

    exit_code = 1


class ConfigError(BigDSSMError):
    """A configuration or a command line that cannot work, found before anything is written."""

    exit_code = 2


class DataError(BigDSSMError):
    """Input tables, shards, indexes or catalogues that are missing, damaged or of another schema."""

    exit_code = 3


class UnavailableError(DataError):
    """Data at a URL that cannot be had now; what was finished before stays for another attempt."""


class CheckpointError(BigDSSMError):
    """A checkpoint or model folder that is missing, damaged or belongs to another schema or run."""

    exit_code = 4


class DivergedError(BigDSSMError):
    """Training that cannot go on: too many non-finite steps in a row."""

    exit_code = 5


class PeerError(BigDSSMError):
    """A rank that died, hangs, or disagrees with the others."""

    exit_code = 6


class Preempted(BigDSSMError):
    """A run that was asked to stop and saved its state first (75 is EX_TEMPFAIL: start me again)."""

    exit_code = 75
