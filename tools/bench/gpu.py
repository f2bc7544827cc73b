"""Run the gpu tests, then time the loss and whole steps on one card, or on several.

    PYTHONPATH=. python tools/bench/gpu.py --out gpu.json
    PYTHONPATH=. torchrun --nproc_per_node 8 tools/bench/gpu.py --out gpu.json

It needs torch, NumPy and, for the text towers, transformers, and nothing from a network; what is missing is named and
left out. Within --seconds it takes what fits, the smallest sizes first. The tables are those of docs/gpu.md:

tests   those marked `gpu`
loss    forward and backward for M rows of the global batch, by direction: time, share of the measured bf16 product
        peak, memory; beside them the whole matrix as open_clip has it, Liger and CCE where they are installed
step    forward, loss, backward and optimizer of a MiniLM, a BERT-base and a history tower, fp32, bf16, with and
        without torch.compile: milliseconds of each part, pairs a second, share of peak
histories   packed ones beside padded ones, by tools/bench/bench_histories.py

Times are medians. An operation is a multiplication or an addition of a matrix product: q2d takes 3 products of
rows x columns x width, both directions 4. --device cpu with small sizes tries the tool itself.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bigdssm.losses import fps_loss

ROOT = Path(__file__).parents[2]
ALPHA = 20.0
TESTS_SHARE = 0.4  # of the time that is left
PRODUCTS = {"q2d": 3, "both": 4}  # of rows x columns x width, forward and backward


@dataclass
class Bench:
    """Where it runs, how much time is left, and what has come out so far."""

    device: torch.device
    rank: int
    world_size: int
    deadline: float
    small: bool
    report: dict[str, Any] = field(default_factory=dict)

    def left(self) -> float:
        """Return the seconds that are left, those of rank 0 on every rank."""
        left = torch.tensor([self.deadline - time.monotonic()], device=self.device)
        if self.world_size > 1:
            dist.broadcast(left, 0)
        return float(left)

    def say(self, line: str) -> None:
        """Print a line, once for all ranks."""
        if self.rank == 0:
            print(line, flush=True)

    def add(self, table: str, row: dict[str, Any]) -> None:
        """Print a row of a table and keep it."""
        self.report.setdefault(table, []).append(row)
        self.say("  ".join(f"{name} {value}" for name, value in row.items()))

    def skip(self, what: str, why: str) -> None:
        """Say what is left out."""
        self.add("skipped", {"skipped": what, "because": why})

    @contextmanager
    def or_skip(self, what: str) -> Iterator[None]:
        """Say what fails, and go on with what comes next."""
        try:
            yield
        except Exception as error:
            self.skip(what, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")

    def synchronise(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="tests, loss, step, histories (default: all)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dim", type=int, default=256, help="width of the loss's vectors (%(default)s)")
    parser.add_argument("--rows", type=int, nargs="+", metavar="M", help="global batches (default: 8k, 16k … 1M)")
    parser.add_argument("--seconds", type=float, default=420, help="that all may take (%(default)s)")
    parser.add_argument("--out", type=Path, metavar="JSON")
    args = parser.parse_args()
    parts = args.parts or list(PARTS)
    if unknown := sorted(set(parts) - set(PARTS)):
        parser.error(f"unknown part {unknown[0]}, needs one of {', '.join(PARTS)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device is here; --device cpu with small --rows tries the tool")
    bench = start(args)
    bench.say(f"{bench.report['device']}, torch {torch.__version__}, {bench.world_size} rank(s)")
    for part in parts:
        PARTS[part](bench, args)
        if args.out is not None and bench.rank == 0:
            args.out.write_text(json.dumps(bench.report, indent=1))
    if bench.world_size > 1:
        dist.destroy_process_group()


def start(args: argparse.Namespace) -> Bench:
    """Return the bench of this rank, with a process group where there are several."""
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
    """Run the tests marked gpu, on one rank."""
    if bench.world_size > 1 or args.device == "cpu":
        bench.skip("tests", "they are run by one process with a CUDA device")
        return
    if importlib.util.find_spec("pytest") is None:
        bench.skip("tests", "pytest is not installed")
        return
    files = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", *files]
    most = max(1.0, TESTS_SHARE * bench.left())
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=most)
    except subprocess.TimeoutExpired:
        bench.skip("tests", f"they were not done in {most:.0f} s")
        return
    said = (done.stdout + done.stderr).strip().splitlines() or ["nothing"]
    bench.add("tests", {"exit code": done.returncode, "said": said[-1]})


def loss(bench: Bench, args: argparse.Namespace) -> None:
    """Time the loss by its size and direction, beside others."""
    peak = product_peak(bench)
    bench.report["peak"] = {"dtype": "bfloat16", "tflops": round(peak / 1e12, 3)}
    bench.say(f"bf16 product peak {peak / 1e12:.1f} TFLOP/s, measured")
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
            if 4 * expected > 0.5 * bench.left():
                bench.skip(f"loss {name}, {rows} x {columns}", "no time is left for it")
                continue
            U, W = (
                vectors(rows // bench.world_size, args.dim, bench),
                vectors(columns // bench.world_size, args.dim, bench),
            )
            with bench.or_skip(f"loss {name}, {rows} x {columns}"):
                seconds, memory = timed(bench, lambda step=step, U=U, W=W: step(U, W).backward(), expected)
                slow[name] = seconds / (rows * columns)
                flops = 2 * products * rows * columns * args.dim / bench.world_size
                bench.add(
                    "loss",
                    {
                        "loss": name, "rows": rows, "columns": columns, "ms": round(1e3 * seconds, 3),
                        "of peak": f"{flops / seconds / peak:.1%}", "MB": round(memory / 1e6),
                    },
                )  # fmt: skip


def ours(U: Tensor, W: Tensor, direction: str) -> Tensor:
    """Return the FPS loss of this rank's vectors."""
    positive = torch.arange(len(U), device=U.device)
    return fps_loss(U, W, positive, alpha=ALPHA, direction=direction).loss  # type: ignore[arg-type]


