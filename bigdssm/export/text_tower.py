"""Decompose a tower of exactly one text feature, for export formats limited to texts."""

import inspect
import json
import shutil
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from bigdssm.checkpoints.model_folder import ModelFolder
from bigdssm.errors import ConfigError
from bigdssm.features import Text, texts_of
from bigdssm.models.encoders import text_configs, text_keys
from bigdssm.models.encoders.transformer import ACTIVATIONS, TransformerEncoder
from bigdssm.utils.atomic import write_json

Side = Literal["query", "doc"]
SIDES: tuple[Side, Side] = ("query", "doc")


@dataclass(frozen=True)
class TextTower:
    """Text encoder → layers → vector."""

    side: Side
    feature: Text
    encoder: TransformerEncoder
    layers: list[tuple[nn.Linear, str]]  # of the encoder and the tower's MLP, with the name of the next activation
    normalized_after: int | None  # number of layers whose output is normalized


def text_towers(folder: ModelFolder, target: str) -> tuple[TextTower, TextTower]:
    """Return the query and the document tower. Raises ConfigError: a tower has features other than one text."""
    towers = []
    for side in SIDES:
        features = getattr(folder.schema, side)
        if len(features) != 1 or not texts_of(features):
            declared = ", ".join(f"{name} ({feature.type})" for name, feature in features.items())
            raise ConfigError(
                f"--format {target}: the {side} tower reads {declared}, needs exactly one text; use --format onnx, "
                "which supports any towers"
            )
        (feature,) = texts_of(features).values()
        tower = getattr(folder.model, f"{side}_tower")
        key = text_keys(folder.config.model, folder.schema)[side]
        encoder = folder.model.text[key]
        if not isinstance(encoder, TransformerEncoder):
            kind = text_configs(folder.config.model, folder.schema)[key].type
            raise ConfigError(
                f"--format {target}: the {side} tower's text encoder is {kind}, needs one of type transformer; use "
                "--format onnx, which supports any towers"
            )
        added = _layers(encoder.layers)
        normalized_after = len(added) if encoder.normalize else None
        towers.append(TextTower(side, feature, encoder, added + _layers(tower.mlp), normalized_after))
    return towers[0], towers[1]


def beta_weight(folder: ModelFolder) -> Tensor | None:
    """Return the weight float32 [1, D] of the per-document beta (a linear head), or None."""
    head = folder.model.beta_head
    return None if head is None else head.weight.detach()


def save_encoder(tower: TextTower, tokenizer_dir: Path, folder: Path) -> None:
    """Write the tower's transformer and tokenizer to a folder for AutoModel and AutoTokenizer."""
    model: Any = tower.encoder.transformer
    model.save_pretrained(folder)
    shutil.copytree(tokenizer_dir, folder, dirs_exist_ok=True)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["model_max_length"] = tower.feature.max_tokens
    settings["pad_token"] = settings.get("pad_token") or settings.get("eos_token")  # masked: any token will do
    write_json(path, settings)


def loading_arguments(tower: TextTower) -> dict[str, bool]:
    """Return arguments of `from_pretrained` that avoid an untrained pooler."""
    parameters = inspect.signature(type(tower.encoder.transformer)).parameters
    return {"add_pooling_layer": False} if "add_pooling_layer" in parameters else {}


def _layers(mlp: nn.Sequential | None) -> list[tuple[nn.Linear, str]]:
    modules = [module for module in mlp or () if not isinstance(module, nn.Dropout)]
    layers = []
    for module, following in zip_longest(modules, modules[1:]):
        name = type(following).__name__
        if isinstance(module, nn.Linear):
            layers.append((module, name if name in ACTIVATIONS else "Identity"))
        else:
            assert type(module).__name__ in ACTIVATIONS, f"no export of {type(module).__name__}"
    return layers
