"""All tensors of something as one, and apart again."""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 64  # bytes: of what a processor loads at once

Place = tuple[int, torch.dtype, torch.Size]
"""Where a tensor begins, in bytes, and what it is."""


def packed(content: Any) -> tuple[bytes, Tensor, list[Place]]:
    """Return a pickle of `content` without its tensors, these as bytes, uint8, and the place of each.

    The tensors are the host's.
    """
    file = io.BytesIO()
    pickler = _WithoutTensors(file, pickle.HIGHEST_PROTOCOL)
    pickler.dump(content)
    places, end = [], 0
    for tensor in pickler.tensors:
        places.append((end, tensor.dtype, tensor.shape))
        end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    whole = torch.empty(end, dtype=torch.uint8)
    for tensor, place in zip(pickler.tensors, places, strict=True):
        _at(whole, place).copy_(tensor)
    return file.getvalue(), whole, places


def unpacked(content: bytes, whole: Tensor, places: Sequence[Place]) -> Any:
    """Return what was packed; its tensors are parts of `whole`."""
    return _WithTensors(io.BytesIO(content), [_at(whole, place) for place in places]).load()


def _at(whole: Tensor, place: Place) -> Tensor:
    first, dtype, shape = place
    return whole[first : first + shape.numel() * dtype.itemsize].view(dtype).view(shape)


class _WithoutTensors(pickle.Pickler):
    def __init__(self, file: io.BytesIO, protocol: int) -> None:
        super().__init__(file, protocol)
        self.tensors: list[Tensor] = []

    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, Tensor):
            return None
        self.tensors.append(obj)
        return len(self.tensors) - 1


class _WithTensors(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: Sequence[Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, pid: int) -> Tensor:
        return self._tensors[pid]
