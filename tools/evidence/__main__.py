"""Try claims: train the cells that a YAML names, compare them, say which claims hold.

    python -m tools.evidence configs/evidence/*.yaml --out runs/evidence [--at-once 2]
        [--page docs/evidence.md --store tools/evidence]

A file names a claim, the configs it is tried on, the cells (a few keys over the config, or a baseline) and what has to
come out (tools/evidence/claims.py). What is finished in --out is not run again, what was broken off goes on; cells
that two claims share are trained once. --only runs a claim in part: what has a text in its name, such as
`tldr: FPS, seed 0`. --page writes the page of all claims that are finished. --store (by default the page's folder)
keeps their results, results.json, and the ranks of every trial, trials.jsonl: what is stored is not run again either,
on whatever machine, and other claims keep their results. Benches of a claim run behind all trainings, one at a time.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from bigdssm.cli import at_least, check_file_to_write, command
from bigdssm.errors import ConfigError, DataError
from bigdssm.utils.atomic import write_json
from tools.evidence.benches import Figures, read_figures, run_benches
from tools.evidence.claims import Claim, read_claim
from tools.evidence.page import write_page
from tools.evidence.results import Result, collect
from tools.evidence.running import Trial, run_trials, trials
from tools.evidence.stored import read_trials, store_trial, write_trials


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.prog = "python -m tools.evidence"
    parser.add_argument("claims", type=Path, nargs="+", metavar="YAML")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the runs")
    parser.add_argument("--page", type=Path, metavar="MD", help="page to write, with pictures in images/ beside it")
    parser.add_argument("--store", type=Path, metavar="DIR", help="folder of results.json and trials.jsonl")
    parser.add_argument("--at-once", type=at_least(1), default=1, help="trainings side by side (%(default)s)")
    parser.add_argument("--only", default="", metavar="TEXT", help="run what has it in `SET: CELL, seed N`")
    parser.add_argument("--collect", action="store_true", help="run nothing, look at what is finished")
    args = parser.parse_args(argv)
    check_file_to_write("--page", args.page)
    claims = {path.stem: read_claim(path) for path in args.claims}
    if len(claims) < len(args.claims):
        raise ConfigError("two files have one name, which is the claim's; rename one")
    planned = {name: trials(claim, args.out) for name, claim in claims.items()}
    everything = [trial for of in planned.values() for trial in of]
    store = args.store if args.store is not None or args.page is None else args.page.parent
    for name in () if store is None else ("results.json", "trials.jsonl"):
        check_file_to_write("--store", store / name)
    if store is not None:
        store.mkdir(parents=True, exist_ok=True)
    kept = {} if store is None else read_trials(store / "trials.jsonl")
    try:
        if not args.collect:
            run_trials([trial for trial in everything if args.only in str(trial)], args.at_once, kept)
    finally:
        kept = store_trial(kept, everything)
        if store is not None and kept:
            write_trials(store / "trials.jsonl", kept)
    results = {} if store is None else _stored_results(store / "results.json")
    for name, claim in claims.items():
        try:
            figures = _figures(claim, planned[name], results.get(name), run=not (args.collect or args.only))
            results[name] = collect(claim, planned[name], kept, figures)
        except DataError as error:
            Console(stderr=True).print(f"{name}: {error}", highlight=False, markup=False, soft_wrap=True)
            continue
        print(f"{name}: {results[name].verdict}")
    results = dict(sorted(results.items()))
    if store is not None and results:
        write_json(store / "results.json", {name: result.to_dict() for name, result in results.items()})
    if args.page is not None and results:
        write_page(results, args.page)


def _figures(claim: Claim, which: Sequence[Trial], earlier: Result | None, *, run: bool) -> list[Figures]:
    """Return the figures of a claim's benches from an earlier result or, where that lacks some, measured now."""
    known = [] if earlier is None else earlier.figures
    if [figures.about for figures in known] == [bench.about for bench in claim.benches]:
        return known
    if run:
        run_benches(claim, which)
    return read_figures(claim, which)


def _stored_results(file: Path) -> dict[str, Result]:
    """Return the results of earlier calls. Raises DataError: damaged."""
    if not file.exists():
        return {}
    try:
        return {name: Result.from_dict(content) for name, content in json.loads(file.read_text("utf-8")).items()}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} holds no results of claims: {error!r}; remove it") from None


if __name__ == "__main__":
    sys.exit(main())
