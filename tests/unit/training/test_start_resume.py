"""The rules of a resume: which keys of a config may change."""

from __future__ import annotations

import runpy
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import bigdssm
from bigdssm.checkpoints.checkpoint import find_checkpoint, load_checkpoint, read_manifest
from bigdssm.config import load_config
from bigdssm.training.start import find_start, rule_of
from tests.distributed import small_run

ROOT = Path(__file__).resolve().parents[3]
RULES = {
    "may": (
        "run.dir", "run.trackers", "data.dir", "data.filter", "data.tokenizer", "data.targets_per_row",
        "data.num_workers", "data.time_unit", "data.max_bad_fraction", "data.cache_dir", "data.cache_bytes",
        "engine", "debug", "pretrain.validate_every_steps", "pretrain.patience", "pretrain.save_every_steps",
        "pretrain.save_every_minutes", "pretrain.keep_checkpoints", "pretrain.log_every_steps",
        "pretrain.max_skipped_steps", "sft",
    ),
    "longer": ("pretrain.epochs", "pretrain.steps"),
    "segment": (
        "data.from_partition", "data.mixture", "pretrain.optimizer.lr",
        "pretrain.table_optimizer.lr", "pretrain.optimizer.continue_lr_ratio",
    ),
}  # fmt: skip


def leaves(content: dict[str, Any], key: str = "") -> list[str]:
    found = []
    for name, value in content.items():
        found += leaves(value, f"{key}{name}.") if isinstance(value, dict) and value else [f"{key}{name}"]
    return found


def test_every_key_has_its_rule(tiny_interactions: Any) -> None:
    config = load_config(tiny_interactions.config, ["sft={}"])
    keys = leaves(config.to_dict())
    assert len(keys) > 100
    for key in keys:
        rules = [rule for rule, declared in RULES.items() if any(f"{key}.".startswith(f"{d}.") for d in declared)]
        assert [rule_of(config, key, "pretrain")] == (rules or ["never"]), key
        assert rule_of(config, key, "sft") == "may" or not key.startswith("pretrain."), key
    assert rule_of(config, "sft.epochs", "sft") == "longer"
    assert rule_of(config, "pretrain.optimizer.a_key_of_another_optimizer", "pretrain") == "never"


def test_the_page_of_faults_has_the_rules_of_the_code() -> None:
    page = (ROOT / "docs/faults.md").read_text("utf-8")
    made = runpy.run_path(str(ROOT / "tools/site/config_keys.py"))["with_rules"](page)
    assert page == made, "run PYTHONPATH=. python tools/site/config_keys.py"
    table = page[page.index("| rule | keys |") :].split("\n\n")[0]
    assert table.count("`STAGE.steps`") == table.count("`data.mixture`") == table.count("`engine`") == 1


@pytest.mark.parametrize(
    ("overrides", "resume", "warned"),
    [([], True, True), (["pretrain.init=model"], True, False), ([], False, False)],
    ids=["random weights", "a model", "first start"],
)
def test_a_resume_without_checkpoint_on_later_partitions_is_a_warning(
    overrides: list[str], resume: bool, warned: bool, tiny_interactions: Any, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    config = load_config(
        tiny_interactions.config, [f"run.dir={tmp_path / 'run'}", "data.from_partition=day2", *overrides]
    )
    config.stage_dir("pretrain").mkdir(parents=True)
    store: Any = SimpleNamespace(newest_valid=lambda: None)
    stream: Any = None  # read only with a checkpoint
    with caplog.at_level("WARNING", "bigdssm"):
        assert find_start(config, "pretrain", store, stream, resume).checkpoint is None
    assert ("data.from_partition=day2 leaves out" in caplog.text) == warned


def test_a_resumed_run_knows_the_validations_before_it(tmp_path: Path) -> None:
    """At this rate the validation at step 2 is the best one: later ones are compared with it, also after a resume."""
    config = small_run.write_dataset(tmp_path)
    options = ["pretrain.steps=8", "pretrain.epochs=0", "pretrain.keep_checkpoints=9", "pretrain.optimizer.lr=0.5"]
    options += ["pretrain.save_every_steps=2", "pretrain.validate_every_steps=2"]
    whole, half = tmp_path / "whole", tmp_path / "half"
    bigdssm.pretrain(config, [f"run.dir={whole}", *options])
    shutil.copytree(whole, half)
    for step in (6, 8):
        shutil.rmtree(half / f"pretrain/checkpoints/step-{step:08d}")
    bigdssm.pretrain(config, [f"run.dir={half}", *options], resume=True)
    first, second = (
        load_checkpoint(read_manifest(find_checkpoint(run / "pretrain", "step-00000008")), 0, 1).common_tensors()
        for run in (whole, half)
    )
    assert first.keys() == second.keys()
    assert all(first[name].equal(second[name]) for name in first)
