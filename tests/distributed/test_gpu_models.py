"""Towers, batches and a run on a CUDA device, against the same on a CPU, as far as their libraries are installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("omegaconf")
pytest.importorskip("pyarrow")
pytest.importorskip("transformers")
pytest.importorskip("xxhash")

from bigdssm.loader.batch import uploaded_batches
from bigdssm.models import QueryPositions, compile_layers, use_packing
from bigdssm.models.packed import flash_attention
from tests.faults import sitecustomize as faults
from tests.packing import within_rows
from tests.unit.models.packed_models import gradients, model, never_packed, vectors

from . import small_run
from .small_model import share_of

ROOT = Path(__file__).parents[2]
DEVICE = "cuda"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_batches_come_to_the_device_as_they_were_made() -> None:
    made = [share_of(0, 1, step) for step in range(5)]
    for found, batch in zip(uploaded_batches(iter(made), torch.device(DEVICE)), made, strict=True):
        assert found.row_ids.device.type == "cpu" and found.doc_ids.device.type == DEVICE
        assert found.step == batch.step and len(found.tensors()) == len(batch.tensors())
        for there, here in zip(found.tensors(), batch.tensors(), strict=True):
            assert torch.equal(there.cpu(), here)


PLACES = QueryPositions(torch.tensor([0, 0, 0, 2, 2, 3, 4, 5, 5]), torch.tensor([9, 0, 4, 1, 4, 1, 0, 7, 3]))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("chunk_tokens", [0, 25])
@pytest.mark.parametrize(
    ("side", "query_positions", "given"),
    [
        ("doc", None, {"pooling": "mean"}),
        ("doc", None, {"pooling": "cls"}),
        ("query", None, {"positions": "age"}),
        ("query", PLACES, {"positions": "rotary", "times": "rotary", "block": "gated"}),
        ("query", None, {"positions": "relative", "block": "gated"}),
        ("query", PLACES, {"positions": "relative", "block": "gated"}),
        ("query", PLACES, {"positions": "relative", "block": "lowpass"}),
    ],
)
def test_packed_lists_are_padded_ones(
    side: str, query_positions: QueryPositions | None, given: dict[str, str], chunk_tokens: int, compiled: bool
) -> None:
    plain, packed = model(**given).to(DEVICE), model(**given).to(DEVICE)
    never_packed(plain)
    use_packing(packed, flash_attention if DEVICE == "cuda" else within_rows)
    if compiled:
        compile_layers(packed)
    with torch.autocast(DEVICE, torch.bfloat16):
        expected, found = (vectors(made, side, chunk_tokens, query_positions).float() for made in (plain, packed))
    assert (found - expected).abs().max() < 0.03 * expected.abs().max()
    ours, theirs = gradients(packed, found), gradients(plain, expected)
    largest = max(float(gradient.abs().max()) for gradient in theirs.values())
    for name in theirs:
        assert (ours[name] - theirs[name]).abs().max() < 0.03 * largest, name


def test_a_run_trains_on_the_gpu_and_resumes(tmp_path: Path) -> None:
    """One rank as started by the launcher: NCCL and gloo, bfloat16, chunks with the GPU's random states."""
    for library in ("accelerate", "deepspeed", "duckdb", "joblib", "matplotlib", "webdataset"):
        pytest.importorskip(library)
    config, run_dir = small_run.write_dataset(tmp_path), tmp_path / "run"
    command = [
        sys.executable, "launch/pretrain.py", "--config", str(config), f"run.dir={run_dir}", "engine.precision=bf16",
        "engine.chunk_tokens=64", "engine.keep_graph_tokens=0",
    ]  # fmt: skip
    environment = {**os.environ, "DS_ACCELERATOR": DEVICE}
    for more, fault, code in (([], "term@6", 75), (["--resume", "auto"], "", 0)):
        struck = environment | faults.variables(fault)
        done = subprocess.run([*command, *more], cwd=ROOT, env=struck, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
    losses = [record["loss"] for record in small_run.records(run_dir, "pretrain")]
    assert len(losses) == 12 and losses[-1] < losses[0]
