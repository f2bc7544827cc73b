"""Building a dataset from Python: tables are files, Arrow tables or data frames."""

import difflib
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, Literal, cast, get_type_hints
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

from bigdssm.config import Config, DataConfig, config_of
from bigdssm.dataset.schema import Schema
from bigdssm.errors import ConfigError, DataError
from bigdssm.features import TextTokenizer
from bigdssm.features.canonical import as_table, is_table
from bigdssm.ingest.dataset_writer import DATASET_FILE, TOKENIZER
from bigdssm.ingest.fitting import with_prompts
from bigdssm.ingest.interactions import InteractionTables, make_interactions
from bigdssm.ingest.job import IngestReport, IngestTarget
from bigdssm.ingest.pairs import ItemTables, PairTables, make_items, make_pairs
from bigdssm.ingest.spark import Cluster
from bigdssm.sources.base import Source, TableFile
from bigdssm.sources.columnar import ParquetSource
from bigdssm.utils.arguments import argument, checked, short_repr
from bigdssm.utils.log import Progress, no_progress
from bigdssm.utils.urls import exists, is_url, join, redacted, upload_folder

EngineName = Literal["built-in", "spark"]


@checked
def make_dataset(
    config: Config | str | Path, overrides: Sequence[str] = (), *,
    interactions: Any = None, items: Any = None, users: Any = None, pairs: Any = None, withdrawn: Any = None,
    out: str | Path | None = None, partition: str = "base", append: bool = False, overwrite: bool = False,
    seed: int = 0, like: str | Path | None = None, engine: EngineName = "built-in", processes: int = 0,
    master: str | None = None, spark_conf: Mapping[str, str] | None = None, progress: Progress = no_progress,
    **options: Any,
) -> IngestReport:  # fmt: skip
    """Build a dataset from interactions, items and optionally users, or from pairs.

    With `append`, `items` without interactions are added to the catalogue alone, and the items of `withdrawn` leave it.
    A table is a file, a URL, an Arrow table, a data frame (pandas, polars), a dict of columns or a list of dicts;
    `pairs` may be a list of tables. `out` (default: the config's data.dir) is a folder or a URL such as s3://…;
    `append` adds `partition` to the dataset there. `processes` is the number of worker processes (0: one per core).
    The engine "spark" uses the Spark session of this process, or a new one on `master` with `spark_conf`; a table may
    then also be spark:NAME or spark:SELECT …. `options` are fields of InteractionTables, ItemTables or PairTables,
    such as item_column, doc_id_column or split. Raises ConfigError, DataError.
    """
    if processes < 0:
        raise ConfigError(f"processes={processes}: needs at least 1, or 0 for one per core")
    config = config_of(config, overrides)
    data = config.data
    destination, like = out or data.dir, None if like is None else Path(like)
    if urlsplit(str(destination)).scheme.lower() in ("file", "local"):
        raise ConfigError(f"out={destination}: a folder of this machine has a path, not a URL; leave out file://")
    tokenizer = data.tokenizer.path if like is None and not append else (like or Path(destination)) / TOKENIZER
    if tokenizer is None or Path(tokenizer).is_dir():
        for key, text in config.text_encoders().items():
            text.check_tokenizer(key, None if tokenizer is None else Path(tokenizer))
    if tokenizer is not None and (Path(tokenizer) / "tokenizer.json").is_file():  # before the tables are read
        with_prompts(Schema.declared(data), data.tokenizer.path, TextTokenizer(Path(tokenizer)))
    spark = Cluster(master, tuple((spark_conf or {}).items())) if engine == "spark" else None
    if spark is None and (master is not None or spark_conf):
        raise ConfigError("master= and spark_conf= have no effect without engine='spark'")
    target = IngestTarget(Path(destination), partition, overwrite, append, seed, like, processes=processes, spark=spark)
    given = {"pairs": pairs, "interactions": interactions, "items": items, "users": users, "withdrawn": withdrawn}
    tables = {name: table for name, table in given.items() if table is not None}
    if ("pairs" in tables) == bool(tables.keys() - {"pairs"}):
        raise ConfigError("a dataset needs pairs=, or interactions= and items=, and optionally users=")
    if not (isinstance(destination, str) and is_url(destination)):
        return _make(data, tables, options, progress, target)
    # built on this machine, then copied to the URL
    if append:
        raise ConfigError(
            f"{redacted(destination)}: cannot append to a dataset at a URL; append to a local copy, and upload that"
        )
    if not overwrite and exists(join(destination, DATASET_FILE)):
        raise DataError(f"{redacted(destination)} already holds a dataset; use --overwrite or another --out")
    folder = Path(tempfile.mkdtemp(prefix="dataset-"))
    local = folder / destination.rstrip("/").rpartition("/")[2]
    report = _make(data, tables, options, progress, replace(target, out=local))
    try:
        upload_folder(local, destination, last=DATASET_FILE)
    except (DataError, OSError) as error:
        raise DataError(f"{error}; the dataset is complete in {local}, copy it from there") from error
    shutil.rmtree(folder)
    return replace(report, out=destination)


