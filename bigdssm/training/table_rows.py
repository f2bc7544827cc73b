"""The sharded tables of a stage: their rows on this rank, and the row files of its best/ folder."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError

from bigdssm import distributed
from bigdssm.config import Config, StageName
from bigdssm.errors import BigDSSMError, CheckpointError
from bigdssm.models import DualEncoder
from bigdssm.tables.files import MappedTables, load_tables, row_file, store_sources, write_row_file
from bigdssm.tables.sharded import ShardedTables
from bigdssm.training.engine import device
from bigdssm.utils.atomic import remove
from bigdssm.utils.log import get_logger

logger = get_logger(__name__)


def build_tables(
    model: DualEncoder, config: Config, name: StageName, memory: Literal["device", "host", "file"], *, resumed: bool
) -> ShardedTables | None:
    """Return the sharded tables of a stage on this rank, None without any.

    They have the rows of the model that the stage starts from, or initial values; those of a `resumed` stage, from
    which rows may have been evicted, are in its checkpoint.
    """
    specs = model.tables.sharded
    if not specs:
        return None
    folder = None
    if memory == "file":
        folder = Path(config.engine.table_dir or config.stage_dir(name) / "table_rows")
    tables = ShardedTables(
        list(specs.values()), config.stage(name).table_optimizer, config.run.seed, device=device(),
        storage=device() if memory == "device" else torch.device("cpu"), folder=folder,
        cache_rows=config.engine.table_cache_rows,
        dtype=torch.bfloat16 if config.engine.precision == "bf16_pure" else torch.float32,
    )  # fmt: skip
    if isinstance(model.tables.source, MappedTables) and not resumed:
        load_tables(tables, model.tables.source, states=False)
    for spec in specs.values():
        share = tables.partition.capacity(spec.stored_rows)
        here = "stored as they are trained" if spec.is_keyed else f"up to {share} here"
        logger.info("table %s: %d rows of width %d sharded over the ranks, %s, in %s memory",
                    spec.name, spec.stored_rows, spec.dim, here, memory)  # fmt: skip
    return tables


def write_tables(tables: ShardedTables | None, folder: Path) -> Path | None:
    """Write the row files of all ranks to a new folder, and return it; None without tables. All ranks must call it.

    Raises CheckpointError, on every rank: they cannot be written.
    """
    if tables is None:
        return None

    def prepare() -> None:
        if distributed.is_main():
            remove(folder)
            folder.mkdir(parents=True)

    for action in (prepare, lambda: write_row_file(folder / row_file(distributed.rank()), store_sources(tables))):
        error: BigDSSMError | None = None
        try:
            action()
        except (OSError, SafetensorError) as problem:
            error = CheckpointError(f"could not write {folder}: {problem}; the previous model is kept")
        distributed.raise_together(error)
    return folder
