"""The text encoder `bert`, of transformers: architectures, pretrained weights, attention over packed texts."""

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

from bigdssm.config import TextInputs
from bigdssm.errors import ConfigError
from bigdssm.models.encoders.base import SideSize, linear_flops, packs_heads
from bigdssm.models.encoders.text import TextEncoder
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


class BertEncoder(TextEncoder):
    """A BERT and its pooling, with new weights."""

    def __init__(self, architecture: PretrainedConfig, pooling: Literal["mean", "cls"]) -> None:
        super().__init__(architecture, architecture.hidden_size, int(architecture.pad_token_id or 0))
        self.pooling = pooling
        self.attention_otherwise: str | None = None  # where attention is plain in training
        self.bert = new_bert(architecture)
        self.architecture = self.bert.config  # which may be a copy

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

    def train(self, mode: bool = True) -> BertEncoder:
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


def pretrained_encoder(
    folder: str, vocab_size: int = 0, pad_token_id: int | None = None, keep_layers: int = 0
) -> BertEncoder:
    """Return the encoder of a folder, mean-pooled. Raises ConfigError: see `pretrained_architecture`."""
    encoder = BertEncoder(pretrained_architecture(folder, vocab_size, pad_token_id, keep_layers), "mean")
    load_pretrained(encoder, folder)
    return encoder


def load_pretrained(encoder: BertEncoder, folder: str) -> None:
    """Give an encoder the weights of a folder. Raises ConfigError: they do not load."""
    try:
        model = AutoModel.from_pretrained(
            folder, config=encoder.bert.config, local_files_only=True, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"text.init={folder} does not load as a Hugging Face model: {error}") from None
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


def new_architecture(inputs: TextInputs, layers: int, hidden: int, heads: int, dropout: float) -> BertConfig:
    """Return the architecture of a BERT that begins with new weights."""
    return BertConfig(
        vocab_size=inputs.vocab_size,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        max_position_embeddings=max(inputs.max_tokens, 8),
        pad_token_id=inputs.pad_token_id,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )


def pretrained_architecture(
    folder: str, vocab_size: int = 0, pad_token_id: int | None = None, keep_layers: int = 0, dropout: float = 0.0
) -> PretrainedConfig:
    """Return the architecture of the Hugging Face model in `folder`, with these layers (0: all) and this dropout.

    Raises ConfigError: it is no such folder, or has too few layers or words.
    """
    if not os.path.isdir(folder):
        raise ConfigError(f"text.init={folder} is not a folder; it takes the local folder of a Hugging Face BERT")
    try:
        if not list(Path(folder).glob("*.safetensors")):
            raise OSError("it has no *.safetensors, the one format of weights that is read")
        architecture = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"text.init={folder} does not load as a Hugging Face model: {error}") from None
    has = getattr(architecture, "num_hidden_layers", 0)
    if keep_layers > has:
        raise ConfigError(f"text.keep_layers={keep_layers}, but text.init={folder} has {has} layers")
    if architecture.vocab_size < vocab_size:
        raise ConfigError(
            f"text.init={folder} has {architecture.vocab_size} word vectors, but the dataset's tokenizer "
            f"has {vocab_size} tokens; make the shards with data.tokenizer.path={folder}"
        )
    architecture.num_hidden_layers = keep_layers or has
    if pad_token_id is not None:
        architecture.pad_token_id = pad_token_id
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout"):
        if hasattr(architecture, name):
            setattr(architecture, name, dropout)
    return architecture
