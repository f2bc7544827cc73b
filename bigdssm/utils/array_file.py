"""Memory-mapped files: Arrow, and .npy with a seal, the fingerprint of their dataset and a checksum.

A seal is SEAL_BYTES of JSON after the array, which .npy readers ignore; the checksum covers all bytes before it.
"""

import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.lib.format import open_memmap
from numpy.typing import DTypeLike

from bigdssm.errors import DataError
from bigdssm.utils.atomic import path_in_errors
from bigdssm.utils.hashing import file_checksum

SEAL_BYTES = 256


def new_array(path: Path, dtype: DTypeLike, shape: tuple[int, ...]) -> np.memmap:
    """Create a memory-mapped array of zeros with reserved disk space.

    Without reservation, a write to a mapped page on a full disk ends the process (SIGBUS). Raises OSError, which names
    the file.
    """
    try:
        with path_in_errors(path):
            array = open_memmap(path, "w+", dtype, shape)
            with path.open("rb+") as file:
                os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return array


def seal(path: Path, dataset: str) -> None:
    """Append the seal to a finished array file; `dataset` is a fingerprint. Raises OSError, which names the file."""
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    os.truncate(path, array.offset + array.nbytes)  # without a seal, or a part of it, of a process that was killed then
    content = json.dumps({"dataset": dataset, "xxh3_128": file_checksum(path)}).encode()
    assert len(content) <= SEAL_BYTES
    with path_in_errors(path), path.open("ab") as file:
        file.write(content.ljust(SEAL_BYTES))


def read_seal(path: Path, fix: str) -> tuple[str, str]:
    """Return the dataset's fingerprint, and the checksum, of a seal. Raises DataError ending in `fix`: no seal."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - SEAL_BYTES))
        try:
            content = json.loads(file.read())
            return str(content["dataset"]), str(content["xxh3_128"])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise DataError(f"{path} has no seal (dataset fingerprint and checksum at its end); {fix}") from None


def check_seal(path: Path, dataset: str, fix: str) -> None:
    """Verify the seal and the checksum. Raises DataError ending in `fix`: damaged, no seal, or another dataset."""
    end = max(0, path.stat().st_size - SEAL_BYTES)
    made_of, checksum = read_seal(path, fix)
    if made_of != dataset:
        raise DataError(f"{path} belongs to another dataset, {made_of}, needs {dataset}; {fix}")
    if file_checksum(path, end) != checksum:
        raise DataError(f"{path} is damaged: its checksum does not match; copy it again, or {fix}")


def open_arrow(path: Path) -> pa.ipc.RecordBatchFileReader:
    """Open an Arrow file memory-mapped. Raises DataError: missing, or not an Arrow file."""
    try:
        return pa.ipc.open_file(pa.memory_map(str(path)))
    except FileNotFoundError:
        raise DataError(f"{path} is missing; the folder is incomplete, build it again or copy all of it") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} is no readable Arrow file ({error}); copy it again or build it again") from None
