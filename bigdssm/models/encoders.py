"""Encoders: one feature of one side → one vector per row.

Shapes: R rows, T tokens or history items, K values, E table width, H encoder width.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModel, BertConfig, BertModel, PreTrainedModel

from bigdssm.config import HistoryEncoderConfig, TextEncoderConfig
from bigdssm.errors import ConfigError
from bigdssm.models.tables import INIT_STD, EmbeddingTables
from bigdssm.schema import PADDING, Feature


class CategoricalEncoder(nn.Module):
    """Mean of the table's vectors over the values of a row; a single value is its own mean."""

    def __init__(self, table: str, tables: EmbeddingTables) -> None:
        super().__init__()
        self.table = table
        self._tables = (tables,)  # in a tuple: the tables are the model's, not a submodule of each encoder

    def forward(self, codes: Tensor) -> Tensor:
        """Return [R, E] for codes [R] or, multi-valued, [R, K]."""
        vectors = self._tables[0].look_up(self.table, codes)
        if codes.dim() == 1:
            return vectors
        count = (codes != PADDING).sum(dim=1, keepdim=True).clamp(min=1)
        return vectors.sum(dim=1) / count


class NumericEncoder(nn.Module):
    """A normalised value and whether it is missing, through one layer."""

    def __init__(self, feature: Feature, dim: int) -> None:
        super().__init__()
        self.feature = feature
        self.layer = nn.Linear(2, dim)

    def forward(self, values_R: Tensor) -> Tensor:
        """Return [R, H] for float32 values [R]; NaN is missing."""
        missing = values_R.isnan()
        value = values_R.masked_fill(missing, self.feature.mean)
        if self.feature.log:
            value = torch.where(missing, value, value.clamp(min=0).log1p())
        normalised = (value - self.feature.mean) / self.feature.std
        inputs = torch.stack([normalised, missing.to(value.dtype)], dim=1)
        return nn.functional.gelu(self.layer(inputs.to(self.layer.weight.dtype)))


class TextEncoder(nn.Module):
    """A BERT and its pooling."""

    def __init__(self, config: TextEncoderConfig, vocab_size: int, pad_token_id: int, max_tokens: int) -> None:
        super().__init__()
        self.pad_token_id = pad_token_id
        self.pooling = config.pooling
        self.attention_otherwise: str | None = None  # where attention is plain in training
        self.bert: PreTrainedModel = (
            _load_bert(config.init, config) if config.init else _new_bert(config, vocab_size, pad_token_id, max_tokens)
        )
        self.dim: int = self.bert.config.hidden_size
        num_words: int = self.bert.config.vocab_size
        if num_words < vocab_size:
            raise ConfigError(
                f"text.init={config.init} has {num_words} word vectors, but the dataset's tokenizer "
                f"has {vocab_size} tokens; make the shards with data.tokenizer.path={config.init}"
            )

    def checkpoint_activations(self) -> None:
        """Keep only the layers' inputs for the backward, which computes the rest again."""
        self.bert.config.use_cache = False  # there is none in an encoder, and transformers would warn of it
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # its new name is not in every transformers 5
            self.bert.gradient_checkpointing_enable({"use_reentrant": False})

    def train(self, mode: bool = True) -> TextEncoder:
        """Train or evaluate, with the attention that is faster at it where that differs."""
        super().train(mode)
        if self.attention_otherwise is not None:
            self.bert.set_attn_implementation("eager" if mode else self.attention_otherwise)
        return self

    def forward(self, tokens_RT: Tensor) -> Tensor:
        """Return [R, H] for token ids [R, T], padded at the end."""
        mask_RT = tokens_RT != self.pad_token_id
        hidden: Tensor = self.bert(input_ids=tokens_RT, attention_mask=mask_RT.long()).last_hidden_state
        if self.pooling == "cls":
            return hidden[:, 0]
        weight = mask_RT.unsqueeze(2).to(hidden.dtype)
        return (hidden * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)


def use_plain_attention(model: nn.Module) -> None:
    """Let the model's BERTs multiply attention out in training: the fused backward in bfloat16 is slow on a CPU.

    MiniLM on a Xeon with AMX, forward and backward a CPU-second: 4,700 tokens of texts of 70 against 2,700, 3,800 of
    texts of 128 against 3,100. In float32 both take the same time. Without a backward the fused kernel is the faster
    one: 15,600 tokens of texts of 128 against 8,300.
    """
    for part in model.modules():
        if isinstance(part, TextEncoder) and part.attention_otherwise is None:
            part.attention_otherwise = part.bert.config._attn_implementation
            part.train(part.training)


