"""The memory that `estimate` predicts, against the measured memory of a rank's process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bigdssm.config import Config, load_config
from bigdssm.dataset.dataset import open_dataset
from bigdssm.training.estimate import Estimate, estimate

from . import real_data

# Prints the bytes by which a run's highest resident memory, and its checkpoint, stand over nothing.
MEASURE = """
import json, sys
from pathlib import Path
import deepspeed, transformers.models.bert.modeling_bert
from bigdssm.config import load_config
from bigdssm.training.stages import run_stage

def status(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) * 1024

before = status("VmRSS")
config = load_config(sys.argv[1], sys.argv[2:])
run_stage(config, "pretrain", resume=False, validate_only=False, world_size=1)
folder = next((config.stage_dir("pretrain") / "checkpoints").glob("step-*"))
checkpoint = sum(file.stat().st_size for file in folder.glob("tensors-*"))
print(json.dumps({"rss": status("VmHWM") - before, "checkpoint": checkpoint}))
"""


def estimated(path: Path, *overrides: str, world_size: int = 1) -> tuple[Config, Estimate]:
    config = load_config(path, overrides)
    return config, estimate(config, "pretrain", open_dataset(config.data), world_size)


def measured(path: Path, run_dir: Path, *overrides: str) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEASURE, str(path), f"run.dir={run_dir}", *overrides],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


WIDE = (
    "pretrain.steps=2", "model.query.text={hidden: 256, heads: 4, layers: 2}",
    "model.doc.text={hidden: 256, heads: 4, layers: 2}",
    "engine.precision=fp32",  # `auto` depends on the machine in the measured process, and not in this one
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("debian_packages", ("pretrain.rows_global=300", "engine.chunk_tokens=8000", "engine.keep_graph_tokens=0")),
        ("movielens", ("pretrain.rows_global=600", "engine.zero_stage=3")),
    ],
)
def test_estimated_memory_is_within_a_fifth_of_measured(name: str, mode: tuple[str, ...], tmp_path: Path) -> None:
    path = getattr(real_data, name)(tmp_path)
    seen = measured(path, tmp_path / "run", *WIDE, *mode)
    _, found = estimated(path, *WIDE, *mode)
    assert found.peak_bytes == pytest.approx(seen["rss"], rel=0.2), mode
    assert found.checkpoint_bytes == pytest.approx(seen["checkpoint"], rel=0.01)
