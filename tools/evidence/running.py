"""Train and evaluate the cells of a claim; existing results are reused.

The folder of a cell is named by a hash of everything that determines its outcome, so that claims share cells:

    DIR/data/HASH          a dataset without some features
    DIR/SET/HASH/seed-S/   the run; cell.yaml: its config; SPLIT-report.json and its ranks; commands.jsonl: the
                           executed commands
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
from bigdssm.dataset.rows import EventRules
from bigdssm.errors import ConfigError
from bigdssm.evaluation.baselines import check_options, fit_baseline
from bigdssm.evaluation.comparison import System, save_comparison
from bigdssm.evaluation.evaluate import evaluate_scores
from bigdssm.utils.atomic import write_text
from bigdssm.utils.hashing import code_checksum, hex64
from bigdssm.utils.log import MetricsWriter, get_logger, read_records
from tools.evidence.claims import Cell, Claim, DataSet

REPORT, COMMANDS, SCORED, TEACHER_VECTORS = "report.json", "commands.jsonl", "scored.npy", "teacher"
logger = get_logger(__name__)
PRECISION = {"engine": {"precision": "fp32"}}  # default of claims, so that all machines compute the same
_building = Lock()  # datasets are built one at a time
_fitting = Lock()  # baselines are fitted one at a time: they share the random state and CPU time of this process


@dataclass(frozen=True)
class Trial:
    """A cell on a set with a seed, and its run folder."""

    claim: Claim
    set_name: str
    cell_name: str
    seed: int
    folder: Path  # of the run
    after: Trial | None = None  # the trial whose pretrained model is fine-tuned
    teacher: Trial | None = None  # the trial whose model is the teacher

    @property
    def data(self) -> DataSet:
        """Return the set of the trial."""
        return self.claim.sets[self.set_name]

    @property
    def cell(self) -> Cell:
        """Return the cell with the overrides of the set."""
        return self.claim.cell_on(self.set_name, self.cell_name)

    @property
    def config_file(self) -> Path:
        """Return the path of the trial's config."""
        return self.folder / "cell.yaml"

    @property
    def stages(self) -> list[StageName]:
        """Return the stages to train, in order."""
        return ["sft"] if self.after else ["pretrain", "sft"] if self.cell.sft else ["pretrain"]

    @property
    def model(self) -> Path:
        """Return the path of the final model."""
        return self.folder / self.stages[-1] / "best"

    @property
    def start(self) -> Path | None:
        """Return the path of the other trial's model that is fine-tuned."""
        return None if self.after is None else self.after.folder / "pretrain" / "best"

    @property
    def needed(self) -> list[Trial]:
        """Return the trials whose models are required."""
        return [trial for trial in (self.after, self.teacher) if trial is not None]

    @property
    def report(self) -> Path:
        """Return the path of the results, which exists once the trial is finished."""
        return self.folder / f"{self.claim.split}-{REPORT}"

    @property
    def name(self) -> str:
        """Return an identifier independent of the run's location: set, hash of the config, seed, split."""
        return "/".join([*self.folder.parts[-3:], self.report.name.removesuffix(f"-{REPORT}")])

    def __str__(self) -> str:
        """Return for example `movielens_100k: FPS, seed 0`."""
        return f"{self.set_name}: {self.cell_name}, seed {self.seed}"


def plan_trials(claim: Claim, out: Path) -> list[Trial]:
    """Return all trials of a claim with their run folders in `out`, in order of their dependencies.

    Raises ConfigError: an invalid config of a set, or a cell compared with an equal one.
    """
    by_key: dict[tuple[str, str, int], Trial] = {}
    for set_name, data in claim.sets.items():
        load_config(data.config, data.set)  # raises for an invalid config
        cells = claim.cells_on(set_name)
        for cell_name in sorted(cells, key=lambda name: (cells[name].after is not None, list(cells).index(name))):
            cell = cells[cell_name]
            folder = out / set_name / _name_of(claim, set_name, cell_name)
            for seed in data.seeds if cell.baseline is None else data.seeds[:1]:
                after = None if cell.after is None else by_key[set_name, cell.after, seed]
                teacher = None if cell.teacher is None else by_key[set_name, cell.teacher, seed]
                run = folder / f"seed-{seed}"
                trial = Trial(claim, set_name, cell_name, seed, run, after, teacher)
                by_key[set_name, cell_name, seed] = trial
        for number, expected in enumerate(claim.expect):
            first, second = (by_key.get((set_name, name, data.seeds[0])) for name in (expected.cell, expected.than))
            if first is not None and second is not None and first.report == second.report:
                raise ConfigError(
                    f"expect[{number}]: {expected.cell} and {expected.than} are the same on {set_name}, needs two "
                    "cells that differ"
                )
    return list(by_key.values())


