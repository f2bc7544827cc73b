"""Hurt a run again and again, and see that it ends as one left alone: the same bits, the same rows, the same metrics.

    python tools/bench/soak.py --out FOLDER [--faults 20] [--seed 0]

Makes a small dataset in FOLDER and trains on it on two ranks without a GPU: once in peace (FOLDER/whole), and once
through random faults at random steps and ranks, under deepspeed or torchrun by chance, each time going on with
--resume auto (FOLDER/hurt). Between two starts a checkpoint may be damaged, too. Ends with 0 where nothing is lost.
20 faults took 15 minutes on 2 busy cores.
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

import torch
import yaml
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from bigdssm.cli import at_least, run_main
from bigdssm.cluster.metrics import METRICS_FILE
from bigdssm.config import load_config
from bigdssm.errors import CheckpointError, ConfigError
from bigdssm.ingest.job import IngestTarget
from bigdssm.ingest.pairs import PairTables, make_pairs

ROOT = Path(__file__).resolve().parents[2]
NUM_PAIRS, NUM_WORDS = 3000, 200
SAVE_EVERY, FURTHEST = 5, 12  # steps: between checkpoints; from a start to its fault
LAST_STEPS = 20  # left for the last start, which nothing hurts
PEER_TIMEOUT_S, DEADLINE_S = 6.0, 60.0  # the second: from a fault to the end of the last process
DAMAGE = ("flip-byte", "cut-file", "lose-file", "lose-latest")
IN_SAVE = ("kill-save", "disk-full")
ANYWHERE = ("kill", "stop", "hang", "raise", "term", "int", "kill-launcher", "term-launcher", "kill-loader")
DEEPSPEED_ONLY = ("kill-runner", "term-runner")  # above torchrun stands this program
CONFIG = {
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
class Struck:
    """One fault and what came of it."""

    kind: str
    launcher: str
    rank: int
    step: int
    exit_code: int
    seconds: float  # from the fault to the end of the last process
    went_on_from: int  # the checkpoint that the next start found, -1 before it


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="must not exist")
    parser.add_argument("--faults", type=at_least(1), default=20, help="how many (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of kinds, steps, ranks and launchers (%(default)s)")
    args = parser.parse_args()
    if args.out.exists():
        raise ConfigError(f"{args.out} exists; --out takes a new folder")
    started = time.monotonic()
    steps = args.faults * FURTHEST + LAST_STEPS
    config = make_dataset(args.out, steps)
    chance = random.Random(args.seed)
    nan = f"nan@{steps // 3}:1"  # skipped in both runs, however often the hurt one comes by
    start(config, args.out / "whole", "deepspeed", nan).finish(0)
    print(f"left alone: {steps} steps in {time.monotonic() - started:.0f} s", flush=True)

    struck: list[Struck] = []
    hurt = args.out / "hurt"
    for kind in kinds(args.faults, chance):
        began = newest_step(hurt)
        struck.append(damaged(hurt, kind, chance) if kind in DAMAGE else hit(config, hurt, kind, nan, began, chance))
        print(f"{len(struck):3d} {json.dumps(asdict(struck[-1]))}", flush=True)
    start(config, hurt, "deepspeed", nan).finish(0)

    report(struck, hurt, args.out, time.monotonic() - started)
    problems = list(differences(args.out / "whole" / "pretrain", hurt / "pretrain"))
    print("the same bits, rows and metrics" if not problems else "\n".join(problems))
    return 1 if problems else 0


def make_dataset(out: Path, steps: int) -> Path:
    """Make the dataset and return the config's path."""
    out.mkdir(parents=True)
    chance = random.Random(0)
    with (out / "pairs.jsonl").open("w") as file:
        for _ in range(NUM_PAIRS):
            words = [f"word{chance.randrange(NUM_WORDS)}" for _ in range(8)]
            record = {"query": " ".join(words[:3]), "text": " ".join(words), "section": words[0][-1]}
            file.write(json.dumps(record) + "\n")
    content = {**CONFIG, "data": {**CONFIG["data"], "dir": str(out / "dataset")}}
    content["pretrain"] = {**CONFIG["pretrain"], "steps": steps}
    path = out / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    tables = PairTables((out / "pairs.jsonl",), validation_fraction=0.05, test_fraction=0.05)
    make_pairs(load_config(path).data, tables, IngestTarget(out / "dataset"))
    return path


def kinds(number: int, chance: random.Random) -> list[str]:
    """Return `number` kinds: each as often as any other, in random order, no damage before there are checkpoints."""
    every = [*ANYWHERE, *DEEPSPEED_ONLY, *IN_SAVE, *DAMAGE]
    found: list[str] = []
    while len(found) < number:
        found += chance.sample(every, len(every))
    found = found[:number]
    first = next((place for place, kind in enumerate(found) if kind.startswith("term")), 0)
    found[0], found[first] = found[first], found[0]
    return found


