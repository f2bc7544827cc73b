"""A term of a module outside the package, named in a config; disagreement of ranks; the interface of kernels."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from bigdssm.config import LOSSES, FrequencyCorrection, LossConfig, ModelConfig, load_config
from bigdssm.errors import BigDSSMError, ConfigError
from bigdssm.evaluation.metrics import register_metric
from bigdssm.loader.batch import Batch
from bigdssm.losses import (
    FPS,
    LossBatch,
    PairCE,
    Softmax,
    apply_sampling,
    contrastive_loss,
    register_distillation,
    register_loss,
    register_sampling,
)
from bigdssm.models import Encoded
from bigdssm.training.objective import Objective
from bigdssm.training.start import forbidden_change
from tests.minimal import MINIMAL
from tools.checks.pages import code_of

from .spawn import Pool

ROOT = Path(__file__).resolve().parents[2]
ROWS, D, LISTED, MARGIN, ALPHA = 6, 4, 2, 0.5, 1.5
OVERRIDES = ["sft={}", "sft.loss.name=squared", f"sft.negatives.hard={LISTED}", f"sft.loss.margin={MARGIN}"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config, and the module that docs/loss.md prints."""
    folder = tmp_path_factory.mktemp("outside")
    section = (ROOT / "docs/loss.md").read_text().split("## Write your own loss")[1].split("\n## ")[0]
    (folder / "outside_terms.py").write_text(code_of(section)[0])
    (folder / "config.yaml").write_text(yaml.safe_dump(MINIMAL))
    return folder


@contextmanager
def registered(folder: Path) -> Iterator[None]:
    """Import the module; remove it and its term afterwards, for other tests of this process."""
    sys.path.insert(0, str(folder))
    try:
        importlib.import_module("outside_terms")
        yield
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop("outside_terms", None)
        LOSSES.classes.pop("squared", None)


def towers() -> tuple[nn.Linear, nn.Linear]:
    torch.manual_seed(0)
    return nn.Linear(D, D, dtype=torch.float64), nn.Linear(D, D, dtype=torch.float64)


def whole() -> tuple[Tensor, Tensor, Tensor]:
    """Return the features of all queries, their documents, and LISTED candidates per query."""
    generator = torch.Generator().manual_seed(1)
    q, d = (torch.randn(ROWS, D, generator=generator, dtype=torch.float64) for _ in "qd")
    return q, d, torch.randn(ROWS * LISTED, D, generator=generator, dtype=torch.float64)


def share_of(rank: int, world_size: int) -> tuple[Tensor, Tensor, Batch]:
    """Return the features of a rank's queries and columns, and their batch."""
    (q, d, listed), m = whole(), ROWS // world_size
    own = slice(rank * m, (rank + 1) * m)
    columns = torch.cat([d[own], listed.view(ROWS, LISTED, D)[own].flatten(0, 1)])
    doc_ids = torch.arange(len(columns)) + 100 * rank
    batch = Batch(
        step=0, row_ids=torch.arange(m), query={}, doc={}, positive=torch.arange(m), relevance=torch.ones(m),
        query_ids=torch.arange(m) + 100 * rank, doc_ids=doc_ids, doc_rows=doc_ids,
        counts=torch.ones_like(doc_ids), query_lengths={}, doc_lengths={},
        negatives=m + torch.arange(m * LISTED).view(m, LISTED),
    )  # fmt: skip
    return q[own], columns, batch


def train(rank: int, world_size: int, folder: Path, overrides: list[str]) -> tuple[float, list[Tensor], float]:
    """Return the loss of a config's term, this rank's gradients, and the loss after a step by their mean over ranks."""
    with registered(folder):
        config = load_config(folder / "config.yaml", [*OVERRIDES, *overrides]).stage("sft")
        objective = Objective(config, ModelConfig(score="dot"), None, ROWS)
        queries, columns, batch = share_of(rank, world_size)
        query, doc = towers()

        def loss() -> Tensor:
            U, W = query(queries), doc(columns)
            return objective(Encoded(U, W, None, torch.tensor([ALPHA])), batch).loss

        first = loss()
        parameters = [*query.parameters(), *doc.parameters()]
        gradients = list(torch.autograd.grad(first, parameters))
        for parameter, gradient in zip(parameters, gradients, strict=True):
            mean = gradient.clone()
            if world_size > 1:
                torch.distributed.all_reduce(mean)
            parameter.data -= 0.01 * mean / world_size
        return float(first.detach()), gradients, float(loss().detach())


