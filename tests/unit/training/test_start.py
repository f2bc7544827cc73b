"""Errors before ranks depend on each other: one sentence, nothing is written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bigdssm.checkpoints.model_folder import load_model_folder
from bigdssm.config import Config, MiningConfig, SourceConfig, TablesConfig, load_config
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.partition import MixturePart
from bigdssm.dataset.rows import EVENT_BITS
from bigdssm.errors import BigDSSMError, CheckpointError, ConfigError, DataError
from bigdssm.evaluation.evaluate import Evaluation
from bigdssm.losses import ListwiseKL
from bigdssm.models import new_model
from bigdssm.retrieval.hard_negatives import window_records
from bigdssm.training.batches import row_stream
from bigdssm.training.checks import check_stage, check_tables
from bigdssm.training.refresh import HardNegativeRefresh
from bigdssm.training.start import _check_origin, check_folder
from bigdssm.training.validation import BestSelection, Validator
from bigdssm.utils.log import no_progress
from tests.distributed import small_run
from tests.hard_negatives import write_hard_negatives


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run.write_dataset(tmp_path_factory.mktemp("stages"))


@pytest.fixture
def config(path: Path, tmp_path: Path) -> Config:
    return load_config(path, [f"run.dir={tmp_path / 'run'}"])


def refused(config: Config, error: type[BigDSSMError], words: str, *, ranks: int = 1, stage: str = "pretrain") -> None:
    before = sorted(Path(config.run.dir).rglob("*"))
    with pytest.raises(error, match=words) as caught:
        check_stage(config, stage, ranks)  # type: ignore[arg-type]
        check_folder(config, stage, False)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert sorted(Path(config.run.dir).rglob("*")) == before


def test_a_good_config_passes(config: Config) -> None:
    assert check_stage(config, "pretrain", 2).num_rows("validation") == small_run.NUM_USERS


def test_keys_of_sharded_tables_are_named_without_any(config: Config, caplog: pytest.LogCaptureFixture) -> None:
    dataset = check_stage(config, "pretrain", 1)
    model = new_model(config.model, dataset.schema, dataset.vocab_size)
    check_tables(config, "pretrain", model)
    assert "no effect" not in caplog.text
    tables = TablesConfig(admit_after=3, id_dropout=0.5, rows_from=10**9)
    check_tables(replace(config, model=replace(config.model, tables=tables)), "pretrain", model)
    assert "model.tables.admit_after: no effect without sharded tables" in caplog.text, "ids of histories are dropped"


def test_more_ranks_than_lanes(config: Config) -> None:
    refused(config, ConfigError, r"7 ranks, but data\.lanes=6", ranks=7)


def test_a_missing_dataset(config: Config, tmp_path: Path) -> None:
    refused(replace(config, data=replace(config.data, dir=str(tmp_path))), DataError, "is not a dataset")


def test_a_dataset_of_another_schema(config: Config) -> None:
    query = {**config.data.query, "history": replace(config.data.query["history"], max_items=9)}
    refused(replace(config, data=replace(config.data, query=query)), ConfigError, "max_items")


def test_an_unknown_tracker(config: Config) -> None:
    refused(replace(config, run=replace(config.run, trackers=("tensorbord",))), ConfigError, "tensorbord")


def test_fine_tuning_without_a_pretraining(config: Config) -> None:
    refused(config, ConfigError, r"does not exist; run bigdssm pretrain", stage="sft")


def test_a_folder_that_is_in_use(config: Config) -> None:
    folder = config.stage_dir("pretrain")
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    refused(config, CheckpointError, "not empty")
    with pytest.raises(CheckpointError, match=r"no config\.yaml"):
        check_folder(config, "pretrain", True)


@pytest.mark.parametrize("stage", ["pretrain", "sft", None])
def test_checkpoints_of_another_stage_are_refused(config: Config, stage: str | None) -> None:
    """Checkpoints of pretraining, copied into sft/, have the run's identity and config."""
    state = {"run_id": "one", "config": config.to_dict(), "stage": stage}
    checkpoint: Any = SimpleNamespace(path=Path("sft/checkpoints/step-00000004"), state=state)
    if stage == "sft":
        return _check_origin(checkpoint, "one", config, "sft")
    with pytest.raises(CheckpointError, match=f"step-00000004 was written by the stage {stage}"):
        _check_origin(checkpoint, "one", config, "sft")


