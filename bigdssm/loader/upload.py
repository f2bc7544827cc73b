"""Transfer batches to a rank's device. For a GPU, a thread prepares the next batch during the current step."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from bigdssm.loader.batch import Batch
from bigdssm.utils.device import to_device

T = TypeVar("T")


def on_device(batch: Batch, device: torch.device) -> Batch:
    """Return the batch with its tensors on `device`, except the row ids, which only the host reads."""

    def moved(value: Any) -> Any:
        if isinstance(value, Tensor):
            return to_device(value, device)
        if isinstance(value, dict):
            return {name: moved(part) for name, part in value.items()}
        return type(value)(*map(moved, value)) if isinstance(value, tuple) else value

    return replace(batch, **{f.name: moved(getattr(batch, f.name)) for f in fields(batch) if f.name != "row_ids"})


def uploaded_batches(batches: Iterator[Batch], device: torch.device) -> Generator[Batch]:
    """Yield host batches on `device`; for a GPU the next one is prefetched. Close it to end its thread."""
    if device.type != "cuda":  # nothing to overlap
        for batch in batches:
            yield on_device(batch, device)
        return
    with closing(prefetch(_sent(batches, device))) as sending:
        for batch, sent in sending:
            now = torch.cuda.current_stream(device)
            now.wait_event(sent)
            for tensor in batch.tensors():
                if tensor.is_cuda:
                    tensor.record_stream(now)  # else the copy stream could reuse its memory too early
            yield batch


def prefetch(items: Iterator[T]) -> Generator[T]:
    """Yield the items in order while a thread fetches the next one; its exception is raised at that item."""
    end: Any = object()
    with ThreadPoolExecutor(1, "batches") as thread:
        following = thread.submit(next, items, end)
        while (item := following.result()) is not end:
            following = thread.submit(next, items, end)
            yield item


def _sent(batches: Iterator[Batch], device: torch.device) -> Iterator[tuple[Batch, torch.cuda.Event]]:
    """Yield each batch with the event that its transfer has completed."""
    stream = torch.cuda.Stream(device)
    for batch in batches:
        with torch.cuda.stream(stream):  # also sets the thread's current device
            moved = on_device(batch, device)
            sent = stream.record_event()
        yield moved, sent
