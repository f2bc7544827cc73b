"""Cutting the rows of one side into chunks of a token budget, rows of like length together: little padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bigdssm.dataset.tensors import Features, PadIds


@dataclass(frozen=True)
class Chunk:
    """Some rows of one side, and where they stand among all of the side's."""

    features: Features
    rows: Tensor  # int64: the rows' numbers; empty in a dummy that only keeps this rank in step with the others
    tokens: int  # cells of all lists, padding among them, and one a row


def cut(features: Features, num_rows: int, chunk_tokens: int, pad_ids: PadIds) -> list[Chunk]:
    """Return chunks of rows of like length, each within the budget of cells (at least one row), longest rows first.

    Rows are sorted by their length in the widest feature, then the next: that is where padding would cost most.
    """
    filled = _filled(features, pad_ids)
    length_RF = _lengths(filled, num_rows)
    order = np.lexsort(-length_RF[:, ::-1].T)
    chunks, start = [], 0
    while start < num_rows:
        window = length_RF[order[start : start + max(1, chunk_tokens)]]
        cells = np.arange(1, len(window) + 1) * (1 + np.maximum.accumulate(window).sum(axis=1))
        rows = torch.from_numpy(order[start : start + max(1, int((cells <= chunk_tokens).sum()))])
        taken = _take(features, filled, rows)
        chunks.append(Chunk(taken, rows, sum(taken[name].numel() for name in filled) + len(rows)))
        start += len(rows)
    return chunks


def filled_up(own: list[Chunk], features: Features, number: int) -> list[Chunk]:
    """Return `own` and as many dummies as make them `number`, at least one."""
    return own + [dummy(features)] * (max(1, number) - len(own))


def assemble(parts: Sequence[Tensor], side: Sequence[Chunk], num_rows: int) -> Tensor:
    """Return what was computed chunk by chunk, [num_rows, …], in the order of the rows."""
    whole = parts[0].new_empty((num_rows, *parts[0].shape[1:]))
    for part, chunk in zip(parts, side, strict=True):
        whole[chunk.rows] = part[: len(chunk.rows)]
    return whole


def dummy(features: Features) -> Chunk:
    """Return a chunk that encodes one row for nothing: a rank without a backward that others make stops ZeRO."""
    one = {name: tensor[:1] for name, tensor in features.items()}
    return Chunk(at_least_one(one), torch.empty(0, dtype=torch.int64), 1)


def at_least_one(features: Features) -> Features:
    """Return `features`, or one row of padding where they have none."""
    if next(iter(features.values())).shape[0] > 0:
        return features
    return {
        name: tensor.new_zeros((1, *(max(1, size) for size in tensor.shape[1:]))) for name, tensor in features.items()
    }


def num_tokens(features: Features, pad_ids: PadIds) -> Tensor:
    """Return the cells of lists (tokens, history items, values) that hold something, int64 [], unread."""
    filled = [cells.sum() for cells in _filled(features, pad_ids).values()]
    return torch.stack(filled).sum() if filled else torch.zeros((), dtype=torch.int64)


def padding_fraction(encoded: Sequence[tuple[Features, PadIds]]) -> float:
    """Return the share of cells that hold padding among all cells of lists; 0 without any."""
    cells = sum(features[name].numel() for features, pad_ids in encoded for name in pad_ids)
    return 1 - sum(int(num_tokens(features, pad_ids)) for features, pad_ids in encoded) / cells if cells else 0.0


def _filled(features: Features, pad_ids: PadIds) -> dict[str, Tensor]:
    """Return bool [rows, T] of every list: the cells that hold something."""
    return {name: features[name] != fill for name, fill in pad_ids.items()}


def _lengths(filled: Mapping[str, Tensor], num_rows: int) -> np.ndarray:
    """Return int64 [rows, lists, the widest first]: the cells that a row fills, at least 1."""
    ragged = sorted(filled.values(), key=lambda cells: -cells.shape[1])
    lengths = [cells.sum(dim=1).clamp(min=1).cpu().numpy() for cells in ragged]
    return np.stack(lengths, axis=1) if lengths else np.zeros((num_rows, 1), np.int64)


def _take(features: Features, filled: Mapping[str, Tensor], rows: Tensor) -> Features:
    """Return the features of `rows`, cut to the longest of them."""
    taken: Features = {}
    for name, tensor in features.items():
        part = tensor[rows]
        if name in filled:
            used = filled[name][rows].any(dim=0).nonzero()
            part = part[:, : int(used[-1]) + 1 if len(used) else 1]
        taken[name] = part
    return taken
