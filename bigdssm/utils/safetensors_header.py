"""The header of a safetensors file whose tensors are written in parts."""

import json
from collections.abc import Sequence
from itertools import accumulate

import torch

_ALIGNMENT = 8  # bytes, of the data in a file

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def safetensors_header(tensors: Sequence[tuple[str, torch.dtype, int]]) -> tuple[bytes, list[int]]:
    """Return the header of a file of flat tensors (name, dtype, count), and their offsets, with the end of the file."""
    ends = list(accumulate((count * dtype.itemsize for _, dtype, count in tensors), initial=0))
    header = {
        name: {"dtype": DTYPE_NAMES[dtype], "shape": [count], "data_offsets": [first, last]}
        for (name, dtype, count), first, last in zip(tensors, ends, ends[1:], strict=False)
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, [8 + len(text) + end for end in ends]
