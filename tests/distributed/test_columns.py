"""The catalogue as columns, and the masks, against torch's cross-entropy over the scores of all documents."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from bigdssm.config import ModelConfig, NegativesConfig, StageConfig, load_config
from bigdssm.dataset.dataset import open_dataset
from bigdssm.features.base import OUT_OF_VOCABULARY
from bigdssm.loader.batch import Batch, Collator, distinct_in_order, to_features
from bigdssm.losses import Softmax
from bigdssm.losses.declarations import NoCorrection
from bigdssm.models import Encoded, new_model
from bigdssm.retrieval.embed import item_contents
from bigdssm.training.batches import row_stream
from bigdssm.training.objective import Objective, catalogue_share
from bigdssm.training.optimizers import parameter_groups, schedule_factor
from bigdssm.training.refresh import ItemContents
from bigdssm.training.trainer import Trainer

from . import small_run
from .compared_runs import common, merged, stop_after
from .parity import assert_close
from .spawn import Pool

DOCS, ROWS, D = 41, 30, 6
ALPHA = 7.0


class World:
    """Queries with their documents and histories, and a catalogue; the same on every rank."""

    def __init__(self, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        self.U, self.W = (torch.randn(n, D, generator=generator, dtype=torch.float64).to(dtype) for n in (ROWS, DOCS))
        self.beta = torch.randn(DOCS, generator=generator, dtype=torch.float64).to(dtype)
        self.doc_ids = torch.randint(-(2**62), 2**62, (DOCS,), generator=generator)
        self.doc = torch.randint(DOCS, (ROWS,), generator=generator) // 2  # some often, some of them never
        self.query_ids = torch.randint(6, (ROWS,), generator=generator) - 3
        self.relevance = (torch.rand(ROWS, generator=generator) < 0.8).float()
        self.before = [torch.randint(DOCS, (int(n),), generator=generator) for n in torch.arange(ROWS) % 7]

    def cut(self, world_size: int) -> list[int]:
        """The bounds of each rank's rows; of three ranks the second has none."""
        return {1: [0, ROWS], 2: [0, 11, ROWS], 3: [0, 13, 13, ROWS]}[world_size]

    def batch(self, rank: int, world_size: int, columns: str, mask: str) -> Batch:
        first, stop = self.cut(world_size)[rank : rank + 2]
        share = catalogue_share(DOCS, rank, world_size) if columns == "catalogue" else np.empty(0, np.int64)
        docs, column_of = distinct_in_order(np.concatenate([self.doc[first:stop].numpy(), share]))
        rows = torch.from_numpy(docs)
        names = range(stop - first) if mask == "past" else self.query_ids[first:stop].tolist()
        known = [
            torch.stack([torch.full_like(before, name), self.doc_ids[before]], 1)
            for name, before in zip(names, self.before[first:stop], strict=True)
        ]
        return Batch(
            step=0, row_ids=torch.arange(first, stop), query={}, doc={},
            positive=torch.from_numpy(column_of[: stop - first]), relevance=self.relevance[first:stop],
            query_ids=self.query_ids[first:stop], doc_ids=self.doc_ids[rows], doc_rows=rows,
            counts=torch.from_numpy(np.bincount(column_of, minlength=len(docs))),
            query_lengths={}, doc_lengths={},
            known_positives=(
                torch.cat([*known, torch.zeros(0, 2, dtype=torch.int64)]) if mask in ("user", "past") else None
            ),
        )  # fmt: skip

    def allowed(self, mask: str) -> Tensor:
        """Return bool [ROWS, DOCS]: the negatives and the positive of each query, compared one by one."""
        used = self.relevance > 0
        dropped = torch.zeros(ROWS, DOCS, dtype=torch.bool)
        for i in range(ROWS):
            same = self.query_ids == self.query_ids[i]
            if mask in ("batch", "user"):
                dropped[i, self.doc[same & used]] = True
            if mask == "user":
                for other in same.nonzero().flatten().tolist():
                    dropped[i, self.before[other]] = True
            if mask == "past":
                dropped[i, self.before[i]] = True
        dropped[torch.arange(ROWS), self.doc] = False
        return ~dropped

    def dense(self, mask: str) -> tuple[Tensor, list[Tensor]]:
        """Return the loss over all documents, and the gradients of U, W, beta and alpha."""
        U, W, beta = (x.double().requires_grad_() for x in (self.U, self.W, self.beta))
        alpha = torch.tensor([ALPHA], dtype=torch.float64, requires_grad=True)
        scores = (alpha * U @ W.T + beta).masked_fill(~self.allowed(mask), -torch.inf)
        losses = cross_entropy(scores, self.doc, reduction="none") * self.relevance.double()
        loss = losses.sum() / self.relevance.sum()
        return loss.detach(), list(torch.autograd.grad(loss, [U, W, beta, alpha]))


