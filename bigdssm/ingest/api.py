"""A dataset from Python: tables as files, Arrow tables or data frames."""

from __future__ import annotations

import difflib
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, Literal, get_type_hints

import pyarrow as pa
import pyarrow.parquet as pq

from bigdssm.config import Config, DataConfig, config_of
from bigdssm.errors import ConfigError, DataError
from bigdssm.features.canonical import as_table, is_table
from bigdssm.ingest.dataset_writer import DATASET_FILE
from bigdssm.ingest.engines.spark import Cluster
from bigdssm.ingest.interactions import InteractionTables, make_interactions
from bigdssm.ingest.job import IngestReport, IngestTarget
from bigdssm.ingest.pairs import PairTables, make_pairs
from bigdssm.ingest.sources.base import Source
from bigdssm.ingest.sources.columnar import ParquetSource
from bigdssm.ingest.sources.files import LocalFile
from bigdssm.utils.arguments import argument, checked, short_repr
from bigdssm.utils.log import Progress, no_progress
from bigdssm.utils.urls import exists, is_url, join, redacted, upload_folder

EngineName = Literal["built-in", "spark"]


@checked
def make_dataset(
    config: Config | str | Path, overrides: Sequence[str] = (), *,
    interactions: Any = None, items: Any = None, users: Any = None, pairs: Any = None,
    out: str | Path | None = None, partition: str = "base", append: bool = False, overwrite: bool = False,
    seed: int = 0, like: str | Path | None = None, engine: EngineName = "built-in", processes: int = 0,
    master: str | None = None, spark_conf: Mapping[str, str] | None = None, progress: Progress = no_progress,
    **options: Any,
) -> IngestReport:  # fmt: skip
    """Make a dataset of interactions, items and maybe users, or of pairs, and return what was made, and where.

    A table is a file, a URL, an Arrow table, a data frame (pandas, polars), a dict of columns or a list of dicts;
    `pairs` may be several. `out`, a folder or a URL
    such as s3://…, is by default the config's data.dir; `append` adds `partition` to the dataset there. Jobs are done
    by `processes` (0: one for each core). With the engine "spark" the Spark session of this process makes it, or one on
    `master` with `spark_conf`, and a table may be spark:NAME or spark:SELECT …, too. `options` are fields of
    InteractionTables or PairTables, such as item_column, doc_id_column or split. Raises ConfigError, DataError.
    """
    if processes < 0:
        raise ConfigError(f"processes={processes}: needs at least 1, or 0 for one on each core")
    data = config_of(config, overrides).data
    place, like = out or data.dir, None if like is None else Path(like)
    spark = _cluster(engine, master, spark_conf or {})
    target = IngestTarget(Path(place), partition, overwrite, append, seed, like, processes=processes, spark=spark)
    given = {"pairs": pairs, "interactions": interactions, "items": items, "users": users}
    tables = {name: table for name, table in given.items() if table is not None}
    if ("pairs" in tables) == bool(tables.keys() - {"pairs"}):
        raise ConfigError("a dataset is made of pairs=, or of interactions= and items=, and maybe users=")
    make = partial(_make, data, tables, options, progress)
    return _made_at_url(place, target, make) if isinstance(place, str) and is_url(place) else make(target)


def _make(
    data: DataConfig, tables: dict[str, Any], options: dict[str, Any], progress: Progress, target: IngestTarget
) -> IngestReport:
    if target.spark is not None:
        target.out.parent.mkdir(parents=True, exist_ok=True)
    # Spark's workers see what is beside the dataset, maybe not this machine's own disk.
    with tempfile.TemporaryDirectory(dir=None if target.spark is None else target.out.parent) as spool:
        opened = partial(_opened, Path(spool))
        if "pairs" in tables:
            return make_pairs(
                data, _tables(PairTables, options, files=_several(tables["pairs"], opened)), target, progress
            )
        if lacking := [name for name in ("interactions", "items") if name not in tables]:
            raise ConfigError(f"{lacking[0]}= is missing: a dataset of interactions is made of them and of items")
        paths = {name: opened(name, table) for name, table in tables.items()}
        return make_interactions(data, _tables(InteractionTables, options, **paths), target, progress)


def _several(pairs: Any, opened: Callable[[str, Any], Path | str | Source]) -> tuple[Path | str | Source, ...]:
    """Return the tables of one or several. Raises ConfigError: there is none."""
    if not isinstance(pairs, list | tuple) or (pairs and all(isinstance(row, Mapping) for row in pairs)):
        return (opened("pairs", pairs),)
    if not pairs:
        raise ConfigError("pairs=[]: needs at least one table")
    return tuple(opened(f"pairs[{place}]", table) for place, table in enumerate(pairs))


def _opened(spool: Path, name: str, table: Any) -> Path | str | Source:
    """Return the place of a table, or a source of what a program has. Raises ConfigError, DataError."""
    if isinstance(table, str | PathLike):
        place: Path | str = argument(name, table, str if isinstance(table, str) else Path)
        return place
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
    return ParquetSource(LocalFile(path, f"{name}="))


def _made_at_url(url: str, target: IngestTarget, make: Callable[[IngestTarget], IngestReport]) -> IngestReport:
    """Make a dataset on this machine and copy it to a URL; where it cannot go there, it stays here.

    Raises DataError, ConfigError.
    """
    if target.append:
        raise ConfigError(f"{redacted(url)}: a dataset at a URL does not grow; append to a copy of it, and copy that")
    if not target.overwrite and exists(join(url, DATASET_FILE)):
        raise DataError(f"{redacted(url)} holds a dataset already; use --overwrite or another --out")
    folder = Path(tempfile.mkdtemp(prefix="dataset-"))
    local = folder / url.rstrip("/").rpartition("/")[2]
    report = make(replace(target, out=local))
    try:
        upload_folder(local, url, last=DATASET_FILE)
    except (DataError, OSError) as error:
        raise DataError(f"{error}; the dataset is whole in {local}, copy it from there") from error
    shutil.rmtree(folder)
    return replace(report, out=url)


def _cluster(engine: EngineName, master: str | None, conf: Mapping[str, str]) -> Cluster | None:
    if engine == "spark":
        return Cluster(master, tuple(conf.items()))
    if master is not None or conf:
        raise ConfigError("a master and settings of Spark would have no effect without the engine spark")
    return None


def _tables(cls: Callable[..., Any], options: dict[str, Any], **files: Any) -> Any:
    known = [field.name for field in fields(cls) if field.name not in files]  # type: ignore[arg-type]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            meant = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise ConfigError(f"{name}= is no option of such a dataset; {meant}")
    kinds = get_type_hints(cls)
    return cls(**files, **{name: argument(name, value, kinds[name]) for name, value in options.items()})
