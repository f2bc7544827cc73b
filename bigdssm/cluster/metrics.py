"""Metrics of a run: write them to metrics.jsonl and trackers, read them as curves, plot them."""

import importlib.util
import itertools
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from bigdssm import distributed
from bigdssm.config import Config, StageName, load_written_config
from bigdssm.config.components import STAGES
from bigdssm.errors import ConfigError, DataError
from bigdssm.utils.atomic import new_file
from bigdssm.utils.log import MetricsWriter, metric_label, read_records, truncate_records

METRICS_FILE, CONFIG_FILE = "metrics.jsonl", "config.yaml"


class Trackers:
    """Metric writers of rank 0; all methods do nothing on other ranks."""

    def __init__(
        self, folder: Path, config: Config, step: int = 0, num_validations: int = 0, *, cpu: bool = True
    ) -> None:
        """Open `folder`/metrics.jsonl and the trackers of `config.run.trackers`.

        Records after the resumed checkpoint (`step` steps, `num_validations` validations) are removed from the file,
        because the run writes them again. TensorBoard also discards later records (`purge_step`); other trackers keep
        them. cpu: the ranks compute on the CPU.
        """
        self._metrics: MetricsWriter | None = None
        self._trackers: list[Any] = []
        if config.run.trackers:  # trackers determine the main process from accelerate's state
            with warnings.catch_warnings():  # accelerate's advice on OMP_NUM_THREADS
                warnings.filterwarnings("ignore", "OMP_NUM_THREADS", UserWarning)
                PartialState(cpu=cpu)
        if distributed.is_main():
            validations = itertools.count()

            def keep(record: dict[str, Any]) -> bool:
                if "validation" in record:
                    return next(validations) < num_validations
                return bool(record["step"] <= step)

            truncate_records(folder / METRICS_FILE, keep)
            self._metrics = MetricsWriter(folder / METRICS_FILE)
            classes = {str(key): tracker for key, tracker in LOGGER_TYPE_TO_CLASS.items()}
            for name in config.run.trackers:
                if classes[name].requires_logging_directory:
                    purged = {"purge_step": step + 1} if name == "tensorboard" else {}
                    tracker = classes[name](name, logging_dir=folder, **purged)
                else:
                    tracker = classes[name](f"{folder.parent.name}-{folder.name}")
                tracker.start()
                tracker.store_init_configuration(flatten(config.to_dict()))
                self._trackers.append(tracker)

    def log(self, record: dict[str, Any]) -> None:
        """Append a record to the file, and send its numbers to the trackers, with nested keys joined by "/"."""
        if self._metrics is None:
            return
        self._metrics.write(record)
        values = {
            key: value for key, value in flatten(record).items() if isinstance(value, int | float) and key != "step"
        }
        for tracker in self._trackers:
            tracker.log(values, step=record["step"])

    def close(self) -> None:
        """Close the file and the trackers."""
        if self._metrics is not None:
            self._metrics.close()
        for tracker in self._trackers:
            tracker.finish()


def check_trackers(names: Sequence[str]) -> None:
    """Raise ConfigError for an unknown tracker, or one whose package is not installed."""
    supported = sorted(str(key) for key in LOGGER_TYPE_TO_CLASS)
    for name in names:
        if name not in supported:
            raise ConfigError(f"run.trackers: got {name!r}, needs names from {supported}")
        if importlib.util.find_spec(name) is None:  # a tracker has the name of its package
            raise ConfigError(
                f"run.trackers: {name} is not installed; pip install {name}, or remove it from run.trackers"
            )


