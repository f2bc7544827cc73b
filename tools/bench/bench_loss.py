"""Measure time and memory of the FPS loss on the ranks of this machine, compared with open_clip if installed.

    python tools/bench/bench_loss.py speed        # both directions, q2d, open_clip, and the share of the product peak
    python tools/bench/bench_loss.py memory       # peak over base for growing batches, compared with open_clip
    python tools/bench/bench_loss.py large        # one step with 262,144 rows
    python tools/bench/bench_loss.py precision    # bfloat16 against float64 on the same rounded inputs
    python tools/bench/bench_loss.py mask         # q2d with and without 200 masked documents per query

Every rank uses one thread; the variants alternate, and ratios are medians over the turns. `speed` gives wall time and
the CPU time of all ranks: on a busy machine only the second is meaningful.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from bigdssm.cli import at_least
from bigdssm.losses import fps_loss

Step = Callable[[Tensor, Tensor, Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "(default: %(default)s)"
    parser.add_argument("task", choices=sorted(TASKS), help="measurement")
    parser.add_argument("--ranks", type=at_least(1), default=2, help=f"number of ranks {default}")
    parser.add_argument("--rows", type=at_least(1), help="rows per rank (default: by task, 2048 to 131072)")
    parser.add_argument("--dim", type=at_least(1), help="width of the vectors (default: 256; `large`: 128, `mask`: 64)")
    parser.add_argument("--alpha", type=float, default=20.0, help=f"scale of the scores {default}")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help=f"vector type {default}")
    parser.add_argument(
        "--direction", choices=["q2d", "d2q", "both"], default="both", help=f"for `memory` and `large` {default}"
    )
    parser.add_argument("--turns", type=at_least(1), default=5, help=f"repetitions {default}")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (args, f"file://{folder}/rendezvous"), nprocs=args.ranks)


def _rank(rank: int, args: argparse.Namespace, rendezvous: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=args.ranks)
    lines = TASKS[args.task](args)
    if rank == 0:
        print("\n".join(lines), flush=True)
    dist.destroy_process_group()


def speed(args: argparse.Namespace) -> list[str]:
    """Return the times of one forward and backward, and their ratios to open_clip's."""
    m, D = args.rows or 8192, args.dim or 256
    U, W, alpha = _inputs(m, D, args)
    variants: dict[str, Step] = {"both": _ours("both"), "q2d": _ours("q2d")}
    if (open_clip := _open_clip()) is not None:
        variants["open_clip"] = open_clip
    runs: dict[str, Callable[[], object]] = {name: partial(_step, step, U, W, alpha) for name, step in variants.items()}
    runs["product"] = lambda: _one_product(m, args.ranks * m, D, U.dtype)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for turn in range(args.turns + 1):
        for name, run in runs.items():
            elapsed = _timed(run)
            if turn:  # the first warms up
                times[name].append(elapsed)
    lines = [
        f"{args.ranks} ranks x {m} x {D}, {args.dtype}, alpha {args.alpha:g}, {args.turns} turns: medians, wall | CPU"
    ]
    for name, values in times.items():
        texts = [f"{seconds:7.2f} s" for seconds in _medians(values)]
        if name == "product":
            rate = [2 * m * args.ranks * m * D / seconds / 1e9 for seconds in _medians(values)]
            texts = [f"{text}, {gflops:.0f} GFLOP/s" for text, gflops in zip(texts, rate, strict=True)]
        if "open_clip" in times and name in _PRODUCTS:
            texts = [
                f"{text}, {r:.2f} of open_clip"
                for text, r in zip(texts, _ratios(values, times["open_clip"]), strict=True)
            ]
        if name in _PRODUCTS:
            shares = [_PRODUCTS[name] * r for r in _ratios(times["product"], values)]
            texts = [f"{text}, {share:.0%} product peak" for text, share in zip(texts, shares, strict=True)]
        lines.append(f"{name:10s} {' | '.join(texts)}")
    return lines


