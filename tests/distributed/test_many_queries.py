"""Rows with several queries: equal losses for any number of ranks and chunks, with every mask."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from bigdssm.checkpoints.model_folder import load_model_folder
from bigdssm.config import load_config
from bigdssm.dataset.dataset import Dataset
from bigdssm.errors import ConfigError
from bigdssm.features.base import REQUEST_PREFIX
from bigdssm.loader import step_plan
from bigdssm.loader.batch import Collator
from bigdssm.loader.step_plan import Chunked, plan_side
from bigdssm.loader.stream import PairStream
from bigdssm.models import RowGroup, new_model
from bigdssm.models.encoders.history import HistoryEncoder
from bigdssm.retrieval.hard_negatives import HardNegatives
from bigdssm.training.checks import check_stage

from . import small_run
from .spawn import Pool

EVENT = (
    "{action: {type: categorical}, price: {type: numeric, log: true}, gap: {type: elapsed}, when: {type: timestamp}, "
    "hour: {type: calendar, timezone: Asia/Kathmandu}}"
)
PIECES = (
    "data.targets_per_row=4", "model.query.history.positions=relative", "model.query.history.times=rotary",
    f"data.event={EVENT}", "data.request=[action,gap,when,hour]", "data.empty_histories=true",
    "model.query.history.transition=action", "model.query.history.transition_dropout=0",
)  # fmt: skip


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run.write_dataset(tmp_path_factory.mktemp("pieces"), PIECES)


def test_one_pass_over_a_piece_is_a_pass_over_each_of_its_beginnings(config: Path) -> None:
    loaded = load_config(config)
    dataset = Dataset.open(loaded.data.dir)
    torch.manual_seed(0)
    model = new_model(loaded.model, dataset.schema, dataset.vocab_size).eval()
    batch = Collator(dataset.schema, dataset.catalogue)(next(PairStream(dataset, rows_global=60, lanes=6)))
    assert batch.query_positions is not None and len(batch.query_positions.row) > 1.5 * len(batch.row_ids)
    assert (batch.query_positions.prefix_length == 0).any()
    with torch.no_grad():
        together = model(query=batch.query, query_positions=batch.query_positions).U
        row = batch.query_positions.row
        alone = {
            name: tensor.clone() if name.startswith(REQUEST_PREFIX) else tensor[row].clone()
            for name, tensor in batch.query.items()
        }
        for query, seen in enumerate(batch.query_positions.prefix_length.tolist()):
            alone["history"][query, seen:] = 0
        torch.testing.assert_close(together, model(query=alone).U, rtol=0, atol=1e-5)
        chunked = plan_side(batch.query_lengths, len(batch.row_ids), 50, batch.queries_of_row)
        assert len(chunked.chunks) > 3
        side = Chunked(batch.query, chunked, batch.query_positions)
        parts = [
            model(query=side.features(chunk), query_positions=side.query_positions(chunk)).U for chunk in chunked.chunks
        ]
        torch.testing.assert_close(together, side.assemble(parts), rtol=0, atol=1e-5)


LOSSES = {
    "batch": ("negatives.mask=batch", "negatives.uniform=0"),
    "user": ("negatives.mask=user",),
    "past": ("negatives.mask=past",),
    "none": ("negatives.mask=none", "sampling.name=none"),
    "catalogue": ("negatives.columns=catalogue", "negatives.mask=past", "sampling.name=none", "negatives.uniform=0"),
}


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in small_run.records(folder)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case == "catalogue" else pytest.mark.slow) for case in LOSSES]
)
def test_ranks_and_chunks_change_no_loss(case: str, config: Path, tmp_path: Path, pools: dict[int, Pool]) -> None:
    said = ["pretrain.steps=5", *(f"pretrain.{word}" for word in LOSSES[case])]
    pools[1].run(small_run.run, config, tmp_path / "one", (*said, "engine.chunk_tokens=0"))
    whole = losses(tmp_path / "one")
    assert len(whole) == 5 and whole[-1] < whole[0]
    pools[2].run(small_run.run, config, tmp_path / "two", (*said, "engine.chunk_tokens=100"))
    np.testing.assert_allclose(losses(tmp_path / "two"), whole, rtol=1e-4)
    record = small_run.records(tmp_path / "two")[-1]
    assert record["queries_per_s"] > record["rows_per_s"] and record["queries_max_over_mean"] >= 1


@pytest.mark.slow
def test_ranks_change_no_loss_with_rules_on_events(config: Path, tmp_path: Path, pools: dict[int, Pool]) -> None:
    """Known positives by a condition are shared by the queries of a user on all ranks; visits and targets hold, too."""
    said = (
        "data.targets.train=action in (view, buy)", "data.exclude_seen=action = buy", "data.visit.gap_s=1",
        "pretrain.steps=3", "pretrain.negatives.mask=user", "pretrain.rows_global=48",
    )  # fmt: skip
    for ranks in (1, 2):
        pools[ranks].run(small_run.run, config, tmp_path / str(ranks), (*said, "engine.chunk_tokens=100"))
    pools[1].run(small_run.run, config, tmp_path / "all", (*said, "data.exclude_seen=true", "engine.chunk_tokens=100"))
    one, two, seen = (losses(tmp_path / name) for name in ("1", "2", "all"))
    assert len(one) == 3 and abs(one[0] - seen[0]) > 1e-3
    np.testing.assert_allclose(two, one, rtol=1e-4)
    assert len(small_run.validations(tmp_path / "1")) == 1


def in_groups(rank: int, world_size: int, *given: Any) -> int:
    """Run a stage with small groups of similar length; return the maximum number of groups per chunk."""
    most, group_by_length = 0, step_plan.group_by_length

    def counted(length_R: np.ndarray) -> tuple[RowGroup, ...]:
        nonlocal most
        groups = group_by_length(length_R)
        most = max(most, len(groups))
        return groups

    with mock.patch.multiple(step_plan, SIMILAR_CELLS=0, group_by_length=counted):
        small_run.run(rank, world_size, *given)
    return most


@pytest.mark.slow
def test_groups_of_like_length_change_no_loss_under_zero_3(
    config: Path, tmp_path: Path, pools: dict[int, Pool]
) -> None:
    """The groups differ between ranks, while every call of a module is a collective."""
    said = ("pretrain.steps=3", "pretrain.negatives.mask=past")
    pools[1].run(small_run.run, config, tmp_path / "one", (*said, "engine.chunk_tokens=0"))
    more = ("engine.chunk_tokens=100", "engine.zero_stage=3")
    groups = pools[2].run(in_groups, config, tmp_path / "two", (*said, *more))
    assert min(groups) > 2
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-4)


# A pairwise design: any two settings of two columns are together in a case.
MATRIX = [  # zero_stage, ranks, packed, chunk_tokens, targets_per_row
    (0, 1, False, 0, 4), (0, 2, True, 100, 1), (1, 1, False, 100, 1), (1, 2, True, 0, 4),
    (2, 1, True, 0, 1), (2, 2, False, 100, 4), (3, 1, True, 100, 4), (3, 2, False, 0, 1),
]  # fmt: skip


def in_layout(rank: int, world_size: int, packed: bool, *given: Any) -> tuple[int, int]:
    """Run a stage with packed or padded histories; return the number of calls of each layout."""
    with (
        mock.patch.object(HistoryEncoder, "accepts_packed", lambda self, training: packed),
        mock.patch.object(HistoryEncoder, "_packed", autospec=True, side_effect=HistoryEncoder._packed) as as_packed,
        mock.patch.object(HistoryEncoder, "_padded", autospec=True, side_effect=HistoryEncoder._padded) as as_padded,
    ):
        small_run.run(rank, world_size, *given)
    return as_packed.call_count, as_padded.call_count


@pytest.mark.slow
def test_any_engine_computes_the_same_losses(config: Path, tmp_path: Path, pools: dict[int, Pool]) -> None:
    single = small_run.write_dataset(tmp_path, ("data.targets_per_row=1", *PIECES[1:]))
    said = ("pretrain.steps=3", "pretrain.negatives.mask=past")
    references: dict[int, list[float]] = {}
    for number, (stage, ranks, packed, tokens, targets) in enumerate([(0, 1, False, 0, 1), *MATRIX]):
        folder, built = tmp_path / str(number), single if targets == 1 else config
        engine = (f"engine.zero_stage={stage}", f"engine.chunk_tokens={tokens}")
        calls = pools[ranks].run(in_layout, packed, built, folder, (*said, *engine))
        assert all((as_packed > 0) == packed and (as_padded > 0 or packed) for as_packed, as_padded in calls)
        found = losses(folder)
        assert len(found) == 3 and found[-1] < found[0]
        np.testing.assert_allclose(found, references.setdefault(targets, found), rtol=1e-4)
    assert references.keys() == {1, 4}


@pytest.mark.slow
def test_a_stopped_run_is_the_one_that_was_not(config: Path, tmp_path: Path, pools: dict[int, Pool]) -> None:
    said = (
        "pretrain.steps=8", "pretrain.negatives.mask=past", "engine.chunk_tokens=400",
        "pretrain.save_every_steps=4",
    )  # fmt: skip
    for name in ("whole", "stopped"):
        pools[2].run(small_run.run, config, tmp_path / name, said)
    for file in (tmp_path / "stopped" / "pretrain" / "checkpoints" / "step-00000008").iterdir():
        file.unlink()  # damaged: the run resumes from step 4
    pools[2].run(small_run.run, config, tmp_path / "stopped", said, "pretrain", True)
    assert len(losses(tmp_path / "whole")) == 8 and losses(tmp_path / "stopped") == losses(tmp_path / "whole")


@pytest.mark.slow
def test_fine_tuning_mines_for_every_query(config: Path, tmp_path: Path, pools: dict[int, Pool]) -> None:
    said = ("pretrain.steps=3", "pretrain.negatives.mask=past", "sft.steps=3")
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        pools[ranks].run(small_run.run, config, folder, said)
        pools[ranks].run(small_run.run, config, folder, said, "sft")
    mined = [HardNegatives.open(tmp_path / name / "sft" / "mined_negatives.npy") for name in "12"]
    dataset = Dataset.open(load_config(config).data.dir)
    keys = np.concatenate([rows.query_keys for rows in dataset.iterate("train", 1000)])
    assert set(mined[0].queries.tolist()) <= set(keys.tolist()) and len(mined[0]) > 1.5 * 3 * 48
    np.testing.assert_array_equal(mined[0].queries, mined[1].queries)
    tuned = [[record["loss"] for record in small_run.records(tmp_path / name, "sft")] for name in "12"]
    np.testing.assert_allclose(tuned[0], tuned[1], rtol=1e-3)


REFUSED = {
    "ages": (("model.query.history.positions=age",), "positions=age has one position per item of a row"),
    "ages, said later": (
        ("data.targets_per_row=1", "model.query.history.positions=age"), "positions=age has one position per item",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_options_incompatible_with_several_queries_are_refused(case: str, config: Path, tmp_path: Path) -> None:
    overrides, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        check_stage(load_config(config, [*overrides, f"run.dir={tmp_path}"]), "pretrain", 1)


@pytest.mark.slow
def test_ages_change_with_no_number_of_ranks_under_zero_3(tmp_path: Path, pools: dict[int, Pool]) -> None:
    age = ("data.doc.arrival={type: age, column: arrived, periods: 4}", "model.score=dot", "model.dim=24")
    config = small_run.write_dataset(tmp_path, (*PIECES, *age), with_arrivals=True)
    said = ("pretrain.steps=4", "pretrain.negatives.mask=past")
    pools[1].run(small_run.run, config, tmp_path / "one", (*said, "engine.chunk_tokens=0"))
    more = ("engine.chunk_tokens=100", "engine.zero_stage=3")
    pools[2].run(small_run.run, config, tmp_path / "two", (*said, *more))
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-4)
    amplitudes = [load_model_folder(tmp_path / name / "pretrain/best").model.age.amplitudes for name in ("one", "two")]  # type: ignore[union-attr]
    assert amplitudes[0].abs().max() > 1e-3
    torch.testing.assert_close(amplitudes[1], amplitudes[0], rtol=0, atol=1e-4)
