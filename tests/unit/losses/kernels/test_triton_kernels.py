"""Compilation of the losses' kernels for an H100, without one: tensor cores, shared memory, no register spills."""

from __future__ import annotations

import contextlib
import io
import re
import tempfile
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bigdssm.losses import fps_loss
from bigdssm.losses.kernels import triton_passes
from bigdssm.losses.kernels.torch_passes import Coefficients, GradientSums
from bigdssm.losses.kernels.triton_passes import FusedMatrix
from bigdssm.training.estimate import LiveBytes

triton = pytest.importorskip("triton")
SHARED_BYTES = 227 << 10  # of an H100's multiprocessor


class Launches:
    """A substitute for a kernel that records its launches."""

    def __init__(self, kernel: Any, kept: list[tuple[Any, dict[str, Any]]]) -> None:
        self.kernel, self.kept = kernel, kept

    def __getitem__(self, grid: tuple[int, ...]) -> Launches:
        return self

    def __call__(self, *arguments: Any, **options: Any) -> None:
        names = self.kernel.arg_names
        self.kept.append((self.kernel, dict(zip(names, arguments, strict=False)) | options))


def launches(direction: str, D: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return (kernel, arguments) of all launches of a loss, with beta, neg_bias and a mask; nothing runs."""
    from bigdssm.losses.kernels import triton_kernels

    kept: list[tuple[Any, dict[str, Any]]] = []
    monkeypatch.setattr(triton_passes, "available", lambda x: True)
    monkeypatch.setattr(triton_passes, "_multiprocessors", lambda device: 132)
    for name in ("sums_kernel", "gradient_kernel"):
        monkeypatch.setattr(triton_kernels, name, Launches(getattr(triton_kernels, name), kept))
    U, W = (torch.ones(8, D, dtype=dtype, requires_grad=True) for _ in "UW")
    beta, neg_bias = torch.zeros(8, requires_grad=True), torch.zeros(8)
    fps_loss(U, W, alpha=20.0, beta=beta, neg_bias=neg_bias, direction=direction)  # type: ignore[arg-type]
    return kept


def compiled(kernel: Any, arguments: dict[str, Any]) -> tuple[Any, list[int]]:
    """Compile a launch for an H100; return the binary and its register spills (stores and loads)."""
    types = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64"}
    signature, constants, aligned = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        value = arguments[name]
        if kernel.params[place].is_constexpr:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], aligned[(place,)] = types[value.dtype], [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
    source = triton.compiler.ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    options = {name: arguments[name] for name in ("num_warps", "num_stages", "enable_fp_fusion")}
    told = io.StringIO()
    with (
        triton.knobs.nvidia.scope(),
        triton.knobs.cache.scope(),
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(told),
    ):
        triton.knobs.nvidia.dump_ptxas_log, triton.knobs.cache.dir = True, folder  # cached kernels have no log
        binary = triton.compile(source, target=target, options=options)
    spilled = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", told.getvalue())
    assert spilled, told.getvalue()
    return binary, [int(number) for pair in spilled for number in pair]


@pytest.mark.slow
@pytest.mark.parametrize(("D", "direction"), [(256, "q2d"), (256, "both"), (64, "both")], ids=lambda value: str(value))
def test_compiles_for_an_h100(D: int, direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = launches(direction, D, torch.bfloat16, monkeypatch)
    assert len(kept) == {"q2d": 2, "both": 3}[direction]
    for kernel, arguments in kept:
        binary, spilled = compiled(kernel, arguments)
        assert "wgmma.mma_async" in binary.asm["ptx"]
        loads = re.findall(r"cp\.async\.c[ag]\.shared\.global [^,]*,[^,]*, 0x(10|8|4)", binary.asm["ptx"])
        assert "10" in loads, "tiles are not loaded ahead, 16 bytes at once"
        assert binary.metadata.shared <= min(SHARED_BYTES, triton_passes.SHARED_BYTES)
        assert spilled == [0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("D", [64, 256])
def test_compiles_without_tensor_cores(D: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 products do not round their operands."""
    for kernel, arguments in launches("both", D, torch.float32, monkeypatch):
        binary, spilled = compiled(kernel, arguments)
        assert "mma" not in binary.asm["ptx"]
        assert binary.metadata.shared <= triton_passes.SHARED_BYTES
        assert spilled == [0, 0]


def test_both_directions_take_memory_of_the_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    """A million queries and documents: the passes take little more than their two gradients, of 8 · n · D bytes."""
    launched: list[str] = []
    monkeypatch.setattr(triton_passes, "launch", lambda kernel, *arguments, **options: launched.append(kernel))
    monkeypatch.setattr(triton_passes, "_multiprocessors", lambda device: 132)
    n, D = 1 << 20, 128
    with FakeTensorMode():
        U, W = (torch.empty(n, D, dtype=torch.bfloat16) for _ in "UW")
        slots, bits = torch.empty(n // 128, n // 128, dtype=torch.int32), torch.empty(1, 2, 128, dtype=torch.int64)
        matrix = FusedMatrix(U, W, torch.arange(n), 20.0, slots, bits)
        with LiveBytes() as live:
            rows, column_N = triton_passes.column_pass(matrix, None, None, None)
            ones = torch.ones_like(column_N)
            coefficients = Coefficients(ones, rows.log_sum, None, ones, column_N)
            sums = GradientSums(torch.zeros(n, D), torch.zeros(n, D), None)
            triton_passes.gradient_pass(matrix, None, True, coefficients, sums)
    assert launched == ["sums_kernel"] * (n // 128 // 64) + ["gradient_kernel"] * 2
    assert live.peak < 9 * n * D
