"""The parts of an estimate against counts by hand; tests/distributed/test_estimate.py measures a process."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bigdssm.commands.estimate import stand_in_dataset
from bigdssm.config import load_config
from bigdssm.dataset.dataset import open_dataset
from bigdssm.errors import ConfigError
from bigdssm.training.estimate import Estimate, LiveBytes, StatedSizes, estimate, size_text
from tests.command_line import Tools
from tests.conftest import NUM_ITEMS, TinyDataset

ROOT = Path(__file__).resolve().parents[3]


def of(tiny: TinyDataset, *overrides: str, world_size: int = 1) -> Estimate:
    config = load_config(tiny.config, ["pretrain.rows_global=240", *overrides])
    return estimate(config, "pretrain", open_dataset(config.data), world_size)


def test_live_bytes_are_those_of_existing_tensors() -> None:
    with FakeTensorMode(), LiveBytes() as live:
        layer = nn.Sequential(nn.Linear(100, 200, bias=False), nn.Tanh())
        weights = live.now
        out = layer(torch.zeros(50, 100))
        assert weights == 4 * 100 * 200
        assert live.now == weights + 4 * 50 * (100 + 200)  # tanh keeps its output, the product its input
        view = out[:3]
        del out
        assert live.now == weights + 4 * 50 * (100 + 200)
        view.sum().backward()
        del view
        assert live.now == 2 * weights
        assert live.peak >= 2 * weights + 4 * 50 * (100 + 2 * 200)


def test_weights_tables_checkpoint_and_time(tiny_pairs: TinyDataset) -> None:
    found = of(tiny_pairs, "pretrain.steps=1000")
    config = load_config(tiny_pairs.config)
    dataset = open_dataset(config.data)
    codes = sum(feature.num_codes for feature in dataset.schema.doc.values() if feature.type == "categorical")
    assert found.table_weights == codes * config.model.doc.embedding_dim
    assert found.resident["weights"] == 4 * found.num_weights
    assert found.checkpoint_bytes == 12 * found.num_weights
    assert found.seconds(rows_per_s=500.0) == pytest.approx(1000 * 240 / 500)
    assert (
        found.validations == 1
        and of(tiny_pairs, "pretrain.steps=5", "pretrain.validate_every_steps=2").validations == 3
    )
    queries, steps = dataset.num_queries("validation"), "1,000 steps: 8.0 minutes at 500 rows per second"
    validation = (
        f"1 validation of {queries} queries and {dataset.catalogue.num_docs} documents: 1.0 days, 1.0 days each"
    )
    assert found.lines(500.0, 86400)[-3:] == [steps, f"{validation} as recorded", "in all: 1.0 days"]
    texts = found.validation_rows / found.rows_global  # forwards of the catalogue, relative to a step's three passes
    assert 0.3 < texts * 3 * 240 / dataset.catalogue.num_docs < 1.2


def test_stated_sizes_need_no_dataset(
    tiny_pairs: TinyDataset, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = load_config(tiny_pairs.config, [f"data.dir={tmp_path / 'none'}", "pretrain.rows_global=240"])
    stated = StatedSizes(pairs=2400, documents=10**6, queries=100)
    found = estimate(config, "pretrain", stand_in_dataset(config, 240, tmp_path / "stand-in"), 2, stated)
    built = of(tiny_pairs, world_size=2)
    assert (found.steps, found.rows_global, found.validations) == (10, 240, 1)
    assert found.validation == "100 queries and 1,000,000 documents"
    assert found.num_weights == pytest.approx(built.num_weights, rel=0.2)
    assert found.phases["validation, mining"] > 4 * 500_000 * (config.model.dim + 1)
    assert found.validation_rows > 1e6 / 6  # one forward of each document; a step has three, of both sides
    tools = Tools(monkeypatch, capsys)
    assert "needs both --pairs and --documents" in tools.refused(
        2, "estimate", "--config", tiny_pairs.config, "--pairs", 9
    )


def test_sizes_of_histories_cannot_be_stated(tiny_interactions: TinyDataset, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the feature history cannot be stated; build the dataset first"):
        stand_in_dataset(load_config(tiny_interactions.config), 8, tmp_path)


def test_shares_and_traffic_of_ranks(tiny_pairs: TinyDataset) -> None:
    one, four = of(tiny_pairs), of(tiny_pairs, world_size=4)
    whole = of(tiny_pairs, "engine.zero_stage=0", world_size=4)
    assert one.resident["optimizer's states"] == pytest.approx(4 * four.resident["optimizer's states"], rel=0.001)
    assert whole.resident["optimizer's states"] == one.resident["optimizer's states"]
    assert sum(one.sent.values()) == 0
    assert four.sent["weights' gradients"] == 2 * 4 * four.num_weights * 3 // 4
    assert four.sent["updated weights"] == 4 * four.num_weights * 3 // 4
    assert one.negatives == 239 and four.negatives == pytest.approx(239, abs=8)  # a rank's copies, for all ranks
    parts = of(tiny_pairs, "engine.zero_stage=3", world_size=4)
    assert parts.resident["weights"] < 1.01 * whole.resident["weights"] / 4
    weights = "weights, for forwards and backwards"
    assert parts.sent[weights] == 2 * 4 * parts.num_weights * 3 // 4
    chunks = of(tiny_pairs, "engine.zero_stage=3", "engine.chunk_tokens=400", world_size=4).sent[weights]
    again = of(tiny_pairs, "engine.zero_stage=3", "engine.chunk_tokens=400", "engine.keep_graph_tokens=0", world_size=4)
    assert 2 * parts.sent[weights] < chunks < again.sent[weights] <= 1.5 * chunks


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 4])
def test_an_index_takes_the_share_of_the_documents_vectors_again(
    tiny_interactions: TinyDataset, world_size: int
) -> None:
    def highest(exact_up_to: int) -> int:
        mines = (
            "pretrain={loss: {name: pair_ce}, negatives: {hard: 2, in_batch: false}}",
            "pretrain.rows_global=24",
            "model.beta=document",
        )
        limit = f"pretrain.negatives.mining.exact_up_to={exact_up_to}"
        return of(tiny_interactions, *mines, limit, world_size=world_size).phases["validation, mining"]

    share = 4 * NUM_ITEMS // world_size * (load_config(tiny_interactions.config).model.dim + 1)
    assert highest(NUM_ITEMS - 1) - highest(NUM_ITEMS) == share


@pytest.mark.slow
def test_a_checkpoint_is_written_from_a_copy_of_a_ranks_share(tiny_pairs: TinyDataset) -> None:
    copy, saving = "copy that a checkpoint is written from", ("pretrain.steps=10", "pretrain.save_every_steps=5")
    four = of(tiny_pairs, *saving, world_size=4)
    assert 4 * four.resident[copy] == pytest.approx(four.checkpoint_bytes, abs=4)
    averaged = of(tiny_pairs, *saving, "pretrain.weight_average=0.9", world_size=4)
    assert averaged.resident[copy] == pytest.approx(four.resident[copy] + four.num_weights, abs=4)
    at_the_end = of(tiny_pairs, "pretrain.steps=10", "pretrain.save_every_steps=10")
    waiting = of(tiny_pairs, *saving, "engine.async_checkpoints=false")
    assert copy not in at_the_end.resident and copy not in waiting.resident


def test_memory_of_the_host_is_counted_apart(tiny_pairs: TinyDataset) -> None:
    saving = ("pretrain.steps=10", "pretrain.save_every_steps=5")
    copy = of(tiny_pairs, *saving)
    assert copy.host_bytes == copy.resident["copy that a checkpoint is written from"] > 0
    offloaded = of(tiny_pairs, "engine.zero_stage=2", "engine.offload_optimizer=true", world_size=2)
    assert offloaded.host_bytes == sum(
        offloaded.resident[name]
        for name in ("float32 copy of the weights", "optimizer's states", "gradients on the host")
    )
    sharded = ("model.tables.sharding=rows", "pretrain.table_optimizer.name=rowwise_adagrad")
    assert of(tiny_pairs, *sharded).host_bytes == 0
    on_host = of(tiny_pairs, *sharded, "engine.table_memory=host")
    assert on_host.host_bytes == on_host.resident["rows of sharded tables, and their states"] > 0


def test_contents_of_items_are_resident_and_saved(tiny_interactions: TinyDataset) -> None:
    dim = load_config(tiny_interactions.config).model.dim
    for mode in ("engine.zero_stage=1", "engine.chunk_tokens=60", "engine.zero_stage=3"):
        ids, contents = (
            of(tiny_interactions, f"model.query.history.items={items}", "pretrain.rows_global=8", mode)
            for items in ("id", "both")
        )
        size = 4 * NUM_ITEMS * dim
        assert contents.resident["contents of items"] == size and "contents of items" not in ids.resident
        of_weights = 4 * (contents.num_weights - ids.num_weights)
        assert contents.checkpoint_bytes >= ids.checkpoint_bytes + size + of_weights


@pytest.mark.slow
def test_catalogue_columns_are_sharded_and_sent(tiny_interactions: TinyDataset) -> None:
    batch = "columns: batch, mask: past"
    columns = "columns: catalogue, mask: past"
    one, four, plain = (
        of(tiny_interactions, f"pretrain.negatives={{{negatives}}}", "pretrain.rows_global=24", world_size=ranks)
        for negatives, ranks in ((columns, 1), (columns, 4), (batch, 4))
    )
    assert one.negatives == four.negatives == NUM_ITEMS - 1 and plain.negatives == 23
    dim = load_config(tiny_interactions.config).model.dim
    of_rank = four.sent["loss: documents' vectors"] / (4 * dim * 3)  # a quarter of all, and its rows' positives
    assert NUM_ITEMS // 4 <= of_rank <= NUM_ITEMS // 4 + 6
    assert plain.sent["loss: documents' vectors"] < four.sent["loss: documents' vectors"]
    assert one.resident["batch"] > plain.resident["batch"]


def test_chunks_and_recomputation_take_less(tiny_pairs: TinyDataset) -> None:
    towers = "towers' activations and gradients"
    whole, chunks, again, both = (
        of(tiny_pairs, *mode).phases[towers]
        for mode in (
            (),
            ("engine.chunk_tokens=400",),
            ("engine.chunk_tokens=400", "engine.keep_graph_tokens=0"),
            ("engine.checkpoint_activations=true",),
        )
    )
    assert again < chunks < 0.6 * whole
    assert both < 0.8 * whole


@pytest.mark.slow
def test_the_command_line_shows_the_effect_of_ranks_and_rows(
    tiny_pairs: TinyDataset, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tools = Tools(monkeypatch, capsys)
    command = ("--config", tiny_pairs.config, "pretrain.rows_global=240", "pretrain.steps=1000")
    one = tools.ran("estimate", *command)
    script = [sys.executable, str(ROOT / "tools" / "estimate.py"), *map(str, command)]
    done = subprocess.run(
        [*script, "--gpus", "4", "--rows", "480", "--rows-per-s", "500"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    four = done.stdout
    assert "; 1 ranks" in one and "; 4 ranks" in four
    assert "240 rows per step; a query has 239 negatives" in one
    assert "480 rows per step; a query has 479 negatives" in four
    assert "1,000 steps: unknown without rows per second" in one
    assert "1,000 steps: 16.0 minutes at 500 rows per second" in four  # 480,000 rows
    assert "sent by a rank in a step: 0 B" in one and size(four, "sent by a rank in a step:") > 1e6
    moments = "optimizer's states"
    assert size(one, moments) == pytest.approx(4 * size(four, moments), rel=0.02)  # ZeRO 1 shares them out
    towers = "towers' activations and gradients (then)"
    assert size(four, towers) < 0.6 * size(one, towers)  # 120 rows on a rank, not 240
    for option, got in (("--gpus", 0), ("--rows", 0), ("--rows", -8)):
        assert f"{option} {got}: needs at least 1" in tools.refused(2, "estimate", *command, option, got)
    for got in ("-5.0", "nan", "inf", "0.0"):
        message = tools.refused(2, "estimate", *command, "--rows-per-s", got)
        assert f"--rows-per-s {got}: needs a finite number above 0" in message
    assert "world_size=5 is more than lanes=4" in tools.refused(2, "estimate", *command, "--gpus", 5)


def size(printed: str, label: str) -> float:
    """Return the bytes in the line of `label`."""
    found = re.search(rf"^\s*{re.escape(label)}\s+([\d.]+) (B|kB|MB|GB)$", printed, re.MULTILINE)
    assert found is not None, printed
    return float(found[1]) * 1000 ** ["B", "kB", "MB", "GB"].index(found[2])


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (2.5e6, "2.5 MB"), (3e9, "3.00 GB")]
)
def test_sizes_have_units(num_bytes: float, text: str) -> None:
    assert size_text(num_bytes) == text