def others(bench: Bench) -> dict[str, tuple[int, Callable[..., Tensor]]]:
    """Return other losses of the same value by name, with the products that they take, all over M x M."""

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
    cards = 1 if bench.small else 8
    for name, make in TOWERS.items():
        try:
            tower, batch, flops = make(bench)
        except ImportError as error:
            bench.skip(f"step {name}", f"{error.name} is not installed")
            continue
        for precision in ("fp32", "bf16"):
            for compiled in (False, True) if bench.device.type == "cuda" else (False,):
                if bench.left() < 10 * cards:
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


@dataclass
class TwoInputs:
    """Features of queries and documents, as arguments of the tower."""

    rows: int
    query: tuple[Tensor, ...]
    doc: tuple[Tensor, ...]


def step_parts(bench: Bench, tower: nn.Module, batch: TwoInputs, precision: str, compiled: bool) -> dict[str, float]:
    """Return the median seconds of a step's parts; both sides go through one tower."""
    run = torch.compile(tower) if compiled else tower
    optimizer = torch.optim.AdamW(tower.parameters(), lr=1e-5, fused=bench.device.type == "cuda")
    autocast = torch.autocast(bench.device.type, torch.bfloat16) if precision == "bf16" else nullcontext()
    taken: dict[str, list[float]] = {}

    @contextmanager
    def part(name: str) -> Iterator[None]:
        bench.synchronise()
        begun = time.perf_counter()
        yield
        bench.synchronise()
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


