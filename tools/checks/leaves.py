"""Contents of files as lines `FILE:PLACE=VALUE`, independent of their encoding.

Arrow columns, arrays, tensors and JSON values are compared one by one, so that a difference has a name to which renames
apply. Opaque files (.faiss, .onnx) are compared by their outputs, in other cases.
"""

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
import yaml

Leaf = tuple[str, Any]
OPAQUE = (".faiss", ".onnx", ".data", ".png")
MAX_CHARS = 60  # a longer value is replaced by its checksum


def leaves(path: Path, name: str) -> Iterator[Leaf]:
    """Yield (`name`:key, value) of all values in a file; values are JSON types."""
    for key, value in _content(path.suffix, path.read_bytes()):
        yield f"{name}:{key}" if key else name, value


def digest(content: bytes) -> str:
    return xxhash.xxh3_64_hexdigest(content)


def _content(suffix: str, content: bytes) -> Iterator[Leaf]:
    if suffix in OPAQUE:
        return
    if suffix == ".arrow":
        yield from _table(pa.ipc.open_file(io.BytesIO(content)).read_all())
    elif suffix == ".parquet":
        yield from _table(pq.read_table(io.BytesIO(content)))
    elif suffix == ".npy":
        yield from _array(np.load(io.BytesIO(content), allow_pickle=False))
    elif suffix == ".safetensors":
        yield from _tensors(content)
    elif suffix == ".tar":
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            for member in tar:
                block = tar.extractfile(member)
                assert block is not None
                for key, value in _table(pa.ipc.open_stream(block).read_all()):
                    yield f"{member.name}:{key}", value
    elif suffix in (".json", ".yaml"):
        yield from flatten(yaml.safe_load(content) if suffix == ".yaml" else json.loads(content))
    elif suffix == ".jsonl":
        for number, line in enumerate(content.splitlines()):
            yield from flatten(json.loads(line), f"{number:04d}")
    else:
        yield "", digest(content)


def flatten(value: Any, prefix: str = "") -> Iterator[Leaf]:
    """Yield the leaves of nested dicts and lists as (dotted key, value)."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if not children:
        text = json.dumps(value, sort_keys=True)
        yield prefix, value if len(text) < MAX_CHARS else digest(text.encode())
    for key, child in children:
        yield from flatten(child, f"{prefix}.{key}" if prefix else str(key))


def _table(table: pa.Table) -> Iterator[Leaf]:
    yield "#rows", table.num_rows
    for name, column in zip(table.column_names, table.columns, strict=True):
        yield name, f"{column.type} {digest(repr(column.to_pylist()).encode())}"


def _array(array: np.ndarray) -> Iterator[Leaf]:
    for field in array.dtype.names or ("",):
        values = array[field] if field else array
        yield field, f"{values.dtype}{list(values.shape)} {digest(np.ascontiguousarray(values).tobytes())}"


def _tensors(content: bytes) -> Iterator[Leaf]:
    end = 8 + int.from_bytes(content[:8], "little")
    for name, tensor in json.loads(content[8:end]).items():
        if name != "__metadata__":
            first, last = tensor["data_offsets"]
            yield name, f"{tensor['dtype']}{tensor['shape']} {digest(content[end + first : end + last])}"
