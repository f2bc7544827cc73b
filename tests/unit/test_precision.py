"""bfloat16 where the processor has instructions for it, and float32 with a line of the log where it has none."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import bigdssm
from bigdssm.config import EngineConfig
from bigdssm.losses import precision
from bigdssm.losses.kernels import product_precision
from bigdssm.retrieval.embed import encode_in_bf16
from tests.distributed import small_run
from tests.distributed.spawn import run_ranks

real_has_bf16 = precision.has_bf16  # the fixture of conftest.py masks it in each test


def lacking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "has_bf16", lambda: False)


@pytest.mark.parametrize(
    ("machine", "avx512_bf16", "amx", "mkldnn", "expected"),
    [
        ("x86_64", False, False, True, False),  # AVX-512 alone, where mkldnn emulates
        ("x86_64", True, False, True, True),
        ("AMD64", False, True, True, True),
        ("aarch64", False, False, True, True),
        ("aarch64", False, False, False, False),
    ],
)
def test_what_counts_as_instructions(
    monkeypatch: pytest.MonkeyPatch, machine: str, avx512_bf16: bool, amx: bool, mkldnn: bool, expected: bool
) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(precision.torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: mkldnn)
    assert real_has_bf16() is expected


@pytest.mark.parametrize(
    ("requested", "device", "has", "began", "computed", "words"),
    [
        ("fp32", "cpu", False, None, "fp32", None),
        ("bf16", "cpu", True, None, "bf16", None),
        ("bf16", "cpu", False, None, "fp32", "engine.precision=bf16: computing in fp32, since the processor of"),
        ("bf16_pure", "cpu", False, None, "fp32", "engine.precision=bf16_pure: computing in fp32, since"),
        ("bf16", "cuda", False, None, "bf16", None),
        ("bf16", "cpu", True, ("bf16", "fp32"), "fp32", "computing in fp32, as this run began on a processor without"),
        ("bf16", "cpu", False, ("bf16", "fp32"), "fp32", "computing in fp32, as this run began on a processor without"),
        (
            "bf16",
            "cpu",
            False,
            ("bf16", "bf16"),
            "bf16",
            "computing in bf16, as this run began, although the",
        ),
        ("bf16", "cpu", False, ("fp32", "fp32"), "fp32", "computing in fp32, since the processor of"),
        ("fp32", "cpu", False, ("bf16", "bf16"), "fp32", None),
    ],
)
def test_the_precision_of_a_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, requested: Any, device: str, has: bool,
    began: tuple[str, str] | None, computed: str, words: str | None,
) -> None:  # fmt: skip
    monkeypatch.setattr(precision, "has_bf16", lambda: has)
    saved = None if began is None else dict(zip(("requested", "computed"), began, strict=True))
    engine = EngineConfig(precision=requested)
    with caplog.at_level(logging.WARNING, "bigdssm"):
        settled = precision.settle_precision(engine, device, saved)
    assert settled.precision == computed
    assert precision.saved_precision(engine, settled) == {"requested": requested, "computed": computed}
    assert [words in record.getMessage() for record in caplog.records if words] == ([] if words is None else [True])
    assert words is not None or not caplog.records


def settled_on(rank: int, world_size: int) -> str:
    precision.has_bf16 = lambda: rank != 1
    return precision.settle_precision(EngineConfig(precision="bf16"), "cpu").precision


def test_all_ranks_compute_in_one_precision() -> None:
    assert run_ranks(settled_on, 2) == ["fp32", "fp32"]


@pytest.mark.parametrize("has", [False, True])
def test_towers_and_losses_narrow_where_there_are_instructions(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, has: bool
) -> None:
    monkeypatch.setattr(precision, "has_bf16", lambda: has)
    model, inputs = nn.Linear(32, 32), torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    exact = model(inputs)
    with caplog.at_level(logging.WARNING, "bigdssm"):
        assert encode_in_bf16(model) is has
    assert torch.equal(model(inputs).float(), exact) is not has
    assert [record.getMessage()[:26] for record in caplog.records] == ([] if has else ["bf16: computing in fp32, s"])
    loss_inputs: Any = SimpleNamespace(U=inputs.bfloat16())
    with product_precision(loss_inputs):
        assert (torch.backends.mkldnn.matmul.fp32_precision == "bf16") is has


def test_a_run_keeps_its_precision_when_it_is_resumed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """Begun without instructions and resumed with them: to the bits of fp32 all along."""
    config = small_run.write_dataset(tmp_path)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")

    def weights(run: str, *overrides: str, resume: bool = False) -> bytes:
        given = [f"run.dir={tmp_path / run}", "pretrain.epochs=0.5", *overrides]
        return (bigdssm.pretrain(config, given, resume=resume).best / "model.safetensors").read_bytes()

    whole = weights("fp32", "pretrain.steps=4", "pretrain.save_every_steps=2")
    steps = ("pretrain.steps=4", "pretrain.save_every_steps=2", "engine.precision=bf16")
    with monkeypatch.context() as patch:
        lacking(patch)
        assert weights("begun", *steps) == whole
    (last,) = (tmp_path / "begun/pretrain/checkpoints").glob("step-00000004")
    last.rename(last.with_name("damaged-step-00000004"))
    assert weights("begun", *steps, resume=True) == whole
    assert weights("narrow", *steps) != whole
