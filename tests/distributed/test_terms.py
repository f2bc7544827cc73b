"""A term from a module outside the package, named in a config; ranks that do not agree on theirs; the seam."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from bigdssm.config import ModelConfig, load_config
from bigdssm.errors import BigDSSMError, ConfigError
from bigdssm.loader.batch import Batch
from bigdssm.losses import LossBatch, PairCE, Softmax, contrastive_loss, register
from bigdssm.losses.terms import TERMS
from bigdssm.models import Encoded
from bigdssm.training.objective import Objective
from bigdssm.utils.loss_options import LOSSES, LossOptions

from ..unit.test_config import MINIMAL
from .spawn import Pool

ROOT = Path(__file__).resolve().parents[2]
ROWS, D, LISTED, MARGIN, ALPHA = 6, 4, 2, 0.5, 1.5
OVERRIDES = ["sft={}", "sft.loss.name=squared", f"sft.loss.negatives={LISTED}", f"sft.loss.margin={MARGIN}"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config, and beside it the module that docs/loss.md prints."""
    folder = tmp_path_factory.mktemp("outside")
    section = (ROOT / "docs/loss.md").read_text().split("## A term of your own")[1].split("\n## ")[0]
    code = "\n".join(line for line in section.splitlines() if not line or line.startswith("    "))
    (folder / "outside_terms.py").write_text(dedent(code))
    (folder / "config.yaml").write_text(yaml.safe_dump(MINIMAL))
    return folder


@contextmanager
def registered(folder: Path) -> Iterator[None]:
    """Import the module; forget it and its term afterwards, for the other tests of this process."""
    sys.path.insert(0, str(folder))
    try:
        importlib.import_module("outside_terms")
        yield
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop("outside_terms", None)
        for known in (LOSSES, TERMS):
            known.pop("squared", None)  # type: ignore[attr-defined]


def towers() -> tuple[nn.Linear, nn.Linear]:
    torch.manual_seed(0)
    return nn.Linear(D, D, dtype=torch.float64), nn.Linear(D, D, dtype=torch.float64)


def whole() -> tuple[Tensor, Tensor, Tensor]:
    """Return the features of all queries, their documents, and LISTED further documents for each."""
    generator = torch.Generator().manual_seed(1)
    q, d = (torch.randn(ROWS, D, generator=generator, dtype=torch.float64) for _ in "qd")
    return q, d, torch.randn(ROWS * LISTED, D, generator=generator, dtype=torch.float64)


def train(rank: int, world_size: int, folder: Path, overrides: list[str]) -> tuple[float, list[Tensor], float]:
    """Return the loss of a config's term, this rank's gradients, and the loss after a step by their mean over ranks."""
    with registered(folder):
        config = load_config(folder / "config.yaml", [*OVERRIDES, *overrides]).stage("sft").loss
        objective = Objective(config, ModelConfig(score="dot"), None, None, ROWS)
        (q, d, listed), m = whole(), ROWS // world_size
        own = slice(rank * m, (rank + 1) * m)
        query, doc = towers()
        columns = torch.cat([d[own], listed.view(ROWS, LISTED, D)[own].flatten(0, 1)])
        negatives = m + torch.arange(m * LISTED).view(m, LISTED)
        doc_ids = torch.arange(len(columns)) + 100 * rank
        batch = Batch(
            step=0, row_ids=torch.arange(m), query={}, doc={}, positive=torch.arange(m), relevance=torch.ones(m),
            query_ids=torch.arange(m) + 100 * rank, doc_ids=doc_ids, doc_rows=doc_ids,
            multiplicity=torch.ones_like(doc_ids), query_lengths={}, doc_lengths={}, negatives=negatives,
        )  # fmt: skip

        def loss() -> Tensor:
            U, W = query(q[own]), doc(columns)
            scores = None
            if config.mlp:  # whatever made them
                picked = objective.listed(batch)
                assert picked is not None
                scores = ALPHA * torch.einsum("md,mkd->mk", U, W[picked])
            return objective(Encoded(U, W, None, torch.tensor([ALPHA]), scores), batch).loss

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
    ("overrides", "in_batch", "tolerance"),
    [([], True, 1e-12), (["sft.loss.in_batch=false"], False, 1e-12),
     (["sft.loss.in_batch=false", "sft.loss.mlp=[4]"], False, 1e-6)],
    ids=["in_batch", "listed", "scores"],
)  # fmt: skip
def test_a_term_from_outside_trains_in_a_stages_objective(
    pools: dict[int, Pool], folder: Path, world_size: int, overrides: list[str], in_batch: bool, tolerance: float
) -> None:
    results = pools[2].run(train, folder, overrides) if world_size > 1 else [train(0, 1, folder, overrides)]
    loss, gradients = expected(in_batch)
    for first, _, then in results:
        assert first == pytest.approx(float(loss), rel=tolerance)
        assert then < first
    for at, right in enumerate(gradients):
        mean = torch.stack([found[at] for _, found, _ in results]).mean(0)
        assert float((mean - right).abs().max()) <= tolerance * float(right.abs().max().clamp(min=1))


