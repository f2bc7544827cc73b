"""Robustness of a run and its folder: signals, edits, damage, changed settings at a resume.

Each case is a command line, its exit code and its sentence.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml

from bigdssm.cluster.signals import STOPPED_EARLY_MESSAGE
from bigdssm.commands import evaluate, make_shards
from bigdssm.dataset.dataset import Dataset
from bigdssm.utils.hashing import json_checksum
from tests.distributed import small_run
from tests.e2e.warm import ROOT, Command

pytestmark = pytest.mark.e2e

STEPS = ("pretrain.steps=8", "pretrain.save_every_steps=4")
RESUME = ("--resume", "auto")
TABLES = {"interactions": "events", "items": "items", "users": "users"}  # of small_run


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run.write_dataset(tmp_path_factory.mktemp("folders"))


@pytest.fixture(autouse=True)
def logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIGDSSM_TEST_LOGS", str(tmp_path))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


@pytest.fixture(scope="module")
def finished(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of eight steps, with the checkpoints of steps 4 and 8."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BIGDSSM_TEST_LOGS", str(folder))
        patch.setenv("DS_ACCELERATOR", "cpu")
        done = pretrain(config, folder / "run", *STEPS).wait()
    assert done.code == 0, done.log
    return folder / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the run, to be damaged."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def pretrain(config: Path, folder: Path, *arguments: object, **options: Any) -> Command:
    return Command("pretrain", "--config", config, f"run.dir={folder}", *arguments, **options)


def refused(done: Command, code: int, words: str) -> None:
    """One sentence on rank 0, no traceback."""
    assert done.code == code, done.log
    assert len(done.errors) == 1 and re.search(words, done.errors[0]), done.log
    assert "Traceback" not in done.log


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "pretrain" / "events.jsonl").read_text().splitlines()]


def edited(old: str, new: str) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        content = (path / "manifest.json").read_text()
        assert old in content
        (path / "manifest.json").write_text(content.replace(old, new, 1))

    return edit


def renamed(path: Path) -> None:
    path.rename(path.with_name("step-00000009"))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (edited('"format": 1', '"format": 5'), "manifest.json is damaged: its content does not match its checksum"),
        (renamed, "step-00000009 was written as step-00000008; restore that name"),
    ],
    ids=["format", "folder"],
)
def test_an_edited_manifest_is_damage(config: Path, run: Path, damage: Callable[[Path], None], words: str) -> None:
    damage(run / "pretrain" / "checkpoints" / "step-00000008")
    done = pretrain(config, run, *STEPS, *RESUME).wait()
    assert done.code == 0, done.log
    assert f"{words}" in done.log and "continues from" in done.log and "step-00000004" in done.log


def test_a_checkpoint_of_another_version_is_refused_and_left(config: Path, run: Path) -> None:
    """It is not skipped like a damaged one: the run would start again and overwrite it."""
    for path in (run / "pretrain" / "checkpoints").glob("step-*/manifest.json"):
        content = json.loads(path.read_text())
        content = {key: content[key] for key in ("step", "world_size", "state")} | {"format": 2}
        path.write_text(json.dumps({"checksum": json_checksum(content), **content}))
    refused(pretrain(config, run, *STEPS, *RESUME).wait(), 4, "has format 2, this version reads 1; continue with")
    assert (run / "pretrain" / "checkpoints" / "step-00000008").is_dir()


def test_a_manifest_without_a_format_is_damage(config: Path, run: Path) -> None:
    (run / "pretrain" / "checkpoints" / "step-00000008" / "manifest.json").write_text("{}")
    done = pretrain(config, run, *STEPS, *RESUME).wait()
    assert done.code == 0 and "manifest.json is damaged: KeyError('checksum')" in done.log, done.log


def test_a_checkpoint_without_its_stage_is_refused_as_a_start(config: Path, run: Path, tmp_path: Path) -> None:
    path = tmp_path / "alone" / "checkpoints" / "step-00000008"
    shutil.copytree(run / "pretrain" / "checkpoints" / "step-00000008", path)
    words = "step-00000008 has only the weights: .*alone has neither"
    refused(pretrain(config, tmp_path / "new", f"pretrain.init={path}").wait(), 4, words)
    refused(
        pretrain(config, tmp_path / "new", f"pretrain.init={config}").wait(), 2, "which is a file; correct the path"
    )


def test_a_full_disk_error_names_the_file(config: Path, run: Path) -> None:
    (run / "pretrain" / "events.jsonl").unlink()
    (run / "pretrain" / "events.jsonl").symlink_to("/dev/full")
    refused(pretrain(config, run, *STEPS, *RESUME).wait(), 1, r"No space left on device: .*events\.jsonl")


@pytest.fixture
def small_disk(finished: Path, tmp_path: Path) -> Iterator[Path]:
    """A disk with space for two and a half checkpoints of the run."""
    checkpoint = sum(path.stat().st_size for path in (finished / "pretrain/checkpoints/step-00000008").iterdir())
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={int(2.5 * checkpoint) + 40_000}", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("this user may not mount a disk")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("background", ["true", "false"])
def test_a_disk_that_fills_up_is_a_checkpoint_error(config: Path, small_disk: Path, background: str) -> None:
    """Regardless of other failed writes; partial files are removed."""
    words = ("pretrain.save_every_steps=3", "pretrain.steps=1000", "pretrain.keep_checkpoints=9")
    words += ("debug.log_row_ids=true", f"engine.async_checkpoints={background}")
    done = pretrain(config, small_disk / "run", *words).wait()
    refused(done, 4, r"could not \w+ a checkpoint in .*No space left on device.*the last valid one is kept")
    assert events(small_disk / "run")[-1]["exit_code"] == 4
    checkpoints = small_disk / "run" / "pretrain" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", "step-00000003", "step-00000006"]


@pytest.mark.slow
def test_an_average_continued_over_new_rows_is_evaluated_by_its_own_vectors(tmp_path: Path) -> None:
    """Not with the weights that mined the negatives."""
    config, run = small_run.write_dataset(tmp_path), tmp_path / "run"
    common = ("--config", config, f"run.dir={run}")
    done = Command("pretrain", *common, "pretrain.steps=4").wait()
    assert done.code == 0, done.log
    drifting = ("sft.steps=6", "sft.weight_average=0.99", "sft.optimizer.lr=0.05", "sft.optimizer.warmup_steps=0")
    done = Command("sft", *common, *drifting).wait()
    assert done.code == 0, done.log
    events = [(user, (3 * user + 5 * time) % 48, time) for user in range(30) for time in range(9)]  # random
    lines = ["user_id\titem_id\ttimestamp", *(f"u{user}\ti{item}\t{10**6 + time}" for user, item, time in events)]
    (tmp_path / "events.tsv").write_text("\n".join(lines))
    words = ["interactions", "--config", str(config), "--append", "day2"]
    words += [f"--{name}={tmp_path / file}.tsv" for name, file in TABLES.items()]
    assert make_shards.main(words) == 0
    worse = "sft.optimizer.lr=5.0"  # by more than a standard error: best/ keeps the weights of the segment's start
    done = Command("sft", *common, *drifting, *RESUME, "data.from_partition=day2", worse).wait()
    assert done.code == 0, done.log
    _, _, first, last = small_run.validations(run, "sft")  # two of the old rows, two of the new ones
    assert first["ndcg_at_10"] > last["ndcg_at_10"], "best/ is not of the first"
    described = json.loads((tmp_path / "dataset" / "dataset.json").read_text())
    (tmp_path / "dataset" / "dataset.json").write_text(json.dumps({**described, "partitions": ["day2"]}))
    words = ["--model", str(run / "sft" / "best"), "--data", str(tmp_path / "dataset"), "--split", "validation"]
    assert evaluate.main([*words, "--out", str(tmp_path / "best.json")]) == 0
    measured = json.loads((tmp_path / "best.json").read_text())["systems"][0]["ndcg_at_10"]
    assert measured == pytest.approx(first["ndcg_at_10"], abs=1e-5)


@pytest.mark.slow
def test_edited_hard_negatives_are_refused(config: Path, run: Path) -> None:
    arguments = ("--config", config, f"run.dir={run}", "sft.save_every_steps=2")
    assert Command("sft", *arguments).wait().code == 0
    shutil.rmtree(run / "sft" / "checkpoints" / "step-00000004")
    mined = np.load(run / "sft" / "mined_negatives.npy")
    mined["window"] += 100_000
    np.save(run / "sft" / "mined_negatives.npy", mined)
    refused(Command("sft", *arguments, *RESUME).wait(), 3, "has no seal")
    refused(
        Command("sft", *arguments, *RESUME, "sft.steps=8").wait(), 2, "negatives were mined only for the rows of these"
    )


def test_extra_files_in_a_checkpoint_are_not_read(config: Path, run: Path) -> None:
    path = run / "pretrain" / "checkpoints" / "step-00000008"
    shutil.copy(path.with_name("step-00000004") / "tensors-00000.safetensors", path / "tensors-00009.safetensors")
    first = (run / "pretrain" / "best" / "model.safetensors").read_bytes()
    shutil.rmtree(run / "pretrain" / "best")
    assert pretrain(config, run, *STEPS, *RESUME).wait().code == 0
    assert (run / "pretrain" / "best" / "model.safetensors").read_bytes() == first


def test_changes_allowed_on_resume(config: Path, run: Path, tmp_path: Path) -> None:
    """Another path of the dataset, other limits: the run is resumed."""
    data = yaml.safe_load(config.read_text())["data"]["dir"]
    moved = shutil.copytree(data, tmp_path / "moved")
    shutil.rmtree(run / "pretrain" / "checkpoints" / "step-00000008")
    changed = (
        "data.max_bad_fraction=0.5",
        "data.cache_bytes=99",
        "data.tokenizer.lowercase=false",
    )
    relative = f"data.dir={os.path.relpath(moved, ROOT)}"
    done = pretrain(config, run, *STEPS, *RESUME, *changed, relative, "pretrain.max_skipped_steps=7").wait()
    assert done.code == 0, done.log
    assert "continues from" in done.log and events(run)[-1]["reason"] == "finished"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("run.seed=1", r"run\.seed was 0, is 1; resume needs the same \(docs/faults\.md"),
        ("pretrain.optimizer.lr=0.5", r"pretrain\.optimizer\.lr was 0\.01, is 0\.5"),
        ("model.query.numeric_dim=5", r"model\.query\.numeric_dim was 4, is 5"),
        ("pretrain.steps=7", r"got 7 steps, needs at least the previous 8: a resumed stage may become longer"),
    ],
)
def test_changes_refused_on_resume(config: Path, run: Path, override: str, words: str) -> None:
    refused(pretrain(config, run, *STEPS, *RESUME, override).wait(), 2, words)


def of_another_run(run: Path, other: Path) -> None:
    shutil.rmtree(run / "pretrain" / "checkpoints")
    shutil.copytree(other / "pretrain" / "checkpoints", run / "pretrain" / "checkpoints")


def without_identity(run: Path) -> None:
    (run / "pretrain" / "run_id").unlink()


def with_an_edited_config(run: Path) -> None:
    path = run / "pretrain" / "config.yaml"
    content = yaml.safe_load(path.read_text())
    content["pretrain"]["optimizer"]["weight_decay"] = 0.5
    path.write_text(yaml.safe_dump(content))


def test_checkpoints_of_another_run_are_refused(config: Path, run: Path, tmp_path: Path) -> None:
    """By their run id, and by their config if the folder has lost its id or its config was edited."""
    other = tmp_path / "other"
    assert pretrain(config, other, *STEPS, "pretrain.optimizer.weight_decay=0.02").wait().code == 0
    before = shutil.copytree(run, tmp_path / "before")
    of_another_run(run, other)
    content = sorted(path.read_bytes() for path in run.rglob("manifest.json"))
    words = rf"step-00000008 was written by another run \(\w+, in {other}\), needs one of this run \(\w+\); move it out"
    refused(pretrain(config, run, *STEPS, *RESUME).wait(), 4, words)
    assert sorted(path.read_bytes() for path in run.rglob("manifest.json")) == content, "nothing is lost"
    without_identity(run)
    words = r"was written with another config: pretrain\.optimizer\.weight_decay was 0\.02, is 0\.01; move it out"
    refused(pretrain(config, run, *STEPS, *RESUME).wait(), 4, words)
    with_an_edited_config(before)
    done = pretrain(config, before, *STEPS, *RESUME, "pretrain.optimizer.weight_decay=0.5").wait()
    refused(done, 4, r"was written with another config: pretrain\.optimizer\.weight_decay was 0\.01, is 0\.5")


def test_a_moved_run_resumes(config: Path, run: Path, tmp_path: Path) -> None:
    shutil.rmtree(run / "pretrain" / "checkpoints" / "step-00000008")
    identity = (run / "pretrain" / "run_id").read_text()
    without_identity(run)  # the checkpoints contain it
    moved = run.rename(tmp_path / "moved")
    done = pretrain(config, moved, *STEPS, *RESUME).wait()
    assert done.code == 0 and "continues from" in done.log, done.log
    assert (moved / "pretrain" / "run_id").read_text() == identity


def test_another_dataset_is_refused_by_its_fingerprint(config: Path, run: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    content = yaml.safe_load(small_run.write_dataset(tmp_path / "other").read_text())
    partition = Path(content["data"]["dir"]) / "partitions" / "base" / "partition.json"
    described = json.loads(partition.read_text())
    partition.write_text(json.dumps({**described, "fingerprint": "another"}))
    refused(
        pretrain(config, run, *STEPS, *RESUME, f"data.dir={content['data']['dir']}").wait(), 3,
        "cannot resume, because partition base has changed",
    )  # fmt: skip


@pytest.mark.slow
def test_a_finished_stage_may_be_trained_longer(config: Path, run: Path) -> None:
    done = pretrain(config, run, *RESUME, "pretrain.steps=12").wait()
    assert done.code == 0, done.log
    told = "takes 12 steps, previously 8: the learning rate follows the longer schedule from here on"
    assert told in done.log and [record["step"] for record in small_run.records(run)] == list(range(1, 13))
    assert (run / "pretrain" / "checkpoints" / "step-00000012").is_dir()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_training_ends_with_the_command_that_has_started_it(config: Path, tmp_path: Path, number: int) -> None:
    """As with tools.evidence: the run saves and releases the folder for the same command."""
    run = tmp_path / "run"
    arguments = ["pretrain", "--config", str(config), f"run.dir={run}", "pretrain.steps=1000000"]
    code = "import pathlib; from bigdssm.cluster.launcher import run_command as run; "
    code += f"run(pathlib.Path('{tmp_path}/log'), *{arguments})"
    starter = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    until, metrics = time.monotonic() + 120, run / "pretrain" / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < until:
        time.sleep(0.1)
    starter.send_signal(number)
    starter.wait()
    while events(run)[-1]["event"] != "end" and time.monotonic() < until:
        time.sleep(0.1)
    assert events(run)[-1]["exit_code"] == 75, (tmp_path / "log").read_text()
    assert [path.name[:5] for path in (run / "pretrain" / "checkpoints").iterdir() if path.is_dir()] == ["step-"]


def rows_by_step(folder: Path) -> dict[int, list[int]]:
    steps: dict[int, list[int]] = {}
    for path in (folder / "pretrain").glob("row_ids-*.jsonl"):
        for record in map(json.loads, path.read_text().splitlines()):
            steps.setdefault(record["step"], []).extend(record["row_ids"])
    return {step: sorted(ids) for step, ids in steps.items()}


def test_other_numbers_of_ranks_resume_with_the_same_rows(config: Path, tmp_path: Path) -> None:
    """Two ranks that stop in the middle of an epoch and of the loaders' prefetch, then one."""
    arguments = ("pretrain.steps=14", "debug.log_row_ids=true")
    whole = pretrain(config, tmp_path / "whole", *arguments).wait()
    assert whole.code == 0, whole.log
    run = tmp_path / "run"
    for ranks, fault, code in ((2, "term@7:1", 75), (1, "", 0)):
        resumed = pretrain(config, run, *arguments, "data.num_workers=1", *RESUME, ranks=ranks, fault=fault).wait()
        assert resumed.codes == [code] * ranks, resumed.log
    assert rows_by_step(run) == rows_by_step(tmp_path / "whole") and len(rows_by_step(run)) == 14
    for mine, theirs in zip(small_run.records(run), small_run.records(tmp_path / "whole"), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


def test_a_killed_loader_process_ends_the_run_at_once_with_its_own_text(config: Path, tmp_path: Path) -> None:
    arguments = ("pretrain.steps=1000000", "data.num_workers=1")
    run = pretrain(config, tmp_path / "run", *arguments, ranks=2, fault="kill-loader@3:1")
    run.wait_for("BIGDSSM_TEST_FAULT: kill-loader at step 3 on rank 1")
    assert run.wait(30).codes == [6, 6], run.log
    died = r"rank 1 cannot read \S+: a loader process died: pid \d+ was killed by SIGKILL"
    assert re.search(died, run.errors[0]), run.log
    end = json.loads((tmp_path / "run" / "pretrain" / "events.jsonl").read_text().splitlines()[-1])
    assert end["exit_code"] == 6 and re.search(died, end["reason"])


def test_a_signal_before_the_first_step_ends_a_blocked_run(config: Path, tmp_path: Path) -> None:
    """The run waits for a second rank that never starts; no exception could interrupt the main thread."""
    alone = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29555"}
    for number in (signal.SIGTERM, signal.SIGINT):
        waiting = pretrain(config, tmp_path / "run", env=alone)
        time.sleep(1.0)
        os.kill(waiting.pids[0], number)
        assert waiting.wait(10).code == 75, waiting.log
        assert waiting.log == f"{STOPPED_EARLY_MESSAGE}\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_signal_before_the_first_step_ends_the_other_ranks(config: Path, tmp_path: Path) -> None:
    """During mining, when rank 0 has recorded only its start."""
    assert pretrain(config, tmp_path / "run", *STEPS).wait().code == 0
    arguments = ("--config", config, f"run.dir={tmp_path}/run", "sft.steps=1000000", "engine.peer_timeout_s=5")
    mining = Command("sft", *arguments, ranks=2).wait_for("mining negatives")
    os.kill(mining.pids[1], signal.SIGTERM)
    codes = mining.wait(30).codes
    assert codes[1] == 75 and codes[0] in (6, 75), mining.log  # 6 if rank 1 ended first, 75 after a collective stop
    end = json.loads((tmp_path / "run" / "sft" / "events.jsonl").read_text().splitlines()[-1])
    assert end["exit_code"] == codes[0] and "stopped on request" in end["reason"]


@pytest.mark.parametrize(("rows", "words"), [(10**12 + 2, r"at most 1,048,576"), (64 * 891 + 6, r"at most 57024 .*64")])
def test_more_rows_per_step_than_the_dataset_has(config: Path, tmp_path: Path, rows: int, words: str) -> None:
    done = pretrain(config, tmp_path / "run", f"pretrain.rows_global={rows}", "--validate").wait(20)
    refused(done, 2, rf"pretrain\.rows_global: got {rows}, needs .*{words}")


@pytest.mark.slow
def test_the_largest_weights_of_a_mixture_and_one_beyond(config: Path, tmp_path: Path) -> None:
    data = shutil.copytree(yaml.safe_load(config.read_text())["data"]["dir"], tmp_path / "data")
    described = json.loads((data / "dataset.json").read_text())
    (data / "dataset.json").write_text(json.dumps({**described, "partitions": ["base", "day2"]}))
    shutil.copytree(data / "partitions" / "base", data / "partitions" / "day2")
    huge = "data.mixture=[{partitions: [base], weight: 1e9}, {partitions: [day2], weight: 1e9}]"
    arguments = (*STEPS, "data.lanes=6", "pretrain.sampling.name=none")
    done = pretrain(config, tmp_path / "run", *arguments, f"data.dir={data}", huge.replace("1e9", "1e308", 1)).wait()
    refused(done, 2, r"data\.mixture\[0\]\.weight: got 1e\+308, needs above 0 and at most")
    done = pretrain(config, tmp_path / "run", *arguments, f"data.dir={data}", huge).wait()
    assert done.code == 0 and "loss 0.0000" not in done.log, done.log
    named = huge.replace("{partitions: [base]", f"{{dir: {data}, partitions: [base]")
    longer = ("pretrain.steps=10", f"data.dir={os.path.relpath(data, ROOT)}", named)  # another path of the same folder
    done = pretrain(config, tmp_path / "run", *arguments, *RESUME, *longer).wait()
    assert done.code == 0 and "continues from" in done.log, done.log


def test_relevances_of_zero_are_refused(config: Path, tmp_path: Path) -> None:
    data = shutil.copytree(yaml.safe_load(config.read_text())["data"]["dir"], tmp_path / "data")
    none = pa.table({"doc": pa.array([], pa.int64()), "count": pa.array([], pa.int64())})
    with pa.ipc.new_file(data / "partitions" / "base" / "counts.arrow", none.schema) as file:
        file.write_table(none)
    refused(pretrain(config, tmp_path / "run", f"data.dir={data}").wait(), 3, "no train row has a relevance above 0")


def test_no_score_is_logged_without_a_validation_split(config: Path, tmp_path: Path) -> None:
    data = shutil.copytree(yaml.safe_load(config.read_text())["data"]["dir"], tmp_path / "data")
    path = data / "partitions" / "base" / "partition.json"
    content = json.loads(path.read_text())
    del content["splits"]["validation"]
    path.write_text(json.dumps(content))
    done = pretrain(config, tmp_path / "run", f"data.dir={data}", *STEPS).wait()
    assert done.code == 0 and "NDCG" not in done.log, done.log
    assert "pretrain finished: no validation split, the newest weights are the best, at step 8" in done.log
    meta = json.loads((tmp_path / "run" / "pretrain" / "best" / "bigdssm.json").read_text())
    assert meta["provenance"]["step"] == 8 and meta["provenance"]["validation"] is None


@pytest.mark.slow
def test_a_rank_that_ends_for_a_dead_peer_notes_its_end(config: Path, tmp_path: Path) -> None:
    """Killed or stopped in a step: the watchdog ends rank 0, whose main thread waits in a collective."""
    arguments = ("pretrain.steps=100000", "pretrain.log_every_steps=100000", "engine.peer_timeout_s=5")
    for fault, words in (
        ("kill@9:1", "rank 1 .* has ended without an error message"),
        ("stop@9:1", r"rank 1 .* has been stopped"),
    ):
        folder = tmp_path / fault[:4]
        done = pretrain(config, folder, *arguments, ranks=2, fault=fault).wait(60)
        assert done.code == 6, done.log
        assert events(folder)[-1]["event"] == "end" and events(folder)[-1]["exit_code"] == 6
        assert re.search(words, events(folder)[-1]["reason"])


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"run: {dir: x}\nmodel: 3\n"])
def test_a_damaged_config_in_a_run_folder_gives_a_one_line_error(config: Path, run: Path, content: bytes) -> None:
    (run / "pretrain" / "config.yaml").write_bytes(content)
    refused(pretrain(config, run, *STEPS, *RESUME).wait(), 4, r"config\.yaml does not load; .* restore it")


