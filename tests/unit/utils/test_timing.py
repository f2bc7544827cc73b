"""Timing: nested spans, the table, and the operations of the towers' matrix products."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bigdssm.config import HISTORY_BLOCKS, ModelConfig, TowerConfig
from bigdssm.dataset.schema import Schema
from bigdssm.features import Categorical, History, Numeric, Text, Vocabulary
from bigdssm.loader.batch import lengths_of
from bigdssm.models import QueryPositions, SideSize, new_model
from bigdssm.models.declarations import Transformer
from bigdssm.training import metrics_logger
from bigdssm.training.metrics_logger import TimeTable
from bigdssm.utils import timing


def test_nested_timings_are_exclusive() -> None:
    timing.pop_seconds()
    with pytest.raises(KeyError), timing.span("loss"):
        time.sleep(0.02)
        with timing.span("communication"):
            time.sleep(0.05)
        raise KeyError
    with timing.span("loss"):
        time.sleep(0.02)
    time.sleep(0.02)
    seconds = timing.pop_seconds()
    assert list(seconds) == ["loss", "loss/communication"]
    assert 0.04 <= seconds["loss"] < seconds["loss/communication"] + 0.04
    assert 0.05 <= seconds["loss/communication"] < 0.5
    assert timing.pop_seconds() == {}


def test_on_a_device_the_clock_is_its_stream_s_and_no_span_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host runs ahead of a device that works 0.3 s on an asynchronous launch."""
    stream_s, waits = 100.0, 0

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at_s = stream_s

        def elapsed_time(self, later: Event) -> float:
            return 1e3 * (later.at_s - self.at_s)

        def synchronize(self) -> None:
            nonlocal waits
            waits += 1

    timing.pop_seconds()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: pytest.fail("the whole device is waited for"))
    with timing.span("encode"):
        stream_s += 0.3
        with timing.span("communication"):
            stream_s += 0.1
    with timing.span("data wait"):
        time.sleep(0.02)  # while the device is still busy
    assert waits == 0
    assert timing.pop_seconds() == pytest.approx({"encode": 0.3, "encode/communication": 0.1, "data wait": 0.0})
    assert waits == 1
    for _ in range(5000):
        with timing.span("much"):
            stream_s += 0.001
    assert waits == 2  # the number of unread events is bounded
    assert timing.pop_seconds() == pytest.approx({"much": 5.0})
    monkeypatch.undo()
    timing.pop_seconds()


def test_the_table_adds_up() -> None:
    table = TimeTable(6.0, 2, 30.0, {"encode": 1.0, "backward": 2.0, "validation": 1.0})
    table.add(TimeTable(4.0, 3, 30.0, {"encode": 1.0, "backward/encode again": 1.0, "validation/communication": 1.0}))
    assert table.training_s == 8.0
    lines = table.lines(peak_flops=20.0)
    assert lines[0] == "10.0 s in 5 steps"
    shares = {line[:28].strip(): line[-6:].strip() for line in lines[1:-1]}
    assert shares["encode"] == "20.0%" and shares["other"] == "30.0%" and len(shares) == 6
    assert "60% of the peak" in lines[-1] and "38% over all" in lines[-1]


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize(
    ("block", "positions"),
    [("sasrec", "none"), ("gated", "rotary"), ("lowpass", "relative"), ("gated", "relative")],
)
def test_operations_by_formula_equal_the_counts_of_torch(block: Any, positions: Any, many: bool) -> None:
    """Rows of one length, without padding; one query per row, or many."""
    schema = Schema(
        {"history": History(of="item", max_items=6).with_name("history")},
        {
            "item": Categorical(vocabulary=Vocabulary.of("abcdefgh")).with_name("item"),
            "year": Numeric().with_name("year"),
            "title": Text(max_tokens=16).with_name("title"),
        },
    )
    config = ModelConfig(
        dim=24,
        beta="none",
        query=TowerConfig(mlp=(20,), history=HISTORY_BLOCKS.find(block, "")(positions=positions, layers=2)),
        doc=TowerConfig(text=Transformer(layers=2, hidden=16)),
    )
    query_positions = QueryPositions(torch.tensor([0, 2, 0, 2, 1]), torch.tensor([0, 5, 3, 1, 2])) if many else None
    model = new_model(config, schema, vocab_size=50).eval()
    query = {"history": torch.randint(2, 10, (3, 5))}
    doc = {"item": torch.arange(2, 9), "year": torch.ones(7), "title": torch.randint(1, 50, (7, 11))}
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(query, doc, query_positions=query_positions)
    padded = {"title": torch.nn.functional.pad(doc["title"], (0, 4))}
    of_queries = SideSize(3, {"history": np.full(3, 5)}, len(query_positions.row) if query_positions else None)
    of_docs = SideSize(7, {"title": lengths_of(padded, {"title": 0})["title"].filled})
    assert model.flops(of_queries, of_docs) == pytest.approx(counter.get_total_flops(), rel=1e-6)


def test_a_peak_is_measured_without_products_that_take_long(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    rand = torch.rand

    def noted(*size: int, **options: Any) -> torch.Tensor:
        made.append(size[0])
        return rand(*size, **options)

    monkeypatch.setattr(metrics_logger, "SLOW_PRODUCT_S", 100.0)
    monkeypatch.setattr(torch, "rand", noted)
    assert metrics_logger.peak_flops(torch.device("cpu"), torch.float32, largest=64) > 0
    assert made == [8, 8, 16, 16, 32, 32, 64, 64]
    monkeypatch.setattr(metrics_logger, "SLOW_PRODUCT_S", 0.0)
    made.clear()
    metrics_logger.peak_flops(torch.device("cpu"), torch.float32, largest=64)
    assert made == [8, 8]


def test_the_first_step_logs_a_line_and_no_record(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Bar:
        is_live = False

        def __call__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(metrics_logger, "step_flops", lambda *_: 0.0)
    monkeypatch.setattr(metrics_logger.logger, "propagate", True)
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.1}])
    engine = SimpleNamespace(module=None, tables=None, deepspeed=SimpleNamespace(optimizer=optimizer))
    records: list[dict[str, Any]] = []
    trackers = SimpleNamespace(log=records.append)
    run: Any = metrics_logger.MetricsLogger("pretrain", engine, trackers, Bar(), 9, 4, 4, lambda: "")  # type: ignore[arg-type]
    batch = SimpleNamespace(query_positions=None, counts=torch.ones(2), doc_ids=[1, 2])
    plan = SimpleNamespace(tokens=8, padding=0.0)
    result = SimpleNamespace(
        loss=1.0, alpha=20.0, reports=[SimpleNamespace(queries=4)], gradient_norm=torch.ones(()), stats={}, plan=plan
    )  # fmt: skip
    with caplog.at_level("INFO", metrics_logger.logger.name):
        for step in range(3, 10):  # resumed after step 2
            run.after_step(step, step, batch, result)
    assert [int(message.split()[1].split("/")[0]) for message in caplog.messages] == [3, 4, 8, 9]
    assert [record["step"] for record in records] == [4, 8, 9]
