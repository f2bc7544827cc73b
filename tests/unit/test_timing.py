"""Where the time goes: spans in spans, the table, and the operations of the towers' matrix products."""

from __future__ import annotations

import time

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bigdssm import timing
from bigdssm.config import HistoryEncoderConfig, ModelConfig, TextEncoderConfig, TowerConfig
from bigdssm.models import DualEncoder
from bigdssm.models.flops import forward_flops
from bigdssm.schema import Feature, Schema
from bigdssm.training.time_table import TimeTable


def test_a_span_counts_what_the_spans_in_it_do_not() -> None:
    timing.taken()
    with pytest.raises(KeyError), timing.span("loss"):
        time.sleep(0.02)
        with timing.span("communication"):
            time.sleep(0.05)
        raise KeyError
    with timing.span("loss"):
        time.sleep(0.02)
    time.sleep(0.02)
    seconds = timing.taken()
    assert list(seconds) == ["loss", "loss/communication"]
    assert 0.04 <= seconds["loss"] < seconds["loss/communication"] + 0.04
    assert 0.05 <= seconds["loss/communication"] < 0.5
    assert timing.taken() == {}


def test_the_table_adds_up() -> None:
    table = TimeTable(6.0, 2, 30.0, {"encode": 1.0, "backward": 2.0, "validation": 1.0})
    table.add(TimeTable(4.0, 3, 30.0, {"encode": 1.0, "backward/encode again": 1.0, "validation/communication": 1.0}))
    assert table.training_s == 8.0
    lines = table.lines(peak_flops=20.0)
    assert lines[0] == "10.0 s in 5 steps"
    shares = {line[:28].strip(): line[-6:].strip() for line in lines[1:-1]}
    assert shares["encode"] == "20.0%" and shares["other"] == "30.0%" and len(shares) == 6
    assert "60% of the peak" in lines[-1] and "38% over all" in lines[-1]


def test_operations_by_formula_are_those_that_torch_counts() -> None:
    """With rows of one length, so that nothing is padding."""
    schema = Schema(
        {"history": Feature("history", "history", "history", of="item", max_items=6)},
        {
            "item": Feature("item", "categorical", "item", vocabulary=tuple("abcdefgh")),
            "year": Feature("year", "numeric", "year"),
            "title": Feature("title", "text", "title", max_tokens=16),
        },
    )
    config = ModelConfig(
        dim=24,
        beta=False,
        query=TowerConfig(mlp=(20,), history=HistoryEncoderConfig(layers=2)),
        doc=TowerConfig(text=TextEncoderConfig(layers=2, hidden=16)),
    )
    model = DualEncoder(config, schema, vocab_size=50).eval()
    query = {"history": torch.randint(2, 10, (3, 5))}
    doc = {"item": torch.arange(2, 9), "year": torch.ones(7), "title": torch.randint(1, 50, (7, 11))}
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(query, doc)
    assert forward_flops(model, query, doc) == pytest.approx(counter.get_total_flops(), rel=1e-6)
    padded = {**doc, "title": torch.nn.functional.pad(doc["title"], (0, 4))}
    assert forward_flops(model, query, padded) == forward_flops(model, query, doc)
