"""The text encoder `transformer`, of Hugging Face: any encoder or decoder, its pooling, attention over packed texts."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
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
from bigdssm.features.text import NO_TOKEN
from bigdssm.models.encoders.base import SideSize, linear_flops, supports_head_width
from bigdssm.models.encoders.lora import add_adapters
from bigdssm.models.encoders.text import TextEncoder, pool
from bigdssm.models.packed import Attention, Packed, SequenceBounds, Values

NAME = "bigdssm_packed"  # registered attention of transformers; for padded texts it is the default one
# Packing arguments of a padded call: torch.compile specializes on the set of arguments of a call.
PADDED: dict[str, Any] = {"packed_attention": None, "offsets": None, "longest": 0}
# Families (`model_type`) that compute attention by the registered function alone, so that their texts may be packed.
BIDIRECTIONAL = frozenset({"bert", "roberta", "xlm-roberta"})  # in all layers, over all tokens
PACKABLE = BIDIRECTIONAL | {"modernbert", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma3_text"}
ACTIVATIONS: Mapping[str, type[nn.Module]] = {cls.__name__: cls for cls in (nn.Identity, nn.Tanh, nn.GELU, nn.ReLU)}


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float,
    dropout: float = 0.0, packed_attention: Attention | None = None, offsets: Tensor | None = None, longest: int = 0,
    sliding_window: int | None = None, **further: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Return [1, P, h, W] for packed [1, h, P, W], else call scaled_dot_product_attention.

    Under autocast rotary embeddings return float32 queries and keys, and a kernel needs the dtype of the values.

    Packing is an argument of the call and not in the model's config, so that recomputed activations use the same kind.
    """
    if packed_attention is None or offsets is None:
        padded: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **further
        )
        return padded
    groups = query.shape[1] // key.shape[1]  # query heads per key head
    q = query[0].transpose(0, 1)
    k, v = (part[0].repeat_interleave(groups, dim=0).transpose(0, 1) for part in (key, value))
    q, k = q.to(v.dtype), k.to(v.dtype)
    bounds = SequenceBounds(offsets, longest)
    attended = packed_attention(q, k, v, bounds, bounds, scaling, causal=module.is_causal, window=sliding_window)
    return attended.unsqueeze(0), None


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, sdpa_mask)


