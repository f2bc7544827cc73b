"""Cutting one side of a batch into chunks of a token budget, and replaying the random state of each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from bigdssm.data import Features


@dataclass(frozen=True)
class Chunk:
    """Some rows of one side, and where they stand among all of the side's."""

    features: Features
    rows: Tensor  # int64: the rows' numbers; empty in a dummy that only keeps this rank in step with the others


def cut(features: Features, num_rows: int, chunk_tokens: int) -> list[Chunk]:
    """Return chunks of rows sorted by length, each within the budget of rows × longest row (at least one row)."""
    length = _row_lengths(features, num_rows)
    order = torch.argsort(length, descending=True, stable=True)
    chunks, start = [], 0
    while start < num_rows:
        longest = int(length[order[start]])
        rows = order[start : start + max(1, chunk_tokens // longest)]
        chunks.append(Chunk(_take(features, rows), rows))
        start += len(rows)
    return chunks


def dummy(features: Features) -> Chunk:
    """Return a chunk that encodes one row for nothing: a rank without a backward that others make stops ZeRO."""
    one = {name: tensor[:1] for name, tensor in features.items()}
    return Chunk(at_least_one(one), torch.empty(0, dtype=torch.int64))


def at_least_one(features: Features) -> Features:
    """Return `features`, or one row of padding where they have none."""
    if next(iter(features.values())).shape[0] > 0:
        return features
    return {
        name: tensor.new_zeros((1, *(max(1, size) for size in tensor.shape[1:]))) for name, tensor in features.items()
    }


def padding_fraction(features: Features) -> float:
    """Return the share of cells that hold padding among all cells of ragged features; 0 without any."""
    ragged = [tensor for tensor in features.values() if tensor.dim() == 2]
    cells = sum(tensor.numel() for tensor in ragged)
    return 1 - sum(int((tensor != 0).sum()) for tensor in ragged) / cells if cells else 0.0


@dataclass(frozen=True)
class RandomState:
    """The random state at one moment, of the CPU and of this rank's device."""

    cpu: Tensor
    device: Tensor | None

    @classmethod
    def now(cls) -> RandomState:
        """Return the present state."""
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None)

    def restore(self) -> None:
        """Make this the present state."""
        torch.set_rng_state(self.cpu)
        if self.device is not None:
            torch.cuda.set_rng_state(self.device)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Within it this state runs; afterwards the one from before goes on."""
        present = RandomState.now()
        self.restore()
        yield
        present.restore()


def _row_lengths(features: Features, num_rows: int) -> Tensor:
    """Return int64 [rows]: the cells a row fills, its padding left out, at least 1."""
    length = torch.ones(num_rows, dtype=torch.int64)
    for tensor in features.values():
        if tensor.dim() == 2:
            length += (tensor != 0).sum(dim=1).cpu()
    return length


def _take(features: Features, rows: Tensor) -> Features:
    """Return the features of `rows`, cut to the longest of them."""
    taken: Features = {}
    for name, tensor in features.items():
        part = tensor[rows]
        if part.dim() == 2:
            filled = (part != 0).any(dim=0).nonzero()
            part = part[:, : int(filled[-1]) + 1 if len(filled) else 1]
        taken[name] = part
    return taken