def _make(
    data: DataConfig, tables: dict[str, Any], options: dict[str, Any], progress: Progress, target: IngestTarget
) -> IngestReport:
    if target.spark is not None:
        target.out.parent.mkdir(parents=True, exist_ok=True)
    # next to the dataset for Spark, whose workers may not share this machine's local disk
    with tempfile.TemporaryDirectory(dir=None if target.spark is None else target.out.parent) as spool:
        opened = partial(_opened, Path(spool))
        if "pairs" in tables:
            pairs = tables["pairs"]
            files: tuple[Path | str | Source, ...]
            if not isinstance(pairs, list | tuple) or (pairs and all(isinstance(row, Mapping) for row in pairs)):
                files = (opened("pairs", pairs),)
            elif not pairs:
                raise ConfigError("pairs=[]: needs at least one table")
            else:
                files = tuple(opened(f"pairs[{number}]", table) for number, table in enumerate(pairs))
            return make_pairs(data, _tables(PairTables, options, files=files), target, progress)
        paths = {name: opened(name, table) for name, table in tables.items()}
        if target.append and not tables.keys() - {"items", "withdrawn"}:
            return make_items(data, _tables(ItemTables, options, **paths), target, progress)
        if "withdrawn" in tables:
            raise ConfigError("withdrawn= needs append=True, and no other table than items=")
        if lacking := [name for name in ("interactions", "items") if name not in tables]:
            raise ConfigError(f"{lacking[0]}= is missing: a dataset of interactions needs interactions= and items=")
        return make_interactions(data, _tables(InteractionTables, options, **paths), target, progress)


def _opened(spool: Path, name: str, table: Any) -> Path | str | Source:
    """Return the path of a table, or a source that reads a table in memory.

    Raises ConfigError, DataError.
    """
    if isinstance(table, str | PathLike):
        return cast(Path | str, argument(name, table, str if isinstance(table, str) else Path))
    if not is_table(table) and not (isinstance(table, Mapping | list) and table):
        raise ConfigError(
            f"{name}={short_repr(table)}: needs the path or URL of a table, an Arrow table, a data frame, a dict of "
            "columns, or a list of dicts"
        )
    path = spool / f"{name}.parquet"
    try:
        pq.write_table(as_table(table), path)
    except (pa.ArrowException, DataError) as error:
        raise DataError(f"{name}= cannot be read: {' '.join(str(error).split())}") from None
    return ParquetSource(TableFile(path, f"{name}="))


def _tables(cls: Callable[..., Any], options: dict[str, Any], **files: Any) -> Any:
    option_names = [field.name for field in fields(cls) if field.name not in files]  # type: ignore[arg-type]
    if unknown := [name for name in options if name not in option_names]:
        near = difflib.get_close_matches(unknown[0], option_names, 1)
        meant = f"did you mean {near[0]}?" if near else f"options are {', '.join(option_names)}"
        raise ConfigError(f"{unknown[0]}= is not an option of such a dataset; {meant}")
    return cls(**files, **{name: argument(name, value, get_type_hints(cls)[name]) for name, value in options.items()})
