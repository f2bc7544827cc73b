"""A server with several processes under load: models and workers are replaced without dropping a request."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from bigdssm.utils.atomic import replace_folder
from tests.conftest import TinyDataset
from tests.e2e.test_page import make_served, started

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.alone]
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")


class Load:
    """Clients that send requests without a pause; `failed` contains all responses without documents."""

    def __init__(self, address: str, clients: int = 4) -> None:
        self.answered, self.failed, self._stop = 0, [], threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(urlsplit(address).netloc,)) for _ in range(clients)]

    def _ask(self, where: str) -> None:
        connection, number = HTTPConnection(where, timeout=30), 0
        while not self._stop.is_set():
            body = json.dumps({"user": f"u{number % 60}", "top": 1 + number % 9})
            number += 1
            try:
                connection.request("POST", "/api/search", body, {"Content-Type": "application/json"})
                answer = connection.getresponse()
                content = json.loads(answer.read())
                if answer.status != 200 or not content["documents"]:
                    self.failed.append(content)
                self.answered += 1
            except Exception as error:
                self.failed.append(repr(error))
                connection = HTTPConnection(where, timeout=30)


@contextmanager
def load(address: str) -> Iterator[Load]:
    made = Load(address)
    for thread in made._threads:
        thread.start()
    try:
        yield made
    finally:
        made._stop.set()
        for thread in made._threads:
            thread.join()


def get(address: str, path: str) -> tuple[int, str]:
    connection = HTTPConnection(urlsplit(address).netloc, timeout=30)
    connection.request("GET", path)
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def until(what: str, holds: object, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not holds():  # type: ignore[operator]
        assert time.monotonic() < end, f"not in {seconds} s: {what}"
        time.sleep(0.1)


def test_a_new_model_and_a_dead_worker_drop_no_request(tiny_interactions: TinyDataset, tmp_path: Path) -> None:
    make_served(tiny_interactions, tmp_path)
    checksum = make_served(tiny_interactions, tmp_path / "new", seed=2)
    with started(tmp_path, "--workers", "2", "--poll-s", "0.2", "--cache", "0", "--access-log") as (address, server):
        until("it is ready", lambda: _status(address, "/readyz") == 200)
        assert get(address, "/healthz") == (200, "ok")
        before = json.loads(get(address, "/api/about")[1])["model"]
        assert before != checksum
        with load(address) as asking:
            until("some are answered", lambda: asking.answered > 50)
            replace_folder(tmp_path / "new" / "model", tmp_path / "model")
            time.sleep(1)  # the index belongs to the old model: both are kept
            assert {_model(address) for _ in range(10)} == {before}
            replace_folder(tmp_path / "new" / "index", tmp_path / "index")
            # a busy worker accepts few connections: responses do not show that both have loaded the model
            until("both workers have taken it up", lambda: "model_loads_total 2.0" in get(address, "/metrics")[1])
            assert {_model(address) for _ in range(20)} == {checksum}
            answered = asking.answered
            until("they answer with it", lambda: asking.answered > answered + 50)
        assert not asking.failed, asking.failed[:3]
        counted = get(address, "/metrics")[1]
        assert "bigdssm_model_loads_total 2.0" in counted and 'path="/api/search",status="200"' in counted
        workers = children(server.pid)
        os.kill(workers[0], signal.SIGKILL)
        until("another is started", lambda: len(set(children(server.pid)) - set(workers)) == 1)
        until("it answers", lambda: _status(address, "/readyz") == 200)
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=30) in (0, -signal.SIGTERM)
        until("no worker is left", lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers))


def test_workers_do_not_outlive_the_process_that_started_them(tiny_interactions: TinyDataset, tmp_path: Path) -> None:
    make_served(tiny_interactions, tmp_path)
    with started(tmp_path, "--workers", "2") as (address, server):
        until("it is ready", lambda: _status(address, "/readyz") == 200)
        workers = children(server.pid)
        assert len(workers) == 2
        server.kill()
        until("they end", lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers), 20)


def _status(address: str, path: str) -> int:
    try:
        return get(address, path)[0]
    except OSError:
        return 0


def _model(address: str) -> str:
    return str(json.loads(get(address, "/api/about")[1])["model"])


def children(pid: int) -> list[int]:
    """Return the worker processes of a server, without its resource tracker."""
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
            found.append(int(child))
    return found