# matrix products per step: the share of peak is their time at peak speed over the measured time
_PRODUCTS = {"both": 4, "q2d": 3, "open_clip": 6}


def memory(args: argparse.Namespace) -> list[str]:
    """Return the peak over base of one forward and backward for growing batches."""
    D = args.dim or 256
    _step(_ours(args.direction), *_inputs(64, D, args))  # include the libraries in the base
    lines = [f"{args.ranks} ranks, D = {D}, {args.dtype}, {args.direction}: peak over base in MB, maximum over ranks"]
    sizes = [args.rows] if args.rows else [2048, 8192, 32768]
    for m in sizes:
        U, W, alpha = _inputs(m, D, args)
        peak = _peak(_ours(args.direction), U, W, alpha)
        line = f"m = {m:6d}   {peak:7.0f}"
        open_clip = _open_clip()
        if open_clip is not None and m <= 8192:  # the next size needs 16 times as much
            other = _peak(open_clip, U, W, alpha)
            line += f"   open_clip {other:7.0f}   1/{other / peak:.1f}"
        lines.append(line)
    return lines


def large(args: argparse.Namespace) -> list[str]:
    """Return time and peak memory of one step with a batch too large for a dense score matrix."""
    m, D = args.rows or 131072, args.dim or 128
    U, W, alpha = _inputs(m, D, args)
    seconds: list[float] = []
    step = _ours(args.direction)
    peak = _peak(lambda *x: _keep_time(step, seconds, *x), U, W, alpha)
    N = args.ranks * m
    return [
        f"{args.ranks} ranks x {m} x {D} (batch {N}), {args.dtype}, {args.direction}: {seconds[0]:.0f} s, "
        f"peak over base {peak:.0f} MB per rank, largest resident size {_status_mb('VmHWM'):.0f} MB; "
        f"a dense score matrix would need {4 * m * N / 1e9:.0f} GB per rank"
    ]


def precision(args: argparse.Namespace) -> list[str]:
    """Return the errors of loss, dU and dW in bfloat16 against float64 on the same rounded inputs."""
    m, D = args.rows or 2048, args.dim or 256
    lines = []
    for alpha_value in (20.0, 100.0):
        for direction in ("q2d", "both"):
            args.dtype, args.alpha = "bfloat16", alpha_value
            U, W, alpha = _inputs(m, D, args)
            results = []
            for dtype in (torch.bfloat16, torch.float64):
                u, w = (t.detach().to(dtype).requires_grad_() for t in (U, W))
                loss = _ours(direction)(u, w, alpha)
                results.append([t.detach().double() for t in (loss, *torch.autograd.grad(loss, (u, w)))])
            errors = [float((a - b).norm() / b.norm()) for a, b in zip(*results, strict=True)]
            named = ", ".join(f"{name} {error:.1e}" for name, error in zip(("loss", "dU", "dW"), errors, strict=True))
            lines.append(f"alpha {alpha_value:g} {direction:5s} relative error: {named}")
    return lines


