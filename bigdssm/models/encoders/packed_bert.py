"""A BERT over packed texts: its attention, told in every call where the texts lie, keeps to each of them.

Shapes: P tokens of all texts, h heads, W width of a head, H width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, BertModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from bigdssm.models.packed import Attention, Packed, Spans

NAME = "bigdssm_packed"  # among the attentions of transformers: the usual one for padded texts
# What a padded call says of packing: torch.compile looks for all that any call had in every call.
PADDED: dict[str, Any] = {"packed_attention": None, "offsets": None, "longest": 0}


def run(bert: BertModel, texts: Packed, attention: Attention) -> Tensor:
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
    spans = Spans(offsets, longest)
    return packed_attention(q, k, v, spans, spans, scaling).unsqueeze(0), None


def _mask(attention_mask: Tensor | None = None, **further: Any) -> Tensor | None:
    """Return no mask for packed texts, which bring none."""
    if attention_mask is None:
        return None
    mask: Tensor | None = sdpa_mask(attention_mask=attention_mask, **further)
    return mask


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, _mask)
