"""Run the GPU tests and benchmark the loss and complete steps on one or several GPUs.

    PYTHONPATH=. python tools/bench/gpu.py --out gpu.json
    PYTHONPATH=. torchrun --nproc_per_node 8 tools/bench/gpu.py --out gpu.json

Needs torch, Triton, NumPy, transformers and pytest, and no network; parts with further requirements are skipped and
reported if those are missing. Runs as much as fits into --seconds, small sizes first. The tables are those of
docs/gpu.md:

versions    of the packages, and limits of the device
tests   tests with the mark `gpu`
families    small text encoders of nine families, bf16 against fp32
loss    forward and backward for M rows of the global batch, by width and direction: time, share of the measured bf16
        matmul peak, memory; for comparison the dense formula of open_clip; Liger and CCE if installed
step    forward, loss, backward and optimizer of a MiniLM, a BERT-base and a history tower, fp32, bf16, with and
        without torch.compile: milliseconds per part, pairs/s, share of peak
chunks  forward and backward of a BERT-base by tokens per chunk, eager and compiled
tables  a step of a sharded table of width 256: fetch, reduce, commit
repeats whether two equal steps have gradients of the same bits
encode  texts per second without gradients
histories   packed and padded, with tools/bench/bench_histories.py

Times are medians. FLOPs are multiplications and additions of matrix products: q2d needs 3 products of
rows x columns x width, both directions 4. Use --device cpu with small sizes to test the tool.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from gpu_bench import ALPHA, ROOT, Bench, ours, run_within, timed, vectors
from gpu_parts import chunks, encode, families, repeats, tables, versions
from gpu_towers import TOWERS, TwoInputs
from torch import Tensor, nn

TESTS_SHARE = 0.4  # of the remaining time
PRODUCTS = {"q2d": 3, "both": 4}  # of rows x columns x width, forward and backward


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="parts to run (default: all)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="device (default: %(default)s)")
    parser.add_argument("--dim", type=int, nargs="+", default=[256, 128, 384, 768], help="widths of the loss's vectors")
    parser.add_argument("--rows", type=int, nargs="+", metavar="M", help="global batch sizes (default: 8k, 16k … 1M)")
    parser.add_argument("--seconds", type=float, default=1500, help="time budget (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="JSON", help="file for the results (default: printed only)")
    args = parser.parse_args()
    parts = args.parts or list(PARTS)
    if unknown := sorted(set(parts) - set(PARTS)):
        parser.error(f"unknown part {unknown[0]}, needs one of {', '.join(PARTS)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device; use --device cpu with small --rows to test the tool")
    bench = start(args)
    bench.log(f"{bench.report['device']}, torch {torch.__version__}, {bench.world_size} rank(s)")
    for part in parts:
        PARTS[part](bench, args)
        if args.out is not None and bench.rank == 0:
            args.out.write_text(json.dumps(bench.report, indent=1))
    if bench.world_size > 1:
        dist.destroy_process_group()


def start(args: argparse.Namespace) -> Bench:
    """Return the bench of this rank; creates a process group for several ranks."""
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device("cpu")
    if args.device == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if world_size > 1:
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    started = time.monotonic()
    bench = Bench(device, rank, world_size, started + args.seconds, args.device == "cpu")
    bench.report["device"], bench.report["torch"], bench.report["ranks"] = name, torch.__version__, world_size
    return bench


def tests(bench: Bench, args: argparse.Namespace) -> None:
    """Run the tests with the mark gpu, on one rank."""
    if bench.world_size > 1 or args.device == "cpu":
        bench.skip("tests", "needs a single process with a CUDA device")
        return
    if importlib.util.find_spec("pytest") is None:
        bench.skip("tests", "pytest is not installed")
        return
    files = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    # conftest.py serves other tests and needs further libraries
    command = [sys.executable, "-m", "pytest", "--noconftest", "-v", "-rs", "-m", "gpu", *files]
    most = max(1.0, TESTS_SHARE * bench.left())
    code, printed = run_within(command, most)
    bench.report["pytest"] = printed
    for line in printed:
        if line.startswith("SKIPPED"):
            bench.skip("tests", line.removeprefix("SKIPPED "))
    if code is None:
        done = sum(" PASSED " in line or " FAILED " in line for line in printed)
        bench.skip("tests", f"after {most:.0f} s {done} were done; the last line: {printed[-1] if printed else 'none'}")
    else:
        bench.add("tests", {"exit code": code, "said": printed[-1] if printed else "nothing"})


def loss(bench: Bench, args: argparse.Namespace) -> None:
    """Time this loss and other implementations, by width, size and direction."""
    peak = product_peak(bench)
    bench.report["peak"] = {"dtype": "bfloat16", "tflops": round(peak / 1e12, 3)}
    bench.log(f"bf16 product peak {peak / 1e12:.1f} TFLOP/s, measured")
    for dim in args.dim:
        loss_of_width(bench, args, dim, peak)


def loss_of_width(bench: Bench, args: argparse.Namespace, dim: int, peak: float) -> None:
    """Time the losses on vectors of a width."""
    sizes = [(m, m) for m in args.rows or [8192 << k for k in range(8)]]
    if not args.rows and bench.world_size == 1:
        sizes.insert(1, (8192, 65_536))  # a rank's share of a batch on eight cards
    peers = {name: peer for name, peer in others(bench).items() if bench.world_size == 1}
    slow: dict[str, float] = {}
    for rows, columns in sizes:
        variants: dict[str, tuple[int, Callable[..., Tensor]]] = {
            direction: (products, lambda U, W, direction=direction: ours(U, W, direction))
            for direction, products in PRODUCTS.items()
        }
        if rows == columns:
            variants |= peers
        for name, (products, step) in variants.items():
            expected = slow.get(name, 0.0) * (rows * columns)
            if 4 * expected > 0.2 * bench.left():
                bench.skip(f"loss {name}, {rows} x {columns} x {dim}", "no time is left for it")
                continue
            U, W = (
                vectors(rows // bench.world_size, dim, bench),
                vectors(columns // bench.world_size, dim, bench),
            )
            with bench.or_skip(f"loss {name}, {rows} x {columns} x {dim}"):
                seconds, memory = timed(bench, lambda step=step, U=U, W=W: step(U, W).backward(), expected)
                slow[name] = seconds / (rows * columns)
                flops = 2 * products * rows * columns * dim / bench.world_size
                bench.add(
                    "loss",
                    {
                        "loss": name, "D": dim, "rows": rows, "columns": columns, "ms": round(1e3 * seconds, 3),
                        "of peak": f"{flops / seconds / peak:.1%}", "MB": round(memory / 1e6),
                    },
                )  # fmt: skip


def others(bench: Bench) -> dict[str, tuple[int, Callable[..., Tensor]]]:
    """Return other implementations by name, with their number of M x M products."""

    def whole(U: Tensor, W: Tensor) -> Tensor:
        logits, target = ALPHA * U @ W.T, torch.arange(len(U), device=U.device)
        cross_entropy = nn.functional.cross_entropy
        return (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2

    found: dict[str, tuple[int, Callable[..., Tensor]]] = {"open_clip's formula": (6, whole)}
    if importlib.util.find_spec("liger_kernel"):
        liger = importlib.import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss()
        found["Liger, q2d"] = (3, lambda U, W: liger(W, ALPHA * U, torch.arange(len(U), device=U.device)))
    else:
        bench.skip("loss Liger", "liger_kernel is not installed")
    if importlib.util.find_spec("cut_cross_entropy"):
        cce = importlib.import_module("cut_cross_entropy").linear_cross_entropy
        found["CCE, q2d"] = (4, lambda U, W: cce(ALPHA * U, W, torch.arange(len(U), device=U.device)))
    else:
        bench.skip("loss CCE", "cut_cross_entropy is not installed")
    return found


def step(bench: Bench, args: argparse.Namespace) -> None:
    """Time the parts of a step by tower, precision and compile."""
    peak = bench.report.get("peak", {}).get("tflops", 0) * 1e12 or product_peak(bench)
    least_s = 10 if bench.small else 80  # including compilation
    for name, make in TOWERS.items():
        try:
            tower, batch, flops = make(bench)
        except ImportError as error:
            bench.skip(f"step {name}", f"{error.name} is not installed")
            continue
        for precision in ("fp32", "bf16"):
            for compiled in (False, True) if bench.device.type == "cuda" else (False,):
                if bench.left() < least_s:
                    bench.skip(f"step {name}, {precision}, compile {compiled}", "no time is left for it")
                    continue
                with bench.or_skip(f"step {name}, {precision}, compile {compiled}"):
                    parts = step_parts(bench, tower, batch, precision, compiled)
                    total = sum(parts.values())
                    row = {"step": name, "precision": precision, "compile": compiled}
                    row |= {part: f"{1e3 * seconds:.1f} ms" for part, seconds in parts.items()}
                    pairs = batch.rows * bench.world_size / total
                    row |= {"pairs/s": round(pairs), "of peak": f"{6 * flops / total / peak:.1%}"}
                    bench.add("step", row)


def step_parts(bench: Bench, tower: nn.Module, batch: TwoInputs, precision: str, compiled: bool) -> dict[str, float]:
    """Return the median seconds per part of a step; both sides use the same tower."""
    run = torch.compile(tower) if compiled else tower
    optimizer = torch.optim.AdamW(tower.parameters(), lr=1e-5, fused=bench.device.type == "cuda")
    autocast = torch.autocast(bench.device.type, torch.bfloat16) if precision == "bf16" else nullcontext()
    taken: dict[str, list[float]] = {}

    @contextmanager
    def part(name: str) -> Iterator[None]:
        bench.synchronize()
        begun = time.perf_counter()
        yield
        bench.synchronize()
        taken.setdefault(name, []).append(time.perf_counter() - begun)

    turns = 2 if bench.small else 8
    for _ in range(turns):
        with part("forward"), autocast:
            U, W = (nn.functional.normalize(run(*side).float(), dim=1) for side in (batch.query, batch.doc))
        with part("loss"):
            leaves = [vectors.detach().to(torch.bfloat16).requires_grad_() for vectors in (U, W)]
            ours(leaves[0], leaves[1], "q2d").backward()
        with part("backward"):
            torch.autograd.backward([U, W], [leaf.grad.float() for leaf in leaves])  # type: ignore[union-attr]
            if bench.world_size > 1:
                for parameter in tower.parameters():
                    if parameter.grad is not None:
                        dist.all_reduce(parameter.grad)
        with part("optimizer"):
            optimizer.step()
            optimizer.zero_grad()
    return {name: statistics.median(values[turns // 4 :]) for name, values in taken.items()}


def product_peak(bench: Bench) -> float:
    """Measure the FLOP/s of a large matrix product in bfloat16."""
    size = 256 if bench.small else 8192
    A, B = (torch.randn(size, size, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / timed(bench, lambda: A @ B, 0.0)[0]


def histories(bench: Bench, args: argparse.Namespace) -> None:
    """Time query towers over packed and padded histories, on one rank."""
    if bench.world_size > 1:
        return
    for block, positions in (("gated", "relative"), ("lowpass", "relative"), ("gated", "rotary")):
        command = [sys.executable, str(ROOT / "tools/bench/bench_histories.py"), "--block", block]
        command += ["--positions", positions, "--precision", "bf16", "--device", args.device]
        command += ["--rows", "16" if bench.small else "1024"]
        what = f"histories {block}, {positions}"
        code, printed = run_within(command, max(1.0, bench.left()))
        if code == 0:
            bench.add("histories", {"histories": "\n".join(printed)})
        else:
            why = printed[-1] if printed else "no output"
            bench.skip(what, "no time is left for it" if code is None else why)


PARTS: dict[str, Callable[[Bench, argparse.Namespace], None]] = {
    "versions": versions, "tests": tests, "families": families, "loss": loss, "chunks": chunks, "tables": tables,
    "repeats": repeats, "encode": encode, "step": step, "histories": histories,
}  # fmt: skip

if __name__ == "__main__":
    main()