def run_rank(rank: int, world_size: int, dtype: torch.dtype, columns: str, mask: str) -> Any:
    world = World(dtype)
    batch = world.batch(rank, world_size, columns, mask)
    U, W, beta = (
        x.clone().requires_grad_()
        for x in (world.U[batch.row_ids], world.W[batch.doc_rows], world.beta[batch.doc_rows])
    )
    alpha = torch.tensor([ALPHA], dtype=torch.float64, requires_grad=True)
    negatives = NegativesConfig(columns=columns, mask=mask)  # type: ignore[arg-type]
    config = StageConfig(negatives=negatives, sampling=NoCorrection())
    with mock.patch("bigdssm.losses.kernels.columns.CACHED_WIDTH", 8):  # columns of a tile
        out = Objective(config, ModelConfig(score="dot"), None, ROWS)(Encoded(U, W, beta, alpha), batch)
        out.loss.backward()
    return out.loss.detach(), [U.grad, W.grad, beta.grad, alpha.grad], batch.doc_rows, out.stats


def together(results: list[Any]) -> tuple[Tensor, list[Tensor]]:
    """Return the mean over ranks of the loss and of the gradients; columns of one document are summed."""
    U = torch.cat([grads[0] for _, grads, _, _ in results]).double() / len(results)
    W, beta = torch.zeros(DOCS, D, dtype=torch.float64), torch.zeros(DOCS, dtype=torch.float64)
    for _, grads, rows, _ in results:
        W.index_add_(0, rows, grads[1].double() / len(results))
        beta.index_add_(0, rows, grads[2].double() / len(results))
    loss = torch.stack([loss.double() for loss, _, _, _ in results]).mean()
    return loss, [U, W, beta, torch.stack([grads[3] for _, grads, _, _ in results]).mean(0)]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("mask", ["none", "past", "batch", "user"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_catalogue_as_columns_is_the_softmax_over_all_documents(
    pools: dict[int, Pool], dtype: torch.dtype, mask: str, world_size: int
) -> None:
    """Each document once, for any distribution of positives over ranks; also with a rank without rows."""
    results = pools[world_size].run(run_rank, dtype, "catalogue", mask)
    world = World(dtype)
    right, right_grads = world.dense(mask)
    loss, grads = together(results)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    assert_close(loss, right, tolerance, "loss")
    for name, found, expected in zip(("U", "W", "beta", "alpha"), grads, right_grads, strict=True):
        assert_close(found, expected, tolerance, name)
    allowed = world.allowed(mask)
    for _, _, _, stats in results:  # counted on the dense scores: a query has every document but its own
        dropped = float((~allowed).sum()) / (ROWS * (DOCS - 1))
        assert float(stats["dropped_fraction"]) == pytest.approx(dropped, abs=1e-12)
        assert float(stats["effective_negatives"]) == pytest.approx(float(allowed.sum()) / ROWS - 1, abs=1e-9)
        scores = (ALPHA * world.U @ world.W.T + world.beta).masked_fill(~allowed, -torch.inf)
        best = scores.argmax(1) == world.doc
        used = world.relevance > 0
        assert float(stats["in_batch_accuracy"]) == pytest.approx(float(best[used].double().mean()))


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("mask", ["none", "past"])
def test_masks_of_each_query_alone_hold_over_the_batch(pools: dict[int, Pool], mask: str, world_size: int) -> None:
    """Columns are the documents of the batch, with multiplicity; rows of other users mask nothing."""
    world = World(torch.float64)
    loss, _ = together(pools[world_size].run(run_rank, torch.float64, "batch", mask))
    copies = torch.bincount(world.doc, minlength=DOCS).double()
    scores = ALPHA * world.U @ world.W.T + world.beta + copies.log()
    own = torch.arange(ROWS), world.doc
    scores[own] -= copies.log()[world.doc]
    scores = scores.masked_fill(~world.allowed(mask), -torch.inf)
    losses = cross_entropy(scores, world.doc, reduction="none") * world.relevance.double()
    assert_close(loss, losses.sum() / world.relevance.sum(), 1e-12, "loss")


def run_candidates(rank: int, world_size: int) -> float:
    """Return the loss of each query's positive and the last two documents; every other row has seen the last."""
    world = World(torch.float32)
    batch = world.batch(rank, world_size, "batch", "none")
    m, n = len(batch.positive), len(batch.doc_rows)
    last = torch.tensor([DOCS - 2, DOCS - 1])
    rows = torch.cat([batch.doc_rows, last])
    seen = (batch.row_ids % 2 == 0).nonzero()
    batch = replace(
        batch, doc_rows=rows, doc_ids=world.doc_ids[rows], negatives=torch.tensor([[n, n + 1]] * m).view(m, 2),
        known_positives=torch.cat([seen, world.doc_ids[-1:].expand(len(seen), 1)], 1),
    )  # fmt: skip
    negatives = NegativesConfig(in_batch=False, hard=2, mask="past")
    config = StageConfig(loss=Softmax(), negatives=negatives, sampling=NoCorrection())
    objective = Objective(config, ModelConfig(score="dot"), None, ROWS)
    U, W = world.U[batch.row_ids], world.W[rows]
    return float(objective(Encoded(U, W, None, torch.ones(1)), batch).loss)


def test_masks_of_candidates_hold_at_unequal_numbers_of_queries_per_rank(pools: dict[int, Pool]) -> None:
    alone, *both = [run_candidates(0, 1), *pools[2].run(run_candidates)]
    assert np.mean(both) == pytest.approx(alone, rel=1e-6)


CATALOGUE = (
    "pretrain={negatives: {columns: catalogue, mask: none, uniform: 0}, sampling: {name: none}}", "pretrain.steps=2",
)  # fmt: skip


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run.write_dataset(tmp_path_factory.mktemp("small"))


def first_loss(path: Path, overrides: tuple[str, ...]) -> float:
    """Return the loss of the first step, computed from the initial model and the step's rows, densely."""
    config = load_config(path, overrides)
    dataset = open_dataset(config.data).with_trained_ids()
    dataset = dataset.with_rules(replace(dataset.rules, item_rows=config.model.query.history.items != "id"))
    torch.manual_seed(config.run.seed)
    model = new_model(config.model, dataset.schema, dataset.vocab_size)
    rows = next(iter(row_stream(config, config.pretrain, dataset, 0, 1)))
    batch = Collator(dataset.schema, dataset.catalogue)(rows)
    if model.content_ids:
        model.set_contents(item_contents(model, dataset))
    with torch.no_grad():
        found = model(
            query=batch.query,
            doc=to_features(dataset.schema.doc, dataset.catalogue.columns(np.arange(dataset.catalogue.num_docs))),
        )
        scores = (found.alpha * found.U @ found.W.T + found.beta).double()
    if config.pretrain.negatives.mask == "past":
        for row in range(len(rows)):
            before = np.setdiff1d(rows.seen(row), rows.doc_rows[row])
            scores[row, before] = -torch.inf
    return float(cross_entropy(scores, torch.tensor(rows.doc_rows)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mask", "modes"),
    [("none", {1: (), 2: ("engine.chunk_tokens=100",), 3: ("engine.zero_stage=3",)}), ("past", {2: ()})],
)
def test_a_run_begins_at_the_softmax_over_all_documents(
    config: Path, tmp_path: Path, pools: dict[int, Pool], mask: str, modes: dict[int, tuple[str, ...]]
) -> None:
    overrides = (*CATALOGUE, f"pretrain.negatives.mask={mask}")
    right, curves = first_loss(config, overrides), []
    for ranks, mode in modes.items():
        pools[ranks].run(small_run.run, config, tmp_path / f"{ranks}", (*overrides, *mode))
        records = small_run.records(tmp_path / f"{ranks}")
        assert records[0]["loss"] == pytest.approx(right, rel=1e-6)
        assert records[0]["distinct_fraction"] < 1
        curves.append([(record["loss"], record["grad_norm"], record["dropped_fraction"]) for record in records])
    for curve in curves[1:]:
        for mine, first in zip(curve, curves[0], strict=True):
            assert mine == pytest.approx(first, rel=1e-5)


REFRESHED = (
    *CATALOGUE, "pretrain.rows_global=24", "pretrain.steps=5",
    "pretrain.optimizer.gradient_clipping=2.0", "model.query.history.items=both",
    "pretrain.refresh_contents_every_steps=3",
)  # fmt: skip


def plain_curve(path: Path, overrides: tuple[str, ...]) -> list[tuple[float, float]]:
    """Return losses and gradient norms of a plain loop over all documents, with the contents of the last refresh."""
    config = load_config(path, overrides)
    stage, dataset = config.pretrain, open_dataset(config.data).with_trained_ids()
    dataset = dataset.with_rules(replace(dataset.rules, item_rows=True))
    num_docs, curve = dataset.catalogue.num_docs, []
    torch.manual_seed(config.run.seed)
    model = new_model(config.model, dataset.schema, dataset.vocab_size)
    optimizer = stage.optimizer.build(parameter_groups(model, stage.optimizer))
    doc = to_features(dataset.schema.doc, dataset.catalogue.columns(np.arange(num_docs)))
    for step, rows in zip(range(stage.steps), row_stream(config, stage, dataset, 0, 1), strict=False):
        if step % stage.refresh_contents_every_steps == 0:
            with torch.no_grad():
                ids = torch.full((num_docs,), OUT_OF_VOCABULARY)
                contents = model(doc={**doc, "item_id": ids}).W
            model.set_contents(torch.cat([torch.zeros(1, config.model.dim), contents]))
        query = Collator(dataset.schema, dataset.catalogue)(rows).query
        found = model(query=query, doc=doc)
        loss = cross_entropy(found.alpha * found.U @ found.W.T + found.beta, torch.tensor(rows.doc_rows))
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), stage.optimizer.gradient_clipping)
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * schedule_factor(step, stage.steps, stage.optimizer)
        optimizer.step()
        curve.append((loss.item(), float(norm)))
    return curve


@pytest.mark.slow
def test_contents_of_items_are_those_of_the_last_refresh(config: Path, tmp_path: Path, pools: dict[int, Pool]) -> None:
    """Losses and gradients are those of a plain loop, at any number of ranks and chunks, and ZeRO stage.

    Validations in between do not change the contents.
    """
    validated = (*REFRESHED, "pretrain.validate_every_steps=1")
    right = plain_curve(config, validated)
    assert right[0][0] == pytest.approx(first_loss(config, REFRESHED), rel=1e-6)
    for ranks, mode in (
        (1, ("engine.chunk_tokens=100", "engine.keep_graph_tokens=60")),
        (2, ("engine.zero_stage=0", "engine.chunk_tokens=60", "engine.keep_graph_tokens=0")),
        (2, ("engine.zero_stage=2",)),
        (3, ("engine.zero_stage=3", "engine.chunk_tokens=100")),
    ):
        run_dir = tmp_path / f"{ranks}-{len(mode)}"
        pools[ranks].run(small_run.run, config, run_dir, (*validated, *mode))
        records = small_run.records(run_dir)
        for record, (loss, norm) in zip(records, right, strict=True):
            assert record["loss"] == pytest.approx(loss, rel=1e-5)
            assert record["grad_norm"] == pytest.approx(norm, rel=1e-4)
        computed = [step for step, record in enumerate(records) if "contents of items" in record["seconds"]]
        assert computed == [0, 3]


def restored(rank: int, world_size: int, config: Path, run_dir: Path, overrides: tuple[str, ...]) -> Tensor:
    """Resume without a step; return the contents of all items."""
    with pytest.MonkeyPatch.context() as patch:
        found = []

        def train(trainer: Trainer) -> Any:
            assert trainer.contents is not None
            found.append(trainer.contents.state_dict()[ItemContents.NAME])
            return trainer.progress

        patch.setattr(Trainer, "train", train)
        small_run.run(rank, world_size, config, run_dir, overrides, resume=True)
    return found[0]


@pytest.mark.slow
def test_a_resume_has_the_contents_of_the_checkpoint(config: Path, tmp_path: Path, pools: dict[int, Pool]) -> None:
    """A resumed run ends with the same bits; on other ranks it begins with the same contents."""
    options = (
        *REFRESHED, "pretrain.refresh_contents_every_steps=5", "pretrain.save_every_steps=3", "pretrain.steps=6",
        "engine.chunk_tokens=100",
    )  # fmt: skip
    whole, cut, other = tmp_path / "whole", tmp_path / "cut", tmp_path / "other"
    pools[2].run(small_run.run, config, whole, options)
    pools[2].run(stop_after, config, cut, options, 3)
    saved = common(cut, 3)[ItemContents.NAME]
    shutil.copytree(cut, other)
    pools[2].run(small_run.run, config, cut, options, "pretrain", True)
    first, second = (merged(run_dir / "pretrain" / "checkpoints" / "step-00000006") for run_dir in (whole, cut))
    assert all(torch.equal(first[name], second[name]) for name in first)
    refreshed, again = (common(run_dir, 6)[ItemContents.NAME] for run_dir in (whole, cut))
    assert torch.equal(refreshed, again) and not torch.equal(refreshed, saved)
    for contents in pools[3].run(restored, config, other, options):
        assert torch.equal(contents, saved)
