"""tools/serve.py as a user starts it: the page in a real browser, and the load that bench_serve.py puts on it."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bigdssm.artifacts.model_folder import load_model_folder, save_model_folder
from bigdssm.config import load_config
from bigdssm.dataset.dataset import Dataset
from bigdssm.retrieval.embed import tower_encoders
from bigdssm.retrieval.index import build_index
from bigdssm.retrieval.vectors import write_vectors
from tests.conftest import TinyDataset
from tests.unit.retrieval.conftest import SMALL, random_model

ROOT = Path(__file__).resolve().parents[2]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")

pytestmark = pytest.mark.e2e
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")


@pytest.fixture(scope="module")
def served(tiny_interactions: TinyDataset, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A server of users and histories: its address, and the folder of model and index."""
    folder = tmp_path_factory.mktemp("served")
    with serving(tiny_interactions, folder) as address:
        yield address, folder


@pytest.fixture(scope="module")
def texts_url(tiny_pairs: TinyDataset, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server whose queries are texts."""
    with serving(tiny_pairs, tmp_path_factory.mktemp("texts")) as address:
        yield address


@contextmanager
def serving(tiny: TinyDataset, folder: Path) -> Iterator[str]:
    """Serve a small random model with the command, and yield its address."""
    make_served(tiny, folder)
    with started(folder) as (address, server):
        yield address
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=20) in (0, 130, -signal.SIGINT)


def make_served(tiny: TinyDataset, folder: Path, seed: int = 1) -> str:
    """Make a small random model and its index in `folder`, and return the model's checksum."""
    config = load_config(tiny.config, [f"model.{override}" for override in SMALL])
    dataset = Dataset.open(tiny.dir)
    model = random_model(config, dataset, seed)
    save_model_folder(folder / "model", model, config, dataset.schema, dataset.tokenizer_dir, {})
    checksum = load_model_folder(folder / "model").checksum
    write_vectors(folder / "vectors", tower_encoders(model, dataset), dataset, checksum)
    build_index(folder / "vectors", folder / "index")
    return checksum


@contextmanager
def started(folder: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Start the command, and yield its address and itself; it is killed where it still runs at the end."""
    command, environment = [*serve(folder, "0"), *options], {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            yield server.stdout.readline().split()[0], server
        finally:
            server.kill()


def serve(folder: Path, port: str) -> list[str]:
    command = [sys.executable, "tools/serve.py", "--model", folder / "model", "--index", folder / "index"]
    return [*map(str, command), "--port", port]


@pytest.fixture(scope="module")
def url(served: tuple[str, Path]) -> str:
    return served[0]


@pytest.fixture(scope="module")
def browse(url: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function from a query string to what the page shows once it has loaded everything."""
    browser = next((path for path in map(shutil.which, BROWSERS) if path), None)
    if browser is None:
        give_up = pytest.fail if "BIGDSSM_FULL" in os.environ else pytest.skip
        give_up(f"needs a browser to look at the page with: one of {', '.join(BROWSERS)}")
    profile = tmp_path_factory.mktemp("profile")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", f"--user-data-dir={profile}"]

    def look(query: str, at: str = url) -> str:
        command = [browser, *options, "--virtual-time-budget=20000", "--dump-dom", f"{at}/{query}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=180)
        assert done.returncode == 0, done.stderr
        return html.unescape(done.stdout)

    return look


def rows(page: str) -> list[list[str]]:
    """Return the cells of the table of documents."""
    (table,) = re.findall(r'<table id="documents">(.*?)</table>', page, re.DOTALL)
    return [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", table) if "<td" in row]


def test_the_page_shows_ten_documents_of_a_user(browse: Any) -> None:
    page = browse("?user=u7")
    found = rows(page)
    assert [cells[0] for cells in found] == [str(rank) for rank in range(1, 11)]
    scores = [float(cells[1]) for cells in found]
    assert scores == sorted(scores, reverse=True)
    assert all(re.fullmatch(r"i\d+", cells[3]) for cells in found)
    assert re.search(r"10 documents in [\d.]+ ms · server [\d.]+ ms · encoding [\d.]+ ms, index [\d.]+ ms", page)
    assert "40 documents · flat index" in page and "History, newest first: " in page
    assert '<option value="u7">' in page and 'name="age"' in page
    (link,) = re.findall(r'href="(\?similar=[^"]+)"', found[0][4])
    page = browse(link)
    assert f"Nearest to {found[0][2]}" in page
    assert len(rows(page)) == 10 and found[0][3] not in [cells[3] for cells in rows(page)]


def test_the_page_takes_a_typed_text(browse: Any, texts_url: str) -> None:
    asked = {"features": {"query": "stone bridge <river>"}, "top": 10}
    request = urllib.request.Request(f"{texts_url}/api/search", json.dumps(asked).encode(), method="POST")
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request, timeout=30) as answer:
        documents = json.load(answer)["documents"]
    page = browse("?query=stone+bridge+%3Criver%3E", texts_url)
    assert [(cells[0], cells[1], cells[3]) for cells in rows(page)] == [
        (str(entry["rank"]), f"{entry['score']:.4f}", entry["key"]) for entry in documents
    ]
    assert len(documents) == 10 and "stone bridge <river>" in page and "no user" not in page
    assert 'name="query"' in page and 'name="user"' not in page and 'name="history"' not in page


def test_the_page_says_what_is_wrong_and_shows_it_as_text(browse: Any) -> None:
    page = browse("?user=<b id=injected>nobody")
    assert 'class="error"' in page and "no user is called '<b id=injected>nobody'" in page
    assert "&lt;b id" not in page  # unescaped by `browse`; as an element it would be closed and quoted
    assert '<b id="injected">' not in page
    assert rows(page) == []


def test_a_load_is_measured(url: str, tmp_path: Path) -> None:
    (tmp_path / "users.txt").write_text("\n".join(f"u{number}" for number in range(60)))
    command = [
        "tools/bench/bench_serve.py",
        "--url",
        url,
        "--queries",
        tmp_path / "users.txt",
        "--user",
        "--seconds",
        "2",
    ]
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert re.search(r"\d+ queries by 8 clients in [\d.]+ s: \d+ queries/s", done.stdout)
    assert re.search(r"latency p50 [\d.]+ ms, p99 [\d.]+ ms", done.stdout)
