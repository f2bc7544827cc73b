"""Benchmarks of the losses run, and confirm the documented properties."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.e2e


def output(*arguments: str) -> str:
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_gradients_have_the_right_size_and_direction() -> None:
    lines = output("tools/bench/check_gradients.py", "--ranks", "3").splitlines()
    ours = [line for line in lines if line.startswith(("fps_loss", "ranking_loss"))]
    assert len(ours) >= 4
    for line in ours:
        assert re.search(r" +1\.00 +1\.000 +1\.00$", line), line


@pytest.mark.slow
def test_the_benchmark_of_the_loss_runs() -> None:
    assert re.search(r"both +\d+\.\d+ s.*% product peak", output(
        "tools/bench/bench_loss.py", "speed", "--rows", "1024", "--dim", "16", "--turns", "1"
    ))  # fmt: skip
    assert re.search(r"m = +1024 +\d+", output("tools/bench/bench_loss.py", "memory", "--rows", "1024", "--dim", "16"))
    assert re.search(r"batch 2048", output("tools/bench/bench_loss.py", "large", "--rows", "1024", "--dim", "16"))
    assert re.search(r"masked .*, \d+\.\d+ of it", output("tools/bench/bench_loss.py", "mask", "--rows", "256"))


@pytest.mark.slow
def test_the_benchmark_of_the_stream_writes_datasets_of_the_present_format() -> None:
    stream = "tools/bench/bench_stream.py"
    assert output(stream, "scale", "--rows", "1e6").startswith("1,000,000 rows in 489 blocks: opened")
    assert output(stream, "catalogue", "--docs", "1e5").startswith("100,000 documents × 32 tokens")


@pytest.mark.parametrize(
    ("command", "code", "sentence"),
    [
        (("bench_sampling", "--batches", "0"), 2, "argument --batches: got 0, needs at least 1"),
        (("check_gradients", "--ranks", "0"), 2, "argument --ranks: got 0, needs at least 1"),
        (("bench_checkpoint", "--out", "x", "--weights", "5"), 2, "argument --weights: got 5, needs at least 64"),
        (("bench_loss", "speed", "--rows", "many"), 2, "argument --rows: invalid number value: 'many'"),
        (
            ("bench_choices", "negatives", "--config", "configs/wordnet.yaml", "--out", "x", "data.dir=nowhere"),
            3,
            "exit code 3",
        ),
    ],
)
def test_numbers_that_measure_nothing_are_refused(command: tuple[str, ...], code: int, sentence: str) -> None:
    tool, *arguments = command
    done = subprocess.run(
        [sys.executable, f"tools/bench/{tool}.py", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    assert sentence in done.stderr.splitlines()[-1]


def test_bfloat16_is_precise_enough_for_its_speed_to_count() -> None:
    lines = output("tools/bench/bench_loss.py", "precision", "--rows", "512", "--dim", "32").splitlines()
    assert len(lines) == 4
    errors = [float(error) for line in lines for error in re.findall(r"(?:loss|dU|dW) (\S+?)(?:,|$)", line)]
    assert len(errors) == 12 and max(errors) < 1e-2


@pytest.mark.parametrize(
    ("missing", "modules"),
    [(("deepspeed", "duckdb", "joblib", "webdataset"), 2), (("deepspeed", "omegaconf", "pyarrow"), 1)],
)
def test_gpu_tests_are_collected_without_optional_libraries(
    missing: tuple[str, ...], modules: int, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({missing}))\n")
    files = [str(path) for path in sorted((ROOT / "tests/distributed").glob("test_gpu*.py"))]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--noconftest", "--collect-only", "-qq", "-rs", "-m", "gpu", *files],
        cwd=ROOT, capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    counted = re.findall(r"^tests/distributed/test_gpu\w*\.py: \d+$", done.stdout, re.MULTILINE)
    assert len(counted) == modules
    assert ("could not import 'omegaconf'" in done.stdout) == ("omegaconf" in missing)


def test_a_timeout_ends_child_processes_and_retains_the_output() -> None:
    code = "import subprocess; print(subprocess.Popen(['sleep', '60']).pid); subprocess.run(['sleep', '60'])"
    tried = (
        f"from gpu_bench import run_within; print(run_within([{sys.executable!r}, '-c', {code!r}], 3));"
        "print(run_within(['sh', '-c', 'echo done; exit 5'], 3))"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'tools/bench'}:{ROOT}"}
    first, second = subprocess.run(
        [sys.executable, "-c", tried], env=environment, capture_output=True, text=True, timeout=120, check=True
    ).stdout.splitlines()
    assert second == "(5, ['done'])"
    started = re.fullmatch(r"\(None, \['(\d+)'\]\)", first)
    assert started is not None, first
    state = Path(f"/proc/{started[1]}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


@pytest.mark.slow
def test_the_parts_of_the_gpu_tool_run_on_a_cpu(tmp_path: Path) -> None:
    """Every part but the tests, with small sizes; the report is written."""
    parts = ["versions", "families", "loss", "chunks", "tables", "repeats", "encode", "step", "histories"]
    sizes = ["--device", "cpu", "--rows", "64", "--dim", "16", "32", "--seconds", "200"]
    command = [sys.executable, "tools/bench/gpu.py", *parts, *sizes, "--out", str(tmp_path / "gpu.json")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert set(parts) <= set(report) | {"histories"}
    assert [row["family"] for row in report["families"]][:2] == ["bert", "modernbert"] and len(report["families"]) == 9
    assert {row["D"] for row in report["loss"]} == {16, 32}
    assert all(row["same bits"] for row in report["repeats"])
    because = [row["because"] for row in report["skipped"]]
    assert all("installed" in why for why in because), because
