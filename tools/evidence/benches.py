"""Benchmarks of the cells' models in addition to the claim's metric: latency, size, recall of an index."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigdssm.cluster.launcher import run_command
from bigdssm.config import load_config
from bigdssm.errors import DataError
from bigdssm.utils.hashing import hex64
from bigdssm.utils.log import get_logger
from tools.evidence.claims import Bench, Claim
from tools.evidence.running import Trial, run_trials

logger = get_logger(__name__)


@dataclass(frozen=True)
class BenchmarkResult:
    """The results of a benchmark: its title, and the records of a table."""

    about: str
    records: list[dict[str, Any]]


def run_benchmarks(claim: Claim, trials: Sequence[Trial]) -> None:
    """Run all benchmarks of a claim; existing results are reused.

    Missing models are trained again. Raises CalledProcessError: a command failed.
    """
    for bench in claim.benches:
        for trial in _benched_trials(bench, trials):
            folder = _folder(bench, trial)
            if (folder / "figures.json").exists():
                continue
            run_trials([trial], 1)
            logger.info("%s: %s", trial, bench.about)
            paths = {
                "model": trial.model, "data": load_config(trial.config_file).data.dir,
                "folder": folder, "out": folder / "measured.json",
            }  # fmt: skip
            for line in bench.run:
                command, *arguments = [word.format(**paths) for word in shlex.split(line)]
                run_command(folder / "bench.log", command, *arguments).check()
            (folder / "measured.json").rename(folder / "figures.json")


def read_benchmarks(claim: Claim, trials: Sequence[Trial]) -> list[BenchmarkResult]:
    """Read the results of a claim's benchmarks. Raises DataError: one is not finished."""
    return [_figures(bench, trials) for bench in claim.benches]


def _figures(bench: Bench, trials: Sequence[Trial]) -> BenchmarkResult:
    records = []
    for trial in _benched_trials(bench, trials):
        file = _folder(bench, trial) / "figures.json"
        try:
            found = json.loads(file.read_text("utf-8"))[bench.records]
        except FileNotFoundError:
            raise DataError(f"not finished: {trial}: {bench.about}") from None
        except (ValueError, KeyError) as error:
            raise DataError(f"{file} contains no {bench.records}: {error!r}; remove it") from None
        of_cell = {"cell": trial.cell_name} if len(bench.of) > 1 else {}
        records += [of_cell | record for record in found]
    return BenchmarkResult(bench.about, records)


def _benched_trials(bench: Bench, trials: Sequence[Trial]) -> list[Trial]:
    first_seed = {trial.cell_name: trial for trial in reversed(trials)}
    return [first_seed[name] for name in bench.of]


def _folder(bench: Bench, trial: Trial) -> Path:
    return trial.folder / "benches" / hex64(repr(bench.run))
