"""Towers with random weights and inputs for the step benchmarks of gpu.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from gpu_bench import Bench
from torch import Tensor, nn


@dataclass
class TwoInputs:
    """Arguments of the tower for queries and documents."""

    rows: int
    query: tuple[Tensor, ...]
    doc: tuple[Tensor, ...]


def text_tower(bench: Bench, layers: int, width: int, rows: int, tokens: int) -> tuple[nn.Module, TwoInputs, float]:
    """Return a BERT, texts of equal length, and the FLOPs of one side's forward."""
    from transformers import BertConfig, BertModel

    if bench.small:
        layers, width, rows, tokens = 1, 64, 8, 8
    config = BertConfig(
        vocab_size=30_522, hidden_size=width, num_hidden_layers=layers, num_attention_heads=min(12, width // 32),
        intermediate_size=4 * width, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    bert = BertModel(config, add_pooling_layer=False).to(bench.device)

    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = bert

        def forward(self, ids: Tensor) -> Tensor:
            return self.bert(input_ids=ids).last_hidden_state.mean(dim=1)

    query, doc = (torch.randint(5, 30_000, (rows, tokens), device=bench.device) for _ in range(2))
    a_token = layers * (24 * width**2 + 4 * tokens * width)
    return Mean(), TwoInputs(rows, (query,), (doc,)), float(a_token * tokens * rows)


def history_tower(bench: Bench) -> tuple[nn.Module, TwoInputs, float]:
    """Return gated blocks over 200 items with one output per position, inputs, and the FLOPs of one side's forward."""
    from bigdssm.models.blocks import AttentionContext, position_angle
    from bigdssm.models.declarations import Gated

    width, items, rows = (32, 16, 4) if bench.small else (128, 200, 256)
    config = Gated(positions="rotary", layers=2, heads=4)
    position = torch.arange(items, device=bench.device)
    angle = position_angle(position, width // config.heads // 2)
    context = AttentionContext(position, position, (position[:, None] >= position)[None, None], True, angle, angle)

    class Histories(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(50_000, width)
            self.layers = nn.ModuleList(config.build(width) for _ in range(config.layers))

        def forward(self, codes: Tensor, is_history: Tensor) -> Tensor:
            hidden = self.table(codes)
            if is_history.shape[0]:
                for layer in self.layers:
                    hidden = layer(hidden, hidden, context)
            return hidden.flatten(0, 1)

    history, target = (torch.randint(1, 50_000, (rows, items), device=bench.device) for _ in range(2))
    yes, no = torch.ones(1, device=bench.device), torch.ones(0, device=bench.device)
    tower = Histories().to(bench.device)
    linear = 2 * sum(p.numel() for layer in tower.layers for p in layer.parameters() if p.dim() == 2)
    flops = rows * items * (linear + config.layers * 4 * items * width) / 2  # documents are embedding look-ups
    return tower, TwoInputs(rows * items, (history, yes), (target, no)), float(flops)


TOWERS: dict[str, Callable[[Bench], tuple[nn.Module, TwoInputs, float]]] = {
    "MiniLM": lambda bench: text_tower(bench, 6, 384, 1024, 64),
    "BERT-base": lambda bench: text_tower(bench, 12, 768, 256, 64),
    "history": history_tower,
}
