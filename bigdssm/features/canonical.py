"""Read the features of one side from source tables or Python values (dicts, strings, Arrow tables, data frames).

Canonical columns are the validated values of features, one Arrow type per feature type; they are encoded for the model.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bigdssm.errors import DataError
from bigdssm.features.base import REQUEST_PREFIX, Feature, encode_columns, encode_values
from bigdssm.features.columns import ReportBad, RowCheck, SourceBatch, plain
from bigdssm.features.event_time import UNKNOWN_TIME, EventTime, Timestamp
from bigdssm.features.history import History, histories_of, item_codes
from bigdssm.features.numeric import Numeric
from bigdssm.features.ragged import Column, from_arrow, gather_ranges, offsets_of
from bigdssm.features.text import texts_of
from bigdssm.features.tokenizer import TextTokenizer


def canonical(check: RowCheck, features: Mapping[str, Feature]) -> pa.Table:
    """Return the canonical columns of all rows by feature name; invalid rows fail in `check`.

    Raises DataError: a column's type is not supported.
    """
    return pa.table({name: feature.read(check) for name, feature in features.items()})


def missing(table: pa.Table, features: Mapping[str, Feature]) -> np.ndarray:
    """Return the mask of empty rows: all texts are empty, or, without text features, all values are missing."""
    empty = np.ones(table.num_rows, bool)
    for name, feature in (texts_of(features) or features).items():
        empty &= feature.is_missing(table.column(name).combine_chunks())
    return empty


def columns_of(
    batch: SourceBatch, features: Mapping[str, Feature], tokenizer: TextTokenizer | None, report_bad: ReportBad
) -> dict[str, Column]:
    """Return the encoded columns of source rows by feature name, as in shards and catalogue."""
    table = canonical(RowCheck(batch, report_bad), features)
    encoded = encode_columns(table, features, tokenizer, large=True)
    return {name: from_arrow(column) for name, column in encoded.items()}


def columns_of_values(
    rows: Any, features: Mapping[str, Feature], docs: Mapping[str, Feature], tokenizer: TextTokenizer | None,
    events: Mapping[str, Feature] | None = None, request: Sequence[str] = (),
) -> tuple[dict[str, Column], int]:  # fmt: skip
    """Return the encoded columns of `rows` by feature name, and the number of rows.

    rows: dicts of feature values, strings if exactly one of `features` is a text, or an Arrow table or data frame with
    columns named after features; omitted values are missing. docs: the document features, which encode the items of
    histories. events: the features of events; HISTORY.FEATURE has a list of values, aligned with the history's items
    (times and elapsed times in seconds). request: the names of event features that the query itself has, too, as
    request.FEATURE. Raises DataError: an unknown feature, or a value that cannot be read.
    """
    if is_table(rows):
        rows = as_table(rows)
    elif isinstance(rows, str | bytes | Mapping) or not isinstance(rows, Iterable):
        raise DataError(f"got {type(rows).__name__}, needs a list of rows; put a single one into a list")
    else:
        rows = list(rows)
    num_rows = len(rows)
    event_features = {
        f"{name}.{key}": event for name in histories_of(features) for key, event in (events or {}).items()
    }
    request_features = {REQUEST_PREFIX + key: (events or {})[key] for key in request}
    given = _given_columns(rows, {**features, **event_features, **request_features})
    columns: dict[str, Column] = {}
    for name, feature in features.items():
        absent = name not in given or pa.types.is_null(given[name].type)
        if isinstance(feature, History) and (not absent or events):
            # A history without values still needs columns for the features of its events.
            items = pa.nulls(num_rows, pa.list_(pa.string())) if absent else given[name]
            batch, offsets = _flattened(name, items, "item values, oldest first")
            item = replace(docs[str(feature.of)], column=name)
            lists = {name: item_codes(np.asarray(columns_of(batch, {name: item}, None, _refuse)[name]))}
            for key, event in (events or {}).items():
                column = f"{name}.{key}"
                if column not in given:
                    lists[column] = np.repeat(np.asarray(encode_values(event, [event.missing], None)), offsets[-1])
                    continue
                batch, event_offsets = _flattened(column, given[column], f"values, one per item of {name}")
                if not np.array_equal(event_offsets, offsets):
                    raise DataError(f"{column} has lists of other lengths than {name}; give one value per item")
                values = lists[column] = _event_values(batch, column, event)
                if isinstance(event, Timestamp) and (unknown := int((values == UNKNOWN_TIME).sum())):
                    raise DataError(
                        f"{column} has no value for {unknown} of {len(values)} events; give the times of all events or "
                        "of none"
                    )
            first = np.maximum(offsets[1:] - feature.max_items, offsets[:-1])  # the newest items of each row
            columns |= {column: gather_ranges(values, first, offsets[1:]) for column, values in lists.items()}
        elif absent:
            defaults = pa.array([feature.missing] * num_rows, feature.canonical_type)
            columns[name] = from_arrow(feature.encode(defaults, tokenizer, large=True))
        else:
            batch = SourceBatch(name, pa.table({name: given[name]}), np.arange(num_rows))
            columns |= columns_of(batch, {name: replace(feature, column=name)}, tokenizer, _refuse)
    for name, event in request_features.items():
        if name not in given or pa.types.is_null(given[name].type):
            columns[name] = np.repeat(np.asarray(encode_values(event, [event.missing], None)), num_rows)
        else:
            batch = SourceBatch(name, pa.table({name: given[name]}), np.arange(num_rows))
            columns[name] = _event_values(batch, name, event)
    return columns, num_rows


def _event_values(batch: SourceBatch, name: str, event: Feature) -> np.ndarray:
    """Return the encoded values of a feature of events; times and elapsed times are given in seconds."""
    if isinstance(event, EventTime):  # from the canonical float64: encoded numbers are float32
        numbers = canonical(RowCheck(batch, _refuse), {name: Numeric(column=name, name=name)})
        return replace(event, name=name).codes_of_values(numbers.column(name).to_numpy())
    return np.asarray(columns_of(batch, {name: replace(event, column=name, name=name)}, None, _refuse)[name])


def is_table(rows: Any) -> bool:
    """Return whether `rows` is an Arrow table, a data frame, or a table with Arrow's C interface (not a series)."""
    if isinstance(rows, pa.Table):
        return True
    cls = type(rows)
    is_frame = cls.__module__.partition(".")[0] == "pandas"
    is_exported = hasattr(cls, "__arrow_c_stream__") or hasattr(cls, "__arrow_c_array__")
    return (is_frame or is_exported) and (hasattr(rows, "columns") or hasattr(rows, "schema"))


