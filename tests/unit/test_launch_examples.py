"""Cluster examples in launch/: linted, valid against published models, run with stubs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
SBATCH = ROOT / "launch" / "slurm.sbatch"

# Runs the command once for each task, like srun, and exits with the highest code; each task's code is in CODES.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
echo "srun with ${SRUN_CPUS_PER_TASK:-no} cpus per task" >&2
highest=0 task=0
for code in $CODES; do
    STUB_CODE=$code SLURM_PROCID=$task SLURM_LOCALID=$((task % 2)) SLURM_NTASKS=4 SLURM_JOB_NUM_NODES=2 "$@"
    [ $? -gt $highest ] && highest=$code
    task=$((task + 1))
done
exit $highest
"""
SCONTROL = """#!/bin/bash
if [ "$1 $2" = "show hostnames" ]; then printf 'node7\\nnode8\\n'; else echo "$@" >> "$CALLS"; fi
"""
PYTHON = """#!/bin/bash
echo "$RANK/$WORLD_SIZE local $LOCAL_RANK/$LOCAL_WORLD_SIZE at $MASTER_ADDR:$MASTER_PORT: $*"
exit $STUB_CODE
"""


@pytest.fixture
def stand_ins(tmp_path: Path) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("python", PYTHON)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


def sbatch(
    stand_ins: Path, codes: str, *arguments: str, restarts: int = 0, **variables: str
) -> tuple[subprocess.CompletedProcess[str], str]:
    """Return the finished job script and the calls of scontrol."""
    calls = stand_ins / "calls"
    environment = {
        "PATH": f"{stand_ins}{os.pathsep}{os.environ['PATH']}", "CODES": codes, "CALLS": str(calls),
        "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_ID": "4711", "SLURM_RESTART_COUNT": str(restarts),
        "SLURM_SUBMIT_DIR": str(ROOT), **variables,
    }  # fmt: skip
    command = ["bash", str(SBATCH), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)
    asked = calls.read_text() if calls.exists() else ""
    calls.unlink(missing_ok=True)
    return done, asked


@pytest.mark.parametrize(
    ("codes", "restarts", "expected", "requeued"),
    [
        ("0 0 0 0", 0, 0, False),
        ("75 75 75 75", 50, 0, True),
        ("6 6 6 6", 3, 0, True),
        ("6 137 6 6", 3, 0, True),
        ("6 137 6 6", 10, 137, False),
        ("2 2 2 2", 0, 2, False),
        ("3 3 3 3", 0, 3, False),
        ("5 5 5 5", 0, 5, False),
        ("1 1 1 1", 0, 1, False),
    ],
)
def test_a_job_goes_back_into_the_queue_where_that_helps(
    stand_ins: Path, codes: str, restarts: int, expected: int, requeued: bool
) -> None:
    done, asked = sbatch(stand_ins, codes, "my.yaml", restarts=restarts)
    assert done.returncode == expected, done.stderr
    assert asked == ("requeue 4711\n" if requeued else "")


def test_every_task_is_a_rank(stand_ins: Path) -> None:
    done, _ = sbatch(stand_ins, "0 0 0 0", "my.yaml", "run.seed=1")
    told = done.stdout.splitlines()
    command = "launch/pretrain.py --config my.yaml --resume auto run.seed=1"
    assert told == [f"{rank}/4 local {rank % 2}/2 at node7:24711: {command}" for rank in range(4)]
    done, asked = sbatch(stand_ins, "0")
    assert done.returncode == 2 and "usage:" in done.stderr and not asked


def test_a_task_has_the_cpus_of_the_job(stand_ins: Path) -> None:
    done, _ = sbatch(stand_ins, "0", "my.yaml")
    assert done.stderr == "srun with no cpus per task\n"
    done, _ = sbatch(stand_ins, "0", "my.yaml", SLURM_CPUS_PER_TASK="4")
    assert done.stderr == "srun with 4 cpus per task\n"


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck")
def test_the_job_script_is_clean() -> None:
    assert subprocess.run(["shellcheck", str(SBATCH)], capture_output=True, text=True).stdout == ""


