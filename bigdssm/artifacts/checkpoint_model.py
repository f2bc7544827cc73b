"""The model of a stage's checkpoint, whatever its ZeRO stage and world size, without the trainer."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from bigdssm.artifacts.checkpoint import consolidated_state_dict
from bigdssm.artifacts.model_folder import CONFIG_FILE, ModelFolder, is_model_folder, load_model_folder, model_checksum
from bigdssm.config import ScorerConfig, StageName, load_written_config
from bigdssm.dataset.cache import Cache
from bigdssm.dataset.dataset import Dataset
from bigdssm.errors import CheckpointError
from bigdssm.models import Scorer, new_model

BEST = "best"


def load_checkpoint_model(path: Path, scorer: ScorerConfig | None = None) -> ModelFolder:
    """Return the model of the checkpoint `path` in a stage's folder, with a new `scorer` where given.

    Raises CheckpointError where it is damaged, or has a scorer of its own where a new one is given.
    """
    stage_dir = path.parent.parent
    state = consolidated_state_dict(path)
    own = bool(Scorer.named(state))
    if is_model_folder(stage_dir / BEST):  # knows schema and architecture even where the dataset has gone
        folder = load_model_folder(stage_dir / BEST, scorer=None if own else scorer)
        model, config, schema, tokenizer_dir = folder.model, folder.config, folder.schema, folder.tokenizer_dir
    elif not (stage_dir / CONFIG_FILE).is_file():
        raise CheckpointError(
            f"{path} has only the weights: what model they are of stands in {stage_dir}, which has neither {BEST}/ nor "
            f"{CONFIG_FILE}; copy one of them too"
        )
    else:
        config = load_written_config(stage_dir / CONFIG_FILE)
        dataset = Dataset.open(config.data.dir, cache=Cache.of(config.data))
        schema, tokenizer_dir = dataset.schema, dataset.tokenizer_dir
        trained = config.stage(cast(StageName, stage_dir.name)).loss.scorer if own else scorer
        model = new_model(config.model, schema, dataset.pad_token_id, dataset.vocab_size, trained)
    try:
        (model.load_state_dict if own and scorer is None else model.load_towers)(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"the weights in {path} do not fit the stage's config and schema: {reason}") from None
    provenance = {"stage": stage_dir.name, "checkpoint": path.name}
    checksum = model_checksum(model, config, schema, tokenizer_dir, provenance)
    return ModelFolder(model.eval(), config, schema, tokenizer_dir, provenance, checksum)
