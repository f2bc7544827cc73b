"""From what a stage saved to a model folder."""

from __future__ import annotations

from pathlib import Path

from bigdssm.checkpoint import consolidated_state_dict, find
from bigdssm.config import load_config
from bigdssm.data import Dataset
from bigdssm.data.cache import Cache
from bigdssm.errors import CheckpointError
from bigdssm.export.model_folder import CONFIG_FILE, is_model_folder, load_model_folder, save_model_folder
from bigdssm.models import DualEncoder

BEST = "best"


def convert_stage(stage_dir: Path, which: str, out: Path) -> str:
    """Write the model folder `out` from a stage's `best`, `latest` or `step-…` weights, and return what was taken.

    Checkpoints may be of any ZeRO stage and world size. Raises CheckpointError: no such weights, or damaged ones.
    """
    best = stage_dir / BEST
    if which == BEST:
        if not is_model_folder(best):
            raise CheckpointError(f"{stage_dir} has no {BEST}/ folder; has the stage validated or finished yet?")
        folder = load_model_folder(best)
        save_model_folder(out, folder.model, folder.config, folder.schema, folder.tokenizer_dir, folder.provenance)
        return BEST
    path = find(stage_dir, which)
    state = consolidated_state_dict(path)
    if is_model_folder(best):  # knows schema and architecture even where the dataset has gone
        folder = load_model_folder(best)
        model, config, schema, tokenizer_dir = folder.model, folder.config, folder.schema, folder.tokenizer_dir
    else:
        config = load_config(stage_dir / CONFIG_FILE)
        dataset = Dataset.open(config.data.dir, cache=Cache.of(config.data))
        schema, tokenizer_dir = dataset.schema, dataset.tokenizer_dir
        model = DualEncoder(config.model, schema, dataset.pad_token_id, dataset.vocab_size)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"the weights in {path} do not fit the stage's config and schema: {reason}") from None
    provenance = {"stage": stage_dir.name, "checkpoint": path.name}
    save_model_folder(out, model, config, schema, tokenizer_dir, provenance)
    return path.name