def test_the_last_rows_of_an_epoch_are_carried_over(config: Config) -> None:
    dataset = check_stage(config, "pretrain", 1)
    whole, rest = divmod(dataset.num_rows("train"), 96)
    assert rest > 0
    rows = row_stream(config, config.pretrain, dataset, 0, 1)
    assert rows.steps_per_epoch == whole + 1
    seen = np.concatenate([next(rows).row_ids for _ in range(whole + 1)])
    assert len(np.unique(seen)) == dataset.num_rows("train")


def test_more_targets_per_row_than_the_dataset_has_are_reported(
    config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    history = replace(config.model.query.history, positions="relative")
    query = replace(config.model.query, history=history)
    wanted = replace(config, data=replace(config.data, targets_per_row=4), model=replace(config.model, query=query))
    check_stage(config, "pretrain", 1)
    assert "targets_per_row" not in caplog.text
    check_stage(wanted, "pretrain", 1)
    assert "data.targets_per_row=4 has no effect: every train row of" in caplog.text


def hard_negative_file(config: Config, dataset: Dataset) -> str:
    mining = HardNegativeRefresh(config, "pretrain", None, dataset, no_progress)  # type: ignore[arg-type]
    return mining.path(10).name


def test_hard_negatives_belong_to_one_dataset_and_weight(config: Config) -> None:
    """Another dataset or weight has other rows, and its row numbers may refer to other documents."""
    dataset = Dataset.open(config.data.dir)
    grown = Dataset.open(config.data.dir)
    grown.fingerprint = "another"  # type: ignore[misc]
    mixed = [replace(config, data=replace(config.data, mixture=[SourceConfig(weight=weight)])) for weight in (1.0, 2.0)]
    named = []
    for some in mixed:
        for data in (dataset, grown):
            data.sources = (MixturePart("base", 0, 1, some.data.mixture[0].weight),)
            named.append(hard_negative_file(some, data))
    assert len(set(named)) == 4 and all(name.startswith("mined_negatives.") for name in named)
    assert hard_negative_file(config, dataset) == "mined_negatives.npy"
    negatives = config.pretrain.negatives
    negatives = replace(negatives, mining=replace(negatives.mining, every_steps=5))
    again = replace(config, pretrain=replace(config.pretrain, negatives=negatives))
    assert hard_negative_file(again, dataset) == "mined_negatives.step-00000010.npy"


def test_existing_hard_negatives_are_validated(config: Config, tmp_path: Path) -> None:
    mining = MiningConfig(file=str(tmp_path / "mined.npy"))
    negatives = replace(config.pretrain.negatives, hard=2, mining=mining)
    config = replace(config, pretrain=replace(config.pretrain, negatives=negatives))
    refused(config, DataError, "mined.npy is not a hard-negatives file: .*No such file")
    dataset = Dataset.open(config.data.dir)
    rows, documents = dataset.num_rows("train"), dataset.catalogue.num_docs
    for row, document in ((rows, 0), (0, documents)):
        records = window_records(np.array([row << EVENT_BITS]), np.array([[document, -1]]))
        write_hard_negatives(tmp_path / "mined.npy", records, dataset)
        refused(config, DataError, f"another dataset: it contains row {row} and document {document}, .* {documents} do")
    records = window_records(np.array([rows - 1 << EVENT_BITS]), np.array([[documents - 1, -1]]))
    write_hard_negatives(tmp_path / "mined.npy", records, dataset)
    check_stage(config, "pretrain", 1)
    judged = replace(config, pretrain=replace(config.pretrain, distillation=ListwiseKL()))
    refused(judged, ConfigError, r"distillation\.name: got kl, needs a teacher's scores, and \S*mined.npy has none")
    negatives = replace(negatives, mining=replace(mining, teacher_margin=0.0))
    margin = replace(config, pretrain=replace(config.pretrain, negatives=negatives))
    refused(margin, ConfigError, r"teacher_margin: got 0.0, needs a teacher's scores, and \S*mined.npy has none")
    teacher = np.zeros((1, 3), np.float32)
    records = window_records(np.array([0]), np.array([[documents - 1, -1]]), teacher)
    write_hard_negatives(tmp_path / "mined.npy", records, dataset)
    check_stage(judged, "pretrain", 1)


def test_a_full_disk_during_the_write_of_the_best_gives_a_one_line_error(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for a checkpoint: code 4, and the previous folder is kept."""
    dataset = Dataset.open(config.data.dir)
    model = new_model(config.model, dataset.schema, dataset.vocab_size)
    engine = SimpleNamespace(module=model, state_dict=lambda names, on_main: model.state_dict(), tables=None)
    validator, best = Validator(dataset, config, "pretrain", 64), config.stage_dir("pretrain") / "best"
    validator.save_best(engine, {"stage": "pretrain", "step": 1})  # type: ignore[arg-type]

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bigdssm.utils.atomic.replace_folder", full)
    with pytest.raises(CheckpointError, match=r"could not write \S*best: .*No space left on device.*is kept"):
        validator.save_best(engine, {"stage": "pretrain", "step": 2})  # type: ignore[arg-type]
    assert load_model_folder(best).provenance["step"] == 1


def test_a_best_that_a_kill_left_between_two_renames_is_not_lost(config: Config) -> None:
    dataset = Dataset.open(config.data.dir)
    model = new_model(config.model, dataset.schema, dataset.vocab_size)
    engine = SimpleNamespace(module=model, state_dict=lambda names, on_main: model.state_dict(), tables=None)
    validator, best = Validator(dataset, config, "pretrain", 64), config.stage_dir("pretrain") / "best"
    validator.save_best(engine, {"stage": "pretrain", "step": 1})  # type: ignore[arg-type]
    best.rename(best.with_name(".best.replaced"))
    assert not validator.is_best_missing()
    assert load_model_folder(best).provenance["step"] == 1


def evaluation(ranks: list[float], query_ids: list[int] | None = None) -> Evaluation:
    """Return an evaluation whose metric `mrr` of a row is 1 / rank."""
    ids = np.arange(len(ranks)) if query_ids is None else np.array(query_ids)
    return Evaluation(np.array(ranks), ids, {}, 0.0)


NOISE = [1.0, 2.0] * 20  # two validations that differ in half of the rows by as much, in either direction
SWAPPED = [2.0, 1.0] * 19 + [2.0, 2.0]
BETTER = [1.0] * 40


@pytest.mark.parametrize(
    ("of_start", "validations", "taken", "highest"),
    [
        (False, (NOISE, SWAPPED, NOISE), (True, True, True), (True, False, False)),  # the latest within the error
        (False, (BETTER, NOISE, BETTER), (True, False, True), (True, False, False)),
        (False, (NOISE, BETTER, [1.0] * 37 + [2.0] * 3), (True, True, False), (True, True, False)),
        (True, (SWAPPED, NOISE, SWAPPED), (True, False, False), (True, True, False)),  # noise leaves no trained start
        (True, (NOISE, BETTER, NOISE), (True, True, False), (True, True, False)),
        (False, ([1.0], [2.0], [1.0]), (True, False, True), (True, False, False)),  # one row has no error
    ],
)
def test_best_is_not_decided_by_noise(
    of_start: bool, validations: tuple[list[float], ...], taken: tuple[bool, ...], highest: tuple[bool, ...]
) -> None:
    whole, resumed = BestSelection(), BestSelection()
    results = []
    for number, ranks in enumerate(validations):
        start = of_start and number == 0
        results.append(whole.add(evaluation(ranks), "mrr", of_start=start))
        assert resumed.add(evaluation(ranks), "mrr", of_start=start) == results[-1]
        state, resumed = resumed.state_dict(), BestSelection()
        resumed.load_state_dict(state)
    assert (tuple(t for t, _ in results), tuple(h for _, h in results)) == (taken, highest)


def test_rows_of_one_query_are_one_observation() -> None:
    """40 rows of two queries improve together: two observations, of which one alone gains, prove nothing."""
    gains = [1.0] * 20 + [2.0] * 20
    for query_ids, leaves in ((None, True), ([0] * 20 + [1] * 20, False)):
        selection = BestSelection()
        selection.add(evaluation([2.0] * 40, query_ids), "mrr", of_start=True)
        assert selection.add(evaluation(gains, query_ids), "mrr", of_start=False)[0] is leaves
    rows_without_rank = evaluation([np.nan, 1.0, 2.0], [0, 1, 2])
    assert BestSelection().add(rows_without_rank, "mrr", of_start=False) == (True, True)


def test_the_selection_starts_again_with_another_number_of_rows() -> None:
    """A block of validation rows is damaged, or repaired."""
    selection = BestSelection()
    for rows, of_start in ((40, True), (39, False)):
        assert selection.add(evaluation([2.0] * rows), "mrr", of_start=of_start) == (True, True)
