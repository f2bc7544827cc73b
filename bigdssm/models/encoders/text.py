"""Text encoders of a model: their base class, and which of them encodes the texts of which side."""

from __future__ import annotations

from typing import Any

from bigdssm.config import ModelConfig, TextEncoderConfig, TextInputs
from bigdssm.dataset.schema import Schema
from bigdssm.features import Text, texts_of
from bigdssm.models.encoders.base import Encoder, Parts, encodes


@encodes(Text)
class TextEncoder(Encoder):
    """Token ids [R, T], padded at the end with `pad_token_id`, → [R, dim]; built by a `TextEncoderConfig`.

    A subclass has `forward`, and `flops` where it does more than linear layers over each row's vector. One with
    transformer layers names them in `transformer_layers` and calls them by `run_layer`. One that takes packed texts,
    too, says so in `packs`.
    """

    is_pretrained_part = True

    def __init__(self, architecture: Any, dim: int, pad_token_id: int) -> None:
        super().__init__()
        self.architecture = architecture  # that it was built from; written with the model
        self.dim, self.pad_token_id = dim, pad_token_id

    @classmethod
    def build(cls, feature: Text, parts: Parts) -> TextEncoder:
        """Return the model's own encoder of the side's texts."""
        assert isinstance(parts.text, TextEncoder), "a schema with text has a text encoder"
        return parts.text


def text_keys(config: ModelConfig, schema: Schema) -> dict[str, str]:
    """Return the name of the text encoder of each side that has texts: its own, or the one that both share."""
    sides = [side for side, features in schema.sides.items() if texts_of(features)]
    return {side: "shared" if config.share_text or schema.siamese else side for side in sides}


def text_configs(config: ModelConfig, schema: Schema) -> dict[str, TextEncoderConfig]:
    """Return the config of each text encoder by its name: of a shared one the query's, in a shared tower the doc's."""
    configs: dict[str, TextEncoderConfig] = {}
    for side, key in text_keys(config, schema).items():
        configs.setdefault(key, getattr(config, "doc" if schema.siamese else side).text)
    return configs


def text_architectures(config: ModelConfig, schema: Schema, pad_token_id: int, vocab_size: int) -> dict[str, Any]:
    """Return the architecture of each text encoder that the config asks for, by its name in the model.

    `vocab_size` is the tokenizer's. Raises ConfigError: a folder of `init` that does not fit.
    """
    keys, made = text_keys(config, schema), {}
    for key, text in text_configs(config, schema).items():
        read = [feature for side in keys if keys[side] == key for feature in texts_of(schema.sides[side]).values()]
        longest = max(feature.max_tokens for feature in read)
        made[key] = text.architecture(TextInputs(vocab_size, pad_token_id, longest))
    return made
