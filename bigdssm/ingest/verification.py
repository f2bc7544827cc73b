"""Verification of every byte of a dataset against its checksums."""

import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from bigdssm.config import DEFAULT_CACHE_BYTES
from bigdssm.dataset.blocks import FORGOTTEN, read_block, read_range
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.partition import read_dataset_json, read_index
from bigdssm.dataset.remote import COUNTS_FILE, FileCache, catalogue_entries
from bigdssm.dataset.schema import VOCABULARIES
from bigdssm.errors import DataError
from bigdssm.ingest.dataset_writer import TOKENIZER
from bigdssm.ingest.job import TAR_HEADER_BYTES
from bigdssm.utils.hashing import file_checksum
from bigdssm.utils.log import Progress, no_progress
from bigdssm.utils.urls import is_url


def verify_dataset(folder: str | Path, progress: Progress = no_progress) -> list[str]:
    """Return a message per damaged file or block, an empty list if there is no damage.

    A dataset at a URL is downloaded into a temporary cache. Raises DataError: the dataset cannot be opened; at a URL,
    also: a file other than a shard is damaged.
    """
    if is_url(folder):
        with tempfile.TemporaryDirectory(prefix="verify-") as cache:
            return _damages(Dataset.open(folder, cache=FileCache(Path(cache), DEFAULT_CACHE_BYTES)), progress)
    entries = catalogue_entries(read_dataset_json(Path(folder)))
    catalogue = {part["file"]: part["checksum"] for part in entries}
    if damages := list(_compared(Path(folder), catalogue)):  # references into the catalogue cannot be validated
        return damages
    return _damages(Dataset.open(folder), progress)


def _damages(dataset: Dataset, progress: Progress) -> list[str]:
    damages = list(_compared(dataset.dir / TOKENIZER, read_dataset_json(dataset.dir).get(TOKENIZER, {})))
    vocabularies = {file.path.name: file.checksum for file in dataset.schema.vocabulary_files}
    damages += _compared(dataset.dir / VOCABULARIES, vocabularies)
    for number, partition in enumerate([*dataset.partitions, *dataset.item_partitions]):
        content = partition.content
        sequences = {part["file"]: part["checksum"] for part in content.get("sequences", [])}
        damages += _compared(partition.folder, {COUNTS_FILE: content["counts_checksum"], **sequences})
        for split in content["splits"]:
            try:
                index = read_index(partition, split, number)
            except DataError as error:
                damages.append(str(error))
                continue
            for block in range(index.num_blocks):
                name = index.name(block)
                for bad in read_block(index, block, dataset.layout)[1]:
                    if bad.reason != FORGOTTEN:
                        row = "" if bad.row is None else f", row {bad.row}"
                        position = "" if bad.position is None else f", position {bad.position}"
                        damages.append(f"{name}{row}{position}: {bad.reason}")
                shard = index.shards[index.shard[block]]
                if isinstance(shard, Path) and shard.is_file():
                    # this project ignores the headers, other tar readers do not
                    header = read_range(shard, int(index.offset[block]) - TAR_HEADER_BYTES, TAR_HEADER_BYTES)
                    recorded_size = int(index.size[block])
                    try:
                        size = tarfile.TarInfo.frombuf(header, "utf-8", "strict").size
                    except (tarfile.HeaderError, UnicodeDecodeError) as error:
                        damages.append(f"{name}: its tar header is damaged ({error}); plain tar readers stop there")
                    else:
                        if size != recorded_size:
                            damages.append(f"{name}: its tar header gives {size} bytes, the index {recorded_size}")
                progress(f"verifying {partition.name}/{split}", block + 1, index.num_blocks)
    return damages


def _compared(folder: Path, checksums: Mapping[str, str]) -> Iterator[str]:
    """Yield a message per file that is missing or has another checksum."""
    for name, checksum in checksums.items():
        path = folder / name
        if not path.is_file():
            yield f"{path} is missing"
        elif file_checksum(path, bits=64) != checksum:
            yield f"{path} is damaged: its checksum is not the recorded one"
