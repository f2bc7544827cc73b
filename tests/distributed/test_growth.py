"""A run continues on added partitions: weights, optimizer state and progress are kept, the rows are new."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from bigdssm.checkpoints.checkpoint import find_checkpoint, verify
from bigdssm.checkpoints.model_folder import load_checkpoint_model, load_model_folder
from bigdssm.config import load_config
from bigdssm.dataset.dataset import Dataset, open_dataset
from bigdssm.errors import CheckpointError
from bigdssm.features.categorical import categorical_of
from bigdssm.ingest.interactions import InteractionTables, make_interactions
from bigdssm.ingest.job import IngestTarget
from bigdssm.loader.stream import PairStream

from . import small_run
from .compared_runs import (
    STREAMING,
    assembled,
    assert_same_tensors,
    common,
    merged,
    restored_share,
    stop_after,
    weights,
)
from .small_run import append_day2
from .spawn import Pool, RankFailed

STEPS, NEW_STEPS = 12, 6
ALWAYS = (*STREAMING, "debug.log_row_ids=true")
ON = (
    *ALWAYS,
    "data.from_partition=day2",
    f"pretrain.steps={NEW_STEPS}",
    "pretrain.save_every_steps=2",
)


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory, pools: dict[int, Pool]) -> tuple[Path, Path]:
    """The config of a dataset that grew by `day2`, and the folder of a run that was finished before."""
    folder = tmp_path_factory.mktemp("grown")
    config, run_dir = small_run.write_dataset(folder), folder / "run"
    pools[2].run(small_run.run, config, run_dir, (*ALWAYS, "pretrain.save_every_steps=8"))
    append_day2(config)
    return config, run_dir


def known_rows(best: Path, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return the mask of the rows of a tensor that hold no id unknown to the model `best`."""
    table = name.rpartition("/")[2].removeprefix("tables.tables.doc_").removesuffix(".weight")
    feature = categorical_of(load_model_folder(best).schema.doc).get(table)
    if feature is None:
        return torch.ones(len(tensor) if tensor.ndim else (), dtype=torch.bool)
    return torch.from_numpy(~feature.unknown(np.arange(len(tensor))))


def copy(run_dir: Path, folder: Path) -> Path:
    shutil.copytree(run_dir, folder / "run")
    return folder / "run"


def row_ids(run_dir: Path, ranks: int) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for rank in range(ranks):
        for line in (run_dir / "pretrain" / f"row_ids-{rank:05d}.jsonl").read_text().splitlines():
            record = json.loads(line)
            found.setdefault(record["step"], []).extend(record["row_ids"])
    return {step: sorted(ids) for step, ids in found.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    "zero_stage", [0, 3, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)]
)
def test_weights_and_optimizer_state_are_retained_and_new_rows_added(
    grown: tuple[Path, Path], tmp_path: Path, pools: dict[int, Pool], zero_stage: int
) -> None:
    config, run_dir = grown[0], copy(grown[1], tmp_path)
    before = merged(run_dir / "pretrain" / "checkpoints" / f"step-{STEPS:08d}")
    shares = pools[2].run(restored_share, config, run_dir, (*ON, f"engine.zero_stage={zero_stage}"))
    after = assembled([piece for share, _ in shares for piece in share])
    assert all(groups == {(name, STEPS, decay) for name, _, decay in groups} for _, groups in shares)
    longer = {name for name in before if before[name].shape != after[name].shape}
    tables = {f"tables.tables.{name}.weight" for name in ("query_gender", "doc_item_id", "doc_genre")}
    assert longer == {prefix + table for table in tables for prefix in ("", "exp_avg/", "exp_avg_sq/")}
    for name, tensor in before.items():
        same = known_rows(grown[1] / "pretrain" / "best", name, tensor)
        assert torch.equal(after[name][: len(tensor)][same], tensor[same]), name
        added = after[name][len(tensor) :]
        assert not added.any() if "/" in name else added.abs().sum() > 0 or name not in longer, name


