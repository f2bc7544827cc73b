"""Text encoders: their base class, and their assignment to the sides of a model."""

from typing import Any, Literal, cast

import torch
from torch import Tensor

from bigdssm.config import ModelConfig, TextEncoderConfig, TextInputs
from bigdssm.dataset.schema import Schema
from bigdssm.features import Text, texts_of
from bigdssm.models.encoders.base import BuildContext, Encoder, SideSize, encodes
from bigdssm.models.packed import Values

Pooling = Literal["mean", "cls", "last"]


@encodes(Text)
class TextEncoder(Encoder):
    """Token ids [R, T], padded at the end with -1, → [R, dim]; built by a `TextEncoderConfig`.

    A subclass implements `forward`, and overrides `flops` if it does more than linear layers per row. It returns its
    transformer layers from `transformer_layers` and calls them through `run_layer`. It overrides `accepts_packed` if it
    also takes packed texts.
    """

    is_shared = True

    def __init__(self, architecture: Any, dim: int) -> None:
        super().__init__()
        self.architecture = architecture  # saved with the model
        self.dim = dim

    @classmethod
    def build(cls, feature: Text, context: BuildContext) -> Encoder:
        """Return the model's text encoder of the side."""
        assert isinstance(context.text, TextEncoder), "a schema with text has a text encoder"
        return _AfterPrompt(context.text, feature.prompt_tokens) if feature.prompt_tokens else context.text


class _AfterPrompt(Encoder):
    """A text encoder that does not pool the first `skip` tokens, those of a prompt."""

    is_shared = True

    def __init__(self, text: TextEncoder, skip: int) -> None:
        super().__init__()
        self.dim, self.skip, self._text = text.dim, skip, (text,)  # not a module of this one

    def forward(self, tokens: Values) -> Tensor:
        return cast(Tensor, self._text[0](tokens, skip=self.skip))

    def accepts_packed(self, training: bool) -> bool:
        return self._text[0].accepts_packed(training)

    def flops(self, name: str, size: SideSize) -> float:
        return self._text[0].flops(name, size)


def pool(hidden_RTH: Tensor, mask_RT: Tensor, pooling: Pooling) -> Tensor:
    """Return [R, H]: the mean over the tokens of a mask (zeros without any), or the first or last one of them."""
    mask_RT = mask_RT.bool()
    if pooling == "mean":
        weight = mask_RT.unsqueeze(2).to(hidden_RTH.dtype)
        return (hidden_RTH * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)
    position_T = torch.arange(mask_RT.shape[1], device=mask_RT.device)
    # padding may be on either side
    chosen_R = mask_RT.int().argmax(1) if pooling == "cls" else torch.where(mask_RT, position_T, 0).amax(1)
    return hidden_RTH[torch.arange(hidden_RTH.shape[0], device=hidden_RTH.device), chosen_R]


def text_keys(config: ModelConfig, schema: Schema) -> dict[str, str]:
    """Return the name of the text encoder by side with text features: the side's, or `shared`."""
    sides = [side for side, features in schema.sides.items() if texts_of(features)]
    return {side: "shared" if config.share_text or schema.siamese else side for side in sides}


def text_configs(config: ModelConfig, schema: Schema) -> dict[str, TextEncoderConfig]:
    """Return the config by text encoder: a shared encoder has the query's, a shared tower the document's."""
    configs: dict[str, TextEncoderConfig] = {}
    for side, key in text_keys(config, schema).items():
        configs.setdefault(key, getattr(config, "doc" if schema.siamese else side).text)
    return configs


def text_architectures(config: ModelConfig, schema: Schema, vocab_size: int) -> dict[str, Any]:
    """Return the architecture by text encoder of the model.

    `vocab_size` is the tokenizer's. Raises ConfigError: an `init` folder that does not fit.
    """
    keys, architectures = text_keys(config, schema), {}
    for key, text in text_configs(config, schema).items():
        read = [feature for side in keys if keys[side] == key for feature in texts_of(schema.sides[side]).values()]
        longest = max(feature.max_tokens for feature in read)
        architectures[key] = text.architecture(TextInputs(vocab_size, longest))
    return architectures
