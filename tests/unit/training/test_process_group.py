"""The device and the threads of a rank, on an accelerator whose current device is 0 in every new process."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bigdssm.errors import ConfigError
from bigdssm.training import process_group
from bigdssm.training.process_group import Placement, check_devices, num_threads

FOUR = (0, 1, 2, 3)
CPU = Placement("node1", "boot1", FOUR, None)


@dataclass
class Cards:
    """DeepSpeed's accelerator on a host with this many visible devices."""

    visible: int
    current: int = 0
    selected: list[int] = field(default_factory=list)

    def device_name(self) -> str:
        return "cuda"

    def communication_backend_name(self) -> str:
        return "nccl"

    def device_count(self) -> int:
        return self.visible

    def current_device_name(self) -> str:
        return f"cuda:{self.current}"

    def set_device(self, index: int) -> None:
        self.current = index
        self.selected.append(index)


def join(monkeypatch: pytest.MonkeyPatch, visible: int, local_rank: int) -> list[Any]:
    """Return the calls of a rank that joins: the device that is current as DeepSpeed joins, and LOCAL_RANK."""
    cards, calls = Cards(visible), []
    variables = {"RANK": "5", "LOCAL_RANK": str(local_rank), "WORLD_SIZE": "8", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(process_group, "get_accelerator", lambda: cards)
    monkeypatch.setattr(
        process_group.deepspeed, "init_distributed",
        lambda dist_backend, **_: calls.append((dist_backend, str(process_group.device()), os.environ["LOCAL_RANK"])),
    )  # fmt: skip
    properties = SimpleNamespace(uuid="GPU-1")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    process_group.init_process_group()
    assert str(process_group.device()) == f"cuda:{cards.current}"
    assert len(cards.selected) == 1
    process_group.leave_process_group()
    assert {name: os.environ[name] for name in variables} == variables
    return calls


def test_the_device_of_a_rank_is_current_before_it_joins(monkeypatch: pytest.MonkeyPatch) -> None:
    assert join(monkeypatch, visible=8, local_rank=5) == [("cpu:gloo,cuda:nccl", "cuda:5", "5")]


def test_the_only_visible_device_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert join(monkeypatch, visible=1, local_rank=5) == [("cpu:gloo,cuda:nccl", "cuda:0", "0")]


def test_more_ranks_than_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"LOCAL_RANK=5 on .*: 4 devices are visible, needs one per rank"):
        join(monkeypatch, visible=4, local_rank=5)


def test_ranks_with_one_device_are_refused() -> None:
    first, second = replace(CPU, device="GPU-1"), replace(CPU, device="GPU-2")
    check_devices([first, second])
    check_devices([CPU, CPU])
    with pytest.raises(ConfigError, match="rank 0 and rank 2 on node1 have the same device GPU-1, needs one"):
        check_devices([first, second, first])


@pytest.mark.parametrize(
    ("others", "cores", "threads"),
    [
        ([], 4, 4),
        ([CPU], 4, 2),
        ([CPU, CPU], 4, 1),
        ([CPU, CPU, CPU, CPU, CPU], 4, 1),
        ([replace(CPU, boot="boot2")], 4, 4),  # another machine
        ([replace(CPU, cores=(4, 5, 6, 7))], 4, 4),  # bound to other cores by a scheduler
        ([replace(CPU, host="container")], 4, 2),  # another container of this machine
        ([CPU], 2, 1),  # a container with fewer cores than the machine
    ],
)
def test_the_ranks_of_a_machine_share_its_cores(others: list[Placement], cores: int, threads: int) -> None:
    placements = [*others, CPU]
    assert num_threads(placements, len(others), cores) == threads
