"""Compare packed and padded histories: forward and backward of a query tower, in the chunks of training.

    python tools/bench/bench_histories.py --items 200 --median 60 --chunk-tokens 4096
    python tools/bench/bench_histories.py --items 50 --median 8 --chunk-tokens 1024 --device cuda

Lengths are log-normal around --median, at most --items; every position of a history is a query. Both variants
alternate; times are medians: CPU seconds of one thread, or the time until the device has finished.
"""

from __future__ import annotations

import argparse
import statistics
import time
from contextlib import nullcontext

import numpy as np
import torch

from bigdssm.cli import at_least
from bigdssm.config import HISTORY_BLOCKS, ModelConfig, TowerConfig
from bigdssm.dataset.schema import Schema
from bigdssm.features import Categorical, History, Timestamp, Vocabulary
from bigdssm.features.event_time import MICROSECONDS
from bigdssm.loader.batch import Features, Lengths, lengths_of
from bigdssm.loader.step_plan import Chunked, SidePlan, plan_side
from bigdssm.models import DualEncoder, QueryPositions, flash_runs_on, new_model, use_packing

NUM_ITEMS = 3000


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "(default: %(default)s)"
    parser.add_argument(
        "--block", choices=("gated", "sasrec", "lowpass"), default="gated", help=f"block type {default}"
    )
    parser.add_argument(
        "--positions",
        choices=("relative", "rotary"),
        default="relative",
        help=f"position encoding {default}",
    )
    parser.add_argument("--times", choices=("none", "rotary"), default="none", help=f"time encoding {default}")
    parser.add_argument("--rows", type=at_least(1), default=64, help=f"number of histories {default}")
    parser.add_argument("--items", type=at_least(1), default=200, help=f"maximum history length {default}")
    parser.add_argument("--median", type=at_least(1), default=60, help=f"median history length {default}")
    parser.add_argument("--chunk-tokens", type=at_least(0), default=4096, help=f"engine.chunk_tokens {default}")
    parser.add_argument("--width", type=at_least(1), default=64, help=f"model width {default}")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help=f"precision {default}")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cpu", help=f"device {default}")
    parser.add_argument("--turns", type=at_least(1), default=5, help=f"repetitions per variant {default}")
    torch.set_num_threads(1)
    print(compare(parser.parse_args()))


def compare(args: argparse.Namespace) -> str:
    """Return a line with both times, their ratio, and the padding fraction of the padded variant."""
    device = torch.device(args.device)
    generator = np.random.default_rng(0)
    length_R = np.clip(generator.lognormal(np.log(args.median), 1.0, args.rows).astype(int), 1, args.items)
    items_RT = np.where(np.arange(args.items) < length_R[:, None], generator.integers(1, NUM_ITEMS, (args.rows, 1)), 0)
    history = torch.from_numpy(items_RT)
    gaps = generator.lognormal(7.0, 3.0, items_RT.shape) * MICROSECONDS  # seconds to weeks
    features = {"history": history, "history.when": torch.from_numpy(gaps.cumsum(axis=1).astype(np.int64))}
    lengths = lengths_of(features, {"history": 0})
    features = {name: tensor.to(device) for name, tensor in features.items()}
    row = torch.from_numpy(np.repeat(np.arange(args.rows), length_R))
    seen = torch.from_numpy(np.concatenate([np.arange(1, length + 1) for length in length_R]))
    query_positions, model = QueryPositions(row.to(device), seen.to(device)), tower(args).to(device)
    plans = {name: planned(args, lengths, length_R, packed) for name, packed in (("packed", True), ("padded", False))}
    seconds: dict[str, list[float]] = {name: [] for name in plans}
    for turn in range(args.turns + 1):
        for name, plan in plans.items():
            elapsed = timed(model, features, plan, query_positions, args)
            if turn:  # the first warms up
                seconds[name].append(elapsed)
    packed, padded = (statistics.median(times) for times in seconds.values())
    padding = 1 - plans["padded"].filled / plans["padded"].cells
    return (
        f"{args.block}, {args.positions}, times {args.times}, {args.precision}, {args.rows} x {args.items} items, "
        f"width {args.width}: "
        f"packed {1e3 * packed:.1f} ms, padded {1e3 * padded:.1f} ms, "
        f"{statistics.median(a / b for a, b in zip(*seconds.values(), strict=True)):.2f} of it; {padding:.0%} padding"
    )


def tower(args: argparse.Namespace) -> DualEncoder:
    """Return a model with a history as the query."""
    block = {"block": args.block, "positions": args.positions, "times": args.times}
    block |= {"layers": 2, "heads": 2, "item_scale": True, "feedforward": 4}
    history = HISTORY_BLOCKS.read("", block)
    config = ModelConfig(
        dim=args.width, score="dot", query=TowerConfig(residual="history", mlp=(), history=history),
        doc=TowerConfig(residual="item", mlp=(), embedding_dim=args.width),
    )  # fmt: skip
    items = Categorical(vocabulary=Vocabulary.of(map(str, range(NUM_ITEMS)))).with_name("item")
    feature = History(of="item", max_items=args.items).with_name("history")
    schema = Schema({"history": feature}, {"item": items}, event={"when": Timestamp().with_name("when")})
    model = new_model(config, schema).train()
    if args.precision == "bf16" and flash_runs_on(torch.device(args.device)):
        use_packing(model)
    return model


def planned(args: argparse.Namespace, lengths: Lengths, length_R: np.ndarray, packed: bool) -> SidePlan:
    """Plan the chunks of all rows."""
    return plan_side(lengths, args.rows, args.chunk_tokens, length_R, frozenset({"history"} if packed else ()))


def timed(
    model: DualEncoder, features: Features, plan: SidePlan, query_positions: QueryPositions, args: argparse.Namespace
) -> float:
    """Return the seconds of packing, forward and backward of all chunks."""
    on_cpu = args.device == "cpu"
    clock = time.process_time if on_cpu else time.perf_counter
    autocast = torch.autocast(args.device, torch.bfloat16) if args.precision == "bf16" else nullcontext()
    begun = clock()
    chunked = Chunked(features, plan, query_positions)
    for chunk in plan.chunks:
        with autocast:
            U = model(query=chunked.features(chunk), query_positions=chunked.query_positions(chunk)).U
        U.float().sum().backward()
    if not on_cpu:
        torch.cuda.synchronize()
    return clock() - begun


if __name__ == "__main__":
    main()
