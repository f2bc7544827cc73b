"""Try claims: train the cells that a YAML names, compare them, say which claims hold.

    bigdssm evidence configs/evidence/*.yaml --out runs/evidence [--page docs/evidence.md] [--at-once 2]

A file names a claim, the configs it is tried on, the cells (a few keys over the config, or a baseline) and what has to
come out (bigdssm/evidence/claims.py). What is finished in --out is not run again, what was broken off goes on; cells
that two claims share are trained once. --only runs a claim in part: what has a text in its name, such as
`tldr: FPS, seed 0`. --page writes the page of all claims that are finished, its figures (.json beside it) and the ranks
of every trial (_trials.jsonl): what stands there is not run again either, on whatever machine, and other claims keep
what the page said of them. Benches of a claim run behind all trainings, one at a time.
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
from bigdssm.evidence.benches import Figures, read_figures, run_benches
from bigdssm.evidence.claims import Claim, read_claim
from bigdssm.evidence.kept import read_trials, store_trial, write_trials
from bigdssm.evidence.page import write_page
from bigdssm.evidence.results import Result, collect
from bigdssm.evidence.running import Trial, run_trials, trials
from bigdssm.utils.atomic import write_json


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("claims", type=Path, nargs="+", metavar="YAML")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the runs")
    parser.add_argument("--page", type=Path, metavar="MD", help="page to write; its figures go into a .json beside it")
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
    file = None if args.page is None else args.page.with_name(f"{args.page.stem}_trials.jsonl")
    kept = {} if file is None else read_trials(file)
    try:
        if not args.collect:
            run_trials([trial for trial in everything if args.only in str(trial)], args.at_once, kept)
    finally:
        kept = store_trial(kept, everything)
        if file is not None and kept:
            write_trials(file, kept)
    results = _known(args.page)
    for name, claim in claims.items():
        try:
            figures = _figures(claim, planned[name], results.get(name), run=not (args.collect or args.only))
            results[name] = collect(claim, planned[name], kept, figures)
        except DataError as error:
            Console(stderr=True).print(f"{name}: {error}", highlight=False, markup=False, soft_wrap=True)
            continue
        print(f"{name}: {results[name].verdict}")
    if args.page is not None and results:
        write_json(args.page.with_suffix(".json"), {name: result.to_dict() for name, result in sorted(results.items())})
        write_page(dict(sorted(results.items())), args.page)


def _figures(claim: Claim, which: Sequence[Trial], earlier: Result | None, *, run: bool) -> list[Figures]:
    """Return what a claim's benches measured, on an earlier page or, where that has not all of them, now."""
    known = [] if earlier is None else earlier.figures
    if [figures.about for figures in known] == [bench.about for bench in claim.benches]:
        return known
    if run:
        run_benches(claim, which)
    return read_figures(claim, which)


def _known(page: Path | None) -> dict[str, Result]:
    """Return the results of an earlier page."""
    figures = None if page is None else page.with_suffix(".json")
    if figures is None or not figures.exists():
        return {}
    try:
        return {name: Result.from_dict(content) for name, content in json.loads(figures.read_text("utf-8")).items()}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{figures} holds no results of claims: {error!r}; remove it") from None


if __name__ == "__main__":
    sys.exit(main())
