"""Components registered by an installed package are available to all commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from bigdssm.config import FrequencyCorrection, LossConfig
from bigdssm.losses import register_loss, register_sampling
from bigdssm.losses.declarations import PairLoss
from bigdssm.training.optimizers import register_optimizer

ROOT = Path(__file__).parents[3]


@pytest.fixture
def installed(tmp_path: Path) -> dict[str, str]:
    """Return an environment with an installed package that registers the feature type `angle`."""
    site = tmp_path / "site"
    (site / "toy-1.0.dist-info").mkdir(parents=True)
    (site / "toy-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    entry = "[bigdssm.plugins]\ntoy = tests.distributed.outside\n"
    (site / "toy-1.0.dist-info" / "entry_points.txt").write_text(entry)
    return {**os.environ, "PYTHONPATH": f"{site}:{ROOT}"}


def make(folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    (folder / "pairs.csv").write_text("hour,doc\n" + "".join(f"{i % 24},d{i % 7}\n" for i in range(60)))
    data = {
        "dir": str(folder / "dataset"), "query": {"hour": {"type": "angle", "whole": 24}},
        "doc": {"doc": {"type": "categorical"}},
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump({"run": {"dir": str(folder / "run")}, "data": data}))
    command = ["make_shards.py", "pairs", "--config", folder / "config.yaml", "--pairs", folder / "pairs.csv"]
    return subprocess.run(
        [sys.executable, ROOT / "tools" / command[0], *command[1:]], env=environment, capture_output=True, text=True
    )


class Plain:
    name = "plain"


@dataclass(frozen=True)
class Unrelated:
    name: str = "unrelated"


@dataclass(frozen=True)
class NoValue(PairLoss):
    name: str = "no_value"


@dataclass(frozen=True)
class NoTerm(LossConfig):
    name: str = "no_term"


@dataclass(frozen=True)
class NoShares(FrequencyCorrection):
    name: str = "no_shares"


@pytest.mark.parametrize(
    ("register", "cls", "reason"),
    [
        (register_loss, Plain, "Plain: a loss is a frozen dataclass, a subclass of LossConfig, with a name"),
        (register_loss, Unrelated, "Unrelated: a loss is a frozen dataclass, a subclass of LossConfig, with a name"),
        (register_optimizer, NoValue, "NoValue: an optimizer is .* a subclass of OptimizerConfig"),
        (register_loss, NoValue, r"NoValue lacks the method value of a loss \(PairLoss\)"),
        (register_loss, NoTerm, r"NoTerm lacks the method value_and_gradients of a loss \(LossConfig\)"),
        (register_sampling, NoShares, "NoShares lacks the method shares"),
    ],
)
def test_a_component_without_its_methods_is_refused(register: Callable[[type], type], cls: type, reason: str) -> None:
    with pytest.raises(TypeError, match=reason):
        register(cls)


@pytest.mark.slow
def test_a_type_of_an_installed_package(installed: dict[str, str], tmp_path: Path) -> None:
    without = make(tmp_path, {**os.environ, "PYTHONPATH": str(ROOT)})
    assert without.returncode == 2 and "data.query.hour.type: got angle, needs one of categorical" in without.stderr
    done = make(tmp_path, installed)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "dataset" / "dataset.json").is_file()


@pytest.mark.slow
def test_the_schema_of_configs_has_the_components_of_an_installed_package(installed: dict[str, str]) -> None:
    command = [sys.executable, "-m", "bigdssm.commands", "config", "--schema"]
    printed = subprocess.run(command, env=installed, capture_output=True, text=True, check=True).stdout
    schema = json.loads(printed)["$defs"]
    [angle] = [
        case["then"] for case in schema["DataConfig"]["properties"]["query"]["additionalProperties"]["allOf"]
        if case["if"]["properties"]["type"]["const"] == "angle"
    ]  # fmt: skip
    assert angle["properties"]["whole"]["default"] == 360.0
    assert angle["properties"]["whole"]["description"] == "size of a full turn"
    assert "1 - momentum" in printed, "the optimizer's comment"


def test_a_package_that_cannot_be_imported(installed: dict[str, str], tmp_path: Path) -> None:
    entries = tmp_path / "site" / "toy-1.0.dist-info" / "entry_points.txt"
    entries.write_text("[bigdssm.plugins]\ntoy = tests.nobody\n")
    done = make(tmp_path, installed)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "error: the plugin toy (tests.nobody) cannot be imported: ModuleNotFoundError" in done.stderr
