"""The commands that `bigdssm seeds` runs, and its validation before the first."""

from __future__ import annotations

from typing import Any

import pytest

from bigdssm.commands import seeds


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines = list[str]()
    monkeypatch.setattr(seeds, "_run", lambda *command: lines.append(" ".join(command)) or 0)
    return lines


@pytest.mark.parametrize(
    "order",
    [
        ["pretrain.steps=3", "run.dir=R", "--seeds", "0", "7"],
        ["--seeds", "0", "7", "pretrain.steps=3", "run.dir=R"],
        ["--seeds", "0", "7", "--ranks", "2", "pretrain.steps=3", "run.dir=R"],
        ["pretrain.steps=3", "--seeds", "0", "7", "run.dir=R", "--", "--beir", "a=b"],
    ],
)
def test_overrides_are_accepted_anywhere(tiny_interactions: Any, started: list[str], order: list[str]) -> None:
    assert seeds.main(["--config", str(tiny_interactions.config), *order]) == 0
    *runs, report = started
    for line, seed in zip(runs, ("0", "7"), strict=True):
        assert f"pretrain.steps=3 run.dir=R run.dir=R/seed-{seed} run.seed={seed} --resume auto" in line
    assert "report R/seed-0 R/seed-7 --out R/report.json" in report and report.endswith("a=b") == ("--" in order)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--seeds", "0", "x"], "needs at least one non-negative integer"),
        (["--seeds", "-1"], "--seeds"),
        (["--seeds", "1.5"], "needs at least one non-negative integer"),
        (["--seeds", "run.dir=x"], "needs at least one non-negative integer"),
        (["--seeds", "3", "03"], "contains a seed twice"),
        (["--seeds", str(2**63)], "run.seed: got 9223372036854775808, needs at least 0 and at most"),
        (["--seeds", "0", "run.dri=x"], "run.dri"),
        (["--seeds", "0", "--unknown"], "unknown option --unknown"),
    ],
)
def test_invalid_arguments_are_refused_before_the_first_run(
    tiny_interactions: Any, started: list[str], capsys: Any, words: list[str], sentence: str
) -> None:
    try:
        code = seeds.main(["--config", str(tiny_interactions.config), *words])
    except SystemExit as error:  # argparse's
        code = error.code
    assert code == 2 and sentence in capsys.readouterr().err and not started
