"""The examples of docs/cached_step.md: DeepSpeed, the Trainer of sentence-transformers, accelerate."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.e2e.runs import ROOT, environment
from tools.bench.bench_cached_step import write_encoder
from tools.checks.pages import code_of

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def example(heading: str) -> str:
    """Return the first block after a heading."""
    page = (ROOT / "docs" / "cached_step.md").read_text(encoding="utf-8")
    return code_of(page[page.index(heading) :])[0]


def run(code: str, folder: Path, *arguments: object) -> str:
    # A thread of gloo that releases tensors while the interpreter exits aborts the process, at times; see the page.
    (folder / "example.py").write_text(code + "\nimport os, sys\nsys.stdout.flush()\nos._exit(0)\n")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    variables = environment(ACCELERATE_USE_CPU="true", PYTHONPATH=str(ROOT))
    done = subprocess.run(
        [*launcher, "example.py", *map(str, arguments)], cwd=folder, env=variables, capture_output=True, text=True,
        timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def numbers(pattern: str, text: str) -> list[float]:
    return [float(number) for number in re.findall(pattern, text)]


def test_a_large_batch_in_little_memory(tmp_path: Path) -> None:
    code = example("# The cached step")
    assert "32_768" in code
    said = run(code.replace("32_768", "8_192").replace("range(3)", "range(2)"), tmp_path)
    losses = numbers(r"loss ([\d.]+)", said)
    assert len(losses) == 2 and losses[1] < losses[0]
    assert max(numbers(r"([\d.]+) GB", said)) < 2


@pytest.mark.parametrize("stage", [(), (3,)])
def test_the_trainer_of_sentence_transformers_has_the_curve_of_its_plain_loss(
    tmp_path: Path, stage: Sequence[int]
) -> None:
    write_encoder(tmp_path, argparse.Namespace(hidden=32, layers=1))
    cached = example("## Under the Trainer of sentence-transformers")
    for old, new in (
        ("logging_steps=1,", 'logging_steps=1, learning_rate=0.01, optim="sgd",'),
        ('{"zero_opt', '{"zero_allow_untested_optimizer": True, "zero_opt'),
        ("chunk_tokens=4096", "chunk_tokens=99"),
        ('"question number {i}"', '"w{i} w{i + 1}"'),  # words of the encoder
        ('"number {i} answers it"', '"w{i} w{i + 2}"'),
    ):
        assert old in cached
        cached = cached.replace(old, new)
    plain = cached.replace("trainer = CachedTrainer(", "trainer = SentenceTransformerTrainer(").replace(
        "RankingLoss(model)", "RankingLoss(model, gather_across_devices=True)"
    )
    assert plain.count("gather_across") == 1 and "SentenceTransformerTrainer(\n" in plain
    curves = []
    for code in (cached, plain):
        losses = numbers(r"'loss': '?([\d.]+)", run(code, tmp_path, tmp_path, *stage))
        assert len(set(losses)) == 4
        curves.append(losses)
    assert curves[0] == pytest.approx(curves[1], rel=2e-3)  # four digits are printed


def test_a_step_under_accelerate(tmp_path: Path) -> None:
    code = example("## With accelerate")
    of_two = numbers(r"loss ([\d.]+)", run(code, tmp_path))
    assert len(of_two) == 4 and of_two[3] < of_two[0] / 2
