"""Encode the features of one side outside of training, in chunks of rows of similar length."""

from collections.abc import Callable

import torch
from torch import Tensor

from bigdssm import distributed
from bigdssm.loader.batch import Features, Paddings, lengths_of
from bigdssm.loader.step_plan import NOTHING_PACKED, Chunked, plan_side
from bigdssm.models import Values

# Tokens per chunk: fits a CPU's caches (twice as fast as one large batch), or keeps a GPU busy.
CHUNK_TOKENS_CPU, CHUNK_TOKENS_GPU = 4096, 65536


def encode_in_chunks(
    features: Features, pads: Paddings, num_rows: int, encode: Callable[[dict[str, Values]], Tensor],
    device: torch.device | str = "cpu", packed: frozenset[str] = NOTHING_PACKED.query,
) -> Tensor:  # fmt: skip
    """Apply `encode` to chunks of rows of similar length on `device`; outputs in row order.

    The number of chunks is equal on all ranks. The features are on the host, where the chunks are planned. `packed`
    names the lists passed without padding.
    """
    chunk_tokens = CHUNK_TOKENS_CPU if torch.device(device).type == "cpu" else CHUNK_TOKENS_GPU
    plan = plan_side(lengths_of(features, pads), num_rows, chunk_tokens, packed=packed)
    plan = plan.padded_to(int(distributed.all_reduce(torch.tensor([len(plan.chunks)]), "max")))
    side = Chunked({name: values.to(device) for name, values in features.items()}, plan)
    return side.assemble([encode(side.features(chunk)) for chunk in plan.chunks])
