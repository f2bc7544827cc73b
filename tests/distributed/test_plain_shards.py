"""A run on plain WebDataset shards of another writer, on 2 ranks, stopped and resumed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from webdataset import TarWriter

from bigdssm.config import load_config
from bigdssm.ingest.job import IngestTarget
from bigdssm.ingest.pairs import PairTables, make_pairs
from bigdssm.utils.hashing import hash64

from . import small_run
from .compared_runs import stop_after
from .spawn import Pool, RankFailed

STEPS = 6


def write_plain_shards(folder: Path) -> Path:
    """Write three shards of pairs, their config, and the dataset of their catalogue; return the config's path."""
    for shard in range(3):
        with TarWriter(str(folder / f"{shard}.tar")) as writer:
            for i in range(200 * shard, 200 * shard + 200):
                words = {"query.txt": f"word{i % 60} of {i % 7}", "doc.txt": f"text {i % 60}"}
                writer.write({"__key__": str(i), **{name: text.encode() for name, text in words.items()}})
    text = {"type": "text", "max_tokens": 8}
    sizes = {"layers": 1, "hidden": 16, "heads": 2}
    tower = {"mlp": [16], "text": sizes}
    content = {
        "run": {"dir": str(folder / "run"), "trackers": []},
        "data": {
            "dir": str(folder / "dataset"), "lanes": 2, "num_workers": 0,
            "query": {"query": text}, "doc": {"doc": text},
            "tokenizer": {"vocab_size": 200}, "webdataset": str(folder / "{0..2}.tar"), "max_bad_fraction": 0.0,
        },
        "model": {"dim": 16, "query": tower, "doc": tower},
        "pretrain": {
            "rows_global": 64, "steps": STEPS, "save_every_steps": 2, "log_every_steps": 1, "validate_every_steps": 3,
            "optimizer": {"lr": 0.01, "warmup_steps": 1},
        },
        "debug": {"log_row_ids": True},
    }  # fmt: skip
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(content))
    make_pairs(load_config(config).data, PairTables(files=(folder / "0.tar",)), IngestTarget(folder / "dataset"))
    return config


@pytest.mark.slow
def test_plain_shards_train_evaluate_and_resume(tmp_path: Path, pools: dict[int, Pool]) -> None:
    config = write_plain_shards(tmp_path)
    with pytest.raises(RankFailed, match=r"sampling\.frequency: got counts"):
        pools[2].run(
            small_run.run,
            config,
            tmp_path / "run",
            ("pretrain.sampling.name=corrected",),
        )
    with pytest.raises(RankFailed, match=r"pretrain\.steps: got 0"):
        pools[2].run(small_run.run, config, tmp_path / "run", ("pretrain.steps=0",))
    pools[2].run(stop_after, config, tmp_path / "run", (), 1)
    pools[2].run(small_run.run, config, tmp_path / "run", (), "pretrain", True)
    curve = small_run.records(tmp_path / "run")
    assert {record["step"] for record in curve} == set(range(1, STEPS + 1))
    losses = [record["loss"] for record in curve]
    assert np.isfinite(losses).all() and losses[-1] < losses[0]
    known = {hash64(f"{tmp_path}/{i // 200}.tar/{i}") for i in range(600)}
    for rank in range(2):
        lines = (tmp_path / "run" / "pretrain" / f"row_ids-{rank:05d}.jsonl").read_text().splitlines()
        steps = {json.loads(line)["step"]: json.loads(line)["row_ids"] for line in lines}
        assert list(steps) == list(range(1, STEPS + 1))
        assert all(len(ids) == 32 and set(ids) <= known for ids in steps.values())
    assert (tmp_path / "run" / "pretrain" / "best" / "schema.json").is_file()
