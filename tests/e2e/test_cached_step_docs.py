"""The examples of docs/cached_step.md: DeepSpeed, the Trainer of sentence-transformers, accelerate."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from itertools import chain
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


def run(code: str, folder: Path, *arguments: object, **settings: str) -> str:
    # A thread of gloo that releases tensors while the interpreter exits aborts the process, at times; see the page.
    (folder / "example.py").write_text(code + "\nimport os, sys\nsys.stdout.flush()\nos._exit(0)\n")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    # An operation that is compiled, although the page says that none is, would be found here.
    extensions = folder / "extensions"
    variables = environment(PYTHONPATH=str(ROOT), TORCH_EXTENSIONS_DIR=str(extensions), **settings)
    done = subprocess.run(
        [*launcher, "example.py", *map(str, arguments)], cwd=folder, env=variables, capture_output=True, text=True,
        timeout=600,
    )  # fmt: skip
    assert not extensions.exists()
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


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, list[float]]:
    """Return a folder with an encoder, the script of the page, and the losses of the plain loss on its rows."""
    folder = tmp_path_factory.mktemp("trainer")
    write_encoder(folder, argparse.Namespace(hidden=32, layers=1))
    cached = example("## Under the Trainer of sentence-transformers")
    for old, new in (
        ("logging_steps=1,", 'logging_steps=1, learning_rate=0.5, optim="sgd",'),
        ('{"zero_opt', '{"zero_allow_untested_optimizer": True, "zero_opt'),
        ("chunk_tokens=4096", "chunk_tokens=99"),
        ('"question number {i}"', '"w{i} w{i + 1}"'),  # words of the encoder
        ('"number {i} answers it"', '"w{i} w{i + 2}"'),
        (
            "        output = big",
            "        print(f\"rows {query['input_ids'][:, 1].tolist()}\\n\", end='', flush=True)\n        output = big",
        ),
        (
            "trainer.train()",
            "trainer.train()\nstage_of = getattr(trainer.model_wrapped, 'zero_optimization_stage', lambda: None)\n"
            "name = type(trainer.model_wrapped).__name__\n"
            "print(f'engine {name} {stage_of()} {trainer.args.world_size}\\n', end='', flush=True)",
        ),
    ):
        assert cached.count(old) == 1, old
        cached = cached.replace(old, new)
    plain = cached.replace("trainer = CachedTrainer(", "trainer = SentenceTransformerTrainer(").replace(
        "RankingLoss(model)", "RankingLoss(model, gather_across_devices=True)"
    )
    assert plain.count("gather_across") == 1 and "SentenceTransformerTrainer(\n" in plain
    losses = numbers(r"'loss': '?([\d.]+)", run(plain, folder, folder))
    assert len(set(losses)) == 4
    return folder, cached, losses


@pytest.mark.parametrize("stage", [None, 0, 1, 2, 3])
def test_the_trainer_of_sentence_transformers_has_the_curve_of_its_plain_loss(
    trainer: tuple[Path, str, list[float]], stage: int | None
) -> None:
    """Under DeepSpeed of the stage that is passed, on two ranks with rows of their own."""
    folder, cached, plain = trainer
    said = run(cached, folder, folder, *([] if stage is None else [stage]))
    assert numbers(r"'loss': '?([\d.]+)", said) == pytest.approx(plain, rel=2e-3)  # four digits are printed
    name = "DistributedDataParallel" if stage is None else "DeepSpeedEngine"
    assert re.findall(r"engine (.*)", said) == [f"{name} {stage} 2"] * 2
    rows = [set(json.loads(found)) for found in re.findall(r"rows (\[.*?\])", said)]
    assert len(rows) == 8 and all(len(of_step) == 64 for of_step in rows)
    # two epochs of two steps: four batches of 64 of the 256 rows each
    assert sorted(chain(*rows)) == sorted([*range(5, 261)] * 2)


@pytest.mark.parametrize(
    ("on_cpu", "words"),
    [
        ("true", "got a DeepSpeed config and DistributedType.MULTI_CPU, needs an engine of DeepSpeed"),
        ("false", "got 1 ranks of 2, needs all"),
    ],
)
def test_a_trainer_without_deepspeed_or_ranks_is_refused(
    trainer: tuple[Path, str, list[float]], on_cpu: str, words: str
) -> None:
    folder, cached, _ = trainer
    code = cached.replace('    PartialState(backend="gloo")\n', "").replace(
        '"use_configured_state": bool(on_cpus and stage)', ""
    )
    with pytest.raises(AssertionError, match=re.escape(words)):
        run(code, folder, folder, 3, ACCELERATE_USE_CPU=on_cpu)


def test_a_step_under_accelerate(tmp_path: Path) -> None:
    code = example("## With accelerate")
    of_two = numbers(r"loss ([\d.]+)", run(code, tmp_path, ACCELERATE_USE_CPU="true"))
    assert len(of_two) == 4 and of_two[3] < of_two[0] / 2