def expected(in_batch: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the dense loss and its gradients by autograd."""
    (q, d, listed), (query, doc) = whole(), towers()
    U, W, L = query(q), doc(d), doc(listed).view(ROWS, LISTED, D)
    positive = ALPHA * (U * W).sum(1, keepdim=True)
    S = ALPHA * torch.einsum("md,mkd->mk", U, L)
    if in_batch:
        others = ~torch.eye(ROWS, dtype=torch.bool)
        S = torch.cat([S, (ALPHA * U @ W.T)[others].view(ROWS, ROWS - 1)], 1)
    loss = (S - positive + MARGIN).clamp(min=0).square().mean()
    return loss.detach(), torch.autograd.grad(loss, [*query.parameters(), *doc.parameters()])


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(
    ("overrides", "in_batch"),
    [([], True), (["sft.negatives.in_batch=false"], False)],
    ids=["in_batch", "listed"],
)
def test_a_term_from_outside_trains_in_a_stages_objective(
    pools: dict[int, Pool], folder: Path, world_size: int, overrides: list[str], in_batch: bool
) -> None:
    results = pools[2].run(train, folder, overrides) if world_size > 1 else [train(0, 1, folder, overrides)]
    loss, gradients = expected(in_batch)
    for first, _, then in results:
        assert first == pytest.approx(float(loss), rel=1e-12)
        assert then < first
    for at, right in enumerate(gradients):
        mean = torch.stack([found[at] for _, found, _ in results]).mean(0)
        assert float((mean - right).abs().max()) <= 1e-12 * float(right.abs().max().clamp(min=1))


def test_unregistered_and_duplicate_names_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"sft\.loss\.name: got squared"):
        load_config(folder / "config.yaml", OVERRIDES)
    with registered(folder):
        with pytest.raises(ConfigError, match=r"unknown key sft\.loss\.direction: squared has .*margin"):
            load_config(folder / "config.yaml", [*OVERRIDES, "sft.loss.direction=both"])
        with pytest.raises(ValueError, match=r"there is a loss named 'squared': outside_terms\.Squared"):
            register_loss(type("Other", (PairCE,), {"name": "squared"}))
    with pytest.raises(ValueError, match="there is a loss named 'triplet'"):
        register_loss(type("Other", (PairCE,), {"name": "triplet"}))


def outside_loss(rank: int, world_size: int, folder: Path, overrides: list[str]) -> tuple[float, float]:
    """Return the loss of a config's objective on this rank's half of a batch, and its distillation."""
    from . import outside  # noqa: F401, it registers what it holds

    stage = load_config(folder / "config.yaml", overrides).pretrain
    objective = Objective(stage, ModelConfig(score="dot"), None, ROWS)
    queries, columns, batch = share_of(rank, world_size)
    batch = replace(batch, teacher=torch.arange(3.0).expand(len(queries), 3))
    U, W = queries.clone().requires_grad_(), columns.clone().requires_grad_()
    out = objective(Encoded(U, W, None, torch.tensor([ALPHA])), batch)
    slope = torch.autograd.grad(out.loss, [U, W])
    step = sum(float((gradient * gradient).sum()) for gradient in slope)
    moved = objective(Encoded(U - 1e-6 * slope[0], W - 1e-6 * slope[1], None, torch.tensor([ALPHA])), batch)
    steps = torch.tensor([step, float(out.loss.detach() - moved.loss.detach())], dtype=torch.float64)
    if world_size > 1:
        torch.distributed.all_reduce(steps)
    assert float(steps[1]) == pytest.approx(1e-6 * float(steps[0]), rel=1e-4)
    return float(out.loss.detach()), float(out.stats.get("distillation", 0.0))


def outside_correction(rank: int, world_size: int, folder: Path) -> list[tuple[float, float]]:
    """Return beta and neg_bias of a config's correction with its whole share on one of them."""
    from . import outside  # noqa: F401, it registers what it holds

    biases = []
    for share in (1.0, 0.0):
        stage = load_config(folder / "config.yaml", [f"pretrain.sampling={{name: shared, share: {share}}}"]).pretrain
        assert isinstance(stage.sampling, FrequencyCorrection)
        beta, neg_bias = apply_sampling(stage.sampling, torch.tensor([2.0]))
        assert beta is not None and neg_bias is not None
        biases.append((float(beta), float(neg_bias)))
    return biases


def test_a_sampling_correction_comes_from_outside(outside_pools: dict[int, Pool], folder: Path) -> None:
    assert outside_pools[1].run(outside_correction, folder) == [[(-2.0, 0.0), (0.0, -2.0)]]


def test_components_of_another_kind_and_taken_names_are_refused() -> None:
    for register, needs in (
        (register_distillation, "a ListDistillation"), (register_sampling, "a FrequencyCorrection"),
    ):  # fmt: skip
        with pytest.raises(TypeError, match=needs):
            register(PairCE)
    with pytest.raises(ValueError, match=r"there is a metric named 'mrr': bigdssm\.evaluation\.metrics"):
        register_metric("mrr", lambda ranks: ranks)
    with pytest.raises(TypeError, match="a loss is a frozen dataclass, a subclass of LossConfig, with a name"):
        register_loss(type("Nameless", (LossConfig,), {}))


def changed_at_a_resume(rank: int, world_size: int, folder: Path, change: str) -> str | None:
    from . import outside  # noqa: F401, it registers what it holds

    given = ["pretrain.optimizer={name: heavy_ball, friction: 0.3}"]
    before = load_config(folder / "config.yaml", given).to_dict()
    return forbidden_change(before, load_config(folder / "config.yaml", [*given, change]), "pretrain")


def test_a_component_declares_the_keys_that_a_resume_may_change(outside_pools: dict[int, Pool], folder: Path) -> None:
    run = partial(outside_pools[1].run, changed_at_a_resume, folder)
    assert run("pretrain.optimizer.foreach=true") == [None]
    assert run("pretrain.optimizer.friction=0.2") == ["pretrain.optimizer.friction was 0.3, is 0.2"]
    assert run("pretrain.loss.direction=both") == ["pretrain.loss.direction was q2d, is both"]


MARGIN_HUBER = "distillation: {name: margin_huber, delta: 0.5, weight: 0.25, temperature: 2.0}"
HARD = "negatives: {hard: 2, mining: {file: x.npy}}"
TAUGHT = f"pretrain={{loss: {{name: softmax}}, sampling: {{name: none}}, {HARD}, {MARGIN_HUBER}}}"


@pytest.mark.parametrize("world_size", [1, 2])
def test_losses_over_all_columns_and_distillations_come_from_outside(
    outside_pools: dict[int, Pool], folder: Path, world_size: int
) -> None:
    q, d, listed = whole()
    S = ALPHA * q @ torch.cat([d, listed]).T
    shifted = S - 0.5 * torch.eye(ROWS, len(S[0]), dtype=torch.float64)
    expected = torch.nn.functional.cross_entropy(shifted, torch.arange(ROWS))
    overrides = ["pretrain={loss: {name: additive_margin, margin: 0.5}, sampling: {name: none}}"]
    for found, _ in outside_pools[world_size].run(outside_loss, folder, overrides):
        assert found == pytest.approx(float(expected), rel=1e-12)

    own, hard = S.diagonal()[:, None], torch.stack([S[i, ROWS + LISTED * i :][:LISTED] for i in range(ROWS)])
    teacher = torch.arange(3.0, dtype=torch.float64) / 2.0
    error = (own - hard) - (teacher[0] - teacher[1:])
    huber = torch.nn.functional.huber_loss(error, torch.zeros_like(error), reduction="none", delta=0.5).sum(1).mean()
    plain = [TAUGHT.replace(f", {MARGIN_HUBER}", "")]
    for (found, distilled), (alone, _) in zip(
        outside_pools[world_size].run(outside_loss, folder, [TAUGHT]),
        outside_pools[world_size].run(outside_loss, folder, plain), strict=True,
    ):  # fmt: skip
        assert distilled == pytest.approx(float(huber), rel=1e-12)
        assert found == pytest.approx(alone + 0.25 * float(huber), rel=1e-12)


def disagree(rank: int, world_size: int, calls: list[dict[str, Any]]) -> str:
    U, W = torch.ones(2, 3), torch.ones(2, 3)
    try:
        call = {"U": U, "W": W, "alpha": 2.0, **calls[min(rank, len(calls) - 1)]}
        options = {name: call.pop(name) for name in ("columns",) if name in call}
        contrastive_loss(call.pop("loss"), LossBatch(**call), **options)
    except BigDSSMError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


PAIR_CE = {"loss": PairCE(), "columns": "in_batch"}


@pytest.mark.parametrize(
    ("calls", "what", "words"),
    [
        ([{"loss": Softmax()}, PAIR_CE], "the loss or its direction",
         ["softmax over all columns, q2d", "pair_ce over in-batch negatives and candidates, q2d"]),
        ([{"loss": FPS()}, {"loss": FPS(direction="both")}], "the loss or its direction",
         ["fps over all columns, q2d", "fps over all columns, both"]),
        ([PAIR_CE, {**PAIR_CE, "alpha": 3.0}], "alpha", ["2.0", "3.0"]),
        ([PAIR_CE, {**PAIR_CE, "beta": torch.zeros(2), "doc_ids": torch.arange(2)}],
         "which of beta, neg_bias, query_ids, doc_ids, known, is_known, time, since, score_bias are given",
          ["none", "beta, doc_ids"]),
        ([PAIR_CE, {**PAIR_CE, "U": torch.ones(2, 3).double(), "W": torch.ones(2, 3).double()}], "the dtype",
         ["float32", "float64"]),
    ],
)  # fmt: skip
def test_disagreeing_ranks_are_reported_with_their_values(
    pools: dict[int, Pool], calls: list[dict[str, Any]], what: str, words: list[str]
) -> None:
    told = f"LossInputError: the ranks disagree on {what}: rank 0 has {words[0]}; rank 1 has {words[1]}"
    assert pools[2].run(disagree, calls, timeout_s=20) == [told] * 2


def test_only_the_kernel_modules_use_tiles() -> None:
    """A replacement of the kernels has to provide only a few names."""
    folder = ROOT / "bigdssm/losses"
    files = sorted(folder.glob("*.py"))
    assert len(files) > 8
    for file in [*files, *(ROOT / "bigdssm/training").glob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bigdssm.losses.kernels"):
                assert node.module == "bigdssm.losses.kernels", f"{file.name}:{node.lineno} looks behind the seam"
            if isinstance(node, ast.Name | ast.Attribute) and file.parent == folder:
                name = node.id if isinstance(node, ast.Name) else node.attr
                assert name not in ("tiles", "Tile", "BlockMask", "RowBlock"), f"{file.name}:{node.lineno} uses {name}"
