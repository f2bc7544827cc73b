"""Monitoring and comparison of runs: watch_run, compare_runs, trackers."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from bigdssm.checkpoints.model_folder import save_model_folder
from bigdssm.cluster.metrics import Trackers, check_trackers
from bigdssm.cluster.monitor import read_run_state, sparkline
from bigdssm.cluster.run_folder import FolderLock
from bigdssm.commands.compare_runs import compare
from bigdssm.config import load_config
from bigdssm.dataset.dataset import Dataset
from bigdssm.errors import ConfigError, DataError
from bigdssm.models import new_model
from tests.command_line import Tools
from tests.conftest import TinyDataset

ROOT = Path(__file__).resolve().parents[3]
START = {"event": "start", "step": 0, "total_steps": 40, "ranks": 2, "versions": {"torch": "2.13.0", "code": "abc"}}


def write_stage(run: Path, *, end: dict[str, object] | None, losses: list[float]) -> Path:
    """Write the files of a stage except its model."""
    folder = run / "pretrain"
    folder.mkdir(parents=True)
    records: list[dict[str, object]] = [
        {"step": step, "loss": loss, "rows_per_s": 100.0 * step, "dropped_fraction": 0.25, "memory_gb": 0.5}
        for step, loss in enumerate(losses, 1)
    ]
    records.append(
        {"step": len(losses), "validation": {"ndcg_at_10": 0.125}, "selected_by": "ndcg_at_10", "seconds": 1.0}
    )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    events = [START] + ([end] if end else [])
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder


def test_a_run_that_ended_is_shown_with_its_end(tools: Tools, tmp_path: Path) -> None:
    end = {"event": "end", "exit_code": 75, "reason": "stopped on request after step 20, saved"}
    folder = write_stage(tmp_path, end=end, losses=[4.0 - 0.1 * step for step in range(20)])
    alert = {"step": 7, "loss": 40.0, "usual": 3.5, "row_ids": [1]}
    for rank in (0, 1):
        (folder / f"alerts-{rank:05d}.jsonl").write_text(json.dumps(alert) + "\n")
    seen = read_run_state(tmp_path)
    assert seen.ended and (seen.step, seen.total_steps) == (20, 40)
    assert seen.state == "ended with exit code 75: stopped on request after step 20, saved"
    assert seen.curves["loss"][0] == 4.0 and seen.curves["validation NDCG@10"] == [0.125]
    assert seen.figures == {"dropped": "25.0 %", "memory gb": "0.5"}
    assert len(seen.alerts) == 1 and "alert at step 7: loss 40, usually 3.5" in seen.alerts[0]
    shown = tools.ran("watch_run", tmp_path, "--once")
    assert "step 20 of 40" in shown and "█" in shown and "alert at step 7" in shown


def test_a_run_that_trains_and_one_that_was_killed(tmp_path: Path) -> None:
    folder = write_stage(tmp_path, end=None, losses=[4.0])
    assert read_run_state(tmp_path).state.startswith("ended without an end record") and read_run_state(tmp_path).ended
    script = "import sys\nfrom bigdssm.cluster.monitor import read_run_state\nfrom pathlib import Path\n"
    script += "seen = read_run_state(Path(sys.argv[1]))\nprint(seen.state, seen.ended)"
    with FolderLock(folder):
        done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.startswith(f"trains: pid {os.getpid()} on ") and done.stdout.endswith("False\n"), done.stderr
    with pytest.raises(DataError, match="is it a run folder"):
        read_run_state(tmp_path / "nothing")


def test_sparklines() -> None:
    assert sparkline([0.0, 7.0], 40) == "▁█"
    assert sparkline([1.0] * 3, 2) == "▁▁"
    assert sparkline(list(map(float, range(800))), 8) == "▁▂▃▄▅▆▇█"


@pytest.mark.slow
def test_two_runs_are_compared_in_all_they_differ_in(
    tools: Tools,
    tmp_path: Path,
    tiny_pairs: TinyDataset,
) -> None:
    import torch

    dataset = Dataset.open(tiny_pairs.dir)
    for seed, name in enumerate(("first", "second")):
        folder = write_stage(tmp_path / name, end={"event": "end", "exit_code": 0, "reason": "finished"}, losses=[4.0])
        config = load_config(tiny_pairs.config, [f"run.dir={tmp_path / name}", f"pretrain.rows_global={256 << seed}"])
        content = config.to_dict()
        if name == "first":  # of an earlier version: a removed key at its former default is no difference
            content["pretrain"]["negatives"]["refresh_every_steps"] = 0
        (folder / "config.yaml").write_text(yaml.safe_dump(content))
        torch.manual_seed(seed)
        model = new_model(config.model, dataset.schema, dataset.vocab_size)
        provenance = {"dataset": dataset.fingerprint}
        save_model_folder(folder / "best", model, config, dataset.schema, dataset.tokenizer_dir, provenance)
    events = (tmp_path / "second" / "pretrain" / "events.jsonl").read_text()
    (tmp_path / "second" / "pretrain" / "events.jsonl").write_text(events.replace("2.13.0", "2.14.0"))
    found = compare(tmp_path / "first", tmp_path / "second", None, "validation", None)
    assert [row for row in found.parts["config"] if row[0] != "run.dir"] == [("pretrain.rows_global", "256", "512")]
    assert found.parts["versions"] == [("torch", "2.13.0", "2.14.0")]
    assert found.parts["data"] == [] and found.skip_reason == ""
    assert found.systems is not None
    assert found.systems[0].difference(found.systems[0], "mrr").mean == 0
    assert found.systems[0].difference(found.systems[1], "mrr").mean != 0
    shown = tools.ran("compare_runs", tmp_path / "first", tmp_path / "second")
    for text in ("pretrain.rows_global", "2.14.0", "data: identical", "B − A: ", "finished"):
        assert text in shown, shown
    with pytest.raises(DataError, match="no stage to compare"):
        compare(tmp_path / "first", tmp_path / "second", "sft", "validation", None)


def test_a_missing_dataset_leaves_the_rest_of_the_comparison(
    tools: Tools,
    tmp_path: Path,
    tiny_pairs: TinyDataset,
) -> None:
    for name in ("first", "second"):
        folder = write_stage(tmp_path / name, end=None, losses=[4.0])
        config = load_config(tiny_pairs.config, [f"run.dir={tmp_path / name}"])
        (folder / "config.yaml").write_text(yaml.safe_dump(config.to_dict()))
    found = compare(tmp_path / "first", tmp_path / "second", None, "validation", None)
    assert found.systems is None and "is not a model folder" in found.skip_reason
    assert "results not measured:" in tools.ran("compare_runs", tmp_path / "first", tmp_path / "second")


def test_trackers_are_known_by_name_and_must_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else find_spec(name))
    check_trackers(["tensorboard"])
    with pytest.raises(ConfigError, match=r"got 'wandbb', needs names from .*'mlflow'.*'trackio'.*'wandb'"):
        check_trackers(["wandbb"])
    with pytest.raises(ConfigError, match=r"run.trackers: wandb is not installed"):
        check_trackers(["tensorboard", "wandb"])


def test_metrics_are_truncated_to_the_resumed_checkpoint(tmp_path: Path, tiny_pairs: TinyDataset) -> None:
    """The checkpoint of step 3 contains one validation; a second one of that step was not saved."""
    config = load_config(tiny_pairs.config, ["run.trackers=[]"])
    lines = [json.dumps({"step": step, "loss": 0.5}) for step in range(1, 6)]
    for place, step in ((3, 3), (4, 3), (7, 5)):
        lines.insert(
            place,
            json.dumps(
                {"step": step, "validation": {"ndcg_at_10": place / 8}, "selected_by": "ndcg_at_10", "seconds": 1.0}
            ),
        )
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 6, "lo')
    trackers = Trackers(tmp_path, config, step=3, num_validations=1)
    trackers.log({"step": 4, "loss": 0.25})
    trackers.close()
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == [*lines[:4], '{"step": 4, "loss": 0.25}']
    Trackers(tmp_path, config).close()
    assert (tmp_path / "metrics.jsonl").read_text() == "", "without a checkpoint the run begins anew"


def test_tensorboard_shows_the_steps_after_the_resumed_checkpoint_once(tmp_path: Path, tiny_pairs: TinyDataset) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = load_config(tiny_pairs.config, ["run.trackers=[tensorboard]"])
    for begun, losses in ((0, [5.0, 4.0, 3.0, 2.0]), (2, [3.5, 2.5, 1.5])):
        trackers = Trackers(tmp_path, config, step=begun)
        for step, loss in enumerate(losses, begun + 1):
            trackers.log({"step": step, "loss": loss})
            if begun == 0 and step == 4:
                trackers.log({"step": 4, "only_before": 1.0})
        trackers.close()
    seen = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    found = [(event.step, event.value) for event in seen.Scalars("loss")]
    assert found == [(1, 5.0), (2, 4.0), (3, 3.5), (4, 2.5), (5, 1.5)]
    assert seen.Scalars("only_before") == []