class TransformerEncoder(TextEncoder):
    """A transformer of Hugging Face, its pooling, and the layers that a sentence-transformers folder adds.

    `architecture.bigdssm` holds pooling, added layers, normalization and adapters.
    """

    def __init__(self, architecture: PretrainedConfig, transformer: PreTrainedModel | None = None) -> None:
        """`transformer`: without adapters; by default one with new weights. See also `pretrained.build_pretrained`."""
        head: Mapping[str, Any] = getattr(architecture, "bigdssm", None) or head_of("mean")
        super().__init__(architecture, head["layers"][-1]["width"] if head["layers"] else architecture.hidden_size)
        self.pooling, self.normalize = head["pooling"], head["normalize"]
        self.default_attention: str | None = None  # set if attention is eager in training
        self.transformer = new_transformer(architecture) if transformer is None else transformer
        self.architecture = self.transformer.config  # may be a copy
        if head["lora"]:
            self.add_adapters(head["lora"])
        modules: list[nn.Module] = []  # the Dense modules of a sentence-transformers folder
        width = architecture.hidden_size
        for layer in head["layers"]:
            modules += [nn.Linear(width, layer["width"], bias=layer["bias"]), ACTIVATIONS[layer["activation"]]()]
            width = layer["width"]
        self.layers = nn.Sequential(*modules)
        self.first_position = first_position(self.transformer)

    def transformer_layers(self) -> list[nn.Module]:
        """Return the layers that transformers can checkpoint, for any architecture."""
        return [part for part in self.transformer.modules() if isinstance(part, GradientCheckpointingLayer)]

    def add_adapters(self, lora: Mapping[str, Any]) -> None:
        """Freeze the transformer and add new adapters, which change nothing yet. Raises ConfigError."""
        self.architecture.bigdssm["lora"] = dict(lora)
        add_adapters(self.transformer, lora)

    def checkpoint_activations(self) -> None:
        """Keep only the layers' inputs for the backward, which recomputes the rest. Raises ConfigError: unsupported."""
        if not self.transformer.supports_gradient_checkpointing:
            family = self.transformer.config.model_type
            raise ConfigError(f"engine.checkpoint_activations=true: transformers has none for the family {family}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # its new name is not in every transformers 5
            self.transformer.gradient_checkpointing_enable({"use_reentrant": False})

    def use_eager_attention(self) -> None:
        """Use eager attention in training."""
        if self.default_attention is None:
            self.default_attention = self.transformer.config._attn_implementation
            self.train(self.training)

    def use_packing(self, attention: Attention) -> None:
        """Accept packed texts, if the family supports them."""
        super().use_packing(attention)
        if self._packable:
            self.transformer.set_attn_implementation(NAME)

    def train(self, mode: bool = True) -> "TransformerEncoder":
        """Set the mode, and the attention that is faster in it."""
        super().train(mode)
        if self.default_attention is not None:
            self.transformer.set_attn_implementation("eager" if mode else self.default_attention)
        return self

    def accepts_packed(self, training: bool) -> bool:
        """Return whether texts may be packed: a kernel, a family and head width with support, no attention dropout."""
        config = self.transformer.config
        dropout = getattr(config, "attention_probs_dropout_prob", 0) or getattr(config, "attention_dropout", 0)
        return (
            self.packed_attention is not None
            and self._packable
            and supports_head_width(self._head_width, 1)
            and not (training and dropout > 0)
        )

    def forward(self, tokens: Values, skip: int = 0) -> Tensor:
        """Return [R, dim] for token ids [R, T], padded at the end with -1, or packed.

        skip: number of first tokens, those of a prompt, that are attended to and not pooled.
        """
        return self._packed(tokens, skip) if isinstance(tokens, Packed) else self.pooled(tokens, skip=skip)

    def pooled(self, tokens_RT: Tensor, types_RT: Tensor | None = None, skip: int = 0) -> Tensor:
        """Return [R, dim] for token ids [R, T], padded at the end with -1, and their token types, by default 0."""
        mask_RT = tokens_RT != NO_TOKEN
        further = PADDED if self.transformer.config._attn_implementation == NAME else {}
        if types_RT is not None:
            further = {**further, "token_type_ids": types_RT}
        position_T = torch.arange(tokens_RT.shape[1], device=tokens_RT.device)
        if self.first_position:
            further = {**further, "position_ids": (position_T + self.first_position).unsqueeze(0)}
        hidden: Tensor = self.transformer(
            input_ids=tokens_RT.clamp(min=0), attention_mask=self._attention_mask(mask_RT), **further
        ).last_hidden_state
        pooled_RT = mask_RT & (position_T >= skip) if skip and self.pooling != "last" else mask_RT
        return self._output(pool(hidden, pooled_RT, self.pooling))

    def _attention_mask(self, mask_RT: Tensor) -> Tensor:
        """Return the mask in the form of the layers if it is the same in all: one of [R, T] is read from the device."""
        attention = self.transformer.config._attn_implementation
        if self.transformer.config.model_type not in BIDIRECTIONAL or attention not in ("sdpa", "eager", NAME):
            return mask_RT.long()
        mask = mask_RT[:, None, None, :].expand(-1, 1, mask_RT.shape[1], -1)
        if attention != "eager":
            return mask
        dtype = self.transformer.get_input_embeddings().weight.dtype
        return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)

    def _packed(self, tokens: Packed, skip: int) -> Tensor:
        """Return [R, dim]; a text without tokens counts as zeros: its padded vector would depend on the kernel."""
        # Without a mask, transformers reads from the device whether the positions are those of one text; it uses one of
        # four dimensions as it is, and `_attend` needs none.
        no_mask = torch.empty((1, 1, 0, 0), dtype=torch.bool, device=tokens.values.device)
        hidden: Tensor = self.transformer(
            input_ids=tokens.values.unsqueeze(0),
            position_ids=(tokens.position + self.first_position).unsqueeze(0),
            attention_mask=no_mask,
            packed_attention=self.packed_attention,
            **tokens.bounds._asdict(),
        ).last_hidden_state[0]
        offsets, lengths = tokens.bounds.offsets.long(), tokens.lengths
        if self.pooling == "mean":
            if skip:
                hidden, lengths = hidden * (tokens.position >= skip).unsqueeze(1), lengths - skip
            sums = torch.segment_reduce(hidden, "sum", offsets=offsets, unsafe=True, initial=0)
            return self._output(sums / lengths.clamp(min=1).to(hidden.dtype).unsqueeze(1))
        # a text of a prompt alone has no token after it: as in a padded batch, its first one is pooled
        chosen = offsets[:-1] + skip * (lengths > skip) if self.pooling == "cls" else offsets[1:] - 1
        vectors = hidden[chosen.clamp(min=0, max=len(hidden) - 1)]
        return self._output(vectors.masked_fill((lengths == 0).unsqueeze(1), 0))

    def _output(self, vectors: Tensor) -> Tensor:
        vectors = self.layers(vectors)
        return nn.functional.normalize(vectors, dim=1) if self.normalize else vectors

    @property
    def _packable(self) -> bool:
        return self.transformer.config.model_type in PACKABLE

    @property
    def _head_width(self) -> int:
        config = self.transformer.config
        return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)

    def flops(self, name: str, size: SideSize) -> float:
        """Return the operations of a forward: linear layers per token, and attention within each text."""
        length_R, config = size.filled[name].astype(float), self.transformer.config
        width = self._head_width * config.num_attention_heads
        attention = float((length_R**2).sum()) * config.num_hidden_layers * 4 * width
        return (
            float(length_R.sum()) * linear_flops(self.transformer) + size.rows * linear_flops(self.layers) + attention
        )


def first_position(model: PreTrainedModel) -> int:
    """Return the position of a text's first token: that of RoBERTa follows its padding token."""
    padding = getattr(getattr(model, "embeddings", None), "padding_idx", None)
    return 0 if padding is None else int(padding) + 1


def new_transformer(architecture: PretrainedConfig) -> PreTrainedModel:
    """Return a model with new weights."""
    if isinstance(architecture, BertConfig):
        return without_pooler(BertModel(architecture, add_pooling_layer=False))
    return without_pooler(AutoModel.from_config(architecture, trust_remote_code=False))


def without_pooler(model: PreTrainedModel) -> PreTrainedModel:
    """Remove the unused pooler, since ZeRO requires a gradient for each parameter, and the cache of generation."""
    model.pooler = None
    model.config.use_cache = False
    return model


def new_architecture(
    inputs: TextInputs, layers: int, hidden: int, heads: int, dropout: float, pooling: str
) -> BertConfig:
    """Return the architecture of a BERT that is trained from scratch."""
    architecture = BertConfig(
        vocab_size=inputs.vocab_size,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        max_position_embeddings=max(inputs.max_tokens, 8),
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    architecture.bigdssm = head_of(pooling)
    return architecture


def head_of(pooling: str, layers: Sequence[Mapping[str, Any]] = (), normalize: bool = False) -> dict[str, Any]:
    """Return the content of `architecture.bigdssm`; `layers` have a width, `bias` and the name of an activation."""
    return {"pooling": pooling, "layers": list(layers), "normalize": normalize, "lora": None}
