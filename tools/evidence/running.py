"""Runs a claim's cells: trains, evaluates, and keeps what each measured; what is there already is not done again.

A cell's folder is named by all that decides its outcome, so that two claims share it:

    DIR/data/HASH          a dataset without some features
    DIR/SET/HASH/seed-S/   the run; cell.yaml, its config; SPLIT[-rerank-K]-report.json and its ranks; commands.jsonl:
                           what was run
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Container, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from time import perf_counter
from typing import Any

from omegaconf import OmegaConf

from bigdssm.cluster.launcher import run_command
from bigdssm.config import Config, StageName, config_from, load_config
from bigdssm.dataset.dataset import Dataset
from bigdssm.errors import ConfigError
from bigdssm.evaluation.baselines import check_options, fit_baseline
from bigdssm.evaluation.comparison import System, save_comparison
from bigdssm.evaluation.evaluate import evaluate_scores
from bigdssm.utils.atomic import write_text
from bigdssm.utils.hashing import code_checksum, hex64
from bigdssm.utils.log import MetricsWriter, get_logger, read_records
from tools.evidence.claims import Cell, Claim, DataSet

REPORT, COMMANDS, JUDGED, TAUGHT = "report.json", "commands.jsonl", "judged.npy", "teacher"
logger = get_logger(__name__)
_making = Lock()  # of datasets, one at a time
PRECISION = {"engine": {"precision": "fp32"}}  # unless a set's config has another: a claim's machines then agree
_fitting = Lock()  # of baselines: they share this process's random state, and its processor time is what each took


@dataclass(frozen=True)
class Trial:
    """A cell on a set with a seed: what is run, and where."""

    claim: Claim
    set_name: str
    cell_name: str
    seed: int
    folder: Path  # of the run
    after: Trial | None = None  # whose pretraining it fine-tunes
    teacher: Trial | None = None  # whose vectors it follows

    @property
    def data(self) -> DataSet:
        """Return the set that it is tried on."""
        return self.claim.sets[self.set_name]

    @property
    def cell(self) -> Cell:
        """Return the cell as it is on the set."""
        return self.claim.cell_on(self.set_name, self.cell_name)

    @property
    def config_file(self) -> Path:
        """Return the config that it is trained with."""
        return self.folder / "cell.yaml"

    @property
    def stages(self) -> list[StageName]:
        """Return what it trains, in order."""
        return ["sft"] if self.after else ["pretrain", "sft"] if self.cell.sft else ["pretrain"]

    @property
    def model(self) -> Path:
        """Return the model that it ends with."""
        return self.folder / self.stages[-1] / "best"

    @property
    def start(self) -> Path | None:
        """Return the model that it fine-tunes, of another cell."""
        return None if self.after is None else self.after.folder / "pretrain" / "best"

    @property
    def needed(self) -> list[Trial]:
        """Return those whose models it takes."""
        return [trial for trial in (self.after, self.teacher) if trial is not None]

    @property
    def report(self) -> Path:
        """Return the file with what it measured, which is there once it is finished."""
        ranked = "" if self.cell.rerank is None else f"-rerank-{self.cell.rerank}"
        return self.folder / f"{self.claim.split}{ranked}-{REPORT}"

    @property
    def name(self) -> str:
        """Return what tells it from all others wherever its run stands: the set, the config's hash, seed, split."""
        return "/".join([*self.folder.parts[-3:], self.report.name.removesuffix(f"-{REPORT}")])

    def __str__(self) -> str:
        """Return for example `movielens_100k: FPS, seed 0`."""
        return f"{self.set_name}: {self.cell_name}, seed {self.seed}"


def trials(claim: Claim, out: Path) -> list[Trial]:
    """Return all trials of a claim whose runs stand in `out`; those that others start from come first.

    Raises ConfigError: what is wrong with a set's config, or a cell is compared with its equal.
    """
    found: dict[tuple[str, str, int], Trial] = {}
    for set_name, data in claim.sets.items():
        load_config(data.config, data.set)  # which says in one sentence what is wrong with it
        cells = claim.cells_on(set_name)
        for cell_name in sorted(cells, key=lambda name: (cells[name].after is not None, list(cells).index(name))):
            cell = cells[cell_name]
            folder = out / set_name / _name_of(claim, set_name, cell_name)
            for seed in data.seeds if cell.baseline is None else data.seeds[:1]:
                after = None if cell.after is None else found[set_name, cell.after, seed]
                teacher = None if cell.teacher is None else found[set_name, cell.teacher, seed]
                run = folder / f"seed-{seed}"
                trial = Trial(claim, set_name, cell_name, seed, run, after, teacher)
                found[set_name, cell_name, seed] = trial
        for number, expected in enumerate(claim.expect):
            first, second = (found.get((set_name, name, data.seeds[0])) for name in (expected.cell, expected.than))
            if first is not None and second is not None and first.report == second.report:
                raise ConfigError(
                    f"expect[{number}]: {expected.cell} and {expected.than} are the same on {set_name}, needs two "
                    "cells that differ"
                )
    return list(found.values())