def _check(trial: Trial) -> None:
    """Raise ConfigError for a trial with an invalid config or options."""
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
        raise ConfigError(f"sets.{trial.set_name}.make: missing; cells with `without` need it to build their dataset")


def run_trials(trials: Sequence[Trial], at_once: int, stored: Container[str] = ()) -> None:
    """Run unfinished trials, `at_once` concurrently; raises the first error after all have ended.

    Includes required trials. `stored` trials are skipped unless another one requires them. Raises ConfigError before
    the first run: an invalid config of a cell, or an invalid option of a baseline.
    """
    errors: list[Exception] = []

    def run(of_folder: Sequence[Trial]) -> None:
        for trial in of_folder:
            try:
                run_trial(trial)
            except Exception as error:
                logger.error("%s: %s", trial, error)
                errors.append(error)

    pending = [trial for trial in trials if trial.name not in stored]
    pending = [needed for trial in pending if not trial.report.exists() for needed in trial.needed] + pending
    unique = {trial.report: trial for trial in pending if not trial.report.exists()}
    for trial in {trial.folder.parent: trial for trial in unique.values()}.values():  # one per cell
        _check(trial)
    for fine_tunes in (False, True):
        folders: dict[Path, list[Trial]] = {}
        for trial in unique.values():
            if (trial.after is not None) == fine_tunes:
                folders.setdefault(trial.folder, []).append(trial)
        with ThreadPoolExecutor(at_once) as pool:
            list(pool.map(run, folders.values()))
    if errors:
        raise errors[0]


def run_trial(trial: Trial) -> None:
    """Train and evaluate a trial. Raises CalledProcessError: a command failed; its log is in the folder."""
    if trial.report.exists():
        return
    logger.info("%s: starting, in %s", trial, trial.folder)
    trial.folder.mkdir(parents=True, exist_ok=True)
    with _building:
        config = write_config(trial)
    measured = load_config(trial.data.config, trial.data.set).data.dir if trial.cell.make else config.data.dir
    if trial.cell.baseline is not None:
        with _fitting:
            _measure_baseline(trial, config, Dataset.open(measured).with_rules(EventRules.of(config.data)))
        return
    overrides = [f"run.dir={trial.folder}", f"run.seed={trial.seed}"]
    if trial.start is not None:
        overrides.append(f"sft.init={trial.start}")
    if trial.cell.teacher_scores:
        _score_negatives(trial, config)
    if trial.teacher is not None:
        with _building:
            _embed_teacher(trial.teacher, config)
    trained = {record["command"] for record in _commands(trial) if record["exit_code"] == 0}
    for stage in trial.stages:
        if stage not in trained:  # otherwise another cell of this folder trained it
            options = ("--resume", "auto", "--ranks", "1")
            _command(trial, stage, "--config", str(trial.config_file), *overrides, *options)
    _command(
        trial, "evaluate", "--model", str(trial.model), "--data", measured, "--split", trial.claim.split,
        "--out", str(trial.report), *_precision(config),
    )  # fmt: skip


def write_config(trial: Trial) -> Config:
    """Write and return the cell's config, and build its dataset if it is not that of the set."""
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
    """Return a trial's config as plain YAML, with the files of its teachers."""
    content = _content(trial.claim, trial.set_name, trial.cell_name)
    if trial.cell.teacher_scores:
        OmegaConf.update(content, "sft.negatives.mining.file", str(trial.folder / SCORED))
    if trial.teacher is not None:
        OmegaConf.update(content, "sft.distillation.teacher", str(trial.teacher.folder / TEACHER_VECTORS))
    return content


def _made(data: DataSet, cell: Cell) -> str | None:
    """Return the make_shards arguments of a cell's dataset, or None if it is that of the set."""
    return data.make if cell.without else cell.make


def _score_negatives(trial: Trial, config: Config) -> None:
    """Mine hard negatives and score them with the cell's teachers; existing files are reused."""
    mined, scored = trial.folder / "mined.npy", trial.folder / SCORED
    assert config.sft is not None
    window = config.sft.negatives.mining
    if not mined.exists():
        _command(
            trial, "mine_negatives", "--model", str(trial.start), "--data", config.data.dir, "--out", str(mined),
            "--first", str(window.first), "--last", str(window.last),
        )  # fmt: skip
    if not scored.exists():
        teachers = [word.format(start=trial.start) for word in trial.cell.teacher_scores]
        files = ["--mined", str(mined), "--out", str(scored)]
        _command(trial, "score_pairs", "--data", config.data.dir, *files, *teachers)