@pytest.mark.slow
def test_intact_lines_of_damaged_record_files_are_retained(config: Path, run: Path) -> None:
    names = ("metrics", "events", "row_ids-00000", "skipped_rows-00000", "alerts-00000")
    for name in names:
        path = run / "pretrain" / f"{name}.jsonl"
        path.touch()
        path.write_bytes(b'\xff\xfe\n{"stop": 1}\n[1, 2]\n3\n' + path.read_bytes() + b'{"step": 1, "lo')
    done = pretrain(config, run, *STEPS, *RESUME, "debug.log_row_ids=true").wait()
    assert done.code == 0, done.log
    assert [record["step"] for record in small_run.records(run)] == list(range(1, 9))
    assert all(f"{name}.jsonl: skipped line 2, which is no record" in done.log for name in names if name != "events")
    watch = [sys.executable, "tools/watch_run.py", str(run), "--once"]
    shown = subprocess.run(watch, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0 and "ended with exit code 0" in shown.stdout, shown.stderr


@pytest.mark.slow
def test_a_finished_run_writes_its_best_again(config: Path, run: Path) -> None:
    weights = run / "pretrain" / "best" / "model.safetensors"
    before = weights.read_bytes()
    shutil.rmtree(weights.parent)
    done = pretrain(config, run, *STEPS, *RESUME).wait()
    assert done.code == 0 and "best/ of step 8 is missing" in done.log, done.log
    assert weights.read_bytes() == before


def test_validate_checks_the_config_before_the_folder(config: Path, run: Path) -> None:
    refused(pretrain(config, run, "--validate", "pretrain.init=/nowhere").wait(), 2, "/nowhere, which does not exist")
    done = pretrain(config, run, "--validate").wait()
    refused(done, 4, r"is not empty; continue with --resume auto")
    assert "pretrain is valid" in done.log


def test_overrides_may_precede_and_follow_options(config: Path, tmp_path: Path) -> None:
    done = Command(
        "pretrain", "pretrain.steps=2", "--config", config, f"run.dir={tmp_path}/run", "--validate", "run.seed=5"
    )
    assert done.wait().code == 0 and "2 steps" in done.log, done.log


def test_too_many_bad_rows_are_reported_with_their_reasons(config: Path, tmp_path: Path) -> None:
    data = shutil.copytree(yaml.safe_load(config.read_text())["data"]["dir"], tmp_path / "data")
    (shard,) = (data / "partitions" / "base").glob("train-*.tar")
    content = bytearray(shard.read_bytes())
    for offset in Dataset.open(data).index("train").offset.tolist():
        content[offset + 100] ^= 1
    shard.write_bytes(content)
    done = pretrain(config, tmp_path / "run", f"data.dir={data}").wait()
    assert "see " in done.log and "quarantine-00000.jsonl" in done.log
    refused(done, 3, r"more than data\.max_bad_fraction=0\.001 allows \(\d+\): .*checksum.* \(\d+ rows\); see ")
