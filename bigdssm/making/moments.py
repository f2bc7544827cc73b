"""The times that a split by time divides at, where they are told and not found from shares of the rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

import numpy as np

from bigdssm.errors import ConfigError
from bigdssm.features.columns import TimeUnits, check_time_units, moment_of

DEFAULT_FRACTIONS = (0.05, 0.05)  # of validation and of test
CUT_OFFS = ("validation_from", "test_from", "train_from")
Told = float | str | date | None
"""A time in the unit of the table's times, or a date or ISO 8601, in seconds; none: it is not told."""


@dataclass(frozen=True)
class Moments:
    """From when on rows are of validation, of test, and of nothing; in the unit of the table's times."""

    validation: float
    test: float
    until: float  # infinity: none is left out

    said: str = ""  # the options that told them
    train_from: float = np.inf  # rows from then on are of train, whatever the others are

    @classmethod
    def of_dataset(cls, split: Mapping[str, Any]) -> Moments:
        """Return the cut-off times of a dataset, as `as_json` describes them; rows after the last are of train."""
        first, second, end = (np.inf if split[name] is None else split[name] for name in CUT_OFFS)
        return cls(first, second, np.inf, train_from=end)

    def as_json(self, newest: float) -> dict[str, Any]:
        """Return the cut-off times as JSON types, null for infinity; `newest` is the time of the newest row."""
        end = self.until if np.isfinite(self.until) else float(np.nextafter(newest, np.inf))
        times = (self.validation, self.test, end)
        return {name: time if np.isfinite(time) else None for name, time in zip(CUT_OFFS, times, strict=True)}

    @classmethod
    def told(
        cls, split: str, fractions: tuple[float, float], validation_from: Told, test_from: Told, until: Told
    ) -> Moments | None:
        """Return those that a table's options say, or None where `fractions` of the rows decide. Raises ConfigError."""
        options = {"--validation-from": validation_from, "--test-from": test_from, "--until": until}
        given = {option: _read(option, value) for option, value in options.items() if value is not None}
        if not given:
            return None
        if split != "time":
            raise ConfigError(f"{next(iter(given))} goes with --split time, not with --split {split}")
        for option in ("--validation-from", "--test-from"):
            if option not in given:
                raise ConfigError(
                    f"{next(iter(given))} needs {option} beside it; --validation-from and --test-from may be the same "
                    "where validation is to have no rows"
                )
        said = ", ".join(f"{option} {options[option]}" for option in given)
        if fractions != DEFAULT_FRACTIONS:
            raise ConfigError(f"{said}: fractions of validation and test would have no effect; leave them out")
        found = cls(given["--validation-from"], given["--test-from"], given.get("--until", np.inf), said)
        if not found.validation <= found.test < found.until:
            raise ConfigError(f"{said}: validation comes before test, and test before the end")
        return found

    def check_units(self, facts: Sequence[Mapping[str, Any]], where: str) -> None:
        """Raise DataError where they are in another unit than the times whose facts these are, part by part."""
        units = TimeUnits()
        moments = np.array([self.validation, self.test, self.until])
        units.add(moments[np.isfinite(moments)])
        check_time_units([*facts, units.facts()], f"{where}, with {self.said},")


def check_own_split(fractions: tuple[float, float], **options: object) -> None:
    """Raise ConfigError where an append without a split has an option of one: the dataset's own split decides."""
    given = [
        f"--{name.replace('_', '-')}" for name, value in options.items() if value is not None and value is not False
    ]
    if fractions != DEFAULT_FRACTIONS:
        given.append("--validation-fraction or --test-fraction")
    if given:
        raise ConfigError(f"{given[0]} needs --split; without it an append takes the split of the dataset at --out")


def _read(option: str, value: float | str | date) -> float:
    moment = moment_of(value)
    if not np.isfinite(moment):
        raise ConfigError(f"{option} {value!r} is no number and no ISO-8601 time")
    return moment
