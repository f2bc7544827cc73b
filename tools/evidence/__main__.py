"""Test claims: train the compared configurations (cells) of YAML files, and determine which claims hold.

    python -m tools.evidence configs/evidence/*.yaml --out runs/evidence [--at-once 2]
        [--page docs/evidence.md --store tools/evidence]

A file contains a claim, its configs, its cells (overrides of the config, or a baseline) and the expected comparisons
(tools/evidence/claims.py). Finished trials in --out are reused, interrupted ones resumed; cells shared by two claims
are trained once. --only selects trials by a part of their name, such as `tldr: FPS, seed 0`. --page writes the page of
all finished claims, and their tables to a second page, such as docs/evidence_tables.md. --store (default: the folder of
the page) contains results.json (their results) and trials.jsonl (the first ranks of all trials), which are reused on
any machine. Benchmarks of a claim run after all training runs, one at a time. --collect trains nothing and needs no
datasets: it rewrites the pages from stored results, for example after a change of a claim's texts.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from bigdssm.cli import at_least, check_file_to_write, command, option
from bigdssm.errors import ConfigError, DataError
from bigdssm.utils.atomic import write_json
from tools.evidence.benches import BenchmarkResult, read_benchmarks, run_benchmarks
from tools.evidence.claims import Claim, read_claim
from tools.evidence.page import head_of, tables_path, write_page
from tools.evidence.results import Result, collect
from tools.evidence.running import Trial, plan_trials, run_trials
from tools.evidence.stored import read_trials, with_finished, write_trials


@command(
    option("claims", type=Path, nargs="+", metavar="YAML", help="files with claims"),
    option("--out", type=Path, required=True, metavar="DIR", help="folder for the runs"),
    option("--page", type=Path, metavar="MD", help="page to write, with tables and images/ next to it"),
    option(
        "--store", type=Path, metavar="DIR", help="folder of results.json and trials.jsonl (default: that of --page)"
    ),
    option("--at-once", type=at_least(1), default=1, help="concurrent training runs (default: %(default)s)"),
    option("--only", default="", metavar="TEXT", help="run trials with TEXT in `SET: CELL, seed N` (default: all)"),
    option("--collect", action="store_true", help="run nothing, collect finished trials"),
)
def main(args: argparse.Namespace) -> None:
    """Run the command line."""
    for page in () if args.page is None else (args.page, tables_path(args.page)):
        check_file_to_write("--page", page, "evidence", overwrite=True)
    if args.page is not None:
        head_of(args.page)
    claims = {path.stem: read_claim(path) for path in args.claims}
    if len(claims) < len(args.claims):
        raise ConfigError("two files have the same name, which identifies the claim; rename one")
    planned = {name: plan_trials(claim, args.out) for name, claim in claims.items()}
    everything = [trial for of in planned.values() for trial in of]
    store = args.store if args.store is not None or args.page is None else args.page.parent
    for name in () if store is None else ("results.json", "trials.jsonl"):
        check_file_to_write("--store", store / name, "evidence", overwrite=True)
    if store is not None:
        store.mkdir(parents=True, exist_ok=True)
    stored = {} if store is None else read_trials(store / "trials.jsonl")
    try:
        if not args.collect:
            run_trials([trial for trial in everything if args.only in str(trial)], args.at_once, stored)
    finally:
        stored = with_finished(stored, everything)
        if store is not None and stored:
            write_trials(store / "trials.jsonl", stored)
    results = {} if store is None else _stored_results(store / "results.json")
    without_result = []
    for name, claim in claims.items():
        try:
            figures = _figures(claim, planned[name], results.get(name), run=not (args.collect or args.only))
            results[name] = collect(claim, planned[name], stored, figures)
        except DataError as error:
            Console(stderr=True).print(f"{name}: {error}", highlight=False, markup=False, soft_wrap=True)
            without_result.append(name)
            if name in results:
                results[name] = results[name].with_texts(claim)
            continue
        print(f"{name}: {results[name].verdict}")
    results = dict(sorted(results.items()))
    if store is not None and results:
        write_json(store / "results.json", {name: result.to_dict() for name, result in results.items()})
    if args.page is not None and results:
        write_page(results, args.page)
    if without_result and not (args.collect or args.only):
        raise DataError(f"no new result of {', '.join(without_result)}; the sentences above name the causes")


def _figures(claim: Claim, trials: Sequence[Trial], earlier: Result | None, *, run: bool) -> list[BenchmarkResult]:
    """Return the benchmark results of a claim from an earlier run if complete, otherwise measure them."""
    stored = [] if earlier is None else earlier.figures
    if [figures.about for figures in stored] == [bench.about for bench in claim.benches]:
        return stored
    if run:
        run_benchmarks(claim, trials)
    return read_benchmarks(claim, trials)


def _stored_results(file: Path) -> dict[str, Result]:
    """Read the results of earlier calls. Raises DataError: the file is damaged."""
    if not file.exists():
        return {}
    try:
        return {name: Result.from_dict(content) for name, content in json.loads(file.read_text("utf-8")).items()}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} contains no results of claims: {error!r}; remove it") from None


if __name__ == "__main__":
    sys.argv[0] = "python -m tools.evidence"  # the name in its --help
    sys.exit(main())
