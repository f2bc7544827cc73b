"""A day of a shop with launch/morning.sh and launch/night.sh, and a folder as the store."""

from __future__ import annotations

import csv
import os
import random
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.e2e, pytest.mark.slow]

START = 1_700_006_400  # a midnight, seconds since 1970
DAY = 86_400
CONFIG = """
run: {dir: runs/shop, trackers: []}
data:
  dir: datasets/shop
  exclude_seen: false
  targets_per_row: 20
  event:
    action: {type: categorical}
  request: [action]
  visit: {gap_s: 1800, funnel: {action: [view, purchase]}}
  query:
    history: {type: history, of: item_id, max_items: 20}
  doc:
    item_id: {type: categorical}
    kind: {type: categorical}
model:
  dim: 16
  score: dot
  alpha_init: 1.0
  beta: document
  tables: {id_dropout: 0.1}
  query:
    residual: history
    mlp: [16]
    embedding_dim: 8
    history: {block: gated, positions: relative, layers: 1, heads: 2, transition: action}
  doc: {residual: item_id, mlp: [], embedding_dim: 16}
pretrain:
  rows_global: 32
  steps: 2
  warm_start: {chain: true}
  loss: {name: fps}
  negatives: {columns: catalogue, mask: none}
  optimizer: {lr: 1.0e-3, warmup_steps: 0}
"""


def write(file: Path, header: str, rows: Iterable[Sequence[object]]) -> None:
    with file.open("w", newline="") as opened:
        csv.writer(opened).writerows([header.split(), *rows])


def write_day(folder: Path, day: str, start: int, days: int, items: range) -> None:
    """Write events of 60 users, whose product after i is i + 1, and the table of `items`."""
    draw = random.Random(day)
    events = []
    for user in range(60):
        for visit in range(8):
            time = start + draw.randrange(days * DAY - 7200)
            item = draw.randrange(items.stop)
            for _ in range(3):
                events.append((f"u{user}", f"i{item}", time, "view"))
                if (item + visit) % 3 == 0:
                    events.append((f"u{user}", f"i{item}", time + 20, "purchase"))
                item = (item + 1) % items.stop
                time += 60
    write(folder / f"events-{day}.csv", "user_id item_id timestamp action", events)
    write(folder / f"items-{day}.csv", "item_id kind", [(f"i{item}", f"k{item % 4}") for item in items])


class Shop:
    """The folder of a shop, in which commands run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.env = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "URL": f"file://{folder}/store"}

    def run(self, command: str) -> subprocess.CompletedProcess[str]:
        """Run a command line of bash; `launch/` is that of the repository."""
        command = f"set -e; {command.replace('launch/', f'{ROOT}/launch/')}"
        arguments = ["bash", "-c", command]
        return subprocess.run(
            arguments, cwd=self.folder, env=self.env, capture_output=True, text=True, check=False, timeout=300
        )

    def ran(self, command: str) -> str:
        """Return the output of a command that succeeds."""
        result = self.run(command)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout + result.stderr

    def live(self) -> str:
        """Return the name of the live collection, as `publish` lists it."""
        listed = self.ran("bigdssm publish --to $URL")
        return next(line.split(":")[0] for line in listed.splitlines() if line.endswith(", live"))


def test_a_day_of_a_shop(tmp_path: Path) -> None:
    shop = Shop(tmp_path)
    (tmp_path / "shop.yaml").write_text(CONFIG)
    write_day(tmp_path, "base", START, 20, range(40))
    write_day(tmp_path, "day-1", START + 20 * DAY, 1, range(44))
    write_day(tmp_path, "day-2", START + 21 * DAY, 1, range(44))
    write(tmp_path / "items-noon.csv", "item_id kind", [(f"i{item}", "k1") for item in range(40, 44)])
    write(tmp_path / "withdrawn.csv", "item_id", [("i3",)])
    shop.ran(
        "bigdssm make_shards interactions --config shop.yaml --partition base --interactions events-base.csv "
        "--items items-base.csv --split time; bigdssm pretrain --config shop.yaml; mkdir models; "
        "cp -rL runs/shop/pretrain/best models/base; "
        "bigdssm embed --model models/base --data datasets/shop --out vectors/base; "
        "bigdssm publish --vectors vectors/base --data datasets/shop --to $URL --as base --verify --switch"
    )

    morning = "bash launch/morning.sh shop.yaml base noon items-noon.csv withdrawn.csv"
    assert "4 written, 1 deleted" in shop.ran(morning)
    assert "0 written, 0 deleted" in shop.ran(morning), "a repeated morning changes nothing"

    missing = shop.run("bash launch/night.sh shop.yaml base day-3")
    assert missing.returncode != 0 and "events-day-3" in missing.stderr
    assert shop.live() == "base"

    output = shop.ran("MARGIN=0.9 bash launch/night.sh shop.yaml base day-1")
    assert "NEW is not worse" in output
    assert shop.live() == "day-1" and (tmp_path / "models/day-1").is_dir()

    output = shop.ran("MARGIN=0 bash launch/night.sh shop.yaml day-1 day-2")
    assert "NEW is not worse" not in output
    assert shop.live() == "day-1" and not (tmp_path / "models/day-2").exists()

    shop.ran("bigdssm publish --to $URL --rollback --update --data datasets/shop --model models --vectors vectors/base")
    assert shop.live() == "base"
