"""Opening the dataset of a config: a single one, or the joined sources of a mixture.

The joined dataset concatenates the sources' partitions, so row ids are unique, and stable while the mixture stays the
same. Sources share one schema and one tokenizer. They share one catalogue, or their catalogues are concatenated (pairs
only: a sequence's items are rows of one catalogue); a document in two catalogues is then two documents with one id.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bigdssm.config import DataConfig, SourceConfig
from bigdssm.dataset.cache import FileCache
from bigdssm.dataset.catalogue import CatalogueFile
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.partition import Extent, MixtureBatches, MixturePart, Partition, steps_per_round
from bigdssm.errors import ConfigError
from bigdssm.utils.urls import is_url


def open_dataset(config: DataConfig, extents: Sequence[Extent] = ()) -> Dataset:
    """Open the dataset of a training config; with `extents` of its sources, without later appends.

    Raises DataError; ConfigError: incompatible sources.
    """
    cache = FileCache.from_config(config)
    every: Sequence[Extent | None] = extents or [None] * max(1, len(config.mixture))
    if not config.mixture:
        return Dataset.open(config.dir, first=config.from_partition, cache=cache, extent=every[0])
    parts = [
        Dataset.open(source.dir or config.dir, source.partitions or None, cache=cache, extent=extent)
        for source, extent in zip(config.mixture, every, strict=True)
    ]
    return join(parts, config.mixture, config.dir, config.mixture_batches)


def join(parts: Sequence[Dataset], sources: Sequence[SourceConfig], main_dir: str, batches: MixtureBatches) -> Dataset:
    """Join datasets; each becomes one MixturePart.

    Partitions outside `main_dir` are prefixed by their dataset's name.
    """
    for part, source in zip(parts[1:], sources[1:], strict=True):
        _check_same(parts[0], part, source.dir or main_dir)
    # The files of distinct catalogues, newer versions last, and each part's offset.
    files: list[CatalogueFile] = []
    starts: dict[tuple[str, ...], int] = {}
    first_doc = []
    for part in parts:
        key = tuple(file.checksum for file in part.catalogue_files)
        if key not in starts:
            if starts and part.sequences is not None:
                raise ConfigError(
                    f"data.mixture: {part.dir} cannot be mixed with {parts[0].dir}: their catalogues differ, but "
                    "datasets with histories must share one catalogue; put the interactions into one dataset, as "
                    "partitions (make_shards --append)"
                )
            starts[key] = sum(file.rows for file in files if file.since is None)
            files += [replace(file, first_doc=starts[key]) for file in part.catalogue_files]
        first_doc.append(starts[key])
    files.sort(key=lambda file: file.since is not None)
    partitions: list[Partition] = []
    mixture = []
    siblings: dict[str, Partition] = {}
    item_partitions: dict[str, Partition] = {}
    withdrawals: dict[Path, CatalogueFile] = {}
    for part, source, base in zip(parts, sources, first_doc, strict=True):
        prefix = "" if source.dir is None or _normalized(source.dir) == _normalized(main_dir) else f"{part.name}/"
        renamed = [replace(p, name=prefix + p.name, first_doc=base) for p in part.partitions]
        name = "+".join(partition.name for partition in renamed)
        mixture.append(MixturePart(name, len(partitions), len(partitions) + len(renamed), source.weight))
        partitions += renamed
        item_partitions |= {prefix + p.name: replace(p, name=prefix + p.name) for p in part.item_partitions}
        withdrawals |= {file.path: replace(file, first_doc=base) for file in part.withdrawals}
        siblings |= {prefix + p.name: replace(p, name=prefix + p.name) for p in part.partitions_on_disk()}
    names = [partition.name for partition in partitions]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(
            f"data.mixture has the partition {twice[0]} twice; name each partition once; datasets must be in folders "
            "with different names"
        )
    steps_per_round([source.name for source in mixture], [source.weight for source in mixture])
    extents = [extent for part in parts for extent in part.extents]
    joined = Dataset(
        parts[0].header, partitions, files, list(withdrawals.values()), list(item_partitions.values()), extents
    )
    joined.sources, joined.batches, joined.siblings = tuple(mixture), batches, tuple(siblings.values())
    joined.pickled = (join, (tuple(parts), tuple(sources), main_dir, batches))
    return joined


def _normalized(folder: str) -> str:
    return folder if is_url(folder) else os.path.realpath(folder)


def _check_same(first: Dataset, other: Dataset, name: str) -> None:
    difference = first.schema.difference(other.schema)
    if difference is None and first.schema != other.schema:
        difference = f"data.title is {first.schema.title!r} and {other.schema.title!r}"
        fitted = [
            (f"{side}.{key}", feature, other.schema.sides[side][key])
            for side, features in first.schema.sides.items()
            for key, feature in features.items()
            if feature != other.schema.sides[side][key]
        ]
        if fitted:
            where, *features = fitted[0]
            described = [feature.describe(first.vocab_size) for feature in features]
            difference = f"{where} was fitted to different data ({described[0]}, {described[1]})"
    if difference is None and first.tokenizer_hash != other.tokenizer_hash:
        difference = "the tokenizers differ"
    fix = f"build it with `bigdssm make_shards … --like {first.dir}`"
    for name_of_part, mine, its, needed in (
        ("sequences", first.sequences is not None, other.sequences is not None, "interactions"),
        ("texts", first.header.text, other.header.text, "--raw-text"),
        ("users' features", first.header.users, other.header.users, "--users-time-column"),
        ("items' features", first.header.items, other.header.items, "--items-time-column"),
    ):
        if difference is None and mine != its:
            difference, fix = f"only one of them has {name_of_part}", f"build both with {needed}, or both without"
    if difference is not None:
        raise ConfigError(f"data.mixture: {name} cannot be mixed with {first.dir}: {difference}; {fix}")