def flatten(values: dict[str, Any], separator: str = "/", prefix: str = "") -> dict[str, Any]:
    """Flatten nested dicts, joining keys with `separator`; values other than numbers, bools and strings become str."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            result |= flatten(value, separator, f"{prefix}{key}{separator}")
        else:
            result[prefix + key] = value if isinstance(value, int | float | str | bool) else str(value)
    return result


def stage_folders(run: Path) -> list[Path]:
    """Return the stage folders of a run folder, or `run` if it is a stage folder. Raises DataError for neither."""
    if (run / METRICS_FILE).is_file():
        return [run]
    folders = [run / stage for stage in STAGES if (run / stage / METRICS_FILE).is_file()]
    if not folders:
        raise DataError(
            f"{run} contains no {METRICS_FILE}, nor do its subfolders {' and '.join(STAGES)}; is it a run folder?"
        )
    return folders


def read_stage(folder: Path) -> list[dict[str, Any]]:
    """Read the last record per step, in step order; incomplete lines (of a killed process) are skipped."""
    train: dict[int, dict[str, Any]] = {}
    validation: dict[int, dict[str, Any]] = {}
    for record in read_records(folder / METRICS_FILE, "step"):
        (validation if "validation" in record else train)[int(record["step"])] = record
    return sorted([*train.values(), *validation.values()], key=lambda record: record["step"])


def training_seconds(folder: Path) -> float:
    """Estimate the duration of a stage's training and validation in seconds, from its recorded speeds."""
    stage: StageName = "sft" if folder.name == "sft" else "pretrain"
    rows_global = load_written_config(folder / CONFIG_FILE).stage(stage).rows_global
    seconds, before = 0.0, 0
    for record in read_stage(folder):
        if "validation" in record:
            seconds += record.get("seconds", 0.0)
        elif record.get("rows_per_s"):
            seconds += (record["step"] - before) * rows_global / record["rows_per_s"]
            before = record["step"]
    return seconds


def selection_score(record: dict[str, Any]) -> float | None:
    """Return the metric that selects best/ from a validation record; None for other records."""
    return float(record["validation"][record["selected_by"]]) if "validation" in record else None


PANELS: tuple[tuple[str, Callable[[dict[str, Any]], Any]], ...] = (
    ("loss", lambda record: record.get("loss")),
    ("validation", selection_score),
    ("alpha (scale of the score)", lambda record: record.get("alpha")),
    ("training speed [rows/s]", lambda record: record.get("rows_per_s")),
)


def plot_runs(runs: Sequence[Path], out: Path) -> None:
    """Plot the curves of run folders (or stage folders) into the image file `out`. Raises DataError."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import EngFormatter, MaxNLocator

    # a run is named by its folder, with its parent's name if names repeat
    paths = [run.resolve() for run in runs]
    names = [path.name for path in paths]
    labels = [
        name if names.count(name) == 1 else f"{path.parent.name}/{name}"
        for path, name in zip(paths, names, strict=True)
    ]
    curves = {
        label: {folder.name: read_stage(folder) for folder in stage_folders(run)}
        for label, run in zip(labels, runs, strict=True)
    }
    with rc_context({"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3}):
        figure = Figure(figsize=(11, 7), layout="constrained")
        axes = figure.subplots(2, 2, sharex=True)
        for axis, (label, value) in zip(axes.flat, PANELS, strict=True):
            for number, stages in enumerate(curves.values()):
                color, offset = f"C{number}", 0
                # consecutive stages have a gap between them: their losses are not comparable
                for stage, records in stages.items():
                    steps = [record["step"] for record in records if value(record) is not None]
                    values = [value(record) for record in records if value(record) is not None]
                    marker = "o" if len(steps) < 40 else ""
                    axis.plot([offset + step for step in steps], values, color=color, marker=marker, ms=3, lw=1.5)
                    if stage != next(iter(stages)):
                        axis.axvline(offset, color=color, ls="--", lw=1, alpha=0.7)
                        transform = axis.get_xaxis_transform()
                        axis.text(offset, 1.0, f" {stage}", transform=transform, color=color, va="top", fontsize=8)
                    offset += max((record["step"] for record in records), default=0)
            if value is selection_score:  # for example `validation NDCG@10`, with all metrics that select best/
                records = [record for stages in curves.values() for stage in stages.values() for record in stage]
                metrics = {metric_label(record["selected_by"]) for record in records if "validation" in record}
                label = " ".join(["validation", *sorted(metrics)])
            axis.set_ylabel(label)
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes[0, 0].set_ylim(bottom=0)
        axes[1, 1].set_ylim(bottom=0)
        axes[1, 1].yaxis.set_major_formatter(EngFormatter())
        several = any(len(stages) > 1 for stages in curves.values())
        for axis in axes[1]:
            axis.set_xlabel("step (consecutive stages)" if several else "step")
        if len(curves) > 1:
            handles = [Line2D([], [], color=f"C{number}") for number in range(len(curves))]
            figure.legend(handles, list(curves), loc="outside upper center", ncols=min(len(curves), 4), frameon=False)
        else:
            figure.suptitle(next(iter(curves)))
        out.parent.mkdir(parents=True, exist_ok=True)
        with new_file(out) as temporary:
            figure.savefig(temporary, format=out.suffix.removeprefix("."), dpi=120)