def _check(trial: Trial) -> None:
    """Raise ConfigError where a trial could not be run."""
    data, cell = trial.data, trial.cell
    try:
        config = config_from(Path(data.config), _config_content(trial))
        if cell.baseline is not None:
            check_options(cell.baseline, cell.options)
        for stage in trial.stages if cell.baseline is None else ():
            config.stage(stage)
    except ConfigError as error:
        raise ConfigError(f"cells.{trial.cell_name} on {trial.set_name}: {error}") from None
    if cell.without and _made(data, cell) is None:
        raise ConfigError(f"sets.{trial.set_name}.make: missing; cells that leave features out need their dataset made")


def run_trials(which: Sequence[Trial], at_once: int, kept: Container[str] = ()) -> None:
    """Run those that are not finished, `at_once` side by side; raises the first one's error once all have ended.

    What others start from is run as well, and what is `kept` is not, unless another starts from it. Raises ConfigError
    before the first is run where a config of a cell, or an option of its baseline, cannot be.
    """
    errors: list[Exception] = []

    def run(of_folder: Sequence[Trial]) -> None:
        for trial in of_folder:
            try:
                run_trial(trial)
            except Exception as error:
                logger.error("%s: %s", trial, error)
                errors.append(error)

    wanted = [trial for trial in which if trial.name not in kept]
    wanted = [needed for trial in wanted if not trial.report.exists() for needed in trial.needed] + wanted
    once = {trial.report: trial for trial in wanted if not trial.report.exists()}
    for trial in {trial.folder.parent: trial for trial in once.values()}.values():  # of each cell one
        _check(trial)
    for of_kind in (False, True):
        folders: dict[Path, list[Trial]] = {}
        for trial in once.values():
            if (trial.after is not None) == of_kind:
                folders.setdefault(trial.folder, []).append(trial)
        with ThreadPoolExecutor(at_once) as pool:
            list(pool.map(run, folders.values()))
    if errors:
        raise errors[0]


def run_trial(trial: Trial) -> None:
    """Train and evaluate one. Raises CalledProcessError where a command fails: its log stands in the folder."""
    if trial.report.exists():
        return
    logger.info("%s: begins, in %s", trial, trial.folder)
    trial.folder.mkdir(parents=True, exist_ok=True)
    with _making:
        config = write_config(trial)
    measured = load_config(trial.data.config, trial.data.set).data.dir if trial.cell.make else config.data.dir
    if trial.cell.baseline is not None:
        with _fitting:
            _measure_baseline(trial, config, Dataset.open(measured))
        return
    overrides = [f"run.dir={trial.folder}", f"run.seed={trial.seed}"]
    if trial.start is not None:
        overrides.append(f"sft.init={trial.start}")
    if trial.cell.judge:
        _judge(trial, config)
    if trial.teacher is not None:
        with _making:
            _embed_teacher(trial.teacher, config)
    trained = {record["command"] for record in _commands(trial) if record["exit_code"] == 0}
    for stage in trial.stages:
        if stage not in trained:  # else another cell of this folder did
            options = ("--resume", "auto", "--ranks", "1")
            _command(trial, stage, "--config", str(trial.config_file), *overrides, *options)
    ranked = [] if trial.cell.rerank is None else ["--rerank", str(trial.cell.rerank)]
    _command(
        trial, "evaluate", "--model", str(trial.model), "--data", measured, "--split", trial.claim.split,
        "--out", str(trial.report), *ranked, *_precision(config),
    )  # fmt: skip


def write_config(trial: Trial) -> Config:
    """Write the cell's config, make its dataset where it has one of its own, and return it."""
    content, make = _config_content(trial), _made(trial.data, trial.cell)
    if make is not None:
        made_of = hex64(repr((OmegaConf.to_yaml(content.data), make)))
        content.data.dir = str(trial.folder.parents[2] / "data" / made_of)
    write_text(trial.config_file, OmegaConf.to_yaml(content))
    config = load_config(trial.config_file)
    if make is not None and not Path(config.data.dir).exists():
        kind, *arguments = shlex.split(make)
        _command(trial, "make_shards", kind, "--config", str(trial.config_file), *arguments)
    return config


def _config_content(trial: Trial) -> Any:
    """Return a trial's config as YAML has it, with the files of its judges and its teacher."""
    content = _content(trial.claim, trial.set_name, trial.cell_name)
    if trial.cell.judge:
        OmegaConf.update(content, "sft.negatives.mining.file", str(trial.folder / JUDGED))
    if trial.teacher is not None:
        OmegaConf.update(content, "sft.distillation.teacher", str(trial.teacher.folder / TAUGHT))
    return content


def _made(data: DataSet, cell: Cell) -> str | None:
    """Return how a cell's own dataset is made, or None where it takes the set's."""
    return data.make if cell.without else cell.make