class HistoryEncoder(nn.Module):
    """A causal transformer over [start, oldest item, …, newest item]; the vector at the newest item is the history's.

    The start token makes an empty history an ordinary one. Positions count from the newest item back, so that what
    happened last has the same position in long and short histories. Source: Kang and McAuley 2018 (SASRec).
    """

    def __init__(
        self, config: HistoryEncoderConfig, feature: Feature, dim: int, table: str, tables: EmbeddingTables
    ) -> None:
        super().__init__()
        self.table = table
        self.dim = dim
        self._tables = (tables,)
        self.start = nn.Parameter(torch.randn(dim) * INIT_STD)
        self.positions = nn.Embedding(feature.max_items + 1, dim)
        nn.init.normal_(self.positions.weight, std=INIT_STD)
        self.dropout = nn.Dropout(config.item_dropout)
        self.layers = nn.ModuleList(_HistoryLayer(config, dim) for _ in range(config.layers))
        self.norm = nn.LayerNorm(dim)
        self._recompute = False

    def checkpoint_activations(self) -> None:
        """Keep only the layers' inputs for the backward, which computes the rest again."""
        self._recompute = True

    def forward(self, items_RT: Tensor) -> Tensor:
        """Return [R, E] for item codes [R, T], oldest first, padded at the end."""
        num_rows, num_items = items_RT.shape
        device = items_RT.device
        length_R = (items_RT != PADDING).sum(dim=1)
        vectors = self._tables[0].look_up(self.table, items_RT)
        start = self.start.to(vectors.dtype).expand(num_rows, 1, -1)
        place_T = torch.arange(num_items + 1, device=device)
        age_RT = (length_R.unsqueeze(1) - place_T).clamp(min=0)
        hidden = self.dropout(torch.cat([start, vectors], dim=1) + self.positions(age_RT))
        newest = (torch.arange(num_rows, device=device), length_R)
        causal_TT = place_T.unsqueeze(1) >= place_T
        for layer in self.layers[:-1]:
            hidden = self._run(layer, hidden, hidden, causal_TT)
        # Only the newest place is read, so the last layer computes only that one.
        up_to_newest_R1T = (place_T <= length_R.unsqueeze(1)).unsqueeze(1)
        hidden = self._run(self.layers[-1], hidden[newest].unsqueeze(1), hidden, up_to_newest_R1T)
        vector: Tensor = self.norm(hidden.squeeze(1))
        return vector

    def _run(self, layer: nn.Module, *inputs: Tensor) -> Tensor:
        output: Tensor
        if self._recompute and self.training:
            output = checkpoint(layer, *inputs, use_reentrant=False)
        else:
            output = layer(*inputs)
        return output


class _HistoryLayer(nn.Module):
    """A pre-norm transformer layer whose queries may stand at fewer places than its keys."""

    def __init__(self, config: HistoryEncoderConfig, dim: int) -> None:
        super().__init__()
        if dim % config.heads:
            raise ConfigError(
                f"model.query.history.heads={config.heads} must divide the items' model.doc.embedding_dim={dim}"
            )
        self.heads = config.heads
        self.attention_norm = nn.LayerNorm(dim)
        self.query, self.key_value, self.output = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.feedforward = nn.Sequential(
            nn.LayerNorm(dim),
            nn.Linear(dim, config.feedforward * dim),
            nn.GELU(),
            nn.Linear(config.feedforward * dim, dim),
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, at: Tensor, over: Tensor, mask: Tensor) -> Tensor:
        """Return [R, A, E] at places `at` [R, A, E] attending over [R, T, E] where `mask` (…, A, T) is True."""
        q = self._split(self.query(self.attention_norm(at)))
        k, v = (self._split(part) for part in self.key_value(self.attention_norm(over)).chunk(2, dim=2))
        mask = mask.unsqueeze(1) if mask.dim() == 3 else mask
        attended = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        hidden = at + self.dropout(self.output(attended.transpose(1, 2).flatten(2)))
        return hidden + self.dropout(self.feedforward(hidden))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


def _new_bert(config: TextEncoderConfig, vocab_size: int, pad_token_id: int, max_tokens: int) -> BertModel:
    if config.hidden % config.heads:
        raise ConfigError(f"text.hidden={config.hidden} must be divisible by text.heads={config.heads}")
    bert = BertConfig(
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
    return BertModel(bert, add_pooling_layer=False)


def _is_hollow() -> bool:
    """Return True where modules are made without memory, to check or count them: no weights need be read then."""
    tensor = torch.empty(0)
    return tensor.device.type == "meta" or isinstance(tensor, FakeTensor)


def _load_bert(folder: str, config: TextEncoderConfig) -> PreTrainedModel:
    if not os.path.isdir(folder):
        raise ConfigError(f"text.init={folder} is not a folder; it takes the local folder of a Hugging Face BERT")
    try:
        architecture = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        has = getattr(architecture, "num_hidden_layers", 0)
        if config.keep_layers > has:
            raise ConfigError(f"text.keep_layers={config.keep_layers}, but text.init={folder} has {has} layers")
        if not list(Path(folder).glob("*.safetensors")):
            raise OSError("it has no *.safetensors, the one format of weights that is read")
        architecture.num_hidden_layers = config.keep_layers or has
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout"):
            if hasattr(architecture, name):
                setattr(architecture, name, config.dropout)
        model: PreTrainedModel = (
            AutoModel.from_config(architecture, trust_remote_code=False)
            if _is_hollow()
            else AutoModel.from_pretrained(
                folder, config=architecture, local_files_only=True, use_safetensors=True, trust_remote_code=False
            )
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"text.init={folder} does not load as a Hugging Face model: {error}") from None
    if hasattr(model, "pooler"):
        model.pooler = None  # unused by both poolings; without a gradient it would stop ZeRO
    return model
