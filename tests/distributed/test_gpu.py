"""On a CUDA device the losses take the same path with larger tiles, and equal the same dense reference.

There texts and histories are packed in bfloat16, and give what padded ones give.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import fields
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bigdssm.batching.upload import uploaded
from bigdssm.losses import RANKING_NAMES, fps_loss, norm_penalty, ranking_loss
from bigdssm.models import Places, compile_layers, use_packing
from bigdssm.models.packed import flash_attention
from tests.packing import within_rows
from tests.unit.test_packed import gradients, model, never_packed, vectors

from . import reference, small_run
from .interpreted import fused_fps
from .parity import Loss, assert_parity, by_matrix, run_rank
from .reference import Shard, make_shards
from .test_gradient_cache import share_of

ROOT = Path(__file__).parents[2]
DEVICE = "cuda"
TILE = 8192
OPTIONS = frozenset({"beta", "neg_bias", "weight", "query_ids", "doc_ids", "shared", "known"})

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PRECISIONS = [(torch.float64, 1e-10), (torch.float32, 1e-4), (torch.bfloat16, 5e-3)]


def batch(dtype: torch.dtype, *more: str) -> Shard:
    generator = torch.Generator().manual_seed(1)
    options = OPTIONS | set(more)
    return make_shards(generator, [(40, 60)], 32, num_queries=30, num_docs=50, options=options, dtype=dtype)[0]


def check(loss: Loss, shard: Shard, expected: tuple[Tensor, list[Tensor | None]], tolerance: float) -> None:
    given = {field.name: getattr(shard, field.name) for field in fields(Shard)}
    there = Shard(**{name: None if value is None else value.to(DEVICE) for name, value in given.items()})
    value, gradients, _ = run_rank(0, 1, loss, [there], 20.0, None, {"tile": TILE})
    assert value.device.type == DEVICE
    back = [None if gradient is None else gradient.cpu() for gradient in gradients]
    assert_parity([shard], 20.0, (value.cpu(), back, None), expected, tolerance)


@pytest.mark.parametrize("direction", ["q2d", "d2q", "both"])
@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_fps(direction: str, dtype: torch.dtype, tolerance: float) -> None:
    shard = batch(dtype)
    check(partial(fps_loss, direction=direction), shard, reference.fps([shard], 20.0, direction), tolerance)


@pytest.mark.parametrize("loss", [fused_fps, partial(by_matrix, fused_fps)], ids=["pairs", "matrix"])
@pytest.mark.parametrize("direction", ["q2d", "d2q", "both"])
@pytest.mark.parametrize(
    ("dtype", "D", "tolerance"),
    [(torch.float32, 64, 1e-4), (torch.bfloat16, 64, 5e-3), (torch.bfloat16, 100, 5e-3), (torch.bfloat16, 256, 5e-3)],
)
def test_fps_by_kernels(dtype: torch.dtype, D: int, tolerance: float, direction: str, loss: Loss) -> None:
    """More than one block each way, none of them full; −inf for the first blocks of columns."""
    generator = torch.Generator().manual_seed(1)
    shard = make_shards(generator, [(300, 700)], D, num_queries=90, num_docs=400, options=OPTIONS, dtype=dtype)[0]
    assert shard.neg_bias is not None
    shard.neg_bias[:200] = -math.inf
    expected = reference.fps_at_once([shard], 20.0, direction)
    check(partial(loss, direction=direction), shard, expected, tolerance)


@pytest.mark.parametrize("direction", ["q2d", "both"])
def test_kernels_give_the_same_bits_again(direction: str) -> None:
    U, W = (torch.nn.functional.normalize(torch.randn(3000, 128, device=DEVICE)).bfloat16() for _ in "UW")
    found = []
    for _ in range(2):
        leaves = [x.clone().requires_grad_() for x in (U, W)]
        loss = fused_fps(*leaves, alpha=20.0, direction=direction).loss
        found.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("name", RANKING_NAMES)
@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_ranking(name: str, dtype: torch.dtype, tolerance: float) -> None:
    shard = batch(dtype, "negatives")
    check(partial(ranking_loss, name, in_batch=True), shard, reference.ranking(name, [shard], 20.0, True), tolerance)


def test_batches_come_to_the_device_as_they_were_made() -> None:
    made = [share_of(0, 1, step) for step in range(5)]
    for found, batch in zip(uploaded(iter(made), torch.device(DEVICE)), made, strict=True):
        assert found.row_ids.device.type == "cpu" and found.doc_ids.device.type == DEVICE
        assert found.step == batch.step and len(found.tensors()) == len(batch.tensors())
        for there, here in zip(found.tensors(), batch.tensors(), strict=True):
            assert torch.equal(there.cpu(), here)


def test_norm_penalty() -> None:
    vectors = torch.randn(20, 4)
    assert float(norm_penalty(vectors.to(DEVICE))) == pytest.approx(float(norm_penalty(vectors)), rel=1e-5)


@pytest.mark.parametrize("direction", ["q2d", "both"])
def test_a_large_batch_in_bfloat16(direction: str) -> None:
    """65,536 rows: dense scores would be 17 GB in float32, and their gradients as much again."""
    m = 65_536 if DEVICE == "cuda" else 2048
    U, W = (torch.nn.functional.normalize(torch.randn(m, 128, device=DEVICE)).bfloat16() for _ in "UW")
    U.requires_grad_(), W.requires_grad_()
    out = fps_loss(U, W, alpha=20.0, direction=direction, tile=TILE)  # type: ignore[arg-type]
    out.loss.backward()
    assert U.grad is not None and U.grad.isfinite().all()
    expected = math.log(m) + 20.0**2 / (2 * 128)  # the scores of random directions are normal
    assert float(out.loss.detach()) == pytest.approx(expected, rel=0.02)
    if DEVICE == "cuda":
        assert torch.cuda.max_memory_allocated() < 4e9


PLACES = Places(torch.tensor([0, 0, 0, 2, 2, 3, 4, 5, 5]), torch.tensor([9, 0, 4, 1, 4, 1, 0, 7, 3]))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("chunk_tokens", [0, 25])
@pytest.mark.parametrize(
    ("side", "places", "given"),
    [
        ("doc", None, {"pooling": "mean"}),
        ("doc", None, {"pooling": "cls"}),
        ("query", None, {"positions": "age"}),
        ("query", PLACES, {"positions": "rotary", "block": "gated"}),
        ("query", None, {"positions": "relative", "block": "gated"}),
        ("query", PLACES, {"positions": "relative", "block": "hstu"}),
    ],
)
def test_packed_lists_are_padded_ones(
    side: str, places: Places | None, given: dict[str, str], chunk_tokens: int, compiled: bool
) -> None:
    plain, packed = model(**given).to(DEVICE), model(**given).to(DEVICE)
    never_packed(plain)
    use_packing(packed, flash_attention if DEVICE == "cuda" else within_rows)
    if compiled:
        compile_layers(packed)
    with torch.autocast(DEVICE, torch.bfloat16):
        expected, found = (vectors(made, side, chunk_tokens, places).float() for made in (plain, packed))
    assert (found - expected).abs().max() < 0.03 * expected.abs().max()
    ours, theirs = gradients(packed, found), gradients(plain, expected)
    largest = max(float(gradient.abs().max()) for gradient in theirs.values())
    for name in theirs:
        assert (ours[name] - theirs[name]).abs().max() < 0.03 * largest, name


def test_a_run_trains_there_and_goes_on(tmp_path: Path) -> None:
    """One rank as the launcher starts it: NCCL beside gloo, bfloat16, chunks whose random states are the card's."""
    config, run_dir = small_run.write_dataset(tmp_path), tmp_path / "run"
    command = [
        sys.executable, "launch/pretrain.py", "--config", str(config), f"run.dir={run_dir}", "engine.precision=bf16",
        "engine.chunk_tokens=64", "engine.keep_graph_tokens=0",
    ]  # fmt: skip
    environment = {**os.environ, "DS_ACCELERATOR": DEVICE}
    for more, fault, code in (([], "term@6", 75), (["--resume", "auto"], "", 0)):
        struck = environment | ({"BIGDSSM_FAULT": fault} if fault else {})
        done = subprocess.run([*command, *more], cwd=ROOT, env=struck, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
    losses = [record["loss"] for record in small_run.records(run_dir, "pretrain")]
    assert len(losses) == 12 and losses[-1] < losses[0]
