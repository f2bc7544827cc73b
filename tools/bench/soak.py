"""Soak test: inject random faults into a run and verify bit-identical results, rows and metrics.

    python tools/bench/soak.py --out FOLDER [--faults 20] [--seed 0] [--tables]

Builds a small dataset in FOLDER and trains on two CPU ranks: once undisturbed (FOLDER/whole), and once with random
faults at random steps and ranks, under deepspeed or torchrun, resumed with --resume auto (FOLDER/hurt). Checkpoints may
also be damaged between two starts. With --tables the model has tables that are sharded by rows, which are admitted and
evicted. The exit code is 0 if the results are identical. 20 faults took 15 minutes on 2 busy
cores.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from bigdssm.checkpoints.checkpoint import read_manifest
from bigdssm.checkpoints.model_folder import load_checkpoint_model
from bigdssm.cli import at_least, run_main
from bigdssm.cluster.metrics import METRICS_FILE
from bigdssm.config import load_config
from bigdssm.errors import CheckpointError, ConfigError
from bigdssm.ingest.job import IngestTarget
from bigdssm.ingest.pairs import PairTables, make_pairs
from bigdssm.tables.files import MappedTables

ROOT = Path(__file__).resolve().parents[2]
NUM_PAIRS, NUM_WORDS = 3000, 200
SAVE_EVERY, MAX_STEPS = 5, 12  # steps: between checkpoints; from a start to its fault
LAST_STEPS = 20  # of the last start, which has no fault
PEER_TIMEOUT_S, DEADLINE_S = 6.0, 60.0  # the second: from a fault to the end of the last process
DAMAGE = ("flip-byte", "cut-file", "lose-file", "lose-latest")
IN_SAVE = ("kill-save", "disk-full")
MARK = "BIGDSSM_SOAK_RUN"  # variable with the run folder, inherited by all processes of a run
ANYWHERE = ("kill", "stop", "hang", "raise", "term", "int", "kill-launcher", "term-launcher", "kill-loader")
DEEPSPEED_ONLY = ("kill-runner", "term-runner")  # torchrun's parent is this program
CONFIG: dict[str, dict[str, Any]] = {
    "run": {"dir": "given", "trackers": []},
    "data": {
        "lanes": 4,
        "query": {"query": {"type": "text", "max_tokens": 8}},
        "doc": {"text": {"type": "text", "max_tokens": 16}, "section": {"type": "categorical"}},
        "tokenizer": {"vocab_size": 300},
    },
    "model": {
        "dim": 16,
        "query": {"mlp": [16], "dropout": 0.1, "text": {"layers": 1, "hidden": 16, "heads": 2}},
        "doc": {"mlp": [16], "dropout": 0.1, "text": {"layers": 1, "hidden": 16, "heads": 2}},
    },
    "engine": {"peer_timeout_s": PEER_TIMEOUT_S},
    "pretrain": {
        "rows_global": 64, "save_every_steps": SAVE_EVERY, "keep_checkpoints": 3, "log_every_steps": 1,
        "optimizer": {"lr": 0.003, "warmup_steps": 10},
    },
    "debug": {"log_row_ids": True},
}  # fmt: skip


@dataclass(frozen=True)
class FaultResult:
    """One fault and its outcome."""

    kind: str
    launcher: str
    rank: int
    step: int
    exit_code: int
    seconds: float  # from the fault to the end of the last process
    went_on_from: int  # step of the resumed checkpoint, -1 without one


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="new folder for all files")
    parser.add_argument("--faults", type=at_least(1), default=20, help="number of faults (default: %(default)s)")
    parser.add_argument("--tables", action="store_true", help="shard embedding tables by rows")
    parser.add_argument("--seed", type=int, default=0, help="seed of the faults (default: %(default)s)")
    args = parser.parse_args()
    if args.out.exists():
        raise ConfigError(f"{args.out} exists; --out takes a new folder")
    started = time.monotonic()
    steps = args.faults * MAX_STEPS + LAST_STEPS
    config = make_dataset(args.out, steps, args.tables)
    chance = random.Random(args.seed)
    nan = f"nan@{steps // 3}:1"  # a skipped step, in both runs
    start(config, args.out / "whole", "deepspeed", nan).finish(0)
    print(f"undisturbed: {steps} steps in {time.monotonic() - started:.0f} s", flush=True)

    results: list[FaultResult] = []
    hurt = args.out / "hurt"
    for kind in kinds(args.faults, chance):
        first = newest_step(hurt)
        results.append(damage(hurt, kind, chance) if kind in DAMAGE else inject(config, hurt, kind, nan, first, chance))
        print(f"{len(results):3d} {json.dumps(asdict(results[-1]))}", flush=True)
    start(config, hurt, "deepspeed", nan).finish(0)

    report(results, hurt, args.out, time.monotonic() - started)
    problems = list(differences(args.out / "whole" / "pretrain", hurt / "pretrain"))
    print("the same bits, rows and metrics" if not problems else "\n".join(problems))
    return 1 if problems else 0


def make_dataset(out: Path, steps: int, tables: bool) -> Path:
    """Build the dataset and return the path of the config."""
    out.mkdir(parents=True)
    chance = random.Random(0)
    with (out / "pairs.jsonl").open("w") as file:
        for _ in range(NUM_PAIRS):
            words = [f"word{chance.randrange(NUM_WORDS)}" for _ in range(8)]
            record = {"query": " ".join(words[:3]), "text": " ".join(words), "section": words[0][-1], "word": words[1]}
            file.write(json.dumps(record) + "\n")
    content = {**CONFIG, "data": {**CONFIG["data"], "dir": str(out / "dataset")}}
    content["pretrain"] = {**CONFIG["pretrain"], "steps": steps}
    if tables:
        word = {"type": "categorical", "hash_buckets": 2**40}  # without a vocabulary
        content["data"]["doc"] = {**content["data"]["doc"], "word": word}
        content["model"] = {**CONFIG["model"], "tables": {"sharding": "rows", "admit_after": 2, "evict_after": 12}}
        content["pretrain"]["table_optimizer"] = {"name": "lazy_adam", "lr": 0.01}
    path = out / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    pairs = PairTables((out / "pairs.jsonl",), validation_fraction=0.05, test_fraction=0.05)
    make_pairs(load_config(path).data, pairs, IngestTarget(out / "dataset"))
    return path


def kinds(number: int, chance: random.Random) -> list[str]:
    """Return `number` kinds with equal frequencies in random order; the first saves a checkpoint (term)."""
    every = [*ANYWHERE, *DEEPSPEED_ONLY, *IN_SAVE, *DAMAGE]
    sample: list[str] = []
    while len(sample) < number:
        sample += chance.sample(every, len(every))
    sample = sample[:number]
    first = next((position for position, kind in enumerate(sample) if kind.startswith("term")), 0)
    sample[0], sample[first] = sample[first], sample[0]
    return sample


def inject(config: Path, hurt: Path, kind: str, nan: str, newest: int, chance: random.Random) -> FaultResult:
    """Start the run with a fault, and wait for the end of all its processes."""
    launcher = "deepspeed" if kind in DEEPSPEED_ONLY else chance.choice(["deepspeed", "torchrun"])
    rank, first = chance.randrange(2), max(0, newest)
    step = first + chance.randint(1, MAX_STEPS)
    if kind in IN_SAVE:
        step = (first // SAVE_EVERY + chance.randint(1, MAX_STEPS // SAVE_EVERY)) * SAVE_EVERY
    run = start(config, hurt, launcher, f"{nan},{kind}@{step}:{rank}")
    seconds = run.wait_for_fault(f"BIGDSSM_TEST_FAULT: {kind} at")
    return FaultResult(kind, launcher, rank, step, run.process.returncode, round(seconds, 1), run.resumed_from())


def damage(hurt: Path, kind: str, chance: random.Random) -> FaultResult:
    """Damage the newest checkpoint of a run that has ended."""
    folder = hurt / "pretrain" / "checkpoints"
    newest = sorted(folder.glob("step-*"))[-1]
    file = chance.choice(sorted(newest.glob("*.safetensors")))
    if kind == "flip-byte":
        content = bytearray(file.read_bytes())
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        file.write_bytes(content)
    elif kind == "cut-file":
        file.write_bytes(file.read_bytes()[: chance.randrange(file.stat().st_size)])
    else:
        (file if kind == "lose-file" else folder / "latest").unlink(missing_ok=True)
    return FaultResult(kind, "", -1, int(newest.name.removeprefix("step-")), 0, 0.0, -1)


class Run:
    """A run under a launcher."""

    def __init__(self, command: list[str], folder: Path, environment: dict[str, str]) -> None:
        self._folder, self._log = folder, folder.with_name(f"{folder.name}-{time.monotonic_ns()}.log")
        marked = {**environment, MARK: str(folder)}
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=marked, stdout=log, stderr=log, start_new_session=True
            )

    def finish(self, code: int) -> None:
        """Wait for the end. Raises CheckpointError: an exit code other than `code`."""
        if self.process.wait() != code:
            raise CheckpointError(f"exit code {self.process.returncode}, needs {code}; see {self._log}")

    def wait_for_fault(self, line: str) -> float:
        """Wait for the fault's log line, then for the end of all processes; return the seconds between.

        Raises CheckpointError.
        """
        while line not in self._log.read_text():
            if self.process.poll() is not None:
                raise CheckpointError(f"ended with {self.process.returncode} before the fault; see {self._log}")
            time.sleep(0.05)
        began = time.monotonic()
        while self.process.poll() is None or self._pids():
            if time.monotonic() - began > DEADLINE_S:
                for pid in self._pids():
                    os.kill(pid, signal.SIGKILL)
                raise CheckpointError(f"processes still run {DEADLINE_S:.0f} s after the fault; see {self._log}")
            time.sleep(0.05)
        return time.monotonic() - began

    def resumed_from(self) -> int:
        """Return the step of the resumed checkpoint, -1 for a new run."""
        match = re.search(r"continues from \S*step-(\d+)", self._log.read_text())
        return int(match[1]) if match else -1

    def _pids(self) -> list[int]:
        """Return the processes of the run, fork servers and loader processes included: those with its environment."""
        pids = []
        for entry in Path("/proc").iterdir():
            try:
                variables = (entry / "environ").read_bytes().split(b"\0") if entry.name.isdigit() else []
                if f"{MARK}={self._folder}".encode() in variables:
                    pids.append(int(entry.name))
            except OSError:  # ended meanwhile
                continue
        return pids


def start(config: Path, folder: Path, launcher: str, faults: str) -> Run:
    """Start or resume the run in `folder` on two ranks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    near = Path(sys.executable).parent
    command = (
        [shutil.which("deepspeed", path=near) or "deepspeed", "--num_gpus", "2", "--master_port", port]
        if launcher == "deepspeed"
        else [shutil.which("torchrun", path=near) or "torchrun", "--nproc-per-node", "2", "--master-port", port]
    )
    command += ["launch/pretrain.py", "--config", str(config), f"run.dir={folder}", "--resume", "auto"]
    path = f"{near}{os.pathsep}{os.environ['PATH']}"
    forced = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "BIGDSSM_TEST_FAULT": faults, "PATH": path}
    forced["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT / "tests/faults")]))
    return Run(command, folder, {**os.environ, **forced})


def newest_step(run: Path) -> int:
    """Return the step of the newest checkpoint, valid or not; -1 without one."""
    names = [path.name for path in (run / "pretrain" / "checkpoints").glob("step-*")]
    return max((int(name.removeprefix("step-")) for name in names), default=-1)


def differences(whole: Path, hurt: Path) -> Iterator[str]:
    """Yield the differences between two stages: best weights, last checkpoint, rows, metrics."""
    last = f"checkpoints/step-{newest_step(whole.parent):08d}"
    tensors = [file for pattern in (f"{last}/[!t]*", f"{last}/tensors-*", "best/**/*") for file in whole.glob(pattern)]
    names = [file.relative_to(whole) for file in sorted(tensors) if file.suffix == ".safetensors"]
    for name in (*names, Path(last)):
        read = table_rows if str(name) == last else load_file
        first, second = (read(stage / name) if (stage / name).exists() else {} for stage in (whole, hurt))
        for key in {**first, **second}:
            if key not in first or key not in second or not torch.equal(first[key], second[key]):
                yield f"{name}: {key} differs"
    for file in sorted(whole.glob("row_ids-*.jsonl")):
        if file.read_text() != (hurt / file.name).read_text():
            yield f"{file.name} differs"
    if metrics(whole / METRICS_FILE) != metrics(hurt / METRICS_FILE):
        yield f"{METRICS_FILE} differs: other losses, or a repeated step"


def table_rows(path: Path) -> dict[str, torch.Tensor]:
    """Return the rows of sharded tables in a checkpoint, whose files depend on the checkpoints before it."""
    specs, found = load_checkpoint_model(path).model.tables.sharded, dict[str, torch.Tensor]()
    if not specs:
        return found
    saved = MappedTables(read_manifest(path).table_files(), specs)
    for name in specs:
        parts = list(saved.contents(name, lambda rows: rows >= 0, states=True))
        order = torch.cat([part["rows"] for part in parts]).argsort()
        found |= {f"{name}/{key}": torch.cat([part[key] for part in parts])[order] for key in parts[0]}
    return found


def metrics(path: Path) -> list[tuple[int, object]]:
    """Read the losses and validation metrics by step."""
    records = map(json.loads, path.read_text().splitlines())
    return [(record["step"], record.get("validation", record.get("loss"))) for record in records]


def report(results: list[FaultResult], hurt: Path, out: Path, seconds: float) -> None:
    """Print a table by kind of fault, and save all results."""
    table = Table(box=SIMPLE, show_edge=False, pad_edge=False)
    for column in ("fault", "times", "exit codes", "seconds to the last process's end"):
        table.add_column(column)
    for kind in dict.fromkeys(result.kind for result in results):
        same = [result for result in results if result.kind == kind]
        codes = ", ".join(sorted({str(result.exit_code) for result in same})) if kind not in DAMAGE else ""
        times = f"{min(result.seconds for result in same):.1f} to {max(result.seconds for result in same):.1f}"
        table.add_row(kind, str(len(same)), codes, times if kind not in DAMAGE else "")
    Console().print(table)
    (out / "faults.json").write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")
    starts = sum('"event": "start"' in line for line in (hurt / "pretrain" / "events.jsonl").read_text().splitlines())
    print(f"{len(results)} faults, {starts} starts, {seconds:.0f} s in total")


if __name__ == "__main__":
    sys.exit(run_main(main))
