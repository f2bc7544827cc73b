"""Compare two runs: config, versions, data, and results with 95 % confidence intervals.

    bigdssm compare_runs A B [--stage sft] [--split test]

A and B are run folders or stage folders. Run folders are compared at the last stage that both contain. The best models
of both are evaluated on the same rows: those of A's dataset, or of --data.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import yaml
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Column, Table

from bigdssm.checkpoints.model_folder import load_model_folder
from bigdssm.cli import command, option
from bigdssm.cluster.metrics import CONFIG_FILE, flatten, read_stage, selection_score, stage_folders
from bigdssm.cluster.run_folder import read_events
from bigdssm.config import without_former_defaults
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.remote import FileCache
from bigdssm.dataset.rows import EventRules
from bigdssm.errors import BigDSSMError, DataError
from bigdssm.evaluation.comparison import System, differences, model_system, table
from bigdssm.utils.log import Progress, ProgressBar, metric_label, no_progress

ABSENT = "—"


@command(
    option("a", type=Path, metavar="A", help="run or stage folder"),
    option("b", type=Path, metavar="B", help="run or stage folder to compare with"),
    option(
        "--stage", choices=["pretrain", "sft"], help="stage to compare (default: the last stage that both runs contain)"
    ),
    option("--split", default="validation", help="split of the dataset (default: %(default)s)"),
    option("--data", help="dataset folder or URL (default: the dataset of A)"),
)
def main(args: argparse.Namespace) -> None:
    """Run the command line."""
    with ProgressBar() as progress:
        comparison = compare(args.a, args.b, args.stage, args.split, args.data, progress)
    console = Console()
    print(f"A  {args.a}\nB  {args.b}\nstage {comparison.stage}\n")
    for title, rows in comparison.parts.items():
        if not rows:
            print(f"{title}: identical\n")
            continue
        columns = [Column(header, overflow="fold") for header in ("", "A", "B")]
        drawn = Table(*columns, title=title, title_justify="left", box=SIMPLE, show_edge=False, pad_edge=False)
        for row in rows:
            drawn.add_row(*row)
        console.print(drawn)
    if comparison.systems is None:
        print(f"results not measured: {comparison.skip_reason}")
        return
    a, b = comparison.systems
    console.print(table([a, b], f"{args.split}, {len(a.values['mrr'])} rows"))
    for line in differences([(b, a)]):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


@dataclass(frozen=True)
class Comparison:
    """The comparison of two stages."""

    stage: str
    # (property, value of A, value of B) by title; of `training` (steps, speed, restarts, best validation) all, of the
    # others those that differ.
    parts: dict[str, list[tuple[str, str, str]]]
    systems: tuple[System, System] | None  # evaluated on the same rows
    skip_reason: str  # why `systems` is None


def compare(
    a: Path, b: Path, stage: str | None, split: str, data: str | None, progress: Progress = no_progress
) -> Comparison:
    """Compare a stage of two runs, by default the last common one; `data` overrides the runs' dataset.

    Raises DataError: a folder is not a run, or the runs have no such stage in common.
    """
    folders_a, folders_b = ({folder.name: folder for folder in stage_folders(run)} for run in (a, b))
    common = [name for name in folders_a if name in folders_b]
    if len(folders_a) == len(folders_b) == 1 and stage is None:  # two stage folders may have any names
        pair = (next(iter(folders_a.values())), next(iter(folders_b.values())))
    elif not common or (stage is not None and stage not in common):
        raise DataError(f"{a} has {', '.join(folders_a)} and {b} has {', '.join(folders_b)}: no stage to compare")
    else:
        pair = (folders_a[stage or common[-1]], folders_b[stage or common[-1]])
    parts = {}
    properties_a, properties_b = map(_properties, pair)
    for title, of_a in properties_a.items():
        of_b = properties_b[title]
        values = [(key, of_a.get(key, ABSENT), of_b.get(key, ABSENT)) for key in {**of_a, **of_b}]
        parts[title] = [row for row in values if title == "training" or row[1] != row[2]]

    # Both models on the same rows.
    systems, reason = [], ""
    try:
        models = [load_model_folder(folder / "best") for folder in pair]
        config = models[0].config.data
        dataset = Dataset.open(data or config.dir, cache=FileCache.from_config(config))
        dataset = dataset.with_rules(EventRules.of(config))
        if dataset.num_rows(split) == 0:
            reason = f"{dataset.dir} has no rows in split {split}"
        else:
            for name, model in zip("AB", models, strict=True):
                systems.append(model_system(name, model, dataset, split, config.exclude_seen, progress=progress))
    except BigDSSMError as error:
        reason = str(error)
    return Comparison(pair[0].name, parts, None if reason else (systems[0], systems[1]), reason)


def _properties(folder: Path) -> dict[str, dict[str, str]]:
    """Return the compared properties of a stage, by the title of their table."""
    config = without_former_defaults(yaml.safe_load((folder / CONFIG_FILE).read_text(encoding="utf-8")))
    try:
        fingerprint = str(load_model_folder(folder / "best").provenance.get("dataset", ABSENT))
    except BigDSSMError:
        fingerprint = ABSENT
    events = read_events(folder)
    starts = [event for event in events if event["event"] == "start"]
    records = read_stage(folder)
    train = [record for record in records if "loss" in record]
    speeds = sorted(record["rows_per_s"] for record in train if record.get("rows_per_s"))
    validations = [record for record in records if "validation" in record]
    name = f" {metric_label(validations[-1]['selected_by'])}" if validations else ""
    scores = [score for record in validations if (score := selection_score(record)) is not None]
    return {
        "config": {key: str(value) for key, value in flatten(config, ".").items()},
        "versions": starts[-1]["versions"] if starts else {},
        "data": {"dataset": config["data"]["dir"], "fingerprint": fingerprint},
        "training": {
            "last step": str(records[-1]["step"]) if records else "0",
            "last loss": f"{train[-1]['loss']:.4f}" if train else ABSENT,
            f"best validation{name}": f"{max(scores):.4f}" if validations else ABSENT,
            "rows/s (median)": f"{speeds[len(speeds) // 2]:,.0f}" if speeds else ABSENT,
            "ranks": str(starts[-1]["ranks"]) if starts else ABSENT,
            "starts": str(len(starts)),
            "ended": str(events[-1]["reason"]) if events and events[-1]["event"] == "end" else "no",
        },
    }


if __name__ == "__main__":
    raise SystemExit(main())
