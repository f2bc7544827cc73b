"""Models for vocabularies that grew at their end: known rows of embedding tables stay, new ones are as initialised."""

from __future__ import annotations

import torch
from torch import Tensor

from bigdssm.artifacts.checkpoint import ReadCheckpoint, TensorReader
from bigdssm.log import get_logger
from bigdssm.models import DualEncoder
from bigdssm.schema import Schema

logger = get_logger(__name__)


def grow_model(model: DualEncoder, schema: Schema) -> None:
    """Give `model` the tables that `schema` needs, whose vocabularies begin with those of the model's own."""
    for name, (known, needed) in model.tables.grow(schema).items():
        _say(f"table {name}", known, needed)
    model.schema = schema


class GrownReader(TensorReader):
    """Reads a checkpoint for a new `model` whose tables may have more rows: as initialised, their moments zero."""

    def __init__(self, checkpoint: ReadCheckpoint, model: DualEncoder) -> None:
        super().__init__(checkpoint)
        self._new_rows: dict[str, Tensor] = {}
        for name, parameter in model.tables.named_parameters("tables"):
            known, needed = self.shape(name)[0], len(parameter)
            if known < needed:
                _say(name, known, needed)
                self._new_rows[name] = parameter.detach()[known:].float().clone()

    def __call__(self, name: str) -> Tensor:
        """Return the tensor `name`, on the CPU, with its new rows. Raises CheckpointError where there is none."""
        tensor = super().__call__(name)
        moment, _, weight = name.rpartition("/")
        new_rows = self._new_rows.get(weight)
        if new_rows is None:
            return tensor
        return torch.cat([tensor, torch.zeros_like(new_rows) if moment else new_rows])


def _say(what: str, known: int, needed: int) -> None:
    logger.info(
        "%s: %d rows as they were, %d new ones for values that came with new partitions", what, known, needed - known
    )
