"""The model of a stage's checkpoint, whatever its ZeRO stage and world size, without the trainer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bigdssm.artifacts.checkpoint import consolidated_state_dict
from bigdssm.artifacts.model_folder import CONFIG_FILE, ModelFolder, is_model_folder, load_model_folder, model_checksum
from bigdssm.config import load_config
from bigdssm.dataset.cache import Cache
from bigdssm.dataset.dataset import Dataset
from bigdssm.errors import CheckpointError
from bigdssm.models import new_model

BEST = "best"


def load_checkpoint_model(path: Path, scorer_widths: Sequence[int] = ()) -> ModelFolder:
    """Return the model of the checkpoint `path` in a stage's folder, with a new MLP of `scorer_widths` where given.

    Raises CheckpointError where it is damaged, or scores with an MLP of its own.
    """
    stage_dir = path.parent.parent
    state = consolidated_state_dict(path)
    if is_model_folder(stage_dir / BEST):  # knows schema and architecture even where the dataset has gone
        folder = load_model_folder(stage_dir / BEST, scorer_widths=scorer_widths)
        model, config, schema, tokenizer_dir = folder.model, folder.config, folder.schema, folder.tokenizer_dir
    elif not (stage_dir / CONFIG_FILE).is_file():
        raise CheckpointError(
            f"{path} has only the weights: what model they are of stands in {stage_dir}, which has neither {BEST}/ nor "
            f"{CONFIG_FILE}; copy one of them too"
        )
    else:
        config = load_config(stage_dir / CONFIG_FILE)
        dataset = Dataset.open(config.data.dir, cache=Cache.of(config.data))
        schema, tokenizer_dir = dataset.schema, dataset.tokenizer_dir
        model = new_model(config.model, schema, dataset.pad_token_id, dataset.vocab_size, scorer_widths)
    try:
        model.load_towers(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"the weights in {path} do not fit the stage's config and schema: {reason}") from None
    provenance = {"stage": stage_dir.name, "checkpoint": path.name}
    checksum = model_checksum(model, config, schema, tokenizer_dir, provenance)
    return ModelFolder(model.eval(), config, schema, tokenizer_dir, provenance, checksum)
