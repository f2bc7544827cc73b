"""The current device of helper threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from threading import local

import pytest
import torch

from bigdssm.loader.batch import prefetch


def test_a_thread_has_the_device_of_its_creator(monkeypatch: pytest.MonkeyPatch) -> None:
    of_thread = local()  # a new thread starts with device 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: getattr(of_thread, "device", 0))
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: setattr(of_thread, "device", index))
    torch.cuda.set_device(3)
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(torch.cuda.current_device).result() == 0
    devices = (torch.cuda.current_device() for _ in range(3))
    with closing(prefetch(devices)) as fetched:
        assert list(fetched) == [3, 3, 3]
