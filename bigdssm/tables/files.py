"""Row files: the updated rows of all tables that one rank has saved, in a checkpoint or a model folder.

A file has the safetensors layout; per table NAME it has the flat tensors NAME/rows int64 [n] (ascending), NAME/values
[n · d], NAME/key int64 [1] of its initial values and, in checkpoints, NAME/updated and NAME/occurrences int32 [n] and
the optimizer states.
The files of all ranks together hold a table; they are memory-mapped, and only the rows that are looked up are read.
In a checkpoint a rank has a chain of files: the first has all rows, a further one those that changed since the file
before it, and the rows NAME/evicted int64 that were evicted since; later files precede earlier ones.

Rows are verified in blocks of BLOCK_ROWS. TENSOR/digests int64 [2 · blocks] has the xxh3_128 of the blocks of a tensor,
NAME/rows/first and NAME/evicted/first int64 [blocks] the first row of each block, and `digest` int64 [2] the xxh3_128
of this index. A file is opened by its header and index; a block is verified when it is first read.
"""

import json
import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from bigdssm.errors import CheckpointError
from bigdssm.features.base import OUT_OF_VOCABULARY
from bigdssm.tables.initial_rows import initial_rows
from bigdssm.tables.rows import ROWS_AT_ONCE, TableSpec
from bigdssm.tables.sharded import ShardedTables
from bigdssm.utils.safetensors_header import safetensors_header

ROWS, VALUES, KEY, UPDATED, OCCURRENCES = "rows", "values", "key", "updated", "occurrences"
EVICTED = "evicted"
COUNTS = (UPDATED, OCCURRENCES)
BLOCK_ROWS = 4096  # a power of 2
DIGEST, DIGESTS, FIRST = "digest", "/digests", "/first"
Content = dict[str, Tensor]
_NUMPY = {"F32": np.float32, "I64": np.int64, "I32": np.int32, "BF16": np.uint16}


def table_tensors(tables: ShardedTables, since: int | None = None) -> dict[str, Tensor]:
    """Return this rank's rows of all tables, with optimizer states, step numbers and occurrences, as a row file.

    since: only rows that changed in step `since` or later, and those that were evicted since then.
    """
    tensors: dict[str, Tensor] = {}
    for name, store in tables.stores.items():
        content = store.content_of(*store.saved(tables.steps, states=True, since=since or 0), states=True)
        if since is not None:
            content[EVICTED] = torch.from_numpy(store.evicted(tables.steps, since))
        for key, tensor in content.items():
            tensors[f"{name}/{key}"] = tensor.reshape(-1).contiguous()
            tensors[f"{name}/{key}{DIGESTS}"] = torch.from_numpy(_digests(tensor))
            if key in (ROWS, EVICTED):
                tensors[f"{name}/{key}{FIRST}"] = torch.from_numpy(tensor.numpy()[::BLOCK_ROWS].copy())
        tensors[f"{name}/{KEY}"] = torch.from_numpy(np.array([store.key], np.uint64).view(np.int64))
    index = {name: tensor.numpy() for name, tensor in tensors.items() if tensor.dtype == torch.int64}
    tensors[DIGEST] = torch.from_numpy(_index_digest(index))
    return tensors


def row_count(tensors: Mapping[str, Tensor]) -> int:
    """Return the number of rows in the tensors of a row file, evicted ones included."""
    return sum(len(tensor) for name, tensor in tensors.items() if name.endswith((f"/{ROWS}", f"/{EVICTED}")))


@dataclass(frozen=True)
class RowSource:
    """Rows of a table that are read in blocks while they are written."""

    key: int  # of its initial values
    rows: np.ndarray  # int64 [n], ascending
    read: Callable[[slice], Content]  # the content of a range of rows, `rows` included


def row_file(rank: int) -> str:
    """Return the name of a rank's file in the folder `tables` of a model folder."""
    return f"rows-{rank:05d}.safetensors"


