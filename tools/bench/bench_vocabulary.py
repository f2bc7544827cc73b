"""Measure the cost of a large vocabulary: memory-mapped, or as a tuple of strings in JSON.

    python tools/bench/bench_vocabulary.py --values 1e7              # 0.3 GB of temporary disk space, 3 GB at 1e8
    python tools/bench/bench_vocabulary.py --values 1e7 --as tuple   # 1.2 GB of memory per process

Values are u0, u1, …; every process opens the vocabulary and looks up a million random values, three times. Memory is
the private (anonymous) memory of a process, without the mapped pages that all processes share.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bigdssm.features.vocabulary import PartFile, Vocabulary, write_part

LOOKUPS, ROUNDS, BATCH_SIZE = 1_000_000, 3, 1 << 17


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--values", type=float, default=1e7, help="size of the vocabulary (default: %(default)s)")
    parser.add_argument(
        "--as", dest="form", choices=("mapped", "tuple"), default="mapped", help="representation (default: %(default)s)"
    )
    parser.add_argument("--folder", type=Path, help="folder for the file (default: the system's temporary folder)")
    args = parser.parse_args()
    values, measure = int(args.values), {"mapped": mapped, "tuple": as_tuple}[args.form]
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path, begin = Path(folder) / "values", time.perf_counter()
        (write_part if args.form == "mapped" else write_json)(path, batches(values))
        seconds, size = time.perf_counter() - begin, path.stat().st_size
        print(f"{values:,} values, {size / 1e9:.2f} GB: written in {seconds:.1f} s, peak {status_mb('VmHWM'):.0f} MB")
        for processes in (1, 4):
            with multiprocessing.get_context("spawn").Pool(processes) as pool:
                for result in pool.starmap(measure, [(path, values)] * processes, chunksize=1):
                    print(f"{processes} process(es): {result}")


def batches(values: int) -> Iterator[pa.Array]:
    for first in range(0, values, BATCH_SIZE):
        yield named(np.arange(first, min(first + BATCH_SIZE, values)))


def named(numbers: np.ndarray) -> pa.Array:
    letter, nothing = (pa.scalar(text, pa.large_string()) for text in ("u", ""))
    return pc.binary_join_element_wise(letter, pa.array(numbers).cast(pa.large_string()), nothing)


def write_json(path: Path, strings: Iterator[pa.Array]) -> None:
    path.write_text(json.dumps([value for some in strings for value in some.to_pylist()]))


def mapped(path: Path, values: int) -> str:
    return measured(lambda: Vocabulary.open([PartFile(path, values, "")]).codes, values)


def as_tuple(path: Path, values: int) -> str:
    def opened() -> Callable[[pa.Array], np.ndarray]:
        vocabulary = tuple(json.loads(path.read_text()))
        value_set = pa.array(vocabulary, pa.large_string())
        alive.append(vocabulary)
        return lambda lookups: pc.index_in(lookups, value_set=value_set).to_numpy()

    alive: list[tuple[str, ...]] = []
    return measured(opened, values)


def measured(opened: Callable[[], Callable[[pa.Array], np.ndarray]], values: int) -> str:
    np.asarray(pa.array([0]))  # load the libraries before measuring
    before, begin = status_mb("RssAnon"), time.perf_counter()
    codes = opened()
    seconds, random = time.perf_counter() - begin, np.random.default_rng(0)
    durations = []
    for _ in range(ROUNDS):
        numbers = random.integers(0, values, LOOKUPS)
        lookups = named(numbers)
        begin = time.perf_counter()
        result = codes(lookups)
        durations.append(time.perf_counter() - begin)
        assert np.array_equal(result, numbers)
    rates = f"{LOOKUPS / durations[0]:,.0f} look-ups/s in round 1, median {LOOKUPS / np.median(durations):,.0f}"
    return f"opened in {1000 * seconds:.1f} ms, {rates}; {status_mb('RssAnon') - before:.0f} MB private"


def status_mb(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


if __name__ == "__main__":
    main()
