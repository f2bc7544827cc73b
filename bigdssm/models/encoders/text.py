"""Text encoder (BERT): architecture from a config or a folder, pretrained weights, attention over packed texts."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModel,
    BertConfig,
    BertModel,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_layers import GradientCheckpointingLayer

from bigdssm.config import ModelConfig, TextEncoderConfig
from bigdssm.dataset.schema import Schema
from bigdssm.errors import ConfigError
from bigdssm.features import Text, texts_of
from bigdssm.models.encoders.base import Encoder, Parts, SideSize, encodes, linear_flops, packs_heads
from bigdssm.models.packed import Attention, Packed, SequenceBounds, Values

NAME = "bigdssm_packed"  # among the attentions of transformers: the usual one for padded texts
# What a padded call says of packing: torch.compile looks for all that any call had in every call.
PADDED: dict[str, Any] = {"packed_attention": None, "offsets": None, "longest": 0}


def run_packed_bert(bert: BertModel, texts: Packed, attention: Attention) -> Tensor:
    """Return the last hidden states, [P, H], of a BERT whose attention is `NAME`; positions are those in the text."""
    hidden: Tensor = bert(
        input_ids=texts.values.unsqueeze(0), position_ids=texts.place.unsqueeze(0), packed_attention=attention,
        **texts.spans._asdict(),
    ).last_hidden_state  # fmt: skip
    return hidden[0]


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float,
    dropout: float = 0.0, packed_attention: Attention | None = None, offsets: Tensor | None = None, longest: int = 0,
    **further: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Return [1, P, h, W] for [1, h, P, W] that are packed, else what scaled_dot_product_attention does.

    Which of them is said in the call, not in the BERT's config: activations that the backward computes again are then
    of the same kind.
    """
    if packed_attention is None or offsets is None:
        padded: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **further
        )
        return padded
    q, k, v = (part[0].transpose(0, 1) for part in (query, key, value))
    spans = SequenceBounds(offsets, longest)
    return packed_attention(q, k, v, spans, spans, scaling).unsqueeze(0), None


def _mask(attention_mask: Tensor | None = None, **further: Any) -> Tensor | None:
    """Return no mask for packed texts, which bring none."""
    if attention_mask is None:
        return None
    mask: Tensor | None = sdpa_mask(attention_mask=attention_mask, **further)
    return mask


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, _mask)


