"""A dual encoder of a few units over text, histories and categories, and random batches for it."""

from __future__ import annotations

import torch
from torch import Tensor

from bigdssm.config import ModelConfig, TowerConfig
from bigdssm.dataset.schema import Schema
from bigdssm.features import Categorical, History, Text, Vocabulary
from bigdssm.loader.batch import Batch, lengths_of
from bigdssm.models import DualEncoder, new_model
from bigdssm.models.declarations import Transformer

TEXT = Text(max_tokens=9).with_name("words")
SCHEMA = Schema(
    {"words": TEXT, "history": History(of="item", max_items=6).with_name("history")},
    {"words": TEXT, "item": Categorical(vocabulary=Vocabulary.of("abcdefghijklmnopqrstuvwx")).with_name("item")},
)
TOWER = TowerConfig(mlp=(16,), embedding_dim=8, text=Transformer(layers=1, hidden=16))
MODEL = ModelConfig(dim=16, beta="document", alpha_init=5.0, share_text=True, query=TOWER, doc=TOWER)
SHARES = {1: (24,), 2: (24, 0), 3: (13, 0, 11)}  # queries per rank: with several, one rank has none


def share_of(rank: int, world_size: int, step: int) -> Batch:
    """Return the rank's rows, each of its documents once; documents of several ranks are columns on each."""
    (words, history), (doc_words, items), positive, doc_ids = global_batch(step)
    first = sum(SHARES[world_size][:rank])
    rows = torch.arange(first, first + SHARES[world_size][rank])
    columns, column = positive[rows].unique(return_inverse=True)
    query = {"words": words[rows], "history": history[rows]}
    doc = {"words": doc_words[columns], "item": items[columns]}
    return Batch(
        step=step,
        row_ids=rows,
        query=query,
        doc=doc,
        positive=column,
        relevance=torch.ones(len(rows)),
        query_ids=rows,
        doc_ids=doc_ids[columns],
        doc_rows=columns,
        counts=torch.bincount(column, minlength=len(columns)),
        query_lengths=lengths_of(query, {"words": -1, "history": 0}),
        doc_lengths=lengths_of(doc, {"words": -1}),
    )


def small_model(dropout: float) -> DualEncoder:
    torch.manual_seed(0)
    model = new_model(MODEL, SCHEMA, vocab_size=30).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    return model


def global_batch(step: int) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """Return words and histories of 24 queries, words and items of 12 documents, and the document of each query."""
    torch.manual_seed(100 + step)
    length, history_length = torch.randint(1, 10, (24, 1)), torch.randint(0, 7, (24, 1))
    words = torch.where(torch.arange(9) < length, torch.randint(1, 30, (24, 9)), -1)
    history = torch.randint(2, 26, (24, 6)) * (torch.arange(6) < history_length)
    doc_words = torch.where(torch.arange(9) < torch.randint(1, 10, (12, 1)), torch.randint(1, 30, (12, 9)), -1)
    positive = torch.cat([torch.arange(12), torch.randint(0, 12, (12,))])[torch.randperm(24)]
    return [words, history], [doc_words, torch.arange(2, 14)], positive, torch.arange(12) + 1000
