"""bigdssm serve with malicious clients: limits of size and time, and a clean stop."""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.conftest import TinyDataset
from tests.e2e.test_page import make_served, started

TIMEOUT_S = 1
BEGUN = ("nothing", "half a head", "half a body", "a body that trickles in", "a second request")

pytestmark = [pytest.mark.e2e, pytest.mark.alone]
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")


@pytest.fixture(scope="module")
def folder(tiny_pairs: TinyDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    make_served(tiny_pairs, folder)
    return folder


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[tuple[str, int]]:
    """The address of a server and its process id."""
    with started(folder, "--timeout-s", str(TIMEOUT_S), "--allow-host", "search.example", "Other.Example") as (
        at,
        server,
    ):
        yield at, server.pid


def head(method: str = "POST", *headers: str, host: str = "localhost") -> bytes:
    lines = [f"{method} /api/search HTTP/1.1", f"Host: {host}", "Content-Type: application/json", *headers]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def connected(address: str) -> socket.socket:
    where = urlsplit(address)
    return socket.create_connection((where.hostname, where.port), timeout=20)


def answer(connection: socket.socket) -> tuple[int, str]:
    """Return status and message of a response after which the server closes; 0 without a response."""
    received = b""
    try:
        while part := connection.recv(65536):
            received += part
    except ConnectionResetError:
        pass  # closed during the request
    first, _, body = received.partition(b"\r\n\r\n")
    return (int(first.split()[1]), json.loads(body)["error"]) if received else (0, "")


def resident_mb(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def send_query(address: str, query: str = "stone bridge", host: str = "localhost") -> tuple[int, dict[str, object]]:
    body = json.dumps({"features": {"query": query}}).encode()
    with connected(address) as connection:
        connection.sendall(head("POST", f"Content-Length: {len(body)}", "Connection: close", host=host) + body)
        received = b"".join(iter(lambda: connection.recv(65536), b""))
    first, _, content = received.partition(b"\r\n\r\n")
    return int(first.split()[1]), json.loads(content)


@pytest.mark.parametrize(
    ("headers", "status", "sentence"),
    [
        (("Content-Length: 5", "Transfer-Encoding: chunked"), 400, "both Content-Length and Transfer-Encoding"),
        (("Transfer-Encoding: chunked",), 411, "no Content-Length"),
        ((f"Content-Length: {1 << 40}",), 413, "needs at most 1048576"),
    ],
)
def test_a_body_that_is_not_announced_as_small_is_not_read(
    served: tuple[str, int], headers: tuple[str, ...], status: int, sentence: str
) -> None:
    address, pid = served
    before = resident_mb(pid)
    chunk = b"100000\r\n" + b" " * (1 << 20) + b"\r\n"
    with connected(address) as connection:
        connection.sendall(head("POST", *headers))
        try:
            for _ in range(100):
                connection.sendall(chunk)
        except OSError:
            pass  # expected: the server does not read it
        else:
            pytest.fail("100 MiB were read")
        assert resident_mb(pid) - before < 30
    with connected(address) as connection:
        connection.sendall(head("POST", *headers))
        found = answer(connection)  # and the connection is closed
    assert found[0] == status and sentence in found[1]
    assert send_query(address)[0] == 200


def test_invalid_http_gives_a_one_line_error(served: tuple[str, int]) -> None:
    for sent in (b"\x16\x03\x01 no hello\r\n\r\n", head("POST", "Content-Length: -5"), head().replace(b"Host", b"X")):
        with connected(served[0]) as connection:
            connection.sendall(sent)
            assert answer(connection) == (400, "this is not an HTTP request")


@pytest.mark.parametrize(
    "begun", ["nothing", "half a head", "half a body", "a body that trickles in", "a second request"]
)
def test_a_request_that_does_not_arrive_is_given_up(served: tuple[str, int], begun: str) -> None:
    whole = head("POST", "Content-Length: 100")
    sent = {"nothing": b"", "half a head": whole[:-9], "a second request": whole + b" " * 100 + whole[:-9]}
    with connected(served[0]) as connection:
        started_at = time.monotonic()
        connection.sendall(sent.get(begun, whole + b"{"))
        if begun == "a body that trickles in":
            try:
                for _ in range(60):
                    connection.sendall(b" ")
                    time.sleep(0.1)
            except OSError:
                pass
            else:
                pytest.fail("it waited for all of it")
        if begun == "a second request":
            assert b"408" in b"".join(iter(lambda: connection.recv(65536), b""))
        elif begun != "a body that trickles in":
            status, sentence = answer(connection)
            if begun == "nothing":
                assert status == 0
            else:
                assert (status, sentence) == (408, f"the request did not arrive completely within {TIMEOUT_S} s")
        assert TIMEOUT_S - 0.5 < time.monotonic() - started_at < TIMEOUT_S + 3


@pytest.mark.parametrize(
    ("host", "ours"),
    [
        ("localhost:8000", True), ("LOCALHOST.", True), ("127.0.0.1", True), ("127.8.9.1:80", True), ("[::1]:9", True),
        ("search.example", True), ("other.example:443", True),
        ("evil.example", False), ("localhost.evil.example", False), ("192.168.1.5", False), ("", False),
        ("search.example@evil.example", False), ("0x7f.1", False), ("[::1].evil.example", False),
    ],
)  # fmt: skip
def test_a_request_for_another_host_is_refused(served: tuple[str, int], host: str, ours: bool) -> None:
    """Otherwise any web page could send requests under a name that resolves to this machine (DNS rebinding)."""
    status, content = send_query(served[0], host=host)
    assert status == (200 if ours else 400), content
    assert ours or "--allow-host" in str(content["error"])


@pytest.mark.slow
def test_a_stop_does_not_wait_for_incomplete_requests(folder: Path) -> None:
    with started(folder, "--timeout-s", "60") as (address, server), ExitStack() as stack:
        idle, half, slow = (stack.enter_context(connected(address)) for _ in range(3))
        half.sendall(head()[:-9])
        slow.sendall(head("POST", "Content-Length: 100") + b"{")
        assert send_query(address)[0] == 200  # the three before were accepted
        started_at = time.monotonic()
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=30) in (0, -signal.SIGTERM)
        assert time.monotonic() - started_at < 10
        assert idle.recv(1) == b""
