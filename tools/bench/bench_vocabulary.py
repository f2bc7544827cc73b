"""What a large vocabulary costs: a mapped one, or as a tuple of strings in schema.json, as it was before.

    python tools/bench/bench_vocabulary.py --values 1e7              # 0.3 GB on disk for a while, 3 GB at 1e8
    python tools/bench/bench_vocabulary.py --values 1e7 --as tuple   # 1.2 GB of memory a process

Values are u0, u1, …; each process opens the vocabulary and looks up a million of them, drawn at random, three times.
Memory is what a process has for itself (anonymous), beside the mapped pages that all share.
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

ASKED, ROUNDS, AT_ONCE = 1_000_000, 3, 1 << 17


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--values", type=float, default=1e7)
    parser.add_argument("--as", dest="form", choices=("mapped", "tuple"), default="mapped")
    parser.add_argument("--folder", type=Path, help="where the file is written (default: the system's)")
    args = parser.parse_args()
    values, measure = int(args.values), {"mapped": mapped, "tuple": as_tuple}[args.form]
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path, begin = Path(folder) / "values", time.perf_counter()
        (write_part if args.form == "mapped" else write_json)(path, batches(values))
        seconds, size = time.perf_counter() - begin, path.stat().st_size
        print(f"{values:,} values, {size / 1e9:.2f} GB: written in {seconds:.1f} s, {status_mb('VmHWM'):.0f} MB held")
        for processes in (1, 4):
            with multiprocessing.get_context("spawn").Pool(processes) as pool:
                for told in pool.starmap(measure, [(path, values)] * processes, chunksize=1):
                    print(f"{processes} process(es): {told}")


def batches(values: int) -> Iterator[pa.Array]:
    for first in range(0, values, AT_ONCE):
        yield named(np.arange(first, min(first + AT_ONCE, values)))


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
        held.append(vocabulary)
        return lambda asked: pc.index_in(asked, value_set=value_set).to_numpy()

    held: list[tuple[str, ...]] = []
    return measured(opened, values)


def measured(opened: Callable[[], Callable[[pa.Array], np.ndarray]], values: int) -> str:
    np.asarray(pa.array([0]))  # what the first use of a library loads is not the vocabulary's
    before, begin = status_mb("RssAnon"), time.perf_counter()
    codes = opened()
    seconds, random = time.perf_counter() - begin, np.random.default_rng(0)
    lasted = []
    for _ in range(ROUNDS):
        numbers = random.integers(0, values, ASKED)
        asked = named(numbers)
        begin = time.perf_counter()
        found = codes(asked)
        lasted.append(time.perf_counter() - begin)
        assert np.array_equal(found, numbers)
    rates = f"{ASKED / lasted[0]:,.0f} look-ups a second at first, then {ASKED / np.median(lasted):,.0f}"
    return f"opened in {1000 * seconds:.1f} ms, {rates}; {status_mb('RssAnon') - before:.0f} MB of its own"


def status_mb(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


if __name__ == "__main__":
    main()
