"""The commands in the header of configs/movielens_1m.yaml, on generated files in GroupLens' format."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bigdssm.commands.make_shards import main as make_shards
from bigdssm.commands.report import main as report
from bigdssm.dataset.dataset import Dataset
from tools.public_data.__main__ import main as public_data

from .runs import ROOT, environment

pytestmark = pytest.mark.e2e
CONFIG = "configs/movielens_1m.yaml"
USERS, FILMS, RATINGS = 24, 30, 12
SMALL = ["model.dim=8", "model.doc.embedding_dim=8", "model.query.history.layers=1", "data.num_workers=0"]
SMALL += ["pretrain.rows_global=16", "pretrain.steps=2", "pretrain.optimizer.warmup_steps=1"]


def write_files(folder: Path) -> dict[str, list[tuple[str, int]]]:
    """Write the files of ml-1m.zip; return (film, time) per user, in the order of ratings.dat.

    The ratings are out of order, and each time has three of them.
    """
    folder.mkdir()
    random = np.random.RandomState(0)
    ratings: dict[str, list[tuple[str, int]]] = {}
    for user in range(1, USERS + 1):
        films = [str(film) for film in 1 + random.permutation(FILMS)[:RATINGS]]
        times = 978_300_000 + 3_600 * random.permutation(np.arange(RATINGS) // 3)
        ratings[str(user)] = list(zip(films, times.tolist(), strict=True))
    rows = [f"{user}::{film}::4::{time}\n" for user, events in ratings.items() for film, time in events]
    (folder / "ratings.dat").write_text("".join(rows))
    movies = [f"{film}::Am\xe9lie {film} (2001)::Comedy|Drama\n" for film in range(1, FILMS + 2)]  # the last is unrated
    (folder / "movies.dat").write_text("".join(movies), "latin-1")
    (folder / "users.dat").write_text("".join(f"{user}::F::25::4::48067\n" for user in ratings))
    return ratings


def header_commands() -> list[list[str]]:
    """Return the commands of the config's header."""
    header = (ROOT / CONFIG).read_text().split("\n\n")[0].replace("\\\n#", "")
    lines = [shlex.split(line[4:]) for line in header.splitlines() if line.startswith("#   ")]
    return [words for words in lines if words[0] in ("python", "bigdssm")]


def test_the_commands_of_the_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ratings = write_files(tmp_path / "ml-1m")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    convert, build, train, measure = header_commands()
    assert convert[:3] == ["python", "-m", "tools.public_data"]
    assert [words[1] for words in (build, train, measure)] == ["make_shards", "pretrain", "report"]
    assert public_data(convert[3:]) == 0
    assert make_shards(build[2:]) == 0
    line = [sys.executable, "-m", "bigdssm.commands", *train[1:], *SMALL]
    variables = environment(PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(line, env=variables, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert report(measure[2:]) == 0
    systems = json.loads((tmp_path / "runs/movielens_1m/report.json").read_text())
    assert [system["name"] for system in systems] == ["popularity", "Markov, window 3", "FPS pretraining"]

    dataset = Dataset.open(tmp_path / "datasets/movielens_1m")
    assert dataset.catalogue.num_docs == len({film for events in ratings.values() for film, _ in events})
    films = np.arange(dataset.catalogue.num_docs)
    assert dataset.catalogue.titles(films) == [f"Amélie {film}" for film in dataset.catalogue.keys(films)]
    assert dataset.num_queries("train") == USERS * (RATINGS - 3)
    for split, last in (("validation", RATINGS - 2), ("test", RATINGS - 1)):
        (rows,) = dataset.iterate(split, USERS)
        users = rows.sequences.strings("query_key", rows.sequence)
        assert sorted(users) == sorted(ratings)
        for number, user in enumerate(users):
            by_time = sorted(ratings[user], key=lambda event: event[1])  # stable
            film, time = by_time[last]
            assert dataset.catalogue.keys(rows.doc_rows[number : number + 1]) == [film]
            assert dataset.catalogue.keys(rows.seen(number)) == [earlier for earlier, _ in by_time[:last]]
            assert rows.request["time"][number] == 1_000_000 * time