def store_sources(tables: ShardedTables) -> dict[str, RowSource]:
    """Return this rank's admitted rows, without states."""

    def source(name: str) -> RowSource:
        store = tables.stores[name]
        rows, positions = store.saved(tables.steps, states=False)
        return RowSource(store.key, rows, lambda part: store.content_of(rows[part], positions[part], states=False))

    return {name: source(name) for name in tables.stores}


def write_row_file(path: Path, sources: Mapping[str, RowSource]) -> None:
    """Write tables block by block to a row file. Raises OSError."""
    index: dict[str, Tensor] = {}
    layout: list[tuple[str, torch.dtype, int]] = []
    for name, source in sources.items():
        index[f"{name}/{KEY}"] = torch.from_numpy(np.array([source.key], np.uint64).view(np.int64))
        index[f"{name}/{ROWS}{FIRST}"] = torch.from_numpy(source.rows[::BLOCK_ROWS].copy())
        for key, tensor in source.read(slice(0, 0)).items():
            index[f"{name}/{key}{DIGESTS}"] = torch.zeros(2 * -(-len(source.rows) // BLOCK_ROWS), dtype=torch.int64)
            layout.append((f"{name}/{key}", tensor.dtype, len(source.rows) * tensor.shape[1:].numel()))
    index[DIGEST] = torch.zeros(2, dtype=torch.int64)
    layout += [(name, tensor.dtype, len(tensor)) for name, tensor in index.items()]
    layout.sort(key=lambda tensor: -tensor[1].itemsize)  # keeps all of them aligned
    header, offsets = safetensors_header(layout)
    offset_of = {name: offset for (name, _, _), offset in zip(layout, offsets, strict=False)}
    with path.open("wb") as file:
        file.write(header)

        def write(name: str, first: int, tensor: Tensor) -> None:
            file.seek(offset_of[name] + first * tensor[:1].nbytes)
            file.write(_bytes(tensor))

        for name, source in sources.items():
            for block, first in enumerate(range(0, len(source.rows), BLOCK_ROWS)):
                for key, tensor in source.read(slice(first, first + BLOCK_ROWS)).items():
                    write(f"{name}/{key}", first, tensor)
                    index[f"{name}/{key}{DIGESTS}"][2 * block : 2 * block + 2] = torch.from_numpy(_digests(tensor))
        index[DIGEST] = torch.from_numpy(_index_digest({name: tensor.numpy() for name, tensor in index.items()}))
        for name, tensor in index.items():
            write(name, 0, tensor)


def holds_rows(path: Path, rows: Mapping[str, np.ndarray]) -> bool:
    """Return whether a row file has one of `rows` (int64 ascending, by table)."""
    file = RowFile(path)
    return any(len(file.find(name, rows[name])[0]) for name in rows.keys() & set(file.tables))


def write_without(path: Path, target: Path, rows: Mapping[str, np.ndarray]) -> None:
    """Write the row file of a model folder without `rows` (int64, by table), which get their initial values."""
    file, sources = RowFile(path), {}
    for name in file.tables:
        saved = _all_rows([file], name)
        retained = np.flatnonzero(~np.isin(saved, rows.get(name, [])))
        sources[name] = _chain_source([file], name, saved[retained], np.zeros(len(retained), np.int64), retained)
    write_row_file(target, sources)


class RowFile:
    """A memory-mapped row file; `checksum`: the xxh3_128 of its header and index, which has the digests, in hex."""

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError: the file is missing, or its header or index is damaged."""
        self.path = path
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._map.madvise(mmap.MADV_RANDOM)  # a row is read without those around it
            content = np.frombuffer(self._map, np.uint8)
            self._start = content.__array_interface__["data"][0]
            size = 8 + int(content[:8].view(np.uint64)[0])
            header = bytes(content[8:size])
            entries: dict[str, Any] = json.loads(header)
            end = size + max(entry["data_offsets"][1] for entry in entries.values())
            if end != len(content):
                raise ValueError(f"it has {len(content)} bytes, needs {end}")
            self._arrays: dict[str, np.ndarray] = {}  # bfloat16 as uint16
            for name, entry in entries.items():
                first, last = entry["data_offsets"]
                self._arrays[name] = content[size + first : size + last].view(_NUMPY[entry["dtype"]])
            needed = _index_digest(self._arrays)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is not a row file: {error}; copy the folder again") from None
        if not np.array_equal(self._arrays.get(DIGEST, needed[:0]), needed):
            raise CheckpointError(f"{path} is damaged: its index does not match its digest; copy the folder again")
        self.checksum = xxhash.xxh3_128_hexdigest(header + needed.tobytes())
        self._verified: dict[str, np.ndarray] = {}

    def holds(self, name: str, dim: int) -> bool:
        """Return whether the file has the table, of width `dim`."""
        rows, values = (self._arrays.get(f"{name}/{key}") for key in (ROWS, VALUES))
        if rows is None or values is None or f"{name}/{ROWS}{DIGESTS}" not in self._arrays:
            return False
        return len(rows) * dim == len(values)

    @property
    def tables(self) -> list[str]:
        """The names of the tables, in the order of the file."""
        return [name.removesuffix(f"/{KEY}") for name in self._arrays if name.endswith(f"/{KEY}")]

    def keys(self, name: str) -> list[str]:
        """Return the keys of a table's tensors with a value or more per row."""
        names = [tensor.removeprefix(f"{name}/") for tensor in self._arrays if tensor.startswith(f"{name}/")]
        return [key for key in names if "/" not in key and key not in (KEY, EVICTED)]

    def count(self, name: str) -> int:
        """Return the number of rows of a table."""
        return len(self._arrays[f"{name}/{ROWS}"])

    def key(self, name: str) -> int:
        """Return the key of a table's initial values."""
        return int(self._arrays[f"{name}/{KEY}"].view(np.uint64)[0])

    def read(self, name: str, key: str, positions: np.ndarray) -> np.ndarray:
        """Return verified values [n, w] of the rows at positions of the file. Raises CheckpointError: damaged."""
        values = self._arrays[f"{name}/{key}"]
        values = values.reshape(self.count(name), -1) if len(values) else values.reshape(0, 1)
        self._verify(f"{name}/{key}", values, np.unique(positions // BLOCK_ROWS))
        return np.asarray(values[positions])

    def find(self, name: str, rows: np.ndarray, key: str = ROWS) -> tuple[np.ndarray, np.ndarray]:
        """Return the indices of saved rows: in `rows`, and in the file. Raises CheckpointError: damaged.

        key: `evicted` instead of `rows` finds rows that are evicted in this file.
        """
        saved = self._arrays.get(f"{name}/{key}")
        if saved is None:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        block = np.searchsorted(self._arrays[f"{name}/{key}{FIRST}"], rows, "right") - 1
        inside = np.flatnonzero(block >= 0)
        inside_rows, positions = rows[inside], block[inside] * BLOCK_ROWS
        self._verify(f"{name}/{key}", saved[:, None], np.unique(block[inside]))
        step = BLOCK_ROWS // 2
        while step and len(positions):  # a binary search within verified blocks
            further = np.minimum(positions + step, len(saved) - 1)
            positions = np.where((positions + step < len(saved)) & (saved[further] <= inside_rows), further, positions)
            step //= 2
        hit = np.flatnonzero(saved[positions] == inside_rows)
        return inside[hit], positions[hit]

    def _verify(self, tensor: str, values: np.ndarray, blocks: np.ndarray) -> None:
        """Verify blocks of values [n, w] that have not been verified yet."""
        verified = self._verified.setdefault(tensor, np.zeros(-(-len(values) // BLOCK_ROWS), bool))
        digests = self._arrays[tensor + DIGESTS].reshape(-1, 2)
        for block in blocks[~verified[blocks]].tolist():
            part = values[block * BLOCK_ROWS : (block + 1) * BLOCK_ROWS]
            # read the pages of the block ahead
            first = part.__array_interface__["data"][0] - self._start
            page = first // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(mmap.MADV_WILLNEED, page, first + part.nbytes - page)
            digest = _digests(part)
            if not np.array_equal(digest, digests[block]):
                raise CheckpointError(
                    f"{self.path} is damaged: block {block} of {tensor}, rows {block * BLOCK_ROWS} to "
                    f"{block * BLOCK_ROWS + len(part) - 1} of {len(values)} in the file, has the digest "
                    f"{digest.tobytes().hex()}, needs {digests[block].tobytes().hex()}; copy the folder again"
                )
            verified[block] = True


class MappedTables:
    """The tables in row files, for inference; rows that were never updated have their initial values."""

    def __init__(self, chains: Sequence[Sequence[Path]], specs: Mapping[str, TableSpec]) -> None:
        """chains: the files of each rank, later ones first to hold a row that several have.

        Raises CheckpointError: a file is missing or damaged, or lacks a table.
        """
        self.specs = dict(specs)
        self.chains = [[RowFile(path) for path in paths] for paths in chains]
        for file, (name, spec) in product((file for files in self.chains for file in files), specs.items()):
            if not file.holds(name, spec.dim):
                raise CheckpointError(
                    f"{file.path} does not hold the table {name} of width {spec.dim} with digests; copy it again"
                )
        if specs and not chains:
            raise CheckpointError(f"no file holds the rows of the tables {', '.join(specs)}; copy the folder again")

    def look_up(self, name: str, rows: Tensor) -> Tensor:
        """Return vectors float32 [*rows.shape, d] of rows int64, zeros for row 0, on the rows' device.

        Raises CheckpointError: a block of these rows is damaged.
        """
        if not (spec := self.specs[name]).hash_rows:
            return self._vectors(name, rows)
        return self._vectors(name, torch.from_numpy(spec.hashed(rows.cpu().numpy()))).sum(-2).to(rows.device)

    def _vectors(self, name: str, rows: Tensor) -> Tensor:
        spec = self.specs[name]
        distinct, inverse = np.unique(rows.detach().cpu().numpy(), return_inverse=True)
        by_chain = [self._find(chain, name, distinct) for chain in self.chains]
        values = initial_rows(distinct, spec.dim, self.key(name), spec.std).numpy()
        for chain, (index, number, positions) in zip(self.chains, by_chain, strict=True):
            values[index] = _tensor(_gather(chain, name, VALUES, number, positions)).float().numpy()
        if spec.admit_after > 1:  # rows that are not admitted have the vector of the one out of vocabulary
            admitted = np.isin(np.arange(len(distinct)), np.concatenate([index for index, _, _ in by_chain]))
            missing = ~admitted & (distinct != OUT_OF_VOCABULARY)
            if missing.any():
                values[missing] = self._vectors(name, torch.tensor([OUT_OF_VOCABULARY])).numpy()
        values[distinct == 0] = 0
        vectors = torch.from_numpy(values[inverse.reshape(-1)]).view(*rows.shape, spec.dim)
        return vectors.to(rows.device)

    def write(self, folder: Path) -> None:
        """Write the admitted rows, without states, to a row file per rank in a new folder. Raises OSError."""
        folder.mkdir()
        for rank, chain in enumerate(self.chains):
            sources = {}
            for name in self.specs:
                rows = _all_rows(chain, name)
                index, number, positions = self._find(chain, name, rows)
                sources[name] = _chain_source(chain, name, rows[index], number, positions)
            write_row_file(folder / row_file(rank), sources)

    def key(self, name: str) -> int:
        """Return the key of a table's initial values."""
        return self.chains[0][0].key(name)

    def contents(self, name: str, owned: Callable[[np.ndarray], np.ndarray], *, states: bool) -> Iterator[Content]:
        """Yield the saved rows for which `owned(rows)` is true, as `RowStore.load` takes them, some at once.

        states: all rows with their states, step numbers and occurrences; else the admitted rows alone.
        """
        for chain in self.chains:
            rows = _all_rows(chain, name)
            rows = rows[owned(rows)]
            index, number, positions = self._find(chain, name, rows, admitted=not states)
            rows, keys = rows[index], [key for key in chain[0].keys(name) if states or key == VALUES]
            for first in range(0, len(rows), ROWS_AT_ONCE):
                part = slice(first, first + ROWS_AT_ONCE)
                content = {key: _tensor(_gather(chain, name, key, number[part], positions[part])) for key in keys}
                content[ROWS] = torch.from_numpy(rows[part])
                yield {key: tensor[:, 0] if key in COUNTS else tensor for key, tensor in content.items()}

    def _find(
        self, chain: Sequence[RowFile], name: str, rows: np.ndarray, *, admitted: bool = True
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the saved, by default admitted, rows among ascending ones; the last file with a row holds it.

        As their indices in `rows`, the numbers of their files in the chain, and their positions in these.
        """
        number, positions = np.full(len(rows), -1), np.zeros(len(rows), np.int64)
        for position, file in enumerate(chain):
            evicted, _ = file.find(name, rows, EVICTED)
            number[evicted] = -1
            index, positions_in_file = file.find(name, rows)
            number[index], positions[index] = position, positions_in_file
        stored = number >= 0
        if admitted and OCCURRENCES in chain[0].keys(name):
            index = np.flatnonzero(stored)
            occurrences = _gather(chain, name, OCCURRENCES, number[index], positions[index])[:, 0]
            stored[index] = (occurrences >= self.specs[name].admit_after) | (rows[index] == OUT_OF_VOCABULARY)
        return np.flatnonzero(stored), number[stored], positions[stored]


def _all_rows(chain: Sequence[RowFile], name: str) -> np.ndarray:
    """Return the rows of all files of a chain, ascending, evicted ones included."""
    rows = [file.read(name, ROWS, np.arange(file.count(name)))[:, 0] for file in chain]
    return rows[0] if len(rows) == 1 else np.unique(np.concatenate(rows))


def _gather(chain: Sequence[RowFile], name: str, key: str, number: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Return the values [n, w] of rows at positions of files of a chain."""
    largest = max(chain, key=lambda file: file.count(name))  # an empty file does not have the width
    empty = largest.read(name, key, positions[:0])
    values = np.empty((len(positions), empty.shape[1]), empty.dtype)
    for position in np.unique(number):
        in_file = number == position
        values[in_file] = chain[position].read(name, key, positions[in_file])
    return values


def _chain_source(
    chain: Sequence[RowFile], name: str, rows: np.ndarray, number: np.ndarray, positions: np.ndarray
) -> RowSource:
    """Return a source of rows at positions of files of a chain, without states."""

    def read(part: slice) -> Content:
        values = _gather(chain, name, VALUES, number[part], positions[part])
        return {ROWS: _tensor(rows[part]), VALUES: _tensor(values)}

    return RowSource(chain[0].key(name), rows, read)


def load_tables(tables: ShardedTables, saved: MappedTables, *, states: bool) -> None:
    """Set this rank's rows to saved ones; states: with states, step numbers and occurrences, to resume."""
    for name, store in tables.stores.items():
        store.key = saved.key(name)
        for content in saved.contents(name, tables.partition.owns, states=states):
            store.load(content)


def _digests(values: np.ndarray | Tensor) -> np.ndarray:
    """Return the xxh3_128 of each block of rows, int64 [2 · blocks]."""
    blocks = (values[first : first + BLOCK_ROWS] for first in range(0, len(values), BLOCK_ROWS))
    return np.frombuffer(b"".join(xxhash.xxh3_128_digest(_bytes(block)) for block in blocks), np.int64).copy()


def _index_digest(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the xxh3_128 of the index tensors, int64 [2]."""
    digest = xxhash.xxh3_128()
    for name in sorted(arrays):
        if name.endswith((DIGESTS, FIRST, f"/{KEY}")):
            digest.update(arrays[name].data)
    return np.frombuffer(digest.digest(), np.int64).copy()


def _bytes(values: np.ndarray | Tensor) -> memoryview:
    if isinstance(values, Tensor):
        values = (values.view(torch.int16) if values.dtype == torch.bfloat16 else values).numpy()
    return np.ascontiguousarray(values).data


def _tensor(values: np.ndarray) -> Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    return tensor.view(torch.bfloat16) if values.dtype == np.uint16 else tensor
