"""How much of the score matrix is worked on at once: what a CPU's caches hold, or a share of a device's memory.

On a CPU tiles are small, so that scores stay in the cache between product and exponential. On a device each operation
is a launch of its own: blocks of rows are as high as memory allows, and a tile is all columns.
"""

from __future__ import annotations

import torch

CACHED_WIDTH = 1024  # columns of a tile: wide enough for the products
CACHED_ROWS = 512  # of the passes that hold one tile
CACHED_PAIR_ROWS = 512
_STRIP_BYTES = 16 << 20  # of scores that a block of rows has against all columns, where all are held
_MEMORY_SHARE = 32  # a device's scores take one part in so many of its memory
_MEMORY_BYTES = 64 << 30  # of a device that does not say
_EVEN_ROWS = 128  # what products on a device are cut into


def tile_width(device: torch.device, num_columns: int) -> int:
    """Return the columns of a tile."""
    return CACHED_WIDTH if device.type == "cpu" else max(1, num_columns)


def strip_rows(device: torch.device, num_columns: int, element_size: int) -> int:
    """Return how many rows are held at once against all columns, at so many bytes an entry."""
    if device.type == "cpu":
        return max(32, min(1024, _STRIP_BYTES // (max(1, num_columns) * element_size)))
    rows = _score_bytes(device) // (max(1, num_columns) * element_size)
    return max(1, rows - rows % _EVEN_ROWS if rows > _EVEN_ROWS else rows)


def block_rows(device: torch.device, width: int, element_size: int, cached: int = CACHED_ROWS) -> int:
    """Return how many rows are held at once against a tile; `cached`: on a CPU."""
    return cached if device.type == "cpu" else strip_rows(device, width, element_size)


def _score_bytes(device: torch.device) -> int:
    backend = torch.get_device_module(device)
    says = hasattr(backend, "get_device_properties") and backend.is_available()
    memory = int(backend.get_device_properties(device).total_memory) if says else _MEMORY_BYTES
    return memory // _MEMORY_SHARE