def mask(args: argparse.Namespace) -> list[str]:
    """Return the time of q2d with many known pairs per query relative to none, at catalogue-like sizes."""
    m, D, known_each = args.rows or 6400, args.dim or 64, 200
    n = max(1, m * 17 // 32)  # columns: 3,400
    U, W, alpha = _inputs(m, D, args)
    W = W.detach()[:n].clone().requires_grad_()
    generator = torch.Generator().manual_seed(dist.get_rank())
    doc_ids = torch.randint(-(2**62), 2**62, (n,), generator=generator)
    positive = torch.randint(n, (m,), generator=generator)
    rows = torch.arange(m).repeat_interleave(known_each)
    known = torch.stack([rows, doc_ids[torch.randint(n, rows.shape, generator=generator)]], 1)

    def step(pairs: Tensor | None) -> Step:
        return lambda U, W, alpha: fps_loss(U, W, positive, alpha=alpha, doc_ids=doc_ids, known=pairs).loss

    times: list[list[tuple[float, float]]] = [[], []]
    for turn in range(args.turns + 1):
        for durations, pairs in zip(times, (None, known), strict=True):
            seconds = _timed(partial(_step, step(pairs), U, W, alpha))
            if turn:  # the first warms up
                durations.append(seconds)
    without, with_known = (_medians(durations)[1] for durations in times)
    return [
        f"{args.ranks} ranks x {m} queries x {n} columns x {D}, {args.dtype}, CPU time per rank: {without:.3f} s; "
        f"with {known_each} masked documents per query {with_known:.3f} s, {_ratios(times[1], times[0])[1]:.2f} of it"
    ]


TASKS = {"speed": speed, "memory": memory, "large": large, "precision": precision, "mask": mask}


def _inputs(m: int, D: int, args: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(dist.get_rank())
    dtype = getattr(torch, args.dtype)
    W = torch.nn.functional.normalize(torch.randn(m, D, generator=generator), dim=1)
    U = torch.nn.functional.normalize(W + 0.1 * torch.randn(m, D, generator=generator), dim=1)
    return U.to(dtype).requires_grad_(), W.to(dtype).requires_grad_(), torch.tensor([args.alpha], requires_grad=True)


def _ours(direction: Any) -> Step:
    return lambda U, W, alpha: fps_loss(U, W, alpha=alpha, direction=direction).loss


def _open_clip() -> Step | None:
    try:
        from open_clip.loss import ClipLoss
    except ImportError:
        return None
    loss = ClipLoss(local_loss=True, gather_with_grad=True, rank=dist.get_rank(), world_size=dist.get_world_size())
    return lambda U, W, alpha: loss(U, W, alpha.to(U.dtype))


def _step(step: Step, U: Tensor, W: Tensor, alpha: Tensor) -> None:
    for tensor in (U, W, alpha):
        tensor.grad = None
    step(U, W, alpha).backward()


def _one_product(m: int, N: int, D: int, dtype: torch.dtype, edge: int = 1024) -> None:
    """Multiply all 1024-tiles of an (m x D) · (D x N) product in `dtype`: the peak speed for these sizes."""
    U, W, S = (torch.ones(edge, columns, dtype=dtype) for columns in (D, D, edge))
    for _ in range((m // edge) * (N // edge)):
        torch.mm(U, W.T, out=S)


def _timed(run: Callable[[], Any]) -> tuple[float, float]:
    """Return the wall time until all ranks are done, and the mean CPU time per rank."""
    dist.barrier()
    start, start_cpu = time.perf_counter(), time.process_time()
    run()
    cpu = torch.tensor(time.process_time() - start_cpu, dtype=torch.float64)
    dist.all_reduce(cpu)
    return time.perf_counter() - start, float(cpu) / dist.get_world_size()


def _medians(values: list[tuple[float, float]]) -> list[float]:
    return [statistics.median(column) for column in zip(*values, strict=True)]


def _ratios(values: list[tuple[float, float]], others: list[tuple[float, float]]) -> list[float]:
    """Return the medians over the turns of value / other, for wall and CPU time."""
    return _medians([(a / c, b / d) for (a, b), (c, d) in zip(values, others, strict=True)])


def _keep_time(step: Step, seconds: list[float], U: Tensor, W: Tensor, alpha: Tensor) -> Tensor:
    """Run the step including backward, and append its seconds."""
    start = time.perf_counter()
    loss = step(U, W, alpha)
    loss.backward()
    dist.barrier()
    seconds.append(time.perf_counter() - start)
    return loss.detach().requires_grad_()


def _peak(step: Step, U: Tensor, W: Tensor, alpha: Tensor) -> float:
    """Return the peak growth of resident memory during a step in MB, maximum over ranks."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # reset the high-water mark
    base = _status_mb("VmRSS")
    _step(step, U, W, alpha)
    growth = torch.tensor([_status_mb("VmHWM") - base])
    dist.all_reduce(growth, dist.ReduceOp.MAX)
    return float(growth)


def _status_mb(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1e3
    raise KeyError(field)


if __name__ == "__main__":
    main()
