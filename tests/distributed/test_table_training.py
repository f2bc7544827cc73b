"""Runs whose tables are sharded by rows: one curve on any number of ranks, clipping, skipped steps, resumes, files."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bigdssm.checkpoints.checkpoint import find_checkpoint, read_manifest
from bigdssm.checkpoints.model_folder import load_checkpoint_model, load_model_folder, save_model_folder
from bigdssm.config import load_config
from bigdssm.dataset.dataset import Dataset
from bigdssm.errors import CheckpointError, ConfigError
from bigdssm.export.convert import export, folder_source
from bigdssm.retrieval.embed import tower_encoders
from bigdssm.tables.files import MappedTables
from bigdssm.tables.initial_rows import initial_rows
from bigdssm.training.estimate import estimate

from . import small_run
from .compared_runs import assert_same_curve, stop_after
from .small_run import append_day2
from .spawn import Pool, RankFailed
from .table_matrix import LIMIT, NUMBERS, modes_of, run

SHARDED = ("model.tables.sharding=rows", "pretrain.table_optimizer={name: rowwise_adagrad, lr: 0.05}")
DRAWN = (*SHARDED, "pretrain.negatives.uniform=9", "model.tables.id_dropout=0.1")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run.write_dataset(tmp_path_factory.mktemp("table_training"))


@pytest.fixture(scope="module")
def one(config: Path, tmp_path_factory: pytest.TempPathFactory, pools: dict[int, Pool]) -> Path:
    """Return the run of one rank at ZeRO 0, without chunks."""
    folder = tmp_path_factory.mktemp("one")
    pools[1].run(small_run.run, config, folder, (*DRAWN, "engine.zero_stage=0"))
    return folder


@pytest.mark.parametrize(
    ("ranks", "modes"),
    [
        (1, ("engine.zero_stage=1", "engine.table_memory=file")),
        (2, ("engine.zero_stage=2", "engine.chunk_tokens=150", "engine.keep_graph_tokens=0")),
        (3, ("engine.zero_stage=3", "engine.table_memory=host")),
        pytest.param(2, ("engine.zero_stage=0", "engine.chunk_tokens=400"), marks=pytest.mark.slow),
    ],
)
def test_one_curve_in_all_modes(
    config: Path, one: Path, tmp_path: Path, pools: dict[int, Pool], ranks: int, modes: tuple[str, ...]
) -> None:
    pools[ranks].run(small_run.run, config, tmp_path, (*DRAWN, *modes))
    assert_same_curve(tmp_path, one)


@pytest.mark.slow
def test_contents_of_items_with_sharded_tables(config: Path, tmp_path: Path, pools: dict[int, Pool]) -> None:
    given = (*DRAWN, "model.query.history.items=both")
    pools[1].run(small_run.run, config, tmp_path / "one", (*given, "engine.zero_stage=0"))
    pools[2].run(small_run.run, config, tmp_path / "two", (*given, "engine.zero_stage=2", "engine.chunk_tokens=150"))
    assert_same_curve(tmp_path / "two", tmp_path / "one")


# A pairwise design: each two of optimizer, numbers, clipping, ranks, ZeRO stage, chunk tokens and memory meet.
DESIGN = [
    ("rowwise_adagrad", "bf16", "clipped", 2, 3, 60, "file"),
    ("rowwise_adagrad", "bf16", "unclipped", 2, 0, 0, "host"),
    ("rowwise_adagrad", "bf16 rows", "unclipped", 1, 2, 60, "device"),
    ("rowwise_adagrad", "fp32", "clipped", 3, 1, 400, "file"),
    ("rowwise_adagrad", "bf16", "clipped", 3, 2, 400, "host"),
    ("rowwise_adagrad", "bf16", "unclipped", 1, 3, 400, "device"),
    ("rowwise_adagrad", "bf16 rows", "clipped", 2, 1, 0, "host"),
    ("rowwise_adagrad", "fp32", "clipped", 1, 0, 60, "file"),
    ("lazy_adam", "bf16", "clipped", 3, 0, 60, "device"),
    ("lazy_adam", "bf16", "unclipped", 2, 1, 400, "file"),
    ("lazy_adam", "bf16 rows", "clipped", 3, 3, 0, "device"),
    ("lazy_adam", "bf16 rows", "unclipped", 1, 1, 60, "host"),
    ("lazy_adam", "fp32", "unclipped", 3, 2, 60, "file"),
    ("lazy_adam", "bf16", "clipped", 2, 2, 0, "file"),
    ("lazy_adam", "bf16 rows", "unclipped", 3, 0, 400, "file"),
    ("lazy_adam", "fp32", "unclipped", 2, 1, 60, "device"),
    ("lazy_adam", "fp32", "unclipped", 1, 3, 0, "host"),
]


@pytest.mark.slow
def test_all_modes_give_the_curve_of_one_rank(config: Path, tmp_path: Path, pools: dict[int, Pool]) -> None:
    references = {key: run(pools[1], config, tmp_path / "-".join(key), key, ("engine.zero_stage=0",))
                  for key in dict.fromkeys(entry[:3] for entry in DESIGN)}  # fmt: skip
    for number, (optimizer, numbers, clipping, ranks, *modes) in enumerate(DESIGN):
        key = optimizer, numbers, clipping
        found = run(pools[ranks], config, tmp_path / str(number), key, modes_of(*modes))
        expected, limit = references[key], NUMBERS[numbers][1]
        torch.testing.assert_close(found[:, 0], expected[:, 0], rtol=limit, atol=0)
        # in bfloat16 the differences of the weights, and of later gradients, grow with each step
        compared = len(found) if numbers == "fp32" else 3
        torch.testing.assert_close(found[:compared, 1], expected[:compared, 1], rtol=limit, atol=0)
        assert found[-1, 0] < found[0, 0] and (found[:, 1] > LIMIT).all()  # it trains, and the limit clips


def vectors(folder: Any, dataset: Path) -> torch.Tensor:
    opened = folder.view(Dataset.open(dataset))
    return tower_encoders(folder.model, opened).documents(np.arange(opened.catalogue.num_docs))


def test_model_folders_and_checkpoints_hold_the_rows(
    config: Path, one: Path, tmp_path: Path, pools: dict[int, Pool]
) -> None:
    pools[3].run(small_run.run, config, tmp_path, (*DRAWN, "pretrain.save_every_steps=6"))
    dataset = config.parent / "dataset"
    best = load_model_folder(tmp_path / "pretrain" / "best")
    assert len(list((tmp_path / "pretrain" / "best" / "tables").iterdir())) == 3
    saved = load_checkpoint_model(find_checkpoint(tmp_path / "pretrain", "latest"))
    theirs = load_checkpoint_model(find_checkpoint(one / "pretrain", "latest"))
    torch.testing.assert_close(vectors(saved, dataset), vectors(theirs, dataset), rtol=1e-4, atol=1e-5)
    save_model_folder(tmp_path / "copy", best.model, best.config, best.schema, best.tokenizer_dir, best.provenance)
    copied = load_model_folder(tmp_path / "copy")
    assert torch.equal(vectors(copied, dataset), vectors(best, dataset))


def test_a_damaged_row_of_a_model_folder_is_refused(config: Path, one: Path, tmp_path: Path) -> None:
    shutil.copytree(one / "pretrain" / "best", tmp_path / "best")
    file = tmp_path / "best" / "tables" / "rows-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(
        CheckpointError, match=r"rows-00000\.safetensors is damaged: block 0 of doc_item_id/values, .* ag"
    ):
        vectors(load_model_folder(tmp_path / "best"), config.parent / "dataset")
    shutil.copy(next((one / "pretrain" / "checkpoints").glob("*/tables-*")), file)
    with pytest.raises(CheckpointError, match=r"damaged: its checksum is not that in bigdssm\.json"):
        load_model_folder(tmp_path / "best")


def test_a_run_resumes_on_other_ranks_and_is_fine_tuned(config: Path, tmp_path: Path, pools: dict[int, Pool]) -> None:
    options = (*SHARDED, "pretrain.table_optimizer={name: lazy_adam, lr: 0.01}", "pretrain.save_every_steps=6")
    pools[2].run(small_run.run, config, tmp_path / "whole", options)
    pools[2].run(stop_after, config, tmp_path / "half", options, 6)
    pools[3].run(small_run.run, config, tmp_path / "half", (*options, "engine.zero_stage=3"), "pretrain", True)
    assert_same_curve(tmp_path / "half", tmp_path / "whole")
    pools[2].run(small_run.run, config, tmp_path / "whole", (*options, "sft.table_optimizer.lr=0.01"), "sft")
    pools[1].run(small_run.run, config, tmp_path / "half", (*options, "sft.table_optimizer.lr=0.01"), "sft")
    assert_same_curve(tmp_path / "half", tmp_path / "whole", tolerance=1e-4, stage="sft")


@pytest.mark.slow
def test_the_same_ranks_repeat_the_same_bits(config: Path, tmp_path: Path, pools: dict[int, Pool]) -> None:
    """A run that resumes from a checkpoint with two row files per rank, too."""
    options = (*SHARDED, "pretrain.save_every_steps=3")
    for name in ("first", "second"):
        pools[2].run(small_run.run, config, tmp_path / name, options)
    pools[2].run(stop_after, config, tmp_path / "third", options, 6)
    newest = find_checkpoint(tmp_path / "third" / "pretrain", "step-00000006")
    assert max(len(files) for files in read_manifest(newest).table_files()) == 2
    of_checkpoint = load_checkpoint_model(newest).model.tables.source
    assert isinstance(of_checkpoint, MappedTables) and len(of_checkpoint.chains) == 2
    pools[2].run(small_run.run, config, tmp_path / "third", options, "pretrain", True)
    files = [sorted((tmp_path / name / "pretrain/best/tables").iterdir()) for name in ("first", "second", "third")]
    for first, *others in zip(*files, strict=True):
        assert all(other.read_bytes() == first.read_bytes() for other in others)


def clipped(
    rank: int, world_size: int, config: Path, folder: Path, overrides: tuple[str, ...]
) -> tuple[list[float], bool]:
    """Run, with NaN in this rank's gradients of the third step; return the norms, and if rows stayed as they were."""
    from bigdssm.tables.sharded import ShardedTables
    from bigdssm.training import step

    encode, unchanged = step.encode, []

    def spoiled(engine: Any, batch: Any, *rest: Any) -> Any:
        encoded = encode(engine, batch, *rest)
        if batch.step == 2 and rank == world_size - 1:
            leaf = next(iter(engine._working.leaves.values()))
            leaf.register_hook(lambda gradient: gradient * torch.nan)
        return encoded

    discard = ShardedTables.discard

    def noted(tables: ShardedTables) -> None:
        before = {name: store.stored["values"].clone() for name, store in tables.stores.items()}
        discard(tables)
        unchanged.append(
            all(torch.equal(store.stored["values"], before[name]) for name, store in tables.stores.items())
        )

    step.encode, ShardedTables.discard = spoiled, noted  # type: ignore[assignment, method-assign]
    try:
        small_run.run(rank, world_size, config, folder, overrides)
    finally:
        step.encode, ShardedTables.discard = encode, discard  # type: ignore[method-assign]
    return [record["grad_norm"] for record in small_run.records(folder) if "grad_norm" in record], unchanged == [True]


