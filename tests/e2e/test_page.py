"""bigdssm serve: the page in a real browser, and the load test of bench_serve.py."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bigdssm.checkpoints.model_folder import load_model_folder, save_model_folder
from bigdssm.config import load_config
from bigdssm.dataset.dataset import Dataset
from bigdssm.ingest.interactions import InteractionTables, make_interactions
from bigdssm.ingest.job import IngestTarget
from bigdssm.retrieval.embed import tower_encoders
from bigdssm.retrieval.index import build_index
from bigdssm.retrieval.vectors import write_vectors
from tests.conftest import INTERACTIONS_DATA, TinyDataset, write_config
from tests.e2e.browser import BROWSERS, Page, browser_path, browsing
from tests.unit.conftest import SMALL, random_model

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.e2e
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")


@pytest.fixture(scope="module")
def served(tiny_interactions: TinyDataset, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A server with users and histories: its address, and the folder of model and index."""
    folder = tmp_path_factory.mktemp("served")
    with serving(tiny_interactions, folder, "--list-users") as address:
        yield address, folder


@pytest.fixture(scope="module")
def texts_url(tiny_pairs: TinyDataset, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server with text queries."""
    with serving(tiny_pairs, tmp_path_factory.mktemp("texts")) as address:
        yield address


@contextmanager
def serving(tiny: TinyDataset, folder: Path, *options: str | Path) -> Iterator[str]:
    """Serve a small random model with the command, and yield its address."""
    make_served(tiny, folder)
    with started(folder, *options) as (address, server):
        yield address
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=20) in (0, 130, -signal.SIGINT)


def make_served(tiny: TinyDataset, folder: Path, seed: int = 1) -> str:
    """Write a small random model and its index to `folder`; return the model's checksum."""
    config = load_config(tiny.config, [f"model.{override}" for override in SMALL])
    dataset = Dataset.open(tiny.dir)
    model = random_model(config, dataset, seed)
    save_model_folder(folder / "model", model, config, dataset.schema, dataset.tokenizer_dir, {})
    checksum = load_model_folder(folder / "model").checksum
    write_vectors(folder / "vectors", tower_encoders(model, dataset), dataset, checksum)
    build_index(folder / "vectors", folder / "index")
    return checksum


@contextmanager
def started(folder: Path, *options: str | Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Start the command; yield its address and process, which is killed at the end."""
    command, environment = [*serve(folder, "0"), *map(str, options)], {**os.environ, "OMP_NUM_THREADS": "1"}
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
def two_url(tiny_interactions: TinyDataset, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server with two models."""
    folder = tmp_path_factory.mktemp("two")
    make_served(tiny_interactions, folder / "other", seed=2)
    with serving(tiny_interactions, folder, "--second", folder / "other/model", folder / "other/index") as address:
        yield address


@pytest.fixture(scope="module")
def timed_url(tiny_interactions: TinyDataset, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server whose requests have the time since the user's newest event."""
    root, source = tmp_path_factory.mktemp("timed"), tiny_interactions.source
    config = write_config(root, {**INTERACTIONS_DATA, "event": {"gap": {"type": "elapsed"}}, "request": ["gap"]})
    tables = InteractionTables(source / "interactions.csv", source / "items.csv", source / "users.csv")
    make_interactions(load_config(config).data, tables, IngestTarget(root / "dataset"))
    with serving(TinyDataset(root / "dataset", config, source), root / "served") as address:
        yield address


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """A page of a real browser."""
    browser = browser_path()
    if browser is None:
        give_up = pytest.fail if "BIGDSSM_FULL" in os.environ else pytest.skip
        give_up(f"needs a browser to look at the page with: one of {', '.join(BROWSERS)}")
    with browsing(browser, tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture(autouse=True)
def no_problems(request: pytest.FixtureRequest) -> Iterator[None]:
    """No test leaves an error in the page's console, such as a violation of its content security policy."""
    yield
    if "page" in request.fixturenames:
        page = request.getfixturevalue("page")
        problems = [problem for problem in page.problems if "status of 4" not in problem]
        page.problems.clear()
        assert not problems


def rows(page: Page, side: str = "") -> list[list[str]]:
    """Return the cells of a table of documents."""
    lines = f"document.getElementById('documents{side}').querySelectorAll('tr[data-key]')"
    found: list[list[str]] = page.js(f"[...{lines}].map(line => [...line.cells].map(cell => cell.textContent))")
    return found


def text(page: Page, selector: str = "body") -> str:
    """Return the text of an element."""
    found: str = page.js(f"document.querySelector({json.dumps(selector)}).innerText")
    return found


def post(url: str, path: str, body: dict[str, Any]) -> Any:
    """Return the response of the API."""
    request = urllib.request.Request(url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def test_the_page_shows_ten_documents_of_a_user(page: Page, url: str) -> None:
    page.open(f"{url}/?user=u7")
    found = rows(page)
    assert [cells[0] for cells in found] == [str(rank) for rank in range(1, 11)]
    scores = [float(cells[1]) for cells in found]
    assert scores == sorted(scores, reverse=True)
    assert all(re.fullmatch(r"i\d+", cells[3]) for cells in found)
    assert re.search(r"10 documents in [\d.]+ ms · server [\d.]+ ms · encoding [\d.]+ ms, index [\d.]+ ms", text(page))
    assert "40 documents · flat index" in text(page) and "History, newest first: " in text(page)
    for selector in ("option[value=u7]", "[name=age]"):
        assert page.js(f"document.querySelector({selector!r}) !== null")
    link = page.js("document.querySelector('tr[data-key] a').href")
    page.open(link)
    assert f"Nearest to {found[0][2]}" in text(page)
    assert len(rows(page)) == 10 and found[0][3] not in [cells[3] for cells in rows(page)]


def test_the_page_takes_a_typed_text(page: Page, texts_url: str) -> None:
    documents = post(texts_url, "/api/search", {"features": {"query": "stone bridge <river>"}, "top": 10})["documents"]
    page.open(f"{texts_url}/?query=stone+bridge+%3Criver%3E")
    assert [(cells[0], cells[1], cells[3]) for cells in rows(page)] == [
        (str(entry["rank"]), f"{entry['score']:.4f}", entry["key"]) for entry in documents
    ]
    assert len(documents) == 10 and text(page, "#title") == "stone bridge <river>" and "no user" not in text(page)
    names = page.js("[...document.querySelectorAll('#fields input')].map(input => input.name)")
    assert names == ["query"]


@pytest.mark.slow
def test_the_page_asks_for_a_time_if_the_model_needs_it(page: Page, url: str, timed_url: str) -> None:
    page.open(f"{timed_url}/?user=u7")
    assert "now is missing: the features gap of a request are computed from it" in text(page, "#status")
    answers = {}
    for now in (41_010, 9_000_000):  # soon after the newest events, and months later
        page.js(f"document.querySelector('[name=now]').value = '{now}'")
        page.js("document.querySelector('#ask > button').click()")
        page.wait_until_idle()
        answers[now] = [(cells[1], cells[3]) for cells in rows(page)]
        documents = post(timed_url, "/api/search", {"user": "u7", "now": now})["documents"]
        assert answers[now] == [(f"{entry['score']:.4f}", entry["key"]) for entry in documents] != []
    assert answers[41_010] != answers[9_000_000]
    page.open(page.js("location.href"))
    assert [(cells[1], cells[3]) for cells in rows(page)] == answers[9_000_000], "the address has the time"
    page.open(f"{url}/?user=u7")
    assert page.js("document.querySelector('[name=now]')") is None and rows(page)


def test_the_page_shows_errors_as_escaped_text(page: Page, url: str) -> None:
    page.open(f"{url}/?user=%3Cb%20id=injected%3Enobody")
    assert page.js("document.getElementById('status').className") == "error"
    assert "no user is called '<b id=injected>nobody'" in text(page, "#status")
    assert page.js("document.getElementById('injected')") is None
    assert rows(page) == []


def test_filters_are_ticked_and_stay_in_the_address(page: Page, url: str) -> None:
    page.open(f"{url}/?user=u7&filter=year+%3C+1975+or+year+%3E+1990")
    page.js("document.querySelector('[value=Comedy]').click(), document.querySelector('[value=Western]').click()")
    page.js("document.querySelector('[name=\"least:year\"]').value = '1970'")
    page.js("document.querySelector('#ask > button').click()")
    page.wait_until_idle()
    wanted = "genres in (Comedy, Western) and year >= 1970 and (year < 1975 or year > 1990)"
    documents = post(url, "/api/search", {"user": "u7", "filter": wanted})["documents"]
    assert [cells[3] for cells in rows(page)] == [entry["key"] for entry in documents] != []
    assert text(page, "#title") == f"u7 · {wanted}"
    page.open(page.js("location.href"))
    assert [cells[3] for cells in rows(page)] == [entry["key"] for entry in documents], "the address says all of it"
    placeholders = page.js("[...document.querySelectorAll('[type=number]')].map(input => input.placeholder)")
    assert placeholders == ["1961", "1999"]
    page.open(f"{url}/?user=u7&one:genres=Comedy&filter=year+>+2100")
    assert rows(page) == [] and "0 documents" in text(page, "#status")


def test_two_models_answer_side_by_side(page: Page, two_url: str) -> None:
    page.open(f"{two_url}/?user=u7")
    answers = [post(two_url, f"{side}/api/search", {"user": "u7"})["documents"] for side in ("", "/second")]
    keys = [[entry["key"] for entry in answer] for answer in answers]
    assert keys[0] != keys[1] and 0 < len({*keys[0]} & {*keys[1]}) < 10
    for side, own, other in (("", *keys), ("/second", *keys[::-1])):
        marks = []
        for rank, key in enumerate(own):
            up = other.index(key) - rank if key in other else None
            marks.append("only here" if up is None else "=" if up == 0 else f"▲{up}" if up > 0 else f"▼{-up}")
        assert [(cells[4], cells[2]) for cells in rows(page, side)] == list(zip(own, marks, strict=True))
        lines = f"[...document.getElementById('documents{side}').querySelectorAll('tr.only')]"
        assert page.js(f"{lines}.map(line => line.dataset.key)") == [key for key in own if key not in other]
    assert text(page, "#status") == f"{len({*keys[0]} & {*keys[1]})} of 10 in both"
    page.open(f"{two_url}/?similar=i3")
    assert len(rows(page)) == len(rows(page, "/second")) == 10 and text(page, "#title").startswith("Nearest to ")
    page.open(f"{two_url}/?user=nobody")
    assert page.js("document.querySelectorAll('.note.error').length") == 2 and rows(page) == []


def test_the_page_works_with_the_keyboard_alone(page: Page, two_url: str) -> None:
    page.open(f"{two_url}/")
    page.press("/", *"u7", "Enter").wait_until_idle()
    assert page.js("document.querySelector('[name=user]').value") == "u7", "/ itself is not typed"

    def at() -> tuple[str, int]:
        line = page.js("[document.activeElement.dataset.side, document.activeElement.rowIndex]")
        return line[0], line[1]

    assert at() == ("", 1)
    page.press("ArrowUp")
    assert at() == ("", 1), "nothing is above"
    page.press("ArrowDown", "ArrowDown", "ArrowRight", "ArrowUp")
    assert at() == ("/second", 2)
    page.press("Enter").wait_until_idle()
    near = post(two_url, "/second/api/why", {"user": "u7", "answer": rows(page, "/second")[1][4]})
    shown = "\n".join(f"{item['cosine']:.2f} {item['title']}" for item in near["history"])
    assert text(page, "tr.why") == f"Similar documents of the history:\n{shown}" and len(near["history"]) == 5
    page.press("Enter")
    assert page.js("document.querySelector('tr.why')") is None, "what is open closes"
    page.press("Enter").wait_until_idle().press("Escape")
    assert page.js("document.querySelector('tr.why')") is None and at() == ("/second", 2)
    page.press("Escape")
    assert page.js("document.activeElement.name") == "user"
    page.press("ArrowDown", "Escape", "ArrowDown")
    assert at() == ("", 1)


def test_an_explanation_shows_the_nearest_words_of_a_text(page: Page, texts_url: str) -> None:
    page.open(f"{texts_url}/?query=stone+bridge+river")
    page.js("document.querySelector('td.do button').click()")
    page.wait_until_idle()
    body = {"features": {"query": "stone bridge river"}, "answer": rows(page)[0][3]}
    near = post(texts_url, "/api/why", body)["words"]
    assert {word["word"] for word in near} == {"stone", "bridge", "river"}
    shown = "\n".join(f"{word['cosine']:.2f} {word['word']}" for word in near)
    assert text(page, "tr.why") == f"Similar words of the query:\n{shown}"


def test_it_fits_a_phone_and_the_dark(page: Page, two_url: str) -> None:
    try:
        page.screen(375, 700, dark=True).open(f"{two_url}/?user=u7&one:genres=Comedy")
        page.js("document.querySelector('td.do button').click()")
        page.wait_until_idle()
        assert page.js("document.documentElement.scrollWidth") == 375
        boxes = "[...document.querySelectorAll('section')].map(section => section.getBoundingClientRect().left)"
        assert len(set(page.js(boxes))) == 1, "the models stand below each other"
        colours = "(({ color, backgroundColor }) => [color, backgroundColor])(getComputedStyle(document.body))"
        light, dark = (sum(map(int, re.findall(r"\d+", colour)[:3])) / 3 for colour in page.js(colours))
        assert light > 200 and dark < 50
        page.screen(1100).open(f"{two_url}/?user=u7")
        assert len(set(page.js(boxes))) == 2
        dark, light = (sum(map(int, re.findall(r"\d+", colour)[:3])) / 3 for colour in page.js(colours))
        assert light > 200 and dark < 50
    finally:
        page.screen(1100)


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
