"""Initial values of rows: a function of (key, row) whose bits are the same on every processor and device.

A value is a sum of four 16-bit numbers, nearly normal, of a 64-bit hash (utils.hashing.mix64). The hash has 12
operations per round: they are computed in place, a block of rows at a time, which stays in a core's cache.
Shapes: n rows, d width of a row, r rows of a block.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bigdssm.utils.device import to_device
from bigdssm.utils.hashing import MIX64_INCREMENT, MIX64_ROUNDS, MIX64_STEPS, signed64

_LANE_BITS = 16
_LARGEST = (1 << _LANE_BITS) - 1
_STD_OF_SUM = float(np.sqrt(4 * ((1 << 2 * _LANE_BITS) - 1) / 12))
_EVEN_LANES = 0x0000FFFF0000FFFF
_LOW_HALF = 0xFFFFFFFF
_CACHED_NUMBERS = 1 << 15  # of a block: 256 KB, and as many for intermediate results
_DEVICE_NUMBERS = 1 << 24  # of a block on a device: 128 MB


def initial_rows(rows: np.ndarray, dim: int, key: int, std: float, device: torch.device | str = "cpu") -> Tensor:
    """Return the initial values float32 [n, d] of rows int64 [n] on a device."""
    device = torch.device(device)
    on_host = device.type == "cpu"
    block = max(1, (_CACHED_NUMBERS if on_host else _DEVICE_NUMBERS) // dim)
    scale = float(np.float32(std / _STD_OF_SUM))
    values = torch.empty(len(rows), dim, device=device)
    if on_host:
        _fill_on_host(values.numpy(), rows, key, block)
    else:
        _fill_on_device(values, to_device(torch.from_numpy(rows.astype(np.int64)), device), key, block)
    return values.mul_(scale)


def _fill_on_host(values: np.ndarray, rows: np.ndarray, key: int, block: int) -> None:
    """Write the centred sums of rows; by NumPy, whose shifts of unsigned integers need no masks."""
    dim = values.shape[1]
    first_of_row = rows.astype(np.uint64) * np.uint64(dim)
    columns = np.arange(dim, dtype=np.uint64) + np.uint64((key + MIX64_INCREMENT) % (1 << 64))
    bits_rd, other_rd = (np.empty((block, dim), np.uint64) for _ in range(2))

    def shift(x: np.ndarray, bits: int, out: np.ndarray) -> np.ndarray:
        return np.right_shift(x, np.uint64(bits), out=out)

    for start in range(0, len(rows), block):
        firsts = first_of_row[start : start + block, None]
        bits, other = bits_rd[: len(firsts)], other_rd[: len(firsts)]
        np.add(firsts, columns, out=bits)
        _hash_sums(bits, other, shift, np.uint64)
        values[start : start + block] = bits.view(np.int64)
        values[start : start + block] -= 2 * _LARGEST


def _fill_on_device(values: Tensor, rows: Tensor, key: int, block: int) -> None:
    """Write the centred sums of rows, as `_fill_on_host` does; torch has no shift of unsigned integers."""
    dim = values.shape[1]
    columns = torch.arange(dim, device=rows.device) + signed64(key + MIX64_INCREMENT)
    bits_rd, other_rd = (torch.empty(block, dim, dtype=torch.int64, device=rows.device) for _ in range(2))

    def shift(x: Tensor, bits: int, out: Tensor) -> Tensor:
        torch.bitwise_right_shift(x, bits, out=out)
        return out.bitwise_and_((1 << (64 - bits)) - 1)

    for start in range(0, len(rows), block):
        firsts = (rows[start : start + block] * dim)[:, None]
        bits, other = bits_rd[: len(firsts)], other_rd[: len(firsts)]
        torch.add(firsts, columns, out=bits)
        _hash_sums(bits, other, shift, signed64)
        values[start : start + block] = bits
        values[start : start + block] -= 2 * _LARGEST


def _hash_sums(bits: Any, other: Any, shift: Callable[[Any, int, Any], Any], number: Callable[[int], Any]) -> None:
    """Replace 64-bit integers by the sums of the four lanes of their hashes, in place.

    bits: NumPy array or tensor, to which the key and the first increment are added; other: as large, for intermediate
    results. shift(x, bits, out): a shift to the right of unsigned integers; number: an operand with these 64 bits.
    """
    for round_ in range(MIX64_ROUNDS):
        if round_:
            bits += number(MIX64_INCREMENT)
        for distance, factor in MIX64_STEPS:
            bits ^= shift(bits, distance, other)
            if factor is not None:
                bits *= number(factor)
    # two lanes in each half, then their sum in the lower half
    shift(bits, _LANE_BITS, other)
    other &= number(_EVEN_LANES)
    bits &= number(_EVEN_LANES)
    bits += other
    bits += shift(bits, 2 * _LANE_BITS, other)
    bits &= number(_LOW_HALF)
