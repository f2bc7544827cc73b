"""Small dual encoders over lists of every kind, and their vectors and gradients with packed and padded rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bigdssm.config import HISTORY_BLOCKS, ModelConfig, TowerConfig
from bigdssm.dataset.schema import Schema
from bigdssm.features import Categorical, Feature, History, Numeric, Text, Timestamp, Vocabulary
from bigdssm.loader.batch import Lengths, lengths_of
from bigdssm.loader.step_plan import Chunked, plan_side
from bigdssm.models import (
    DualEncoder,
    QueryPositions,
    new_model,
)
from bigdssm.models.declarations import Transformer
from bigdssm.models.encoders import Encoder

NUM_ITEMS, PAD = 20, -1
QUERY: dict[str, Feature] = {
    "history": History(of="item", max_items=9).with_name("history"),
    "words": Text(max_tokens=12).with_name("words"),
    "more": Text(max_tokens=12).with_name("more"),
    "age": Numeric(mean=30.0, std=10.0).with_name("age"),
}
EVENT: dict[str, Feature] = {
    "action": Categorical(vocabulary=Vocabulary.of(("view", "buy"))).with_name("action"),
    "price": Numeric(mean=5.0, std=2.0).with_name("price"),
    "when": Timestamp().with_name("when"),
}
START = 1_700_000_000_000_000  # microseconds
DOC: dict[str, Feature] = {
    "item": Categorical(vocabulary=Vocabulary.of(map(str, range(NUM_ITEMS - 2)))).with_name("item"),
    "title": Text(max_tokens=12).with_name("title"),
    "tags": Categorical(multi=True, vocabulary=Vocabulary.of(("a", "b"))).with_name("tags"),
}
LISTS = {"query": {"history": 0, "words": PAD, "more": PAD}, "doc": {"title": PAD, "tags": 0}}


def model(
    pooling: Any = "mean", dropout: float = 0.0, text_dropout: float = 0.0, request: Any = (), **history: Any
) -> DualEncoder:
    """A model in which every parameter affects the output."""
    text = Transformer(hidden=16, pooling=pooling, dropout=text_dropout)
    encoder = HISTORY_BLOCKS.read(
        "", {"block": "sasrec", "layers": 2, "dropout": dropout, "item_dropout": dropout, **history}
    )
    config = ModelConfig(
        dim=6, score="dot", query=TowerConfig(mlp=(7,), text=text, history=encoder),
        doc=TowerConfig(mlp=(7,), embedding_dim=16, text=text),
    )  # fmt: skip
    torch.manual_seed(0)
    made = new_model(config, Schema(QUERY, DOC, event=EVENT, request=request), vocab_size=50)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
        for table in made.tables.tables.values():
            table.weight[0] = 0  # type: ignore[index, operator]
    return made


def never_packed(made: DualEncoder) -> None:
    for part in made.modules():
        if isinstance(part, Encoder):
            part.accepts_packed = lambda training: False  # type: ignore[method-assign]


def padded(lengths: list[int], fill: int, first: int) -> Tensor:
    rows = torch.full((len(lengths), max(lengths)), fill)
    for row, length in enumerate(lengths):
        rows[row, :length] = torch.arange(length) * 7 % 11 + first + row
    return rows


def sides() -> dict[str, dict[str, Tensor]]:
    """Rows of all lengths, including 0; one text contains the padding token."""
    words = padded([3, 12, 1, 5, 0, 2], PAD, 5)
    words[1, 4] = PAD
    history = padded([9, 0, 4, 1, 0, 7], 0, 2)
    # one action and one price are missing within a history
    action, price = history % 4, torch.where(history % 5 == 0, torch.nan, history.float())
    when = START + history.cumsum(1) ** 4 * 10**6
    events = {"history.action": action, "history.price": price, "history.when": when}
    query = {
        "history": history,
        **events,
        "words": words,
        "more": padded([2, 2, 9, 1, 4, 1], PAD, 8),
        "age": torch.arange(6.0),
    }
    title, tags = padded([6, 2, 12, 7], PAD, 5), torch.tensor([[1, 0], [2, 1], [0, 0], [1, 0]])
    return {"query": query, "doc": {"item": torch.tensor([4, 2, 9, 6]), "title": title, "tags": tags}}


def lengths(side: str) -> Lengths:
    return lengths_of(sides()[side], LISTS[side])


def vectors(made: DualEncoder, side: str, chunk_tokens: int, query_positions: QueryPositions | None = None) -> Tensor:
    """The vectors of a side in the batch's order, by its plan."""
    device = made.log_alpha.device
    features = {name: values.to(device) for name, values in sides()[side].items()}
    query_positions = (
        None if query_positions is None else QueryPositions(*(part.to(device) for part in query_positions[:2]))
    )
    if made.schema.request and side == "query":
        number = 6 if query_positions is None else len(query_positions.row)
        features["request.action"] = torch.arange(number, device=device) % 4
        features["request.price"] = torch.arange(number, device=device) * 3 % 7.0
        features["request.when"] = START + torch.arange(1, number + 1, device=device) * 10**13
    per_row = None if query_positions is None else torch.bincount(query_positions.row, minlength=6).cpu().numpy()
    packed = getattr(made.accepts_packed(made.training), side)
    plan = plan_side(lengths(side), len(next(iter(features.values()))), chunk_tokens, per_row, packed)
    chunked = Chunked(features, plan, query_positions)
    parts = []
    for chunk in plan.padded_to(len(plan.chunks) + 1).chunks:
        further = {} if chunk.num_rows == 0 else {"query_positions": chunked.query_positions(chunk)}
        encoded = made(**{side: chunked.features(chunk)}, **further)
        parts.append((encoded.U if side == "query" else encoded.W)[: chunk.num_outputs])
    return chunked.assemble(parts[:-1]) + parts[-1].sum()  # without the dummy


def gradients(made: DualEncoder, of: Tensor) -> dict[str, Tensor]:
    made.zero_grad()
    (of * torch.linspace(-1, 1, of.numel(), device=of.device).view_as(of)).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in made.named_parameters() if parameter.grad is not None}
