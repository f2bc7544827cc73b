"""Arrays in .npy files that are written where they are mapped, and seals, which name the data that they belong to.

A seal is SEAL_BYTES of JSON behind the array, which readers of .npy files ignore: the dataset's fingerprint, and the
checksum of all bytes before the seal.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import DTypeLike

from bigdssm.errors import DataError
from bigdssm.utils.atomic import naming
from bigdssm.utils.hashing import file_checksum

SEAL_BYTES = 256


def new_array(path: Path, dtype: DTypeLike, shape: tuple[int, ...]) -> np.memmap:
    """Return a new array of zeros, mapped from the file `path`, whose space on the disk is reserved.

    Raises OSError, which names the file: a write to a mapped page that finds no space would end the process (SIGBUS).
    """
    try:
        with naming(path):
            array = open_memmap(path, "w+", dtype, shape)
            with path.open("rb+") as file:
                os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return array


def seal(path: Path, dataset: str) -> None:
    """Append the seal of a finished array to its file: `dataset` is the fingerprint of its dataset.

    Raises OSError, which names the file.
    """
    content = json.dumps({"dataset": dataset, "xxh3_128": file_checksum(path)}).encode()
    assert len(content) <= SEAL_BYTES
    with naming(path), path.open("ab") as file:
        file.write(content.ljust(SEAL_BYTES))


def check_seal(path: Path, dataset: str, fix: str) -> None:
    """Read a file whole. Raises DataError, which ends in `fix`: damaged, no seal, or that of another dataset."""
    end = max(0, path.stat().st_size - SEAL_BYTES)
    with path.open("rb") as file:
        file.seek(end)
        try:
            content = json.loads(file.read())
            made_of, checksum = str(content["dataset"]), content["xxh3_128"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise DataError(f"{path} does not end in the fingerprint of its dataset and a checksum; {fix}") from None
    if made_of != dataset:
        raise DataError(f"{path} was made of another dataset, {made_of}, needed is {dataset}; {fix}")
    if file_checksum(path, 0, end) != checksum:
        raise DataError(f"{path} is damaged: its checksum is another; copy it again, or {fix}")
