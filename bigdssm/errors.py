"""Errors for users, each with the exit code of the process, and the exit codes of a comparison of models."""

from enum import IntEnum


class BigDSSMError(Exception):
    """Base of all errors of this package; the message is one sentence that a user can act on.

    `details`, such as ids or paths, continue the sentence on the command line and in logs. The clients of a server get
    the message without them.
    """

    exit_code = 1

    def __init__(self, *args: object, details: str = "") -> None:
        super().__init__(*args)
        self.details = details

    def __str__(self) -> str:
        return f"{self.public_message}{self.details}"

    @property
    def public_message(self) -> str:
        """Return the message without details."""
        return super().__str__()


class ConfigError(BigDSSMError):
    """An invalid configuration or command line; raised before anything is written."""

    exit_code = 2


class DataError(BigDSSMError):
    """Input tables, shards, indexes or catalogues that are missing, damaged or of another schema."""

    exit_code = 3


class UnknownKeyError(DataError):
    """A user or document of a request that does not exist."""


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


class Verdict(IntEnum):
    """The exit codes of `bigdssm compare_models LIVE NEW`; no error has one of them."""

    NOT_WORSE = 0  # NEW is not worse than LIVE by more than the margin
    WORSE = 10
    UNDECIDED = 11  # there are too few requests
    EQUAL_WEIGHTS = 12  # the same model


class Preempted(BigDSSMError):
    """A run that was stopped from outside after saving its state (75 is EX_TEMPFAIL: restart it)."""

    exit_code = 75