@pytest.mark.parametrize("stage", [0, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (1, 2)), 3])
def test_rows_are_skipped_with_the_weights(config: Path, tmp_path: Path, pools: dict[int, Pool], stage: int) -> None:
    options = (*SHARDED, f"engine.zero_stage={stage}", "pretrain.optimizer.gradient_clipping=0.05")
    for _, unchanged in pools[2].run(clipped, config, tmp_path, options):
        assert unchanged
    records = small_run.records(tmp_path)
    assert [record["skipped"] for record in records][-1] == 1 and records[-1]["loss"] < records[0]["loss"]


def test_clipping_is_by_the_norm_of_all_gradients(config: Path, tmp_path: Path, pools: dict[int, Pool]) -> None:
    """The norms are those of any ZeRO stage."""
    clip = ("pretrain.optimizer.gradient_clipping=0.05", "pretrain.steps=4")
    found = []
    for number, modes in enumerate([("engine.zero_stage=0",), ("engine.zero_stage=2",), ("engine.zero_stage=3",)]):
        run = tmp_path / str(number)
        pools[2].run(small_run.run, config, run, (*SHARDED, *clip, *modes))
        found.append([(record["loss"], record["grad_norm"]) for record in small_run.records(run)])
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=1e-4)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("pretrain.weight_average=0.9", "weight_average: got 0.9, needs 0.0"),
        ("pretrain.negatives={columns: catalogue, mask: user}", "negatives.columns: got catalogue, needs batch"),
        ("pretrain.documents={model: ., vectors: .}", "documents.model: got ., needs null"),
    ],
)
def test_what_sharded_tables_do_not_support_is_refused(
    config: Path, tmp_path: Path, pools: dict[int, Pool], override: str, message: str
) -> None:
    with pytest.raises(RankFailed, match=message):
        plain = ("pretrain.sampling.name=none", "pretrain.negatives.uniform=0")
        pools[1].run(small_run.run, config, tmp_path, (*SHARDED, *plain, override))