def test_the_rows_are_the_new_partitions_from_their_first_step_on(
    grown: tuple[Path, Path], tmp_path: Path, pools: dict[int, Pool]
) -> None:
    config, run_dir = grown[0], copy(grown[1], tmp_path)
    pools[2].run(small_run.run, config, run_dir, ON, "pretrain", True)
    old = row_ids(grown[1], 2)
    seen = row_ids(run_dir, 2)
    assert list(seen) == list(range(1, STEPS + NEW_STEPS + 1))
    assert {step: seen[step] for step in range(1, STEPS + 1)} == old
    dataset = Dataset.open(config.parent / "dataset", first="day2")
    stream = PairStream(dataset, rows_global=96, lanes=6)
    expected = {STEPS + step: sorted(next(stream).row_ids.tolist()) for step in range(1, NEW_STEPS + 1)}
    assert {step: ids for step, ids in seen.items() if step > STEPS} == expected
    curve = small_run.records(run_dir)
    assert [record["step"] for record in curve] == list(range(1, STEPS + NEW_STEPS + 1))
    assert np.isfinite([record["loss"] for record in curve]).all()
    rates = [record["lr"] for record in curve]
    ratio = load_config(config).pretrain.optimizer.continue_lr_ratio
    assert rates[STEPS] == pytest.approx(ratio * rates[0])  # a new schedule, of a continued model: warm-up again
    best = weights(run_dir)
    assert len(best["tables.tables.doc_item_id.weight"]) == 2 + small_run.NUM_ITEMS + 7


def test_an_unfinished_run_grows_on_another_number_of_ranks(
    grown: tuple[Path, Path], tmp_path: Path, pools: dict[int, Pool]
) -> None:
    config, run_dir = grown[0], copy(grown[1], tmp_path)
    shutil.rmtree(run_dir / "pretrain" / "checkpoints" / f"step-{STEPS:08d}")
    pools[1].run(small_run.run, config, run_dir, ON, "pretrain", True)
    stream = PairStream(Dataset.open(config.parent / "dataset", first="day2"), rows_global=96, lanes=6)
    expected = {8 + step: sorted(next(stream).row_ids.tolist()) for step in range(1, NEW_STEPS + 1)}
    seen = row_ids(run_dir, 1)
    assert {step: ids for step, ids in seen.items() if step > 8} == expected
    progress = verify(run_dir / "pretrain" / "checkpoints" / f"step-{8 + NEW_STEPS:08d}").state["progress"]
    assert (progress["part_step"], progress["step"]) == (8, 8 + NEW_STEPS)


MIXED = (
    "data.mixture=[{partitions: [day2], weight: 3}, {partitions: [base], weight: 1}]",
    *(option for option in ON if not option.startswith("data.from_partition")),
)


@pytest.mark.slow
def test_old_rows_are_mixed_in_by_weight_and_a_resumed_mixture_is_exact(
    grown: tuple[Path, Path], tmp_path: Path, pools: dict[int, Pool]
) -> None:
    config, run_dir = grown[0], copy(grown[1], tmp_path)
    pools[2].run(stop_after, config, run_dir, MIXED, 1)
    with pytest.raises(RankFailed, match=r"mixture was \[\['day2', 750\], \['base', 250\]\], is \[\['day2', 500\]"):
        changed = MIXED[0].replace("weight: 3", "weight: 1")
        pools[1].run(small_run.run, config, run_dir, (changed, *MIXED[1:]), "pretrain", True)
    pools[1].run(small_run.run, config, run_dir, MIXED, "pretrain", True)
    stream = PairStream(open_dataset(load_config(config, MIXED).data), rows_global=96, lanes=6)
    expected = {STEPS + step: sorted(next(stream).row_ids.tolist()) for step in range(1, NEW_STEPS + 1)}
    seen = row_ids(run_dir, 2)
    assert {step: ids for step, ids in seen.items() if step > STEPS} == expected
    rows_of_day2 = stream.dataset.partitions[0].content["splits"]["train"]["rows"]
    assert 0.5 < np.mean(np.concatenate(list(expected.values())) < rows_of_day2) < 1
    assert np.isfinite([record["loss"] for record in small_run.records(run_dir)]).all()


@pytest.mark.slow
def test_a_new_part_that_was_killed_ends_with_the_same_weights(
    grown: tuple[Path, Path], tmp_path: Path, pools: dict[int, Pool]
) -> None:
    whole, cut = copy(grown[1], tmp_path / "a"), copy(grown[1], tmp_path / "b")
    pools[2].run(small_run.run, grown[0], whole, ON, "pretrain", True)
    pools[2].run(stop_after, grown[0], cut, ON, 1)
    assert (cut / "pretrain" / "checkpoints" / f"step-{STEPS + 2:08d}").is_dir()
    pools[2].run(small_run.run, grown[0], cut, ON, "pretrain", True)
    last = f"step-{STEPS + NEW_STEPS:08d}"
    first, second = (merged(run / "pretrain" / "checkpoints" / last) for run in (whole, cut))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert row_ids(whole, 2) == row_ids(cut, 2)
    assert common(whole, STEPS + NEW_STEPS)["step"].tolist() == [STEPS + NEW_STEPS]  # of the whole run
    assert_same_tensors(common(whole, STEPS + NEW_STEPS), common(cut, STEPS + NEW_STEPS))