def text_tower(bench: Bench, layers: int, width: int, rows: int, tokens: int) -> tuple[nn.Module, TwoInputs, float]:
    """Return a BERT with new weights, texts of one length, and the operations of a forward of one pair's sides."""
    from transformers import BertConfig, BertModel

    if bench.small:
        layers, width, rows, tokens = 1, 64, 8, 8
    config = BertConfig(
        vocab_size=30_522, hidden_size=width, num_hidden_layers=layers, num_attention_heads=min(12, width // 32),
        intermediate_size=4 * width, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    bert = BertModel(config, add_pooling_layer=False).to(bench.device)

    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = bert

        def forward(self, ids: Tensor) -> Tensor:
            return self.bert(input_ids=ids).last_hidden_state.mean(dim=1)  # type: ignore[no-any-return]

    query, doc = (torch.randint(5, 30_000, (rows, tokens), device=bench.device) for _ in range(2))
    a_token = layers * (24 * width**2 + 4 * tokens * width)
    return Mean(), TwoInputs(rows, (query,), (doc,)), float(a_token * tokens * rows)


def history_tower(bench: Bench) -> tuple[nn.Module, TwoInputs, float]:
    """Return gated blocks over 200 items, a vector a place of them, and the operations of a forward of a side."""
    from bigdssm.config import HistoryEncoderConfig
    from bigdssm.models.blocks import BLOCKS, Sight

    width, items, rows = (32, 16, 4) if bench.small else (128, 200, 256)
    config = HistoryEncoderConfig(block="gated", positions="rotary", layers=2, heads=4)
    place = torch.arange(items, device=bench.device)
    sight = Sight(place, place, (place[:, None] >= place)[None, None], True, True)

    class Histories(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(50_000, width)
            self.layers = nn.ModuleList(BLOCKS["gated"](config, width) for _ in range(config.layers))

        def forward(self, codes: Tensor, is_history: Tensor) -> Tensor:
            hidden = self.table(codes)
            if is_history.shape[0]:
                for layer in self.layers:
                    hidden = layer(hidden, hidden, sight)
            return hidden.flatten(0, 1)  # type: ignore[no-any-return]

    history, target = (torch.randint(1, 50_000, (rows, items), device=bench.device) for _ in range(2))
    yes, no = torch.ones(1, device=bench.device), torch.ones(0, device=bench.device)
    tower = Histories().to(bench.device)
    linear = 2 * sum(p.numel() for layer in tower.layers for p in layer.parameters() if p.dim() == 2)
    flops = rows * items * (linear + config.layers * 4 * items * width) / 2  # documents are looked up
    return tower, TwoInputs(rows * items, (history, yes), (target, no)), float(flops)


def product_peak(bench: Bench) -> float:
    """Return the operations a second of a large product in bfloat16."""
    size = 256 if bench.small else 8192
    A, B = (torch.randn(size, size, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / timed(bench, lambda: A @ B, 0.0)[0]


def vectors(rows: int, dim: int, bench: Bench) -> Tensor:
    """Return vectors of length 1, to be differentiated."""
    made = nn.functional.normalize(torch.randn(rows, dim, device=bench.device), dim=1)
    return made.to(torch.bfloat16).requires_grad_()


def timed(bench: Bench, run: Callable[[], Any], expected: float) -> tuple[float, int]:
    """Return the median seconds of a run, and the most memory that it took beside what was there."""
    memory = 0
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        memory = torch.cuda.memory_allocated()
    run()  # compiles and warms up
    bench.synchronise()
    if bench.device.type == "cuda":
        memory = torch.cuda.max_memory_allocated() - memory
    seconds = []
    for _ in range(3 if expected > 1 or bench.small else 9):
        begun = time.perf_counter()
        run()
        bench.synchronise()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds), memory


def histories(bench: Bench, args: argparse.Namespace) -> None:
    """Time query towers over packed histories beside padded ones, on one rank."""
    if bench.world_size > 1:
        return
    for block, positions in (("gated", "relative"), ("hstu", "relative"), ("gated", "rotary")):
        command = [sys.executable, str(ROOT / "tools/bench/bench_histories.py"), "--block", block]
        command += ["--positions", positions, "--precision", "bf16", "--device", args.device]
        command += ["--rows", "16" if bench.small else "1024"]
        what = f"histories {block}, {positions}"
        with bench.or_skip(what):
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=max(1, bench.left()))
            if done.returncode:
                bench.skip(what, (done.stderr.strip().splitlines() or ["no word why"])[-1])
            else:
                bench.add("histories", {"histories": done.stdout.strip()})


TOWERS: dict[str, Callable[[Bench], tuple[nn.Module, TwoInputs, float]]] = {
    "MiniLM": lambda bench: text_tower(bench, 6, 384, 1024, 64),
    "BERT-base": lambda bench: text_tower(bench, 12, 768, 256, 64),
    "history": history_tower,
}

PARTS: dict[str, Callable[[Bench, argparse.Namespace], None]] = {
    "tests": tests, "loss": loss, "step": step, "histories": histories,
}  # fmt: skip

if __name__ == "__main__":
    main()
