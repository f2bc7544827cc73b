"""Two nodes: two connected network namespaces with separate process ids.

    node 0  10.77.0.1  ──veth──  10.77.0.2  node 1

DeepSpeed's launcher runs on each with --no_ssh, one rank a node, gloo over the cable. Then node 1 dies, comes back, and
the cable is pulled.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed import small_run
from tests.e2e.runs import BIN, ROOT, environment, launcher

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.alone]

PORT = "29611"  # unused in the new namespaces
STEADY = ("pretrain.save_every_steps=4", "pretrain.steps=16", "debug.log_row_ids=true", "engine.peer_timeout_s=8")


class Nodes:
    """Two namespaces, `names`, each with the interface `eth`."""

    def __init__(self) -> None:
        self.names = [f"bigdssm-{os.getpid()}-{node}" for node in (0, 1)]

    def make(self) -> None:
        links = [f"bd{os.getpid() % 100000}-{node}" for node in (0, 1)]
        for name in self.names:
            ip("netns", "add", name)
        ip("link", "add", links[0], "type", "veth", "peer", "name", links[1])
        for node, (name, link) in enumerate(zip(self.names, links, strict=True)):
            ip("link", "set", link, "netns", name, "name", "eth")
            ip("-n", name, "addr", "add", f"10.77.0.{node + 1}/24", "dev", "eth")
            self.plug(node, "up")
            ip("-n", name, "link", "set", "lo", "up")

    def plug(self, node: int, state: str) -> None:
        """Connect (`up`) or disconnect (`down`) a node."""
        ip("-n", self.names[node], "link", "set", "eth", state)

    def remove(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)

    def start(self, node: int, folder: Path, config: Path, log: Path, *arguments: str, fault: str = "") -> Node:
        hosts = folder.parent / "hosts"
        hosts.write_text("10.77.0.1 slots=1\n10.77.0.2 slots=1\n")
        launch = [
            str(BIN / "deepspeed"), "--hostfile", str(hosts), "--no_ssh", "--node_rank", str(node),
            "--master_addr", "10.77.0.1", "--master_port", PORT, "launch/pretrain.py", "--config", str(config),
            f"run.dir={folder}", *STEADY, *arguments,
        ]  # fmt: skip
        inside = ["ip", "netns", "exec", self.names[node], "unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
        with log.open("w") as file:
            process = subprocess.Popen(
                [*inside, *launch], cwd=ROOT, env=environment(fault, GLOO_SOCKET_IFNAME="eth"),
                stdout=file, stderr=file, start_new_session=True,
            )  # fmt: skip
        return Node(process, log)


class Node:
    """The processes on one node."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self._process, self._log = process, log

    @property
    def log(self) -> str:
        return self._log.read_text()

    def wait(self, timeout_s: float = 300.0) -> int:
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.lose_power()
            raise AssertionError(f"did not end in {timeout_s:.0f} s:\n{self.log}") from None

    def wait_for(self, text: str) -> None:
        until = time.monotonic() + 120
        while text not in self.log:
            assert self._process.poll() is None and time.monotonic() < until, f"{text!r} never came:\n{self.log}"
            time.sleep(0.1)

    def lose_power(self) -> None:
        """Kill all processes of the node at once."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGKILL)
        self._process.wait()


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        pytest.skip("needs ip (iproute2) and unshare (util-linux)")
    if subprocess.run(["unshare", "--net", "--pid", "--fork", "--mount-proc", "true"], capture_output=True).returncode:
        pytest.skip("namespaces cannot be made here: needs root or CAP_SYS_ADMIN")
    made = Nodes()
    try:
        made.make()
        yield made
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces cannot be made here: {error.stderr}")
    finally:
        made.remove()


def assert_same_run(folder: Path, config: Path, alone: Path) -> None:
    """A run on one machine has the same losses and the same rows."""
    losses = {record["step"]: record["loss"] for record in small_run.records(folder)}
    assert sorted(losses) == list(range(1, 17))
    done = subprocess.run(
        [*launcher("deepspeed"), "launch/pretrain.py", "--config", str(config), f"run.dir={alone}", *STEADY],
        cwd=ROOT, env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert losses == {record["step"]: record["loss"] for record in small_run.records(alone)}
    for name in ("row_ids-00000.jsonl", "row_ids-00001.jsonl"):
        assert (folder / "pretrain" / name).read_text() == (alone / "pretrain" / name).read_text()


def test_a_node_dies_and_comes_back_and_the_cable_is_pulled(nodes: Nodes, tmp_path: Path) -> None:
    config, folder = small_run.write_dataset(tmp_path), tmp_path / "run"
    started: list[Node] = []

    def start(*arguments: str, fault: str = "") -> list[Node]:
        logs = [tmp_path / f"{len(started)}-{node}.log" for node in (0, 1)]
        both = [nodes.start(node, folder, config, log, *arguments, fault=fault) for node, log in enumerate(logs)]
        started.extend(both)
        return both

    try:
        first, second = start(fault="hang@6:1")
        second.wait_for("BIGDSSM_TEST_FAULT: hang")
        first.wait_for("wrote the checkpoint of step 4")  # in the background
        second.lose_power()
        died = time.monotonic()
        assert first.wait() == 6, first.log
        assert time.monotonic() - died < 20
        assert re.search(r"error: rank 1 \(pid \d+ on \S+\) no longer sends heartbeats", first.log), first.log

        first, second = start("--resume", "auto", fault="hang@10:1")
        second.wait_for("BIGDSSM_TEST_FAULT: hang")
        assert re.search("continues from .*step-00000004", first.log), first.log
        first.wait_for("wrote the checkpoint of step 8")
        nodes.plug(1, "down")
        pulled = time.monotonic()
        assert first.wait() == 6, first.log
        assert second.wait() == 6, second.log
        assert time.monotonic() - pulled < 8 + 30
        assert re.search(r"error: rank 1 \(pid \d+ on \S+\) sent no heartbeat for 8 s", first.log), first.log
        assert "the process group's store, on rank 0" in second.log, second.log

        nodes.plug(1, "up")
        first, second = start("--resume", "auto")
        assert (first.wait(), second.wait()) == (0, 0), first.log + second.log
        assert re.search("continues from .*step-00000008", first.log), first.log
    finally:
        for node in started:
            node.lose_power()
    assert_same_run(folder, config, tmp_path / "alone")
