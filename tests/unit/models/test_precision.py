"""Precision: bfloat16 where the hardware computes it, float32 where it would be emulated."""

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
from bigdssm.losses.kernels import product_precision
from bigdssm.models import precision
from bigdssm.models.encoders.text import TextEncoder
from bigdssm.retrieval.embed import encode_in
from bigdssm.utils import device as devices
from tests.distributed import small_run
from tests.distributed.spawn import run_ranks

detected = devices.instruction_set  # the fixture of conftest.py replaces it in each test


def on(monkeypatch: pytest.MonkeyPatch, instructions: str) -> None:
    monkeypatch.setattr(devices, "instruction_set", lambda device="cpu": instructions)


@pytest.mark.parametrize(
    ("machine", "avx512_bf16", "amx", "mkldnn", "expected"),
    [
        ("x86_64", False, False, True, "none"),  # AVX-512 alone, where mkldnn emulates
        ("x86_64", True, False, True, "avx512_bf16"),
        ("AMD64", True, True, True, "amx"),
        ("x86_64", True, True, False, "none"),  # ONEDNN_MAX_CPU_ISA=AVX2
        ("aarch64", False, False, True, "arm_bf16"),
        ("aarch64", False, False, False, "none"),
    ],
)
def test_instruction_sets(
    monkeypatch: pytest.MonkeyPatch, machine: str, avx512_bf16: bool, amx: bool, mkldnn: bool, expected: str
) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: mkldnn)
    assert detected() == expected


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), "none"), ((8, 0), "sm_80"), ((10, 0), "sm_80")])
def test_gpus(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert detected("cuda") == expected


EMULATED = "emulates bfloat16; a product takes"
BEGAN = "in which this run began"


@pytest.mark.parametrize(
    ("requested", "instructions", "began", "computed", "words"),
    [
        ("fp32", "none", None, "fp32", None),
        ("fp32", "none", ("auto", "bf16"), "fp32", None),
        ("auto", "none", None, "fp32", None),
        ("auto", "arm_bf16", None, "fp32", None),  # not measured
        ("auto", "avx512_bf16", None, "bf16", None),  # 256 columns
        ("auto", "amx", None, "bf16", None),
        ("auto", "sm_80", None, "bf16", None),
        ("auto", "amx", ("auto", "fp32"), "fp32", BEGAN),
        ("auto", "none", ("auto", "bf16"), "bf16", BEGAN),
        ("auto", "amx", ("fp32", "fp32"), "bf16", None),
        ("bf16", "amx", None, "bf16", None),
        ("bf16", "none", None, "bf16", EMULATED),
        ("bf16_pure", "none", None, "bf16_pure", EMULATED),
    ],
)
def test_the_precision_of_a_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, requested: Any, instructions: str,
    began: tuple[str, str] | None, computed: str, words: str | None,
) -> None:  # fmt: skip
    on(monkeypatch, instructions)
    saved = None if began is None else dict(zip(("requested", "computed"), began, strict=True))
    engine = EngineConfig(precision=requested)
    with caplog.at_level(logging.WARNING, "bigdssm"):
        resolved = precision.resolve_engine_precision(engine, nn.Linear(256, 300), "cpu", saved)
    assert resolved.precision == computed
    assert [words in record.getMessage() for record in caplog.records if words] == ([] if words is None else [True])
    assert words is not None or not caplog.records


def test_the_emulation_is_measured() -> None:
    assert 0.01 < precision.emulation_factor() < 10_000


@pytest.mark.parametrize(("chunks", "expected"), [(4, 0.003), (256, 0.019)])
def test_gradients_added_in_bfloat16_are_inexact(chunks: int, expected: float) -> None:
    """The figures of docs/clusters.md, for which bf16_pure refuses chunks."""
    gradients = torch.randn(chunks, 100_000, generator=torch.Generator().manual_seed(0))
    added = torch.zeros(100_000, dtype=torch.bfloat16)
    for gradient in gradients:
        added += gradient.bfloat16()
    exact = gradients.double().sum(0)
    assert float((added - exact).norm() / exact.norm()) == pytest.approx(expected, rel=0.1)


