"""Measure how many requests the server's cache answers, where queries come again by Zipf's law.

    python tools/bench/bench_cache.py [--distinct 1000000] [--requests 1000000] [--sizes 1000 10000 100000] [--out JSON]

The r-th most frequent of `--distinct` queries comes in proportion to r^−s. The first half of the requests fills the
cache, the second half is counted.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from bigdssm.cli import at_least, run_main
from bigdssm.serving.batching import AnswerCache
from bigdssm.utils.atomic import write_json

EXPONENTS = (0.8, 1.0, 1.2)  # of queries to search engines, about 0.8 to 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--distinct", type=at_least(1), default=1_000_000, help="queries that differ (%(default)s)")
    parser.add_argument("--requests", type=at_least(2), default=1_000_000, help="(%(default)s)")
    parser.add_argument("--sizes", nargs="+", type=at_least(1), default=[1_000, 10_000, 100_000], help="of the cache")
    parser.add_argument("--seed", type=int, default=0, help="of the requests (%(default)s)")
    parser.add_argument("--out", type=Path, metavar="JSON", help="where to save the figures")
    args = parser.parse_args()
    measured = []
    for exponent in EXPONENTS:
        asked = zipf(args.distinct, args.requests, exponent, np.random.default_rng(args.seed))
        shares = {f"{size:,} answers": hit_rate(asked, size) for size in args.sizes}
        measured.append({"Zipf's exponent": exponent, **shares})
    table = Table(*measured[0])
    for record in measured:
        table.add_row(*(f"{value:.3g}" for value in record.values()))
    Console().print(table)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        about = f"{args.requests:,} requests for {args.distinct:,} queries"
        write_json(args.out, {"about": about, "hit_rates": measured})


def zipf(distinct: int, requests: int, exponent: float, rng: np.random.Generator) -> np.ndarray:
    """Return which query each request is for, 0 the most frequent, int64 [requests]."""
    up_to = np.cumsum(np.arange(1, distinct + 1, dtype=np.float64) ** -exponent)
    return np.searchsorted(up_to, rng.random(requests) * up_to[-1])


def hit_rate(asked: np.ndarray, size: int) -> float:
    """Return the share of the second half of the requests that a cache of `size` answers."""
    cache, hits = AnswerCache[bool](size), 0
    for number, query in enumerate(asked.tolist()):
        if cache.get(str(query)) is None:
            cache.put(str(query), True)
        elif number >= len(asked) // 2:
            hits += 1
    return hits / (len(asked) - len(asked) // 2)


if __name__ == "__main__":
    sys.exit(run_main(main))
