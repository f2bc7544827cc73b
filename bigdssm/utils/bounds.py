"""Bounds of dataclass fields."""

from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeVar

from bigdssm.errors import ConfigError

Default = TypeVar("Default")
BOUND, RESUME = "bound", "resume"  # in the metadata of a field: its `Bound`, its `ResumeRule`

# Whether a resumed run may change a key. A rule at a section holds for its keys, except those with their own; without
# one, a key must not change.
# may      may change: it does not affect the trained model
# longer   may increase; may have any value in a new segment
# segment  a change starts a new segment over new partitions, if the stream's state permits it
# never    requires another run
ResumeRule = Literal["may", "longer", "segment", "never"]


@dataclass(frozen=True)
class Bound:
    """Limits of a number, or of each number of a tuple."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def holds(self, number: float) -> bool:
        """Return whether `number` is within the limits; NaN never is."""
        return (
            (self.at_least is None or number >= self.at_least)
            and (self.above is None or number > self.above)
            and (self.at_most is None or number <= self.at_most)
            and (self.below is None or number < self.below)
        )

    def __str__(self) -> str:
        stated = ((f.name.replace("_", " "), getattr(self, f.name)) for f in fields(self))
        return " and ".join(f"{name} {limit:,}" for name, limit in stated if limit is not None)


def bounded(
    default: Default, at_least: float | None = None, at_most: float | None = None, *, above: float | None = None,
    below: float | None = None, resume: ResumeRule | None = None,
) -> Default:  # fmt: skip
    """Return a dataclass field with a default, bounds, and its rule for a resume."""
    metadata: dict[str, Any] = {BOUND: Bound(at_least, above, at_most, below)}
    return field(default=default, metadata=metadata if resume is None else {**metadata, RESUME: resume})


def require(holds: bool, key: str, got: object, needed: str) -> None:
    """Raise ConfigError with the config key, its value and the requirement, unless `holds`."""
    if not holds:
        raise ConfigError(f"{key}: got {got}, needs {needed}")