def test_another_run_starts_from_a_model_with_fewer_values(
    grown: tuple[Path, Path], tmp_path: Path, pools: dict[int, Pool]
) -> None:
    config, best = grown[0], grown[1] / "pretrain" / "best"
    pools[2].run(
        small_run.run, config, tmp_path, (f"pretrain.init={best}", "pretrain.optimizer.lr=0.0", "pretrain.steps=2")
    )
    assert load_model_folder(tmp_path / "pretrain/best").checksum == load_model_folder(best).checksum, "kept"
    before = weights(grown[1])
    after = load_checkpoint_model(find_checkpoint(tmp_path / "pretrain", "latest")).model.state_dict()
    assert len(after["tables.tables.doc_item_id.weight"]) == 2 + small_run.NUM_ITEMS + 7
    for name, tensor in before.items():
        same = known_rows(best, name, tensor)
        assert torch.equal(after[name][: len(tensor)][same], tensor[same]), name
    item = "tables.tables.doc_item_id.weight"
    assert torch.equal(after[item][-7:], before[item][1].expand(7, -1)), "new ids start from the row out of vocabulary"


def test_changes_other_than_growth_are_refused(
    grown: tuple[Path, Path], tmp_path: Path, pools: dict[int, Pool]
) -> None:
    config, run_dir = grown[0], copy(grown[1], tmp_path)
    written = (run_dir / "pretrain" / "config.yaml").read_text()
    with pytest.raises(RankFailed, match=r"partition day2 is new.*or continue on .* data\.from_partition=day2"):
        pools[1].run(small_run.run, config, run_dir, STREAMING, "pretrain", True)
    shutil.copytree(config.parent / "dataset", tmp_path / "dataset")
    elsewhere = yaml_with(config, tmp_path, str(tmp_path / "dataset"))
    saved = yaml_with(run_dir / "pretrain" / "config.yaml", tmp_path, str(tmp_path / "dataset"))
    shutil.copy(saved, run_dir / "pretrain" / "config.yaml")
    described = tmp_path / "dataset" / "partitions" / "base" / "partition.json"
    described.write_text(described.read_text().replace('"fingerprint": "', '"fingerprint": "x'))
    with pytest.raises(RankFailed, match="partition base has changed"):
        pools[1].run(small_run.run, elsewhere, run_dir, ON, "pretrain", True)
    assert "day2" not in written and "day2" not in saved.read_text()


def yaml_with(path: Path, folder: Path, dataset: str) -> Path:
    import yaml

    content = yaml.safe_load(path.read_text())
    content["data"]["dir"] = dataset
    target = folder / f"{path.parent.name}.yaml"
    target.write_text(yaml.safe_dump(content))
    return target


def test_a_checkpoint_alone_needs_the_dataset_of_its_training(tmp_path: Path, pools: dict[int, Pool]) -> None:
    config, stage = small_run.write_dataset(tmp_path), tmp_path / "run" / "pretrain"
    pools[1].run(stop_after, config, tmp_path / "run", ("pretrain.save_every_steps=2",), 2)
    assert not (stage / "best").exists()
    path = find_checkpoint(stage, "latest")
    before = load_checkpoint_model(path).model.state_dict()
    append_day2(config)
    assert_same_tensors(load_checkpoint_model(path).model.state_dict(), before)
    shutil.rmtree(tmp_path / "dataset")
    users = (tmp_path / "users.tsv").read_text().splitlines()
    (tmp_path / "users.tsv").write_text("\n".join([users[0], *(line.replace("\t2", "\t7", 1) for line in users[1:])]))
    tables = InteractionTables(*(tmp_path / f"{name}.tsv" for name in ("events", "items", "users")))
    make_interactions(load_config(config).data, tables, IngestTarget(tmp_path / "dataset"))
    with pytest.raises(CheckpointError, match="was trained with another vocabulary, normalization or tokenizer"):
        load_checkpoint_model(path)
