"""Types of the tensors that reach the attention kernel, which refuses queries, keys and values of different types."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bigdssm.features.text import NO_TOKEN
from bigdssm.models.encoders.pretrained import build_pretrained, pretrained_architecture
from bigdssm.models.encoders.transformer import PACKABLE
from bigdssm.models.packed import pack
from tests.encoders import write_family
from tests.packing import within_rows

LENGTHS = [5, 3, 2]


@pytest.mark.parametrize("family", sorted(PACKABLE))
def test_a_kernel_receives_one_type_under_autocast(family: str, tmp_path: Path) -> None:
    folder = write_family(family, tmp_path / family)
    encoder = build_pretrained(pretrained_architecture(str(folder)), str(folder))
    types: list[set[torch.dtype]] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, *bounds: Any, **further: Any) -> Tensor:
        types.append({q.dtype, k.dtype, v.dtype})
        return within_rows(q, k, v, *bounds, **further)

    encoder.use_packing(attend)
    tokens = torch.full((len(LENGTHS), max(LENGTHS)), NO_TOKEN)
    for row, length in enumerate(LENGTHS):
        tokens[row, :length] = torch.arange(4, 4 + length)
    with torch.autocast("cpu", torch.bfloat16):
        encoder(pack(tokens, NO_TOKEN, sum(LENGTHS), max(LENGTHS)))
    assert len(types) == 3  # layers
    assert types == [{torch.bfloat16}] * 3
