"""tools/evidence from the command line: cells are trained, shared and resumed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from bigdssm.retrieval.hard_negatives import HardNegatives
from tests.conftest import TinyDataset

from .runs import ROOT, environment

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
SMALL = ["model.dim=8", "model.query.mlp=[]", "model.doc.mlp=[]", "pretrain.rows_global=64", "pretrain.steps=20"]
SMALL += ["pretrain.optimizer.warmup_steps=2", "model.doc.text.layers=1", "model.doc.text.hidden=8"]


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, *map(str, arguments)]
    return subprocess.run(line, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600)


def claim_of_all_kinds(tiny_interactions: TinyDataset, folder: Path) -> dict[str, Any]:
    """Return a claim with stages, features left out, teachers, and baselines."""
    source = tiny_interactions.source
    tables = f"--interactions {source}/interactions.csv --items {source}/items.csv --users {source}/users.csv"
    bright = f"--like {tiny_interactions.dir} --rating-column rating --positive-rating 5"
    config = folder / "config.yaml"
    content = yaml.safe_load(tiny_interactions.config.read_text())
    negatives = {"hard": 2, "mining": {"first": 1, "last": 20}}
    content["sft"] = {"steps": 3, "rows_global": 64, "loss": {"name": "pair_ce"}, "negatives": negatives}
    config.write_text(yaml.safe_dump(content, sort_keys=False))
    return {
        "claim": "more is better",
        "sets": {"tiny": {"config": str(config), "seeds": [0], "set": SMALL, "make": f"interactions {tables}"}},
        "cells": {
            "tuned": {"after": "more"},
            "more": {},
            "no titles": {"without": ["doc.title"]},
            "judged": {"after": "more", "set": ["sft.distillation.name=kl"], "teacher_scores": ["--model", "{start}"]},
            "taught": {
                "after": "more",
                "teacher": "other",
                "set": ["sft.loss.name=fps", "sft.negatives.hard=0", "sft.distillation.name=batch_kl"],
            },
            "other": {"set": ["pretrain.steps=3"]},
            "EASE": {"baseline": "ease"},
            "EASE of the bright": {"baseline": "ease", "make": f"interactions {tables} {bright}"},
        },
        "expect": [{"no_better": "EASE", "than": "more", "margin": 1.0}],
    }


def assert_teachers(out: Path, cells: dict[str, Any]) -> None:
    """One cell is fine-tuned with a teacher's scores, one with a teacher's vectors, whose work counts."""
    (candidates,) = out.glob("tiny/*/seed-0/scored.npy")
    scores = HardNegatives.open(candidates)
    assert np.isfinite(scores.teacher_scores(scores.queries)[:, 0]).all()
    assert "distillation" in (candidates.parent / "sft/metrics.jsonl").read_text()
    assert cells["judged"]["cpu_seconds"] > cells["tuned"]["cpu_seconds"]
    assert len(list(out.glob("tiny/*/seed-0/teacher"))) == 1
    logs = out.glob("tiny/*/seed-0/sft/metrics.jsonl")
    assert sum("distillation" in log.read_text() for log in logs) == 2
    assert cells["taught"]["cpu_seconds"] > cells["more"]["cpu_seconds"] + cells["other"]["cpu_seconds"]


def test_a_claim_is_tried_once(tiny_interactions: TinyDataset, tmp_path: Path) -> None:
    claim = claim_of_all_kinds(tiny_interactions, tmp_path)
    (tmp_path / "first.yaml").write_text(yaml.safe_dump(claim, sort_keys=False))
    out, page = tmp_path / "runs", tmp_path / "page.md"
    done = command("-m", "tools.evidence", tmp_path / "first.yaml", "--out", out, "--page", page, "--at-once", 2)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(page.with_name("results.json").read_text())["first"]["sets"]["tiny"]
    cells = {cell["cell"]: cell for cell in figures["cells"]}
    assert list(cells) == list(claim["cells"])
    assert cells["tuned"]["cpu_seconds"] > cells["more"]["cpu_seconds"] > cells["EASE"]["cpu_seconds"] >= 0
    assert cells["EASE"]["mean"] != cells["EASE of the bright"]["mean"], "it learned from a dataset of its own"
    assert [found["verdict"] for found in figures["expected"]] == ["holds"]

    def commands() -> dict[Path, str]:
        return {path: path.read_text() for path in out.glob("tiny/*/seed-0/commands.jsonl")}

    before = commands()
    assert_teachers(out, cells)
    assert len(before) == 8 and len(list(out.glob("data/*/dataset.json"))) == 2
    again = command("-m", "tools.evidence", tmp_path / "first.yaml", "--out", out, "--page", page)
    assert again.returncode == 0 and "begins" not in again.stderr + again.stdout and commands() == before
    assert "*more is better*" in page.read_text() and "| EASE |" in page.with_name("page_tables.md").read_text()

    broken = {**claim, "cells": {"more": {}, "bad": {"set": ["pretrain.steps=-1"]}}, "expect": []}
    (tmp_path / "second.yaml").write_text(yaml.safe_dump(broken))
    refused = command("-m", "tools.evidence", tmp_path / "second.yaml", "--out", out)
    assert refused.returncode == 2 and "pretrain.steps: got -1" in refused.stderr