@encodes(Text)
class TextEncoder(Encoder):
    """A BERT and its pooling, with new weights."""

    is_pretrained_part = True

    def __init__(self, architecture: PretrainedConfig, pooling: Literal["mean", "cls"]) -> None:
        super().__init__()
        self.pooling = pooling
        self.attention_otherwise: str | None = None  # where attention is plain in training
        self.bert = new_bert(architecture)
        self.dim: int = architecture.hidden_size

    @classmethod
    def build(cls, feature: Text, parts: Parts) -> TextEncoder:
        """Return the model's own encoder of the side's texts."""
        assert isinstance(parts.text, TextEncoder), "a schema with text has a text encoder"
        return parts.text

    @property
    def pad_token_id(self) -> int:
        """Return the token that pads texts."""
        return int(self.bert.config.pad_token_id or 0)

    def transformer_layers(self) -> list[nn.Module]:
        """Return its layers: what transformers can checkpoint, of any architecture."""
        return [part for part in self.bert.modules() if isinstance(part, GradientCheckpointingLayer)]

    def checkpoint_activations(self) -> None:
        """Keep only the layers' inputs for the backward, which computes the rest again."""
        self.bert.config.use_cache = False  # there is none in an encoder, and transformers would warn of it
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # its new name is not in every transformers 5
            self.bert.gradient_checkpointing_enable({"use_reentrant": False})

    def use_plain_attention(self) -> None:
        """Multiply attention out in training."""
        if self.attention_otherwise is None:
            self.attention_otherwise = self.bert.config._attn_implementation
            self.train(self.training)

    def use_packing(self, attention: Attention) -> None:
        """Take packed texts, where it can."""
        super().use_packing(attention)
        if isinstance(self.bert, BertModel):
            self.bert.set_attn_implementation(NAME)

    def train(self, mode: bool = True) -> TextEncoder:
        """Train or evaluate, with the attention that is faster at it where that differs."""
        super().train(mode)
        if self.attention_otherwise is not None:
            self.bert.set_attn_implementation("eager" if mode else self.attention_otherwise)
        return self

    def packs(self, training: bool) -> bool:
        """Return whether packed texts can be attended over: by a BERT, without dropout of attention."""
        config = self.bert.config
        return (
            self.packed_attention is not None
            and isinstance(self.bert, BertModel)
            and packs_heads(self.dim, config.num_attention_heads)
            and not (training and config.attention_probs_dropout_prob > 0)
        )

    def forward(self, tokens: Values) -> Tensor:
        """Return [R, H] for token ids [R, T], padded at the end, or packed."""
        return self._packed(tokens) if isinstance(tokens, Packed) else self.pooled(tokens)

    def pooled(self, tokens_RT: Tensor, types_RT: Tensor | None = None) -> Tensor:
        """Return [R, H] for token ids [R, T], padded at the end, and their token types, by default 0 of each."""
        mask_RT = tokens_RT != self.pad_token_id
        further = PADDED if self.bert.config._attn_implementation == NAME else {}
        if types_RT is not None:
            further = {**further, "token_type_ids": types_RT}
        mask = self._attention_mask(mask_RT)
        hidden: Tensor = self.bert(input_ids=tokens_RT, attention_mask=mask, **further).last_hidden_state
        if self.pooling == "cls":
            return hidden[:, 0]
        weight = mask_RT.unsqueeze(2).to(hidden.dtype)
        return (hidden * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)

    def _attention_mask(self, mask_RT: Tensor) -> Tensor:
        """Return the mask as a BERT's layers take it: of one of two dimensions it would ask a device what is in it."""
        attention = self.bert.config._attn_implementation
        if not isinstance(self.bert, BertModel) or attention not in ("sdpa", "eager", NAME):
            return mask_RT.long()
        mask = mask_RT[:, None, None, :].expand(-1, 1, mask_RT.shape[1], -1)
        if attention != "eager":
            return mask
        dtype = self.bert.embeddings.word_embeddings.weight.dtype
        return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)

    def _packed(self, tokens: Packed) -> Tensor:
        """Return zeros for a text without a token, whose padded vector depends on the kernel of attention."""
        assert self.packed_attention is not None
        hidden: Tensor = run_packed_bert(self.bert, tokens, self.packed_attention)
        offsets = tokens.spans.offsets.long()
        if self.pooling == "mean":
            sums = torch.segment_reduce(hidden, "sum", offsets=offsets, unsafe=True, initial=0)
            return sums / tokens.lengths.clamp(min=1).to(hidden.dtype).unsqueeze(1)
        first = hidden[offsets[:-1].clamp(max=len(hidden) - 1)]
        return first.masked_fill((tokens.lengths == 0).unsqueeze(1), 0)

    def flops(self, name: str, size: SideSize) -> float:
        """Return the operations of a forward: a token's linear layers, and attention over each text's own tokens."""
        length_R = size.filled[name].astype(float)
        attention = float((length_R**2).sum()) * self.bert.config.num_hidden_layers * 4 * self.dim
        return float(length_R.sum()) * linear_flops(self) + attention


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


def text_architectures(
    config: ModelConfig, schema: Schema, pad_token_id: int, vocab_size: int
) -> dict[str, PretrainedConfig]:
    """Return the architecture of each text encoder that the config asks for, by its name in the model.

    `vocab_size` is the tokenizer's. Raises ConfigError: a folder of `init` that does not fit.
    """
    keys, made = text_keys(config, schema), {}
    for key, text in text_configs(config, schema).items():
        read = [feature for side in keys if keys[side] == key for feature in texts_of(schema.sides[side]).values()]
        longest = max(feature.max_tokens for feature in read)
        if text.init is None:
            made[key] = _small_bert(text, vocab_size, pad_token_id, longest)
        else:
            made[key] = pretrained_architecture(text, vocab_size, pad_token_id)
    return made


