"""Numeric features, normalized by mean and standard deviation of the train rows."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, cast

import numpy as np
import pyarrow as pa

from bigdssm.errors import ConfigError
from bigdssm.features.base import FITTED, ColumnType, Decoder, Feature, register
from bigdssm.features.columns import RowCheck, numbers
from bigdssm.features.ragged import Column
from bigdssm.features.tokenizer import TextTokenizer
from bigdssm.utils.components import BOUND, Bound

COMPARISONS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "=": np.equal, "!=": np.not_equal, "<": np.less, "<=": np.less_equal, ">": np.greater, ">=": np.greater_equal,
    "in": np.isin, "not in": partial(np.isin, invert=True),
}  # fmt: skip


def numeric_input(feature, values, exported):  # type: ignore[no-untyped-def]
    """Return the numbers, float32 [rows]."""
    return np.array([np.nan if value is None else value for value in values], np.float32)


@register
@dataclass(frozen=True)
class Numeric(Feature):
    """A number; NaN is missing. Values that cannot be read are reported and missing.

    Dates and timestamps are seconds since 1970 (UTC), durations and times of day are seconds.
    """

    type: ClassVar[str] = "numeric"
    example: ClassVar[str] = "1.0"
    canonical_type: ClassVar[pa.DataType] = pa.float64()
    missing: ClassVar[float] = math.nan
    column_type: ClassVar[ColumnType] = "number"
    onnx_code: ClassVar = (numeric_input,)

    log: bool = False  # log1p before the normalisation, for heavy tails
    mean: float = field(default=0.0, metadata=FITTED)
    std: float = field(default=1.0, metadata={**FITTED, BOUND: Bound(above=0)})

    def read(self, check: RowCheck) -> pa.Array:
        """Return the numbers, NaN if one cannot be read."""
        values, unreadable = numbers(check, self.source)
        check.blank(unreadable, f"{self.source} is {{}}, needs a finite 32-bit number", check.column(self.source))
        if self.log:
            negative = values < 0
            check.blank(negative, f"{self.source} is {{}}, needs a number ≥ 0 for its logarithm", values)
            unreadable = unreadable | negative
        return pa.array(np.where(unreadable, np.nan, values))

    def is_missing(self, column: pa.Array) -> np.ndarray:
        """Return the mask of NaN, bool [R]."""
        return np.isnan(column.to_numpy())

    def fitter(self) -> "_RunningMeanStd":
        """Return the fitter of mean and deviation."""
        return _RunningMeanStd(self.log)

    def parse(self, value: str) -> float:
        """Return the number. Raises ConfigError: not a finite 32-bit number."""
        try:
            number = math.nan if "_" in value else float(value)  # 1_0 is a number in Python only
        except ValueError:
            number = math.nan
        if not abs(number) <= float(np.finfo(np.float32).max):
            raise ConfigError(f"{self.name} is {value!r}, needs a number")
        return number

    def arrow_type(self, *, large: bool = False) -> pa.DataType:
        """Return float32."""
        return pa.float32()

    def encode(self, column: pa.Array, tokenizer: TextTokenizer | None, *, large: bool = False) -> pa.Array:
        """Return the numbers as float32; models normalize them."""
        return pa.array(column.to_numpy(zero_copy_only=False).astype(np.float32))

    def operands(self, operator: str, values: Sequence[str]) -> tuple[float, ...]:
        """Return the numbers, rounded to float32 as those of rows. Raises ConfigError: no number."""
        return tuple(sorted({float(np.float32(self.parse(value))) for value in values}))

    def matches(self, column: Column, operator: str, operands: Sequence[str] | Sequence[float]) -> np.ndarray:
        """Return the mask of matching numbers, bool [R]; missing ones never match."""
        numbers = np.asarray(column)
        return cast(np.ndarray, COMPARISONS[operator](numbers, np.array(operands, np.float32)) & ~np.isnan(numbers))

    def choices(self, column: Column) -> dict[str, Any] | None:
        """Return the minimum and the maximum."""
        values = np.asarray(column)
        present = values[np.isfinite(values)]
        if not len(present):
            return None
        least, most = (float(str(bound)) for bound in (present.min(), present.max()))  # 12.34, not 12.340000152587891
        return {"least": least, "most": most}

    def column_values(self, column: Column) -> list[Any]:
        """Return the numbers."""
        return [None if math.isnan(value) else value for value in np.asarray(column).tolist()]

    def array(self, column: Column) -> np.ndarray:
        """Return float32 [R]."""
        return np.asarray(column, np.float32)

    def probe(self, random: np.random.RandomState, rows: int, docs: Mapping[str, Feature]) -> Column:
        """Return normally distributed numbers, a fifth of them missing."""
        values = self.mean + self.std * random.randn(rows)
        values = np.abs(values) if self.log else values
        return np.where(random.rand(rows) < 0.2, np.nan, values).astype(np.float32)

    def describe(self, vocab_size: int) -> str:
        """Return mean and deviation."""
        return f"mean {self.mean:.4g}, deviation {self.std:.4g}{' of log(1 + x)' if self.log else ''}"

    def display(self, values: np.ndarray, decoder: Decoder) -> Any:
        """Return the number, None if missing."""
        return None if np.isnan(values) else float(values)


class _RunningMeanStd:
    """Mean and deviation of a stream, merged batch by batch (Chan's formula: no cancellation of large sums)."""

    def __init__(self, log: bool) -> None:
        self._log, self._count, self._mean, self._squares = log, 0, 0.0, 0.0

    def update(self, column: pa.Array) -> None:
        values = column.to_numpy()
        values = values[~np.isnan(values)]
        if self._log:
            values = np.log1p(values)
        if len(values):
            mean = float(values.mean())
            self.merge([len(values), mean, float(((values - mean) ** 2).sum())])

    def state(self) -> list[float]:
        return [self._count, self._mean, self._squares]

    def merge(self, state: list[float]) -> None:
        count, mean, squares = state
        if count:
            total = self._count + int(count)
            delta = mean - self._mean
            self._squares += squares + delta**2 * self._count * count / total
            self._mean += delta * count / total
            self._count = total

    def fitted(self, feature: Numeric, *, grow: bool) -> Numeric:
        if grow:
            return feature
        deviation = (self._squares / self._count) ** 0.5 if self._count else 0.0
        # a constant feature is normalized to about 0; its deviation is at most the rounding of its mean
        varies = deviation > np.finfo(np.float32).eps * abs(self._mean)
        return replace(feature, mean=self._mean, std=deviation if varies else 1.0)