@pytest.mark.slow
def test_exports_hold_dense_tables_and_an_estimate_counts_them(
    config: Path, one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = folder_source(one / "pretrain" / "best")
    for kind in ("model", "onnx"):
        parity = export(source, tmp_path / kind, kind)
        assert max(parity.query, parity.doc) <= 1e-5
    monkeypatch.setattr("bigdssm.export.convert.DENSE_BYTES", 100)
    with pytest.raises(ConfigError, match=r"--format onnx: the table doc_\w+ has .* use --format model"):
        export(source, tmp_path / "large", "onnx")
    dataset = Dataset.open(config.parent / "dataset")
    replicated, sharded = (
        estimate(load_config(config, [f"run.dir={tmp_path}", *modes]), "pretrain", dataset, 2)
        for modes in ((), SHARDED[:1])
    )
    assert sharded.table_weights == replicated.table_weights > 0
    assert sharded.num_weights == replicated.num_weights - replicated.table_weights
    assert sharded.resident["rows of sharded tables, and their states"] > 0 and sharded.sent["sharded tables"] > 0


@pytest.mark.slow
def test_a_new_partition_appends_rows(tmp_path: Path, pools: dict[int, Pool]) -> None:
    """Rows that were trained keep their values, on another number of ranks, too."""
    config = small_run.write_dataset(tmp_path)
    options = (*SHARDED, "pretrain.steps=4", "pretrain.save_every_steps=4", "pretrain.validate_every_steps=4")
    pools[2].run(small_run.run, config, tmp_path / "run", options)
    frozen = ("pretrain.table_optimizer={name: rowwise_adagrad, lr: 0.0}", "data.from_partition=day2")
    with pytest.raises(RankFailed, match=r"table_optimizer\.lr was 0\.05, is 0\.0: it may change only where"):
        pools[3].run(small_run.run, config, tmp_path / "run", (*options, frozen[0]), "pretrain", True)
    append_day2(config)
    pools[3].run(small_run.run, config, tmp_path / "run", (*options, frozen[1]), "pretrain", True)
    after = load_checkpoint_model(find_checkpoint(tmp_path / "run" / "pretrain", "latest")).model.tables
    assert after.sharded["doc_item_id"].rows == 2 + small_run.NUM_ITEMS + 7
    assert after.source is not None
    added = torch.arange(2 + small_run.NUM_ITEMS, 9 + small_run.NUM_ITEMS)
    assert (after.source.look_up("doc_item_id", added).abs().sum(1) > 0).all()


@pytest.mark.slow
def test_a_resume_mines_with_the_trained_rows(config: Path, tmp_path: Path, pools: dict[int, Pool]) -> None:
    hard = (
        *SHARDED, "pretrain.loss.name=pair_ce", "pretrain.sampling.name=none", "pretrain.save_every_steps=4",
        "pretrain.negatives={uniform: 0, hard: 3, in_batch: false, mining: {first: 1, last: 20, every_steps: 4}}",
    )  # fmt: skip
    pools[1].run(small_run.run, config, tmp_path / "whole", hard)
    pools[1].run(stop_after, config, tmp_path / "half", hard, 4)
    (tmp_path / "half" / "pretrain" / "mined_negatives.step-00000004.npy").unlink(missing_ok=True)
    pools[2].run(small_run.run, config, tmp_path / "half", hard, "pretrain", True)
    assert_same_curve(tmp_path / "half", tmp_path / "whole")


EXACT = "data.doc.item_id.hash_buckets=4611686018427387904"  # 2**62


@pytest.mark.slow
def test_ids_without_a_vocabulary(tmp_path: Path, pools: dict[int, Pool]) -> None:
    """From ingestion to vectors: codes of 62 bits, a resume on other ranks, a model folder."""
    config = small_run.write_dataset(tmp_path, [EXACT])
    dataset = Dataset.open(tmp_path / "dataset")
    codes = dataset.catalogue.codes("item_id", np.arange(dataset.catalogue.num_docs))
    assert codes.dtype == np.int64 and len(np.unique(codes)) == small_run.NUM_ITEMS and codes.max() > 2**60
    options = ("pretrain.table_optimizer={name: lazy_adam, lr: 0.01}", "pretrain.save_every_steps=6")
    options = (*options, "model.tables={admit_after: 2, evict_after: 9}", "pretrain.warm_start.window=2")
    pools[2].run(small_run.run, config, tmp_path / "whole", options)
    pools[2].run(stop_after, config, tmp_path / "half", options, 6)
    pools[3].run(small_run.run, config, tmp_path / "half", (*options, "engine.table_memory=file"), "pretrain", True)
    assert_same_curve(tmp_path / "half", tmp_path / "whole")
    best, saved, whole = (
        vectors(folder, tmp_path / "dataset")
        for folder in (
            load_model_folder(tmp_path / "half" / "pretrain" / "best"),
            load_checkpoint_model(find_checkpoint(tmp_path / "half" / "pretrain", "latest")),
            load_checkpoint_model(find_checkpoint(tmp_path / "whole" / "pretrain", "latest")),
        )
    )
    assert torch.equal(best, saved) and len(best.unique(dim=0)) > small_run.NUM_ITEMS // 2
    torch.testing.assert_close(saved, whole, rtol=1e-4, atol=1e-5)
    size = estimate(load_config(config, [f"run.dir={tmp_path}"]), "pretrain", dataset, 2).table_weights
    assert size < 10_000


def test_ids_that_share_rows(tmp_path: Path, pools: dict[int, Pool]) -> None:
    """One curve on any number of ranks; the model folder has the vectors of the last step."""
    config = small_run.write_dataset(tmp_path, [EXACT])
    options = ("model.tables={hashes: 2, hash_rows: 20}", "pretrain.table_optimizer={name: rowwise_adagrad, lr: 0.05}")
    for ranks in (1, 3):
        pools[ranks].run(small_run.run, config, tmp_path / str(ranks), (*options, "engine.chunk_tokens=150"))
    assert_same_curve(tmp_path / "3", tmp_path / "1")
    dataset = Dataset.open(tmp_path / "dataset")
    codes = torch.from_numpy(dataset.catalogue.codes("item_id", np.arange(dataset.catalogue.num_docs)))
    found = [load_model_folder(tmp_path / name / "pretrain" / "best").model.tables.source for name in ("1", "3")]
    one, three = (source.look_up("doc_item_id", codes) for source in found)
    torch.testing.assert_close(three, one, rtol=1e-4, atol=1e-5)
    assert len(one.unique(dim=0)) > 40 and torch.linalg.matrix_rank(one) <= 16
    assert sum(chain[0].count("doc_item_id") for chain in found[1].chains) <= 20
    with pytest.raises(RankFailed, match=r"warm_start\.window: got 2, needs 0 with sharded tables"):
        pools[1].run(small_run.run, config, tmp_path / "warm", (*options, "pretrain.warm_start.window=2"))
    with pytest.raises(ConfigError, match=r"model\.tables\.hash_rows: got 0, needs above 0 with hashes=2"):
        load_config(config, ["model.tables.hashes=2"])


def test_ids_without_a_vocabulary_need_a_sharded_table(config: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"data\.doc\.item_id\.hash_buckets: got 4611686018427387904, needs at most 2,147"
    ):
        load_config(config, [EXACT, "model.tables.sharding=replicated"])


def test_a_checkpoint_has_the_admitted_rows_alone(config: Path, tmp_path: Path, pools: dict[int, Pool]) -> None:
    """Of a model folder, a checkpoint and a folder with another file."""
    rare = ("model.tables.admit_after=3", "pretrain.rows_global=12", "pretrain.negatives.uniform=0", "pretrain.steps=5")
    pools[2].run(small_run.run, config, tmp_path, (*SHARDED, *rare, "pretrain.save_every_steps=5"))
    stage, dataset = tmp_path / "pretrain", config.parent / "dataset"
    best, saved = load_model_folder(stage / "best"), load_checkpoint_model(find_checkpoint(stage, "latest"))
    expected = vectors(best, dataset)
    assert torch.equal(vectors(saved, dataset), expected)
    items = torch.arange(2, 2 + small_run.NUM_ITEMS)
    of_items = [folder.model.tables.source.look_up("doc_item_id", items) for folder in (best, saved)]
    assert torch.equal(*of_items) and 1 < len(of_items[0].unique(dim=0)) < len(items)  # the others are unknown
    files = (stage / "best" / "tables").iterdir()
    shutil.copy(max(files), stage / "best" / "tables" / "rows-00009.safetensors")
    listed = load_model_folder(stage / "best").model.tables.source
    assert isinstance(listed, MappedTables) and len(listed.chains) == 2


@pytest.mark.slow
def test_a_table_that_grows_beyond_the_limit_stays_as_it_is(tmp_path: Path, pools: dict[int, Pool]) -> None:
    config = small_run.write_dataset(tmp_path)
    limit = 2 + small_run.NUM_ITEMS + 3
    options = (f"model.tables.rows_from={limit}", "pretrain.steps=4", "pretrain.save_every_steps=4", "sft.steps=2")
    pools[1].run(small_run.run, config, tmp_path / "run", options)
    append_day2(config)
    pools[1].run(small_run.run, config, tmp_path / "run", (*options, "data.from_partition=day2"), "pretrain", True)
    pools[1].run(small_run.run, config, tmp_path / "run", options, "sft")
    for stage in ("pretrain", "sft"):
        for folder in (
            load_model_folder(tmp_path / "run" / stage / "best"),
            load_checkpoint_model(find_checkpoint(tmp_path / "run" / stage, "latest")),
        ):
            assert not folder.model.tables.sharded
            assert len(folder.model.state_dict()["tables.tables.doc_item_id.weight"]) > limit


@pytest.mark.slow
def test_a_stage_from_a_checkpoint_has_states_of_its_own(config: Path, tmp_path: Path, pools: dict[int, Pool]) -> None:
    options = (*SHARDED, "pretrain.table_optimizer={name: lazy_adam, lr: 0.01}", "pretrain.save_every_steps=12")
    pools[1].run(small_run.run, config, tmp_path / "run", options)
    start = find_checkpoint(tmp_path / "run" / "pretrain", "latest")
    for name, folder in (("checkpoint", start), ("best", tmp_path / "run" / "pretrain" / "best")):
        again = (*SHARDED, f"pretrain.init={folder}", "pretrain.table_optimizer.name=rowwise_adagrad")
        pools[2].run(small_run.run, config, tmp_path / name, again)
    if load_model_folder(tmp_path / "run" / "pretrain" / "best").provenance["step"] == 12:
        assert_same_curve(tmp_path / "checkpoint", tmp_path / "best")


def test_fine_tuning_starts_from_the_trained_rows(config: Path, tmp_path: Path, pools: dict[int, Pool]) -> None:
    """At a rate of 0 the rows of its last checkpoint are the pretrained ones, and those are not the initial ones."""
    pools[2].run(small_run.run, config, tmp_path, SHARDED)
    at_rest = (*SHARDED, "sft.table_optimizer.lr=0", "sft.optimizer.lr=0")
    pools[2].run(small_run.run, config, tmp_path, at_rest, "sft")
    first = load_model_folder(tmp_path / "pretrain/best").model.tables
    second = load_checkpoint_model(find_checkpoint(tmp_path / "sft", "latest")).model.tables
    for name, spec in first.sharded.items():
        rows = torch.arange(2, spec.rows)
        assert isinstance(first.source, MappedTables) and isinstance(second.source, MappedTables)
        trained, kept = first.source.look_up(name, rows), second.source.look_up(name, rows)
        initial = initial_rows(rows.numpy(), spec.dim, first.source.key(name), spec.std)
        assert torch.equal(trained, kept) and not torch.equal(trained, initial)
