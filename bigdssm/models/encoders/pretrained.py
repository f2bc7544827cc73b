"""Pretrained text encoders: folders of transformers and sentence-transformers, by path or by name on the Hub."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from bigdssm.config import TextInputs
from bigdssm.errors import ConfigError
from bigdssm.features.tokenizer import locate
from bigdssm.models.encoders.transformer import (
    ACTIVATIONS,
    TransformerEncoder,
    first_position,
    head_of,
    new_transformer,
    without_pooler,
)

POOLINGS = {"mean": "mean", "cls": "cls", "lasttoken": "last"}
LEGACY = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls", "pooling_mode_lasttoken": "lasttoken"}
DROPOUTS = (
    "hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout", "embedding_dropout",
    "mlp_dropout",
)  # fmt: skip


class PretrainedFolder:
    """A folder of a Hugging Face model, with the modules of sentence-transformers if it has any."""

    def __init__(self, name: str) -> None:
        """Raises ConfigError: no such model, or a module that is not supported."""
        self.name, self.path = name, locate(name)
        # class names and folders of the modules: Transformer, Pooling, then Dense and Normalize
        modules = [("Transformer", self.path)]
        if (self.path / "modules.json").is_file():
            modules = [(str(m["type"]).rpartition(".")[2], self.path / m["path"]) for m in self._json("modules.json")]
            kinds = [kind for kind, _ in modules]
            rest = kinds[2:-1] if kinds[-1] == "Normalize" else kinds[2:]
            if kinds[:2] != ["Transformer", "Pooling"] or set(rest) - {"Dense"}:
                raise ConfigError(
                    f"text.init={self.name} has the modules {', '.join(kinds)}, needs Transformer, Pooling, any number "
                    "of Dense, and Normalize or nothing"
                )
        self.transformer = modules[0][1]  # folder of the config and weights
        self.dense = [folder for kind, folder in modules if kind == "Dense"]
        self.normalize = modules[-1][0] == "Normalize"
        self._pooling = modules[1][1] if len(modules) > 1 else None

    def pooling(self, architecture: PretrainedConfig) -> str:
        """Return the folder's pooling; without one, `last` for a decoder and `mean` for an encoder."""
        if self._pooling is None:
            family = architecture.model_type
            is_decoder = (
                family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and family not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
            ) or family.endswith("_text")
            return "last" if is_decoder else "mean"
        content = self._json(self._pooling.relative_to(self.path) / "config.json")
        mode = content.get("pooling_mode")
        modes = [mode] if isinstance(mode, str) else list(mode or [])
        modes = modes or [LEGACY.get(key, key) for key, on in content.items() if key.startswith("pooling_mode") and on]
        if len(modes) != 1 or modes[0] not in POOLINGS:
            raise ConfigError(f"text.init={self.name} pools by {modes}, needs one of {sorted(POOLINGS)}")
        return POOLINGS[modes[0]]

    def layers(self) -> list[dict[str, Any]]:
        """Return its Dense modules, as for `head_of`. Raises ConfigError: an activation that is not supported."""
        layers = []
        for folder in self.dense:
            content = self._json(folder.relative_to(self.path) / "config.json")
            activation = str(content.get("activation_function", "Tanh")).rpartition(".")[2]
            if activation not in ACTIVATIONS:
                raise ConfigError(
                    f"text.init={self.name} has a Dense module with {activation}, needs one of {sorted(ACTIVATIONS)}"
                )
            bias = bool(content.get("bias", True))
            layers.append({"width": int(content["out_features"]), "bias": bias, "activation": activation})
        return layers

    def architecture(self) -> PretrainedConfig:
        """Return the transformer's config. Raises ConfigError: not a supported model."""
        try:
            if not list(self.transformer.glob("*.safetensors")):
                raise OSError("it has no *.safetensors, the only supported format of weights")
            architecture = AutoConfig.from_pretrained(self.transformer, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError) as error:
            carries_code = "auto_map" in self._json(self.transformer.relative_to(self.path) / "config.json", {})
            reason = "it needs the code that it carries, which is never run" if carries_code else str(error)
            raise ConfigError(f"text.init={self.name} does not load as a Hugging Face model: {reason}") from None
        if getattr(architecture, "is_encoder_decoder", False) or not hasattr(architecture, "hidden_size"):
            raise ConfigError(
                f"text.init={self.name} is of the family {architecture.model_type}, needs an encoder or a decoder of "
                "texts alone"
            )
        return architecture

    def _json(self, file: str | Path, otherwise: Any = None) -> Any:
        try:
            return json.loads((self.path / file).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            if otherwise is not None:
                return otherwise
            raise ConfigError(f"text.init={self.name}: {file} is not readable: {error}") from None


def pretrained_encoder(folder: str) -> TransformerEncoder:
    """Return the encoder of a folder. Raises ConfigError: see `pretrained_architecture`."""
    return build_pretrained(pretrained_architecture(folder), folder)


def pretrained_architecture(
    name: str, inputs: TextInputs | None = None, *, keep_layers: int = 0, dropout: float = 0.0, pooling: str = "auto"
) -> PretrainedConfig:
    """Return the architecture of a pretrained model, with `keep_layers` layers (0: all), `dropout` and `pooling`.

    Raises ConfigError: not a supported model, or too few layers, word vectors or positions.
    """
    folder = PretrainedFolder(name)
    architecture = folder.architecture()
    num_layers = int(getattr(architecture, "num_hidden_layers", 0))
    if keep_layers > num_layers:
        raise ConfigError(f"text.keep_layers={keep_layers}, but text.init={name} has {num_layers} layers")
    if inputs is not None and architecture.vocab_size < inputs.vocab_size:
        raise ConfigError(
            f"text.init={name} has {architecture.vocab_size} word vectors, but the dataset's tokenizer "
            f"has {inputs.vocab_size} tokens; make the shards with data.tokenizer.path={name}"
        )
    if inputs is not None:
        with torch.device("meta"):
            model = new_transformer(architecture)
        learned = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
        positions = math.inf if learned is None else learned.num_embeddings - first_position(model)
        if positions < inputs.max_tokens:
            raise ConfigError(
                f"text.init={name} has {positions} positions, but the longest text feature has max_tokens: "
                f"{inputs.max_tokens}; lower it and make the shards again"
            )
    architecture.num_hidden_layers = keep_layers or num_layers
    if getattr(architecture, "layer_types", None):
        architecture.layer_types = architecture.layer_types[: architecture.num_hidden_layers]
    for key in DROPOUTS:
        if hasattr(architecture, key):
            setattr(architecture, key, dropout)
    pooling = folder.pooling(architecture) if pooling == "auto" else pooling
    architecture.bigdssm = head_of(pooling, folder.layers(), folder.normalize)
    return architecture


def build_pretrained(architecture: PretrainedConfig, name: str) -> TransformerEncoder:
    """Return an encoder with the weights of a pretrained model. Raises ConfigError: they do not load."""
    folder = PretrainedFolder(name)
    try:
        model = AutoModel.from_pretrained(
            folder.transformer, config=architecture, local_files_only=True, use_safetensors=True,
            trust_remote_code=False, dtype=torch.float32,
        )  # fmt: skip
        encoder = TransformerEncoder(architecture, without_pooler(model))
        linear = [layer for layer in encoder.layers if isinstance(layer, torch.nn.Linear)]
        for layer, path in zip(linear, folder.dense, strict=True):
            state = load_file(path / "model.safetensors")
            layer.load_state_dict({key.removeprefix("linear."): tensor for key, tensor in state.items()})
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ConfigError(f"text.init={name} does not load as a Hugging Face model: {error}") from None
    return encoder
