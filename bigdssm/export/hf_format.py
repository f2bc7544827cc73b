"""`--format hf`: for each tower a BERT and tokenizer for AutoModel and AutoTokenizer, and its projection.

OUT/query/, OUT/document/   config.json, model.safetensors, tokenizer files; projection.safetensors, projection.json
"""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from bigdssm.checkpoints.model_folder import ModelFolder
from bigdssm.export.formats import Parity, Probe, largest_difference
from bigdssm.export.hf_loading import load_tower
from bigdssm.export.text_tower import (
    TextTower,
    alpha,
    beta_of_all,
    beta_weight,
    loading_arguments,
    save_encoder,
    text_towers,
)
from bigdssm.utils.atomic import write_json

FOLDERS = {"query": "query", "doc": "document"}


def write_hf(model: ModelFolder, out: Path) -> Parity:
    """Write both towers into the folder `out` and return how their vectors compare with the trainer's.

    Raises ConfigError where a tower reads more than one text.
    """
    assert model.tokenizer_dir is not None
    differences = {}
    probe = Probe(model)
    for tower in text_towers(model, "hf"):
        folder = out / FOLDERS[tower.side]
        save_encoder(tower, model.tokenizer_dir, folder)
        _write_projection(model, tower, folder)
        vectors = load_tower(folder)(probe.only_text(tower.side))
        differences[tower.side] = largest_difference(vectors, probe.vectors[tower.side])
    return Parity(differences["query"], differences["doc"])


def _write_projection(model: ModelFolder, tower: TextTower, folder: Path) -> None:
    weights: dict[str, Tensor] = {}
    for number, layer in enumerate(tower.layers):
        weights[f"layers.{number}.weight"] = layer.linear.weight.detach().contiguous()
        weights[f"layers.{number}.bias"] = layer.linear.bias.detach().contiguous()
    beta = beta_weight(model)
    if tower.side == "doc" and beta is not None:
        weights["beta"] = beta.contiguous()
    save_file(weights, folder / "projection.safetensors", metadata={"format": "pt"})
    head = {
        "side": tower.side,
        "max_tokens": tower.max_tokens,
        "pooling": tower.encoder.pooling,
        "gelu_after_layer": [layer.gelu for layer in tower.layers],
        "score": model.config.model.score,
        "alpha": alpha(model),
        "beta": beta_of_all(model),  # unless each document has its own
        "loading_arguments": loading_arguments(tower),
    }
    write_json(folder / "projection.json", head)
