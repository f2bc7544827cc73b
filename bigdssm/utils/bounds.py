"""Bounds of dataclass fields, and validation of all values in a dataclass."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
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


def out_of_bounds(value: Any, key: str = "", bound: Bound | None = None) -> Iterator[tuple[str, Any, str]]:
    """Yield (dotted key, value, requirement) of every invalid value in a dataclass.

    Invalid are non-finite numbers, numbers outside the bounds of their field, and text with a NUL character.
    """
    if is_dataclass(value):
        for f in fields(value):
            yield from out_of_bounds(getattr(value, f.name), f"{key}.{f.name}".lstrip("."), f.metadata.get(BOUND))
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from out_of_bounds(name, key)
            yield from out_of_bounds(inner, f"{key}.{name}")
    elif isinstance(value, tuple | list):
        for number, inner in enumerate(value):
            if bound is not None and isinstance(inner, tuple | list):  # a list of lists has no type in OmegaConf
                yield f"{key}[{number}]", inner, "a number"
                continue
            yield from out_of_bounds(inner, f"{key}[{number}]", bound)
    elif isinstance(value, str):
        if "\0" in value:
            yield key, ascii(value), "text without NUL"
    elif isinstance(value, float) and not math.isfinite(value):
        yield key, value, "a finite number" + (f", {bound}" if bound else "")
    elif isinstance(value, int | float) and bound is not None and not bound.holds(value):
        yield key, value, str(bound)


def require(holds: bool, key: str, got: object, needed: str) -> None:
    """Raise ConfigError with the config key, its value and the requirement, unless `holds`."""
    if not holds:
        raise ConfigError(f"{key}: got {got}, needs {needed}")
