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
from bigdssm.models.encoders.base import SideSize, linear_flops, supports_head_width
from bigdssm.models.encoders.text import TextEncoder, masked_mean
from bigdssm.models.packed import Attention, Packed, SequenceBounds, Values

NAME = "bigdssm_packed"  # registered attention of transformers; for padded texts it is the default one
# Packing arguments of a padded call: torch.compile specializes on the set of arguments of a call.
PADDED: dict[str, Any] = {"packed_attention": None, "offsets": None, "longest": 0}


def run_packed_bert(bert: BertModel, texts: Packed, attention: Attention) -> Tensor:
    """Return the last hidden states, [P, H], of a BERT whose attention is `NAME`."""
    hidden: Tensor = bert(
        input_ids=texts.values.unsqueeze(0), position_ids=texts.position.unsqueeze(0), packed_attention=attention,
        **texts.bounds._asdict(),
    ).last_hidden_state  # fmt: skip
    return hidden[0]


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float,
    dropout: float = 0.0, packed_attention: Attention | None = None, offsets: Tensor | None = None, longest: int = 0,
    **further: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Return [1, P, h, W] for packed [1, h, P, W], else call scaled_dot_product_attention.

    Packing is an argument of the call and not in the BERT's config, so that recomputed activations use the same kind.
    """
    if packed_attention is None or offsets is None:
        padded: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **further
        )
        return padded
    q, k, v = (part[0].transpose(0, 1) for part in (query, key, value))
    bounds = SequenceBounds(offsets, longest)
    return packed_attention(q, k, v, bounds, bounds, scaling).unsqueeze(0), None


def _mask(attention_mask: Tensor | None = None, **further: Any) -> Tensor | None:
    """Return the SDPA mask, or None for packed texts."""
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
        self.default_attention: str | None = None  # set if attention is eager in training
        self.bert = new_bert(architecture)
        self.architecture = self.bert.config  # may be a copy

    def transformer_layers(self) -> list[nn.Module]:
        """Return the layers that transformers can checkpoint, for any architecture."""
        return [part for part in self.bert.modules() if isinstance(part, GradientCheckpointingLayer)]

    def checkpoint_activations(self) -> None:
        """Keep only the layers' inputs for the backward, which recomputes the rest."""
        self.bert.config.use_cache = False  # avoids a warning; an encoder has no cache
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # its new name is not in every transformers 5
            self.bert.gradient_checkpointing_enable({"use_reentrant": False})

    def use_eager_attention(self) -> None:
        """Use eager attention in training."""
        if self.default_attention is None:
            self.default_attention = self.bert.config._attn_implementation
            self.train(self.training)

    def use_packing(self, attention: Attention) -> None:
        """Accept packed texts, if the architecture is a BERT."""
        super().use_packing(attention)
        if isinstance(self.bert, BertModel):
            self.bert.set_attn_implementation(NAME)

    def train(self, mode: bool = True) -> BertEncoder:
        """Set the mode, and the attention that is faster in it."""
        super().train(mode)
        if self.default_attention is not None:
            self.bert.set_attn_implementation("eager" if mode else self.default_attention)
        return self

    def accepts_packed(self, training: bool) -> bool:
        """Return whether texts may be packed: a kernel, a BERT, a supported head width, no attention dropout."""
        config = self.bert.config
        return (
            self.packed_attention is not None
            and isinstance(self.bert, BertModel)
            and supports_head_width(self.dim, config.num_attention_heads)
            and not (training and config.attention_probs_dropout_prob > 0)
        )

    def forward(self, tokens: Values) -> Tensor:
        """Return [R, H] for token ids [R, T], padded at the end, or packed."""
        return self._packed(tokens) if isinstance(tokens, Packed) else self.pooled(tokens)

    def pooled(self, tokens_RT: Tensor, types_RT: Tensor | None = None) -> Tensor:
        """Return [R, H] for token ids [R, T], padded at the end, and their token types, by default 0."""
        mask_RT = tokens_RT != self.pad_token_id
        further = PADDED if self.bert.config._attn_implementation == NAME else {}
        if types_RT is not None:
            further = {**further, "token_type_ids": types_RT}
        mask = self._attention_mask(mask_RT)
        hidden: Tensor = self.bert(input_ids=tokens_RT, attention_mask=mask, **further).last_hidden_state
        if self.pooling == "cls":
            return hidden[:, 0]
        return masked_mean(hidden, mask_RT)

    def _attention_mask(self, mask_RT: Tensor) -> Tensor:
        """Return the mask in the form of BERT's layers: a mask of two dimensions would be read from the device."""
        attention = self.bert.config._attn_implementation
        if not isinstance(self.bert, BertModel) or attention not in ("sdpa", "eager", NAME):
            return mask_RT.long()
        mask = mask_RT[:, None, None, :].expand(-1, 1, mask_RT.shape[1], -1)
        if attention != "eager":
            return mask
        dtype = self.bert.embeddings.word_embeddings.weight.dtype
        return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)

    def _packed(self, tokens: Packed) -> Tensor:
        """Return [R, H]; zeros for a text without tokens, whose padded vector would depend on the attention kernel."""
        assert self.packed_attention is not None
        hidden: Tensor = run_packed_bert(self.bert, tokens, self.packed_attention)
        offsets = tokens.bounds.offsets.long()
        if self.pooling == "mean":
            sums = torch.segment_reduce(hidden, "sum", offsets=offsets, unsafe=True, initial=0)
            return sums / tokens.lengths.clamp(min=1).to(hidden.dtype).unsqueeze(1)
        first = hidden[offsets[:-1].clamp(max=len(hidden) - 1)]
        return first.masked_fill((tokens.lengths == 0).unsqueeze(1), 0)

    def flops(self, name: str, size: SideSize) -> float:
        """Return the operations of a forward: linear layers per token, and attention within each text."""
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
    """Load the weights of a folder into an encoder. Raises ConfigError: they do not load."""
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
    """Return a BERT with new weights, without the unused pooler: ZeRO requires a gradient for each parameter."""
    if isinstance(architecture, BertConfig):
        return BertModel(architecture, add_pooling_layer=False)
    model: PreTrainedModel = AutoModel.from_config(architecture, trust_remote_code=False)
    model.pooler = None
    return model


def new_architecture(inputs: TextInputs, layers: int, hidden: int, heads: int, dropout: float) -> BertConfig:
    """Return the architecture of a BERT that is trained from scratch."""
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
    """Return the architecture of the Hugging Face model in `folder`, with `keep_layers` layers (0: all) and `dropout`.

    Raises ConfigError: not a model folder, or too few layers or word vectors.
    """
    if not os.path.isdir(folder):
        raise ConfigError(f"text.init={folder} is not a folder; set it to the local folder of a Hugging Face BERT")
    try:
        if not list(Path(folder).glob("*.safetensors")):
            raise OSError("it has no *.safetensors, the only supported format of weights")
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