def settled_on(rank: int, world_size: int) -> str:
    devices.instruction_set = lambda device="cpu": "amx" if rank != 1 else "none"
    return precision.resolve_engine_precision(EngineConfig(precision="auto"), nn.Linear(256, 256), "cpu").precision


class Texts(TextEncoder):
    def forward(self, tokens: Any) -> Any:
        return self.layer(tokens)


@pytest.mark.parametrize(
    ("instructions", "texts", "width", "computed"),
    [
        ("amx", 32, 64, "bf16"), ("sm_80", 32, 64, "bf16"), ("arm_bf16", 512, 512, "fp32"),
        ("avx512_bf16", 63, 255, "fp32"), ("avx512_bf16", 63, 256, "bf16"), ("avx512_bf16", 64, 255, "bf16"),
    ],
)  # fmt: skip
def test_narrow_towers_are_computed_in_float32_without_amx(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, instructions: str, texts: int, width: int,
    computed: str,
) -> None:  # fmt: skip
    on(monkeypatch, instructions)
    text = Texts(None, texts)
    text.layer = nn.Linear(4 * texts, texts)
    model = nn.Sequential(nn.Embedding(1000, 999), nn.Linear(2000, 32), nn.Linear(width, 3 * width), text)
    with caplog.at_level(logging.INFO, "bigdssm"):
        resolved = precision.resolve_engine_precision(EngineConfig(precision="auto"), model, "cpu")
    assert resolved.precision == computed
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == f"engine.precision=auto: computing in {computed} ({instructions}, products up to {width} wide)"


@pytest.mark.slow
def test_all_ranks_compute_in_one_precision() -> None:
    assert run_ranks(settled_on, 2) == ["fp32", "fp32"]


def test_towers_are_encoded_in_the_requested_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Towers compute in the requested precision."""
    inputs = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    for requested, instructions, resolved in (
        ("bf16", "none", "bf16"),
        ("auto", "none", "fp32"),
        ("auto", "amx", "bf16"),
    ):
        on(monkeypatch, instructions)
        model = nn.Linear(32, 32)
        exact = model(inputs)
        assert encode_in(model, requested) == resolved
        assert torch.equal(model(inputs).float(), exact) is (resolved == "fp32")


@pytest.mark.parametrize("instructions", ["none", "avx512_bf16"])
def test_losses_narrow_on_cpus_with_bfloat16_instructions(monkeypatch: pytest.MonkeyPatch, instructions: str) -> None:
    on(monkeypatch, instructions)
    inputs: Any = SimpleNamespace(U=torch.zeros(4, 32, dtype=torch.bfloat16))
    with product_precision(inputs):
        assert (torch.backends.mkldnn.matmul.fp32_precision == "bf16") is (instructions != "none")


@pytest.mark.slow
def test_a_run_keeps_its_precision_when_it_is_resumed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """A run that began in fp32 and resumes where bf16 is faster has the bits of fp32."""
    config = small_run.write_dataset(tmp_path)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")

    def weights(run: str, *overrides: str, resume: bool = False) -> bytes:
        given = [f"run.dir={tmp_path / run}", "pretrain.epochs=0.5", *overrides]
        return (bigdssm.pretrain(config, given, resume=resume).best / "model.safetensors").read_bytes()

    whole = weights("fp32", "pretrain.steps=4", "pretrain.save_every_steps=2")
    steps = ("pretrain.steps=4", "pretrain.save_every_steps=2", "engine.precision=auto")
    with monkeypatch.context() as patch:
        on(patch, "none")
        assert weights("begun", *steps) == whole
    on(monkeypatch, "amx")
    (last,) = (tmp_path / "begun/pretrain/checkpoints").glob("step-00000004")
    last.rename(last.with_name("damaged-step-00000004"))
    assert weights("begun", *steps, resume=True) == whole
    assert weights("narrow", *steps) != whole