def as_table(rows: Any) -> pa.Table:
    """Return a table, a dict of columns or a list of dicts as an Arrow table; NaN is missing. Raises DataError."""
    try:
        if isinstance(rows, pa.Table):
            return rows
        if isinstance(rows, Mapping):
            return pa.table({str(name): _array(str(name), column) for name, column in rows.items()})
        if isinstance(rows, list):
            return as_table(columns_of_dicts(rows))
        if type(rows).__module__.partition(".")[0] == "pandas":
            return pa.Table.from_pandas(rows, preserve_index=False)
        return pa.table(rows)
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise DataError(f"the table cannot be read: {' '.join(str(error).split())}") from None


def columns_of_dicts(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return rows as columns, with None for missing keys. Raises DataError: a row is not a dict."""
    if wrong := [row for row in rows if not isinstance(row, Mapping)]:
        raise DataError(f"got rows of {type(wrong[0]).__name__}; give dicts, strings, an Arrow table or a data frame")
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _flattened(name: str, lists: pa.Array, needed: str) -> tuple[SourceBatch, np.ndarray]:
    """Return the values of lists as rows, and the lists' offsets, int64. Raises DataError: the column has no lists."""
    lists = plain(lists)
    list_types = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    if not any(is_type(lists.type) for is_type in list_types):
        raise DataError(f"{name} holds {lists.type}, needs lists of {needed}")
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    row = np.repeat(np.arange(len(lengths)), lengths)
    return SourceBatch(name, pa.table({name: lists.flatten()}), row), offsets_of(lengths)


def _given_columns(rows: Any, features: Mapping[str, Feature]) -> dict[str, pa.Array]:
    """Return the given columns. Raises DataError: a column is not a feature."""
    if is_table(rows):
        table = as_table(rows)
        _check_names(table.column_names, features)
        return {name: table.column(name).combine_chunks() for name in table.column_names}
    if rows and all(isinstance(row, str) for row in rows):
        texts = list(texts_of(features))
        if len(texts) != 1:
            raise DataError(f"got strings, which need exactly one text feature, but there are {len(texts)}; give dicts")
        return {texts[0]: _array(texts[0], rows)}
    columns = columns_of_dicts(rows)
    _check_names(columns, features)
    return {name: _array(name, values) for name, values in columns.items()}


def _check_names(names: Iterable[str], features: Mapping[str, Feature]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise DataError(f"there are two columns {name!r}")
        seen.add(name)
        if name not in features:
            same_source = [other for other, feature in features.items() if feature.source == name]
            near = [*same_source, *difflib.get_close_matches(str(name), features, 1)]
            hint = f"did you mean {near[0]!r}? The" if near else "the"
            raise DataError(f"{name!r} is not a feature; {hint} features are {', '.join(features)}")


def _array(name: str, values: Any) -> pa.Array:
    """Return a column's values as an Arrow array; NaN is missing. Raises DataError: no list, or mixed types."""
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise DataError(f"{name}: got {type(values).__name__}, needs a list of values, one per row")
    if hasattr(values, "__arrow_c_stream__"):  # a series or a chunked array
        return pa.chunked_array(values).combine_chunks()
    arrow_type = None
    if not hasattr(values, "dtype") or getattr(values, "ndim", 1) > 1:
        values = [_inferable(value) for value in values]
        # Arrow does not infer uint64 for integers beyond int64
        lists = [value for value in values if isinstance(value, list | tuple)]
        numbers = [number for value in lists for number in value] if lists else values
        integers = all(isinstance(number, int | np.integer | None) for number in numbers)
        if integers and max((number or 0 for number in numbers), default=0) >= 2**63:
            arrow_type = pa.list_(pa.uint64()) if lists else pa.uint64()
    try:
        return pa.array(values, arrow_type, from_pandas=True)
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{name}: values of one feature need one type: {' '.join(str(error).split())}") from None


def _inferable(value: Any) -> Any:
    """Return a value whose type Arrow infers: NumPy's dates become datetimes, tensors and series become arrays."""
    if isinstance(value, np.datetime64):
        return value.astype("datetime64[us]").item()
    if getattr(value, "ndim", 0) and hasattr(value, "__array__"):
        return np.asarray(value)
    return value


def _refuse(file: str, row: int, reason: str, left_out: bool = True) -> None:
    """Raise DataError: unlike a table's values, invalid values from a program are not treated as missing."""
    raise DataError(f"row {row}: {reason.removesuffix('; taken as missing')}")