def _judge(trial: Trial, config: Config) -> None:
    """Have the cell's judges score the ranks that its config mines, where they have not yet."""
    mined, judged = trial.folder / "mined.npy", trial.folder / JUDGED
    assert config.sft is not None
    window = config.sft.negatives.mining
    if not mined.exists():
        _command(
            trial, "mine_negatives", "--model", str(trial.start), "--data", config.data.dir, "--out", str(mined),
            "--first", str(window.first), "--last", str(window.last),
        )  # fmt: skip
    if not judged.exists():
        judges = [word.format(start=trial.start) for word in trial.cell.judge]
        files = ["--mined", str(mined), "--out", str(judged)]
        _command(trial, "score_pairs", "--data", config.data.dir, *files, *judges)


def _embed_teacher(teacher: Trial, config: Config) -> None:
    """Encode the dataset by a teacher's model, where that has not been done yet."""
    out = teacher.folder / TAUGHT
    if not out.exists():
        where = ["--data", config.data.dir, "--out", str(out)]
        _command(teacher, "embed_teacher", "--model", str(teacher.model), *where, *_precision(config))


def _precision(config: Config) -> list[str]:
    """Return the option of commands that encode as the towers were trained."""
    return ["--precision", config.engine.precision]


def cpu_seconds(trial: Trial) -> float:
    """Return what its training took, its judges, its teacher and the pretraining that it started from included."""
    spent = _spent(trial, "pretrain", "mine_negatives", "score_pairs", "sft", "baseline")
    if trial.after is not None:
        spent += cpu_seconds(trial.after)
    if trial.teacher is not None:
        spent += cpu_seconds(trial.teacher) + _spent(trial.teacher, "embed_teacher")
    return spent


def _spent(trial: Trial, *commands: str) -> float:
    return sum(float(record["cpu_seconds"]) for record in _commands(trial) if record["command"] in commands)


def _content(claim: Claim, set_name: str, cell_name: str) -> Any:
    """Return a cell's config as YAML has it, without the features that it leaves out."""
    data, cell = claim.sets[set_name], claim.cell_on(set_name, cell_name)
    content: Any = OmegaConf.merge(
        PRECISION, OmegaConf.load(data.config), OmegaConf.from_dotlist([*data.set, *cell.set])
    )
    for left_out in cell.without:
        side, _, name = left_out.partition(".")
        if side not in ("query", "doc") or name not in content.data.get(side, {}):
            raise ConfigError(f"cells.{cell_name}.without: {left_out} is no feature of {data.config}")
        del content.data[side][name]
    return content


def _name_of(claim: Claim, set_name: str, cell_name: str) -> str:
    """Return a name that two cells share where all that decides what comes out is the same."""
    data, cell = claim.sets[set_name], claim.cell_on(set_name, cell_name)
    after = None if cell.after is None else _name_of(claim, set_name, cell.after)
    content = OmegaConf.to_yaml(_content(claim, set_name, cell_name))
    made = _made(data, cell)
    told: list[Any] = [cell.judge] if cell.judge else []
    told += [_name_of(claim, set_name, cell.teacher)] if cell.teacher is not None else []
    return hex64(json.dumps([content, made, cell.sft, after, cell.baseline, cell.options, *told]))


def _measure_baseline(trial: Trial, config: Config, dataset: Dataset) -> None:
    assert trial.cell.baseline is not None
    started, used = perf_counter(), os.times()
    scores = fit_baseline(trial.cell.baseline, Dataset.open(config.data.dir), trial.cell.options)
    how: dict[str, Any] = {"split": trial.claim.split, "exclude_seen": config.data.exclude_seen}
    evaluation = evaluate_scores(scores, dataset, **how)
    system = System.of_ranks(trial.cell_name, evaluation.ranks, evaluation.query_ids, perf_counter() - started)
    spent = sum(os.times()[:2]) - sum(used[:2])
    _note(trial, "baseline", 0, spent, perf_counter() - started)
    save_comparison(trial.report, [system], [], dataset, **how)


def _command(trial: Trial, command: str, *arguments: str) -> None:
    """Run `bigdssm command …`, its output in the trial's folder. Raises CalledProcessError."""
    ended = run_command(trial.folder / f"{command}.log", command, *arguments)
    _note(trial, command, ended.exit_code, ended.cpu_seconds, ended.seconds)
    ended.check()


def _commands(trial: Trial) -> list[dict[str, Any]]:
    """Return the records of what was run for it."""
    return read_records(trial.folder / COMMANDS, "cpu_seconds")


def _note(trial: Trial, command: str, code: int, cpu_s: float, wall_s: float) -> None:
    record = {
        "command": command, "exit_code": code, "cpu_seconds": round(cpu_s, 2), "seconds": round(wall_s, 2),
        "code": code_checksum(),
    }  # fmt: skip
    with closing(MetricsWriter(trial.folder / COMMANDS)) as writer:
        writer.write(record)
