"""A night that continues a model: learning rate, nights that change nothing, comparison with the live model."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
import yaml

import bigdssm
from bigdssm import errors
from bigdssm.checkpoints.checkpoint import find_checkpoint
from bigdssm.checkpoints.model_folder import load_checkpoint_model, load_model_folder
from bigdssm.checkpoints.training_record import TrainingRecord
from bigdssm.cluster.monitor import read_run_state
from bigdssm.cluster.run_folder import read_events
from bigdssm.commands import compare_models
from bigdssm.config import load_config
from bigdssm.dataset.dataset import Dataset
from bigdssm.errors import BigDSSMError, CheckpointError, DataError, Verdict
from bigdssm.evaluation import succession
from bigdssm.evaluation.comparison import chain_systems
from bigdssm.evaluation.metrics import Difference
from bigdssm.export.formats import EXPORT_FORMATS, model_card
from bigdssm.training.validation import BestSelection

USERS, ITEMS = 20, [f"i{n}" for n in range(12)]
STAGE = {
    "rows_global": 16, "steps": 4, "optimizer": {"lr": 0.05, "warmup_steps": 0}, "validate_every_steps": 2,
    "log_every_steps": 1, "negatives": {"columns": "catalogue", "mask": "none"},
}  # fmt: skip
TOWER = {"mlp": [], "embedding_dim": 8}
EVENTS = {
    "lanes": 2, "query": {"past": {"type": "history", "of": "item_id", "max_items": 4}}, "exclude_seen": False,
    "doc": {"item_id": {"type": "categorical"}, "price": {"type": "numeric"}},
}  # fmt: skip
PAIRS = {"lanes": 2, "query": {"word": {"type": "categorical"}}, "doc": {"item_id": {"type": "categorical"}}}


class Shop(NamedTuple):
    """A folder with a dataset of one partition, and the model that was trained on it."""

    dir: Path
    live: Path
    append: Any  # adds the next partition

    @property
    def data(self) -> str:
        return str(self.dir / "data")

    def night(self, *overrides: str) -> bigdssm.StageResult:
        """Continue the live model on the second partition, in a run folder of its own."""
        run = self.dir / f"night-{len(list(self.dir.glob('night-*')))}"
        given = [f"run.dir={run}", f"pretrain.init={self.live}", "data.from_partition=day1", *overrides]
        return bigdssm.pretrain(self.dir / "config.yaml", given)

    def compare(self, new: Path, *options: str) -> int:
        return compare_models.main([str(self.live), str(new), "--data", self.data, *options])


def write_config(folder: Path, data: dict[str, Any]) -> None:
    query = {"residual": "past", "mlp": []} if "past" in data["query"] else TOWER
    doc = {**TOWER, "residual": "item_id"} if "past" in data["query"] else TOWER
    content = {
        "run": {"dir": str(folder / "run"), "trackers": []}, "data": {**data, "dir": str(folder / "data")},
        "model": {"dim": 8, "query": query, "doc": doc}, "pretrain": STAGE,
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(content))


def add_events(folder: Path, day: int, **options: Any) -> None:
    """Add a day with an item of its own; the newest quarter of its events is held out."""
    random = np.random.RandomState(day)
    ids = [*ITEMS, f"new{day}"]
    times = 1e9 + 100_000 * day + random.permutation(6 * USERS)
    users = np.repeat([f"u{n}" for n in range(USERS)], 6)
    events = pd.DataFrame({"user_id": users, "item_id": random.choice(ids, 6 * USERS), "timestamp": times})
    split = {"split": "time", "validation_fraction": 0.2, "test_fraction": 0.2}
    options = {"partition": f"day{day}", "append": day > 0, **split, **options}
    items = pd.DataFrame({"item_id": ids, "price": 5.0})
    bigdssm.make_dataset(folder / "config.yaml", interactions=events, items=items, **options)


def add_pairs(folder: Path, day: int, **options: Any) -> None:
    random = np.random.RandomState(day)
    words = [f"w{number}" for number in random.randint(0, 30, 120)]
    ids = [*ITEMS, f"new{day}"]
    pairs = [{"word": word, "item_id": random.choice(ids)} for word in words]
    split = {"split": "random", "validation_fraction": 0.2, "test_fraction": 0.2}
    options = {"partition": f"day{day}", "append": day > 0, **split, **options}
    bigdssm.make_dataset(folder / "config.yaml", pairs=pairs, **options)


@pytest.fixture(scope="module", params=["events", "pairs"])
def shop(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Shop:
    """Return a shop whose live model was trained on day0, with a dataset of day0 and day1."""
    folder = tmp_path_factory.mktemp(request.param)
    data, append = (EVENTS, add_events) if request.param == "events" else (PAIRS, add_pairs)
    write_config(folder, data)
    append(folder, 0)
    bigdssm.pretrain(folder / "config.yaml")
    shutil.copytree(folder / "run/pretrain/best", folder / "live")
    shutil.copytree(folder / "data", folder / "data of the first day")
    append(folder, 1)
    return Shop(folder, folder / "live", append)


def rates(run: Path) -> list[float]:
    """Return the learning rates of the steps of a stage."""
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [record["lr"] for record in records if "lr" in record]


def test_a_night_that_changes_nothing_says_so_and_is_the_same_model(
    shop: Shop, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """The dataset has new items, whose rows would be other weights, although no vector of an item changed."""
    caplog.set_level("INFO")
    result = shop.night("pretrain.optimizer.lr=0")
    live, kept = load_model_folder(shop.live), load_model_folder(result.best)
    assert not result.changed and kept.checksum == live.checksum
    assert kept.schema.vocabulary_sizes() == live.schema.vocabulary_sizes()
    whole = Dataset.open(shop.data)
    assert kept.schema.vocabulary_sizes() != whole.schema.vocabulary_sizes(), "day1 has a new item"
    assert kept.config.run.dir != live.config.run.dir, "the config is that of the night"
    queries = Dataset.open(shop.data, ["day1"]).num_queries("validation")
    assert 0 < queries < whole.num_queries("validation")
    (warning,) = [record for record in caplog.records if "changed nothing" in record.message]
    assert warning.levelname == "WARNING" and f"on {queries} queries of day1" in warning.message
    assert live.checksum[:12] in warning.message
    (line,) = [line for line in caplog.messages if "pretrain finished" in line]
    assert "the initial weights are the best, unchanged: best validation NDCG@10" in line and "at step 0" in line
    end = read_events(result.best.parent)[-1]
    assert end["reason"] == "finished"
    assert {**end["best"], "validation": None} == {
        "step": 0, "initial": True, "validation": None, "queries": queries, "model": live.checksum,
        "start": live.checksum,
    }  # fmt: skip
    state = read_run_state(result.best.parent).state
    assert f"best/ has the initial weights, unchanged (model {live.checksum[:12]}" in state
    assert kept.provenance["initial"] and kept.provenance["trained"] == live.provenance["trained"]
    card = model_card(kept, "kept", EXPORT_FORMATS.find("model", "")(), None, None)
    assert "step 0, unchanged since the start of the stage" in card
    assert shop.compare(result.best) == Verdict.EQUAL_WEIGHTS == 12
    assert "equal weights" in capsys.readouterr().out
    # a checkpoint has the rows of the new items
    last = load_checkpoint_model(find_checkpoint(result.best.parent, "latest"))
    assert last.schema.vocabulary_sizes() == whole.schema.vocabulary_sizes()


def test_a_night_that_trains_records_what_it_trained_on(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BestSelection, "add", lambda *_, **__: (True, True))
    result = shop.night()
    live, new = load_model_folder(shop.live), load_model_folder(result.best)
    end = read_events(result.best.parent)[-1]["best"]
    assert result.changed and new.checksum != live.checksum
    assert (end["step"], end["initial"], end["model"], end["start"]) == (4, False, new.checksum, live.checksum)
    assert "best/ has the weights of step 4 (model" in read_run_state(result.best.parent).state
    first, both = TrainingRecord.of(live.provenance), TrainingRecord.of(new.provenance)
    assert first is not None and both is not None
    assert [*first.partitions.values()] == ["day0"] and [*both.partitions.values()] == ["day0", "day1"]
    dataset = Dataset.open(shop.data)
    if dataset.sequences is None:
        assert first.until is both.until is None
        return
    times = [dataset.request_times(rows).max() for rows in dataset.iterate("train", 64)]
    assert both.until == max(times) > 1e9 + 100_000 > first.until > 1e9


def test_a_continued_model_has_its_own_learning_rate(
    shop: Shop, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    first = rates(shop.dir / "run/pretrain")
    assert first[0] == pytest.approx(0.05)
    ratio = load_config(shop.dir / "config.yaml").pretrain.optimizer.continue_lr_ratio
    assert 0 < ratio < 1
    expected = pytest.approx([ratio * rate for rate in first])
    assert rates(shop.night().best.parent) == expected
    assert "pretrain continues a model on newer data: learning rate" in caplog.text
    if shop.dir.name.startswith("pairs"):
        return
    # also over all partitions, which the model knows in part
    assert rates(shop.night("data.from_partition=null").best.parent)[:4] == expected
    # a new segment of a run
    shutil.copytree(shop.dir / "run", tmp_path / "run")
    on = [f"run.dir={tmp_path / 'run'}", "data.from_partition=day1"]
    bigdssm.pretrain(shop.dir / "config.yaml", on, resume=True)
    assert rates(tmp_path / "run/pretrain") == [*first, *expected.expected]
    # as it is: a rate on the command line, a ratio of 1, and another stage or dataset
    caplog.clear()
    assert rates(shop.night("pretrain.optimizer.lr=0.02").best.parent)[0] == pytest.approx(0.02)
    assert rates(shop.night("pretrain.optimizer.continue_lr_ratio=1").best.parent) == first
    assert "learning rate 2.00e-02" in caplog.text


def test_a_rate_on_the_command_line_is_that_of_the_command(shop: Shop) -> None:
    def ratio(*overrides: str) -> float:
        return load_config(shop.dir / "config.yaml", overrides).pretrain.optimizer.continue_lr_ratio

    default = ratio()
    assert ratio("pretrain.optimizer.lr=0.1") == ratio("pretrain.optimizer={lr: 0.1}") == 1.0
    assert ratio("pretrain.optimizer.lr=0.1", "pretrain.optimizer.continue_lr_ratio=0.5") == 0.5
    assert ratio("pretrain.optimizer.lr=null") == ratio("pretrain.steps=3") == default


def test_only_a_model_of_the_stage_is_continued(shop: Shop) -> None:
    given = [f"run.dir={shop.dir / 'tuned'}", f"sft.init={shop.live}", "sft.optimizer.warmup_steps=0", "sft.steps=1"]
    small = ["sft.rows_global=16", "sft.log_every_steps=1", "data.from_partition=day1"]
    loss = ["sft.loss.name=softmax", "sft.negatives.columns=batch"]
    best = bigdssm.sft(shop.dir / "config.yaml", [*given, *small, *loss]).best
    assert rates(best.parent)[0] == pytest.approx(1e-3)


def test_verdicts() -> None:
    cases = [
        ((0.01, 0.001, 0.02), Verdict.NOT_WORSE), ((-0.003, -0.005, -0.001), Verdict.NOT_WORSE),
        ((-0.003, -0.0051, -0.001), Verdict.WORSE), ((-0.1, -0.2, -0.01), Verdict.WORSE),
        ((0.0, -0.1, 0.1), Verdict.UNDECIDED), ((0.5, math.nan, math.nan), Verdict.UNDECIDED),
    ]  # fmt: skip
    for interval, expected in cases:
        assert succession.verdict_of(Difference(*interval), 0.005) is expected, interval


def test_no_error_has_the_exit_code_of_a_verdict() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, BigDSSMError)]
    codes = {kind.exit_code for kind in kinds} | {130}
    assert len(kinds) > 8 and codes.isdisjoint({*Verdict} - {Verdict.NOT_WORSE})
    assert [*map(int, Verdict)] == [0, 10, 11, 12]


def test_models_are_compared_on_requests_newer_than_both(
    shop: Shop, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BestSelection, "add", lambda *_, **__: (True, True))
    best = shop.night("pretrain.optimizer.lr=0.1").best
    dataset = Dataset.open(shop.data, ["day1"])
    queries = dataset.num_queries("test")
    code = shop.compare(best)
    out = capsys.readouterr().out
    assert code in (0, 10, 11) and f"test, {queries} requests of day1" in out
    assert "requests newer than the training on day0, day1" in out and "margin 0." in out and "(2% of LIVE)" in out
    assert ("chain" in out) == ("(chosen on validation)" in out) == (dataset.sequences is not None)
    # the live model against itself is equal; the verdict is the exit code
    for verdict in (Verdict.NOT_WORSE, Verdict.WORSE, Verdict.UNDECIDED):
        monkeypatch.setattr(succession, "verdict_of", lambda *_, verdict=verdict: verdict)
        assert shop.compare(best) == verdict and compare_models.WORDS[verdict] in capsys.readouterr().out
    # no partition has newer train rows; nor has the dataset of the first day, where both are trained on all
    live, new = (load_model_folder(path) for path in (shop.live, best))
    with pytest.raises(DataError, match=r"no request in split train that is newer than the training on day0, day1"):
        succession.newer_requests(shop.data, "train", live, new)
    if dataset.sequences is not None:
        with pytest.raises(DataError, match="no request in split test that is newer"):
            succession.newer_requests(str(shop.dir / "data of the first day"), "test", live, new)
    assert compare_models.main([str(shop.live), str(best), "--data", shop.data, "--split", "train"]) == 3
    old = load_model_folder(shop.live)
    del old.provenance["trained"]
    with pytest.raises(CheckpointError, match="LIVE has no record of the data"):
        succession.newer_requests(shop.data, "test", old, new)


def test_the_strongest_chain_of_all_partitions_is_compared(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BestSelection, "add", lambda *_, **__: (True, True))
    live, new = load_model_folder(shop.live), load_model_folder(shop.night().best)
    result = succession.compare_models(live, new, shop.data)
    whole, compared = Dataset.open(shop.data), Dataset.open(shop.data, ["day1"])
    chains = chain_systems(compared, "test", exclude_seen=False, fitted_on=whole)
    if whole.sequences is None:
        assert not chains and len(result.systems) == 2
        return
    assert [chain.name for chain in chains] == ["chain", "daily chain"]
    strongest = max(chains, key=lambda chain: chain.values["ndcg_at_10"].mean())
    _, _, found = result.systems
    assert found.name == strongest.name and found.options == strongest.options
    np.testing.assert_array_equal(found.values["ndcg_at_10"], strongest.values["ndcg_at_10"])
    for chain in chain_systems(compared, "test", exclude_seen=False, fitted_on=compared):
        assert not np.array_equal(chain.values["mrr"], found.values["mrr"])


def test_only_requests_after_the_newest_target_count(tmp_path: Path) -> None:
    """Rows that are held out at random are mostly older than the training."""
    write_config(tmp_path, EVENTS)
    add_events(tmp_path, 0, split="time")
    bigdssm.pretrain(tmp_path / "config.yaml")
    live = load_model_folder(tmp_path / "run/pretrain/best")
    until = live.provenance["trained"]["until"]
    dataset = Dataset.open(tmp_path / "data")
    assert until == max(dataset.request_times(rows).max() for rows in dataset.iterate("train", 64))
    times = np.concatenate([dataset.request_times(rows) for rows in dataset.iterate("test", 64)])
    live.provenance["trained"]["until"] = later = float(np.median(times))
    found = succession.newer_requests(str(tmp_path / "data"), "test", live, live)
    assert found.mask is not None and found.mask.tolist() == (times > later).tolist()
    assert 0 < found.mask.sum() < len(times)
    # a dataset that is rebuilt has other partitions; times decide
    live.provenance["trained"]["partitions"] = {"other": "day0"}
    assert succession.newer_requests(str(tmp_path / "data"), "test", live, live).mask is not None
    live.provenance["trained"]["until"] = None
    with pytest.raises(DataError, match="trained on none of its partitions"):
        succession.newer_requests(str(tmp_path / "data"), "test", live, live)
