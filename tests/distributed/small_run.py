"""A small run over synthetic interactions: users who walk through items of one genre, with a few popular ones between.

Items have a title, so that all four encoders take part. What needs many libraries is imported when it is called: tests
of a card run without most of them.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from bigdssm.config import StageName, load_config
from bigdssm.utils.log import no_progress

NUM_USERS, NUM_ITEMS, NUM_GENRES = 60, 48, 4

CONFIG: dict[str, Any] = {
    "run": {"dir": "replaced", "trackers": []},
    "engine": {"precision": "fp32"},
    "data": {
        "time_unit": "s",
        "dir": "replaced",
        "lanes": 6,
        "num_workers": 0,
        "query": {
            "history": {"type": "history", "of": "item_id", "max_items": 8},
            "age": {"type": "numeric"},
            "gender": {"type": "categorical"},
        },
        "doc": {
            "item_id": {"type": "categorical"},
            "title": {"type": "text", "max_tokens": 8},
            "genre": {"type": "categorical", "multi": True},
        },
        "tokenizer": {"vocab_size": 200},
    },
    "model": {
        "dim": 16,
        "beta": "document",
        "score": "cosine",  # with dot products a shift of all document vectors has no gradient: nothing to compare
        "alpha_init": 4.0,
        "query": {
            "residual": "history", "mlp": [], "embedding_dim": 4, "numeric_dim": 4,
            "history": {"dropout": 0.0, "item_dropout": 0.0},
        },
        "doc": {
            "residual": "item_id", "mlp": [16], "embedding_dim": 16, "text": {"layers": 1, "hidden": 16, "heads": 2},
        },
    },
    "pretrain": {
        "rows_global": 96,
        "steps": 12,
        "negatives": {"mask": "user", "uniform": 24}, "sampling": {"name": "corrected"},
        "optimizer": {"lr": 0.01, "warmup_steps": 3},
        "save_every_steps": 0,
        "log_every_steps": 1,
    },
    "sft": {
        "rows_global": 48,
        "steps": 4,
        "loss": {"name": "pair_ce"}, "negatives": {"hard": 3, "in_batch": False, "mining": {"first": 1, "last": 20}},
        "log_every_steps": 1,
    },
}  # fmt: skip


def write_dataset(folder: Path, overrides: Sequence[str] = (), *, with_arrivals: bool = False) -> Path:
    """Make the tables, the config (with `overrides`) and the dataset in `folder`; return the config's path.

    with_arrivals: items have a column `arrived`, over 40 days.
    """
    from bigdssm.ingest.interactions import InteractionTables, make_interactions
    from bigdssm.ingest.job import IngestTarget

    random = np.random.RandomState(0)
    genre_of = random.randint(0, NUM_GENRES, NUM_ITEMS)
    items = ["item_id\ttitle\tgenre" + "\tarrived" * with_arrivals]
    for item in range(NUM_ITEMS):
        words = " ".join(f"word{w}" for w in random.randint(0, 20, 1 + item % 4))
        arrival = f"\t{86_400 * (item * 7 % 40)}" * with_arrivals
        items.append(f"i{item}\t{words} number {item}\tg{genre_of[item]} all{arrival}")
    users = ["user_id\tage\tgender"] + [f"u{u}\t{20 + u % 40}\t{'MF'[u % 2]}" for u in range(NUM_USERS)]
    events = ["user_id\titem_id\ttimestamp\taction\tprice"]
    for user in range(NUM_USERS):
        liked = np.flatnonzero(genre_of == user % NUM_GENRES)
        for time in range(14 + user % 9):
            item = time % 5 if time % 4 == 3 else liked[(time * 3 + user) % len(liked)]
            price = "" if time % 6 == 5 else f"{1 + (item * 3 + user) % 11}.5"
            events.append(f"u{user}\ti{item}\t{time}\t{('view', 'buy', '')[(time + item) % 3]}\t{price}")
    for name, lines in (("items", items), ("users", users), ("events", events)):
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    content = {**CONFIG, "data": {**CONFIG["data"], "dir": str(folder / "dataset")}}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    if overrides:
        path.write_text(yaml.safe_dump(load_config(path, overrides).to_dict()))
    tables = InteractionTables(folder / "events.tsv", folder / "items.tsv", folder / "users.tsv")
    make_interactions(load_config(path).data, tables, IngestTarget(folder / "dataset"), no_progress)
    return path


def group_threads() -> int:
    """Return the number of threads of gloo groups in this process."""
    return sum("gloo" in (task / "comm").read_text() for task in Path("/proc/self/task").iterdir())


def run(
    rank: int, world_size: int, config: Path, run_dir: Path, overrides: tuple[str, ...] = (),
    stage: StageName = "pretrain", resume: bool = False,
) -> None:  # fmt: skip
    """Run a stage on this rank; for a Pool. At ZeRO 3 every parameter is sharded, which small ones else are not."""
    from bigdssm.training import engine
    from bigdssm.training.stages import run_stage

    warnings.filterwarnings("ignore", category=FutureWarning)
    loaded = load_config(config, [f"run.dir={run_dir}", *overrides])
    derive = engine.deepspeed_config

    def sharding_all(*args: Any) -> dict[str, Any]:
        derived = derive(*args)
        derived["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return derived

    engine.deepspeed_config = sharding_all
    try:
        run_stage(loaded, stage, resume=resume, validate_only=False, world_size=world_size)
    finally:
        engine.deepspeed_config = derive


def validations(run_dir: Path, stage: str = "pretrain") -> list[dict[str, float]]:
    """Return the metrics of every validation in metrics.jsonl."""
    lines = (run_dir / stage / "metrics.jsonl").read_text().splitlines()
    return [record["validation"] for record in map(json.loads, lines) if "validation" in record]


def records(run_dir: Path, stage: str = "pretrain") -> list[dict[str, Any]]:
    """Return the training records of metrics.jsonl."""
    lines = (run_dir / stage / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "loss" in record]


def append_day2(config: Path) -> None:
    """Append the partition `day2`, with new users, items and genres, to the dataset of a config."""
    from bigdssm.ingest.interactions import InteractionTables, make_interactions
    from bigdssm.ingest.job import IngestTarget

    folder = config.parent
    items = ["item_id\ttitle\tgenre"] + [f"new{i}\tword{i} number {i}\tg9 all" for i in range(7)]
    users = ["user_id\tage\tgender"] + [f"v{u}\t{30 + u}\t{'MX'[u % 2]}" for u in range(30)]
    events = ["user_id\titem_id\ttimestamp"]
    for user in range(30):
        for time in range(9):
            item = f"new{(user + time) % 7}" if time % 2 else f"i{(3 * user + time) % NUM_ITEMS}"
            events.append(f"{'uv'[user % 2]}{user}\t{item}\t{100 + time}")
    for name, lines in (("items2", items), ("users2", users), ("events2", events)):
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    tables = InteractionTables(folder / "events2.tsv", folder / "items2.tsv", folder / "users2.tsv")
    make_interactions(load_config(config).data, tables, IngestTarget(folder / "dataset", "day2", append=True))