def pretrained_encoder(config: TextEncoderConfig, vocab_size: int = 0, pad_token_id: int | None = None) -> TextEncoder:
    """Return the encoder of the folder that `config.init` names. Raises ConfigError: see `pretrained_architecture`."""
    encoder = TextEncoder(pretrained_architecture(config, vocab_size, pad_token_id), config.pooling)
    load_pretrained(encoder, config)
    return encoder


def load_pretrained(encoder: TextEncoder, config: TextEncoderConfig) -> None:
    """Give an encoder the weights of the folder that `config.init` names. Raises ConfigError: they do not load."""
    try:
        model = AutoModel.from_pretrained(
            config.init, config=encoder.bert.config, local_files_only=True, use_safetensors=True,
            trust_remote_code=False,
        )  # fmt: skip
    except (OSError, ValueError) as error:
        raise ConfigError(f"text.init={config.init} does not load as a Hugging Face model: {error}") from None
    if hasattr(model, "pooler"):
        model.pooler = None
    encoder.bert.load_state_dict(model.state_dict())


def new_bert(architecture: PretrainedConfig) -> PreTrainedModel:
    """Return a BERT with new weights, without the pooler: neither pooling uses it, and ZeRO wants a gradient of all."""
    if isinstance(architecture, BertConfig):
        return BertModel(architecture, add_pooling_layer=False)
    model: PreTrainedModel = AutoModel.from_config(architecture, trust_remote_code=False)
    model.pooler = None
    return model


def _small_bert(config: TextEncoderConfig, vocab_size: int, pad_token_id: int, max_tokens: int) -> BertConfig:
    if config.hidden % config.heads:
        raise ConfigError(f"text.hidden={config.hidden} must be divisible by text.heads={config.heads}")
    return BertConfig(
        vocab_size=vocab_size,
        hidden_size=config.hidden,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        intermediate_size=4 * config.hidden,
        max_position_embeddings=max(max_tokens, 8),
        pad_token_id=pad_token_id,
        hidden_dropout_prob=config.dropout,
        attention_probs_dropout_prob=config.dropout,
    )


def pretrained_architecture(
    config: TextEncoderConfig, vocab_size: int = 0, pad_token_id: int | None = None
) -> PretrainedConfig:
    """Return the architecture of the Hugging Face model in `config.init`, with the layers and dropout of `config`.

    Raises ConfigError: it is no such folder, or has too few layers or words.
    """
    folder = str(config.init)
    if not os.path.isdir(folder):
        raise ConfigError(f"text.init={folder} is not a folder; it takes the local folder of a Hugging Face BERT")
    try:
        if not list(Path(folder).glob("*.safetensors")):
            raise OSError("it has no *.safetensors, the one format of weights that is read")
        architecture = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"text.init={folder} does not load as a Hugging Face model: {error}") from None
    has = getattr(architecture, "num_hidden_layers", 0)
    if config.keep_layers > has:
        raise ConfigError(f"text.keep_layers={config.keep_layers}, but text.init={folder} has {has} layers")
    if architecture.vocab_size < vocab_size:
        raise ConfigError(
            f"text.init={folder} has {architecture.vocab_size} word vectors, but the dataset's tokenizer "
            f"has {vocab_size} tokens; make the shards with data.tokenizer.path={folder}"
        )
    architecture.num_hidden_layers = config.keep_layers or has
    if pad_token_id is not None:
        architecture.pad_token_id = pad_token_id
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout"):
        if hasattr(architecture, name):
            setattr(architecture, name, config.dropout)
    return architecture
