"""Whether a stream may go on from a saved state: where it was, or at the beginning, over partitions that are new."""

from __future__ import annotations

from typing import Any

from bigdssm.dataset.dataset import Dataset
from bigdssm.errors import DataError
from bigdssm.schema import Schema


def check_state(dataset: Dataset, mine: dict[str, Any], state: dict[str, Any]) -> bool:
    """Return True where a stream in state `mine` goes on where `state` was taken, False where it begins a new part.

    A new part has only partitions that were added since, or a mixture with one of them in it; those of `state` must
    still be there, unchanged, and vocabularies may have grown at their end. Raises DataError naming everything else
    that differs.
    """
    before, now = dict(state.get("partitions", [])), dict(mine["partitions"])
    mixed = bool(dataset.sources) and any(name not in before for name in now)
    new_part = bool(before) and (mixed or not before.keys() & now.keys())
    differences = []
    for key in {**mine, **state}:
        if key in ("step", "epoch", "vocabularies", "partitions") or mine.get(key) == state.get(key):
            continue
        if new_part and (key in ("mixture", "batches") or (key == "schema" and has_only_grown(dataset.schema, state))):
            continue
        differences.append(f"{key} was {state.get(key)!r}, is {mine.get(key)!r}")
    growing = ""
    if new_part:
        on_disk = {partition.name: partition.identity for partition in dataset.partitions_on_disk()}
        differences += _gone_or_changed(before, on_disk)
        if not mixed:
            order = list(on_disk)
            latest = max((order.index(name) for name in before if name in on_disk), default=-1)
            differences += [f"partition {n} is older than {order[latest]}" for n in now if order.index(n) < latest]
    else:
        new = [name for name in now if name not in before]
        differences += _gone_or_changed(before, now) + [f"partition {name} is new" for name in new]
        growing = _how_to_go_on(list(before), list(now)) if new else ""
        if not differences and list(before) != list(now):
            differences.append(f"partitions were {list(before)}, are {list(now)}")
    if differences:
        raise DataError(
            f"{dataset.dir}: the stream cannot go on where it was, because {'; '.join(differences)}; "
            f"restore that, or start a new run{growing}"
        )
    return not new_part


def has_only_grown(schema: Schema, state: dict[str, Any]) -> bool:
    """Return True where `schema` with its vocabularies cut to the state's lengths is the state's schema."""
    lengths = state.get("vocabularies")
    return lengths is not None and schema.cut(lengths).fingerprint() == state["schema"]


def _gone_or_changed(before: dict[str, str], now: dict[str, str]) -> list[str]:
    gone = [f"partition {name} is gone" for name in before if name not in now]
    return gone + [f"partition {name} has changed" for name in before if name in now and before[name] != now[name]]


def _how_to_go_on(before: list[str], now: list[str]) -> str:
    if not before or before[-1] not in now:
        return ""
    later = now[now.index(before[-1]) + 1 :]
    if later:
        return (
            f", or go on over the new partitions with data.from_partition={later[0]}, over old and new ones by weight "
            f"with data.mixture"
        )
    return f", or go on where it was with data.from_partition={before[0]}"
