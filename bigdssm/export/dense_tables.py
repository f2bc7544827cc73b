"""Models with their sharded tables as dense weights, for the formats that cannot look rows up in files."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch

from bigdssm.checkpoints.model_folder import ModelFolder, trained_scorer
from bigdssm.config import TablesConfig
from bigdssm.errors import ConfigError
from bigdssm.models import DualEncoder

DENSE_BYTES = 2**31  # of one table: ONNX files are at most 2 GiB


def with_dense_tables(folder: ModelFolder, target: str) -> ModelFolder:
    """Return the model with all rows of its sharded tables in memory; itself if it has none.

    Raises ConfigError: a table is too large for the format `target`.
    """
    model = folder.model
    if not model.tables.sharded:
        return folder
    state = dict(model.state_dict())
    for name, spec in model.tables.sharded.items():
        if (size := spec.rows * spec.dim * 4) > DENSE_BYTES:
            raise ConfigError(
                f"--format {target}: the table {name} has {spec.rows} rows of width {spec.dim}, {size / 1e9:.1f} GB; "
                f"the format holds tables of up to {DENSE_BYTES / 1e9:.1f} GB; use --format model"
            )
        assert model.tables.source is not None
        state[f"tables.tables.{name}.weight"] = model.tables.source.look_up(name, torch.arange(spec.rows))
    config = replace(folder.config, model=replace(folder.config.model, tables=TablesConfig(sharding="replicated")))
    texts = {name: cast(Any, encoder).architecture for name, encoder in model.text.items()}
    dense = DualEncoder(config.model, folder.schema, texts, trained_scorer(config, folder.provenance))
    dense.load_state_dict(state)
    return replace(folder, model=dense.eval(), config=config)  # the scores, and thus the checksum, stay