def hit(config: Path, hurt: Path, kind: str, nan: str, began: int, chance: random.Random) -> Struck:
    """Start the run, let the fault strike, and wait until nothing of it is left."""
    launcher = "deepspeed" if kind in DEEPSPEED_ONLY else chance.choice(["deepspeed", "torchrun"])
    rank, first = chance.randrange(2), max(0, began)
    step = first + chance.randint(1, FURTHEST)
    if kind in IN_SAVE:
        step = (first // SAVE_EVERY + chance.randint(1, FURTHEST // SAVE_EVERY)) * SAVE_EVERY
    run = start(config, hurt, launcher, f"{nan},{kind}@{step}:{rank}")
    seconds = run.struck(f"BIGDSSM_FAULT: {kind} at")
    return Struck(kind, launcher, rank, step, run.process.returncode, round(seconds, 1), run.went_on_from())


def damaged(hurt: Path, kind: str, chance: random.Random) -> Struck:
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
    return Struck(kind, "", -1, int(newest.name.removeprefix("step-")), 0, 0.0, -1)


class Started:
    """A run under a launcher."""

    def __init__(self, command: list[str], folder: Path, environment: dict[str, str]) -> None:
        self._folder, self._log = folder, folder.with_name(f"{folder.name}-{time.monotonic_ns()}.log")
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def finish(self, code: int) -> None:
        """Wait for the end. Raises CheckpointError where the launcher does not exit with `code`."""
        if self.process.wait() != code:
            raise CheckpointError(f"exit code {self.process.returncode}, needed is {code}; see {self._log}")

    def struck(self, sign: str) -> float:
        """Wait for the fault, then for the end of all processes; return the seconds between. Raises CheckpointError."""
        while sign not in self._log.read_text():
            if self.process.poll() is not None:
                raise CheckpointError(f"ended with {self.process.returncode} before the fault; see {self._log}")
            time.sleep(0.05)
        began = time.monotonic()
        while self.process.poll() is None or self._pids():
            if time.monotonic() - began > DEADLINE_S:
                for pid in self._pids():
                    os.kill(pid, signal.SIGKILL)
                raise CheckpointError(f"processes were left {DEADLINE_S:.0f} s after the fault; see {self._log}")
            time.sleep(0.05)
        return time.monotonic() - began

    def went_on_from(self) -> int:
        """Return the step of the checkpoint that the run went on from, -1 where it began."""
        found = re.search(r"goes on from \S*step-(\d+)", self._log.read_text())
        return int(found[1]) if found else -1

    def _pids(self) -> list[int]:
        """Return the processes that have the run's folder in their command line."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and f"run.dir={self._folder}".encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:  # ended meanwhile
                continue
        return found


def start(config: Path, folder: Path, launcher: str, faults: str) -> Started:
    """Start two ranks that go on from where the run in `folder` stands."""
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
    forced = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "BIGDSSM_FAULT": faults, "PATH": path}
    return Started(command, folder, {**os.environ, **forced})


def newest_step(run: Path) -> int:
    """Return the step of the newest checkpoint, good or not, -1 where there is none."""
    names = [path.name for path in (run / "pretrain" / "checkpoints").glob("step-*")]
    return max((int(name.removeprefix("step-")) for name in names), default=-1)


def differences(whole: Path, hurt: Path) -> Iterator[str]:
    """Yield what differs between the two stages: best weights, last checkpoint, rows, metrics."""
    last = f"checkpoints/step-{newest_step(whole.parent):08d}"
    tensors = [f"{last}/{file.name}" for file in sorted((whole / last).glob("*.safetensors"))]
    for name in ("best/model.safetensors", *tensors):
        first, second = (load_file(stage / name) if (stage / name).is_file() else {} for stage in (whole, hurt))
        for key in {**first, **second}:
            if key not in first or key not in second or not torch.equal(first[key], second[key]):
                yield f"{name}: {key} differs"
    for file in sorted(whole.glob("row_ids-*.jsonl")):
        if file.read_text() != (hurt / file.name).read_text():
            yield f"{file.name} differs"
    first, second = (told(stage / METRICS_FILE) for stage in (whole, hurt))
    if first != second:
        yield f"{METRICS_FILE} differs: it has other losses, or a step twice"


def told(path: Path) -> list[tuple[int, object]]:
    """Return what a run told of each step and validation, times and memory aside."""
    records = map(json.loads, path.read_text().splitlines())
    return [(record["step"], record.get("validation", record.get("loss"))) for record in records]


def report(struck: list[Struck], hurt: Path, out: Path, seconds: float) -> None:
    """Print the figures by kind, and save every fault."""
    table = Table(box=SIMPLE, show_edge=False, pad_edge=False)
    for column in ("fault", "times", "exit codes", "seconds to the last process's end"):
        table.add_column(column)
    for kind in dict.fromkeys(one.kind for one in struck):
        same = [one for one in struck if one.kind == kind]
        codes = ", ".join(sorted({str(one.exit_code) for one in same})) if kind not in DAMAGE else ""
        times = f"{min(one.seconds for one in same):.1f} to {max(one.seconds for one in same):.1f}"
        table.add_row(kind, str(len(same)), codes, times if kind not in DAMAGE else "")
    Console().print(table)
    (out / "faults.json").write_text(json.dumps([asdict(one) for one in struck], indent=1) + "\n")
    starts = sum('"event": "start"' in line for line in (hurt / "pretrain" / "events.jsonl").read_text().splitlines())
    print(f"{len(struck)} faults, {starts} starts, {seconds:.0f} s in all")


if __name__ == "__main__":
    sys.exit(run_main(main))