def test_a_name_that_nobody_registered_is_refused_and_one_that_is_taken(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"sft\.loss\.name: got squared, needs one of 'fps', 'softmax'"):
        load_config(folder / "config.yaml", OVERRIDES)
    with registered(folder):
        assert LOSSES["squared"] == LossOptions("squared")
        with pytest.raises(ConfigError, match=r"sft\.loss\.direction: got both, needs q2d: squared has no other"):
            load_config(folder / "config.yaml", [*OVERRIDES, "sft.loss.direction=both"])
        with pytest.raises(ValueError, match="there is another loss called 'squared'"):
            register("squared", PairCE)
    with pytest.raises(ValueError, match="there is another loss called 'sigmoid'"):
        register("sigmoid", PairCE)


def disagree(rank: int, world_size: int, calls: list[dict[str, Any]]) -> str:
    U, W = torch.ones(2, 3), torch.ones(2, 3)
    try:
        call = {"U": U, "W": W, "alpha": 2.0, **calls[min(rank, len(calls) - 1)]}
        options = {name: call.pop(name) for name in ("columns", "direction") if name in call}
        contrastive_loss(call.pop("term"), LossBatch(**call), **options)
    except BigDSSMError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


PAIR_CE = {"term": PairCE(), "columns": "in_batch"}


@pytest.mark.parametrize(
    ("calls", "what", "words"),
    [
        ([{"term": Softmax()}, PAIR_CE], "the loss or its direction",
         ["softmax over all columns, q2d", "pair_ce over in-batch and listed negatives, q2d"]),
        ([{"term": Softmax()}, {"term": Softmax(), "direction": "both"}], "the loss or its direction",
         ["softmax over all columns, q2d", "softmax over all columns, both"]),
        ([PAIR_CE, {**PAIR_CE, "alpha": 3.0}], "alpha", ["2.0", "3.0"]),
        ([PAIR_CE, {**PAIR_CE, "beta": torch.zeros(2), "doc_ids": torch.arange(2)}],
         "which of beta, neg_bias, query_ids, doc_ids, known are given", ["none", "beta, doc_ids"]),
        ([PAIR_CE, {**PAIR_CE, "U": torch.ones(2, 3).double(), "W": torch.ones(2, 3).double()}], "the dtype",
         ["float32", "float64"]),
    ],
)  # fmt: skip
def test_ranks_that_disagree_are_told_what_each_has(
    pools: dict[int, Pool], calls: list[dict[str, Any]], what: str, words: list[str]
) -> None:
    told = f"LossInputError: the ranks disagree on {what}: rank 0 has {words[0]}; rank 1 has {words[1]}"
    assert pools[2].run(disagree, calls, timeout_s=20) == [told] * 2


def test_nothing_above_the_seam_knows_tiles() -> None:
    """What replaces the folder `passes` with other kernels has only its few names to keep."""
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
