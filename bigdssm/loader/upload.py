"""Batches to a rank's device. To a GPU they are made and sent by a thread while the step before still runs."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from bigdssm.loader.batch import Batch

T = TypeVar("T")


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the host on `device`, out of pinned memory, so that the host does not wait for the copy."""
    return (tensor if device.type == "cpu" else tensor.pin_memory()).to(device, non_blocking=True)


def on_device(batch: Batch, device: torch.device) -> Batch:
    """Return the batch with its tensors on `device`, but for the numbers of its rows, which only the host reads."""

    def moved(value: Any) -> Any:
        if isinstance(value, Tensor):
            return to_device(value, device)
        if isinstance(value, dict):
            return {name: moved(part) for name, part in value.items()}
        return type(value)(*map(moved, value)) if isinstance(value, tuple) else value

    return replace(batch, **{f.name: moved(getattr(batch, f.name)) for f in fields(batch) if f.name != "row_ids"})


def uploaded_batches(batches: Iterator[Batch], device: torch.device) -> Generator[Batch]:
    """Yield host batches on `device`; for a GPU the next one is made and sent meanwhile. Close it to end its thread."""
    if device.type != "cuda":  # nothing would overlap: the host is the device
        for batch in batches:
            yield on_device(batch, device)
        return
    with closing(upload_ahead(_sent(batches, device))) as coming:
        for batch, sent in coming:
            now = torch.cuda.current_stream(device)
            now.wait_event(sent)
            for tensor in batch.tensors():
                if tensor.is_cuda:
                    tensor.record_stream(now)  # the other stream, whose memory it is, must not reuse it too early
            yield batch


def upload_ahead(items: Iterator[T]) -> Generator[T]:
    """Yield what `items` gives, in order, while a thread gets the next one; where that raises, raise when it is due."""
    nothing: Any = object()
    with ThreadPoolExecutor(1, "batches") as thread:
        coming = thread.submit(next, items, nothing)
        while (item := coming.result()) is not nothing:
            coming = thread.submit(next, items, nothing)
            yield item


def _sent(batches: Iterator[Batch], device: torch.device) -> Iterator[tuple[Batch, torch.cuda.Event]]:
    """Yield each batch on its way to the device, and when it is there."""
    stream = torch.cuda.Stream(device)
    for batch in batches:
        with torch.cuda.stream(stream):  # also makes `device` this thread's
            moved = on_device(batch, device)
            sent = stream.record_event()
        yield moved, sent
