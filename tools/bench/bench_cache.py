"""Measure the hit rate of the server's cache for queries with Zipf-distributed frequencies.

    python tools/bench/bench_cache.py [--distinct 1000000] [--requests 1000000] [--sizes 1000 10000 100000] [--out JSON]

The frequency of the r-th most frequent of `--distinct` queries is proportional to r^−s. The first half of the requests
fills the cache, the second half is measured.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from bigdssm.cli import at_least, run_main
from bigdssm.serving.live import AnswerCache
from bigdssm.utils.atomic import write_json

EXPONENTS = (0.8, 1.0, 1.2)  # queries to search engines have about 0.8 to 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--distinct", type=at_least(1), default=1_000_000, help="number of distinct queries (default: %(default)s)"
    )
    parser.add_argument(
        "--requests", type=at_least(2), default=1_000_000, help="number of requests (default: %(default)s)"
    )
    parser.add_argument(
        "--sizes",
        nargs="+",
        type=at_least(1),
        default=[1_000, 10_000, 100_000],
        help="cache sizes (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the requests (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="JSON", help="file for the results (default: printed only)")
    args = parser.parse_args()
    results = []
    for exponent in EXPONENTS:
        requests = zipf(args.distinct, args.requests, exponent, np.random.default_rng(args.seed))
        shares = {f"{size:,} answers": hit_rate(requests, size) for size in args.sizes}
        results.append({"Zipf's exponent": exponent, **shares})
    table = Table(*results[0])
    for record in results:
        table.add_row(*(f"{value:.3g}" for value in record.values()))
    Console().print(table)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        about = f"{args.requests:,} requests for {args.distinct:,} queries"
        write_json(args.out, {"about": about, "hit_rates": results})


def zipf(distinct: int, requests: int, exponent: float, rng: np.random.Generator) -> np.ndarray:
    """Sample the query per request, 0 the most frequent, int64 [requests]."""
    cumulative = np.cumsum(np.arange(1, distinct + 1, dtype=np.float64) ** -exponent)
    return np.searchsorted(cumulative, rng.random(requests) * cumulative[-1])


def hit_rate(requests: np.ndarray, size: int) -> float:
    """Return the hit rate of a cache of `size` in the second half of the requests."""
    cache, hits = AnswerCache[bool](size), 0
    for number, query in enumerate(requests.tolist()):
        if cache.get(str(query)) is None:
            cache.put(str(query), True)
        elif number >= len(requests) // 2:
            hits += 1
    return hits / (len(requests) - len(requests) // 2)


if __name__ == "__main__":
    sys.exit(run_main(main))