def _embed_teacher(teacher: Trial, config: Config) -> None:
    """Encode the dataset with a teacher's model; existing vectors are reused."""
    out = teacher.folder / TEACHER_VECTORS
    if not out.exists():
        where = ["--data", config.data.dir, "--out", str(out)]
        _command(teacher, "embed_teacher", "--model", str(teacher.model), *where, *_precision(config))


def _precision(config: Config) -> list[str]:
    """Return the option for encoding in the precision of training."""
    precision = config.engine.precision
    return ["--precision", "fp32" if precision == "bf16_pure" else precision]


def cpu_seconds(trial: Trial) -> float:
    """Return the CPU seconds of training, including its teachers and the pretraining of its initial model."""
    spent = _spent(trial, "pretrain", "mine_negatives", "score_pairs", "sft", "baseline")
    if trial.after is not None:
        spent += cpu_seconds(trial.after)
    if trial.teacher is not None:
        spent += cpu_seconds(trial.teacher) + _spent(trial.teacher, "embed_teacher")
    return spent


def _spent(trial: Trial, *commands: str) -> float:
    return sum(float(record["cpu_seconds"]) for record in _commands(trial) if record["command"] in commands)


def _content(claim: Claim, set_name: str, cell_name: str) -> Any:
    """Return a cell's config as plain YAML, without the features in `without`."""
    data, cell = claim.sets[set_name], claim.cell_on(set_name, cell_name)
    content: Any = OmegaConf.merge(
        PRECISION, OmegaConf.load(data.config), OmegaConf.from_dotlist([*data.set, *cell.set])
    )
    for feature in cell.without:
        side, _, name = feature.partition(".")
        if side not in ("query", "doc", "event", "request") or name not in content.data.get(side, {}):
            raise ConfigError(f"cells.{cell_name}.without: {feature} is no feature of {data.config}")
        if side != "request":
            del content.data[side][name]
        if side in ("event", "request") and "request" in content.data:
            content.data.request = [other for other in content.data.request if other != name]
    return content


def _name_of(claim: Claim, set_name: str, cell_name: str) -> str:
    """Return a hash of everything that determines a cell's outcome except the seed."""
    data, cell = claim.sets[set_name], claim.cell_on(set_name, cell_name)
    after = None if cell.after is None else _name_of(claim, set_name, cell.after)
    content = OmegaConf.to_yaml(_content(claim, set_name, cell_name))
    made = _made(data, cell)
    teachers: list[Any] = [cell.teacher_scores] if cell.teacher_scores else []
    teachers += [_name_of(claim, set_name, cell.teacher)] if cell.teacher is not None else []
    return hex64(json.dumps([content, made, cell.sft, after, cell.baseline, cell.options, *teachers]))


def _measure_baseline(trial: Trial, config: Config, dataset: Dataset) -> None:
    assert trial.cell.baseline is not None
    started, used = perf_counter(), os.times()
    fitted = Dataset.open(config.data.dir).with_rules(EventRules.of(config.data))
    scores = fit_baseline(trial.cell.baseline, fitted, trial.cell.options)
    how: dict[str, Any] = {"split": trial.claim.split, "exclude_seen": config.data.exclude_seen}
    evaluation = evaluate_scores(scores, dataset, **how)
    system = System.from_ranks(trial.cell_name, evaluation.ranks, evaluation.query_ids, perf_counter() - started)
    spent = sum(os.times()[:2]) - sum(used[:2])
    _record(trial, "baseline", 0, spent, perf_counter() - started)
    save_comparison(trial.report, [system], [], dataset, **how)


def _command(trial: Trial, command: str, *arguments: str) -> None:
    """Run `bigdssm command …` with its log in the trial's folder. Raises CalledProcessError."""
    finished = run_command(trial.folder / f"{command}.log", command, *arguments)
    _record(trial, command, finished.exit_code, finished.cpu_seconds, finished.seconds)
    finished.check()


def _commands(trial: Trial) -> list[dict[str, Any]]:
    """Return the records of the trial's commands."""
    return read_records(trial.folder / COMMANDS, "cpu_seconds")


def _record(trial: Trial, command: str, code: int, cpu_s: float, wall_s: float) -> None:
    record = {
        "command": command, "exit_code": code, "cpu_seconds": round(cpu_s, 2), "seconds": round(wall_s, 2),
        "code": code_checksum(),
    }  # fmt: skip
    with closing(MetricsWriter(trial.folder / COMMANDS)) as writer:
        writer.write(record)