DOCKERFILES = sorted((ROOT / "launch/docker").glob("*.Dockerfile"))


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="needs hadolint")
@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: str(file.name))
def test_a_dockerfile_is_clean(file: Path) -> None:
    assert subprocess.run(["hadolint", str(file)], capture_output=True, text=True).stdout == ""


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: str(file.name))
def test_a_dockerfile_copies_installed_files(file: Path) -> None:
    copied = [name for line in re.findall(r"^COPY (.*) \S+$", file.read_text(), re.MULTILINE) for name in line.split()]
    sent = (ROOT / ".dockerignore").read_text().splitlines()
    for name in copied:
        assert (ROOT / name).exists() and f"!{name}" in sent, name
    assert {"pyproject.toml", "README.md", "LICENSE", "bigdssm"} <= set(copied), "the package does not install"
    known = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("\n[")[0]
    extras = re.findall(r'pip install --no-cache-dir "\.\[([\w,]*)\]"', file.read_text())
    assert len(extras) == 1 and set(extras[0].split(",")) <= set(re.findall(r"^(\S+) = \[", known, re.MULTILINE))
    run = " ".join(line.removeprefix("#").rstrip("\\") for line in file.read_text().splitlines() if line[:1] == "#")
    build, *used = re.findall(r"(?:launch|configs)/[\w/.]+", run)
    assert build == file.relative_to(ROOT).as_posix()
    assert used and all((ROOT / path).is_file() for path in used)


def test_the_trainjob_is_valid() -> None:
    """Validated by the models of Kubeflow, which drop unknown fields: the round trip is complete."""
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="needs kubeflow-trainer-api")
    runtime, job = yaml.safe_load_all((ROOT / "launch" / "trainjob.yaml").read_text())
    assert without_quantities(runtime) == ["8Gi"]
    assert without_quantities(job) == ["32", "64Gi", "8", "8"]
    assert models.TrainerV1alpha1TrainingRuntime.model_validate(runtime).to_dict() == runtime
    assert models.TrainerV1alpha1TrainJob.model_validate(job).to_dict() == job
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    misspelt = {**job, "spec": {**job["spec"], "trainers": {}}}
    assert models.TrainerV1alpha1TrainJob.model_validate(misspelt).to_dict() != misspelt


def without_quantities(content: Any) -> list[str]:
    """Take resource quantities out of `content` and return them: the models have no type for how they are written."""
    found: list[str] = []
    if isinstance(content, list):
        return [quantity for item in content for quantity in without_quantities(item)]
    if not isinstance(content, dict):
        return found
    for key in list(content):
        if key in ("requests", "limits"):
            found += map(str, content.pop(key).values())
        elif key == "sizeLimit":
            found.append(content.pop(key))
        else:
            found += without_quantities(content[key])
    assert all(re.fullmatch(r"\d+(\.\d+)?([KMGT]i?)?", quantity) for quantity in found)
    return found


LAUNCHER = """#!/bin/bash
events=$1/events.jsonl
code=$(sed -n "$(($(grep -c start "$events" 2>/dev/null || true) + 1))p" "$2")
[ "$code" = unstarted ] && exit 1
echo '{"event": "start"}' >> "$events"
[ "$code" = killed ] || echo "{\\"event\\": \\"end\\", \\"exit_code\\": $code, \\"reason\\": \\"\\"}" >> "$events"
exit 9
"""


@pytest.mark.parametrize(
    ("ends", "starts", "code"),
    [
        (["6", "killed", "0"], 3, 9),  # the launcher's code, whatever it is
        (["75"], 1, 9),
        (["2"], 1, 9),
        (["6", "6", "6"], 3, 6),
        (["unstarted"], 0, 1),
        (["killed", "unstarted", "unstarted"], 1, 6),
    ],
)
def test_a_launcher_is_started_again_after_faults_alone(
    ends: list[str], starts: int, code: int, tmp_path: Path
) -> None:
    launcher, plan = tmp_path / "launcher", tmp_path / "plan"
    launcher.write_text(LAUNCHER)
    plan.write_text("\n".join(ends))
    command = ["bash", str(ROOT / "launch" / "restart_loop.sh"), str(tmp_path), "bash", str(launcher), str(tmp_path)]
    environment = {**os.environ, "BIGDSSM_MAX_RESTARTS": "2", "BIGDSSM_RESTART_WAIT_S": "0"}
    done = subprocess.run([*command, str(plan)], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    events = tmp_path / "events.jsonl"
    assert (events.read_text().count("start") if events.exists() else 0) == starts
