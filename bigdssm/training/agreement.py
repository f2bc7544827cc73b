"""What the ranks of a run tell each other once a step: one small gather, which nothing waits for until it is read.

In it ride the loss, requests to stop and to save, what was met in the data, and what the plan of the next batch needs.
It goes over the device's group: where there is a device, nothing in a step goes over the host's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bigdssm import distributed
from bigdssm.batching.plan import Needs
from bigdssm.batching.upload import to_device
from bigdssm.streaming.row_stream import Report


class Note(NamedTuple):
    """What one rank tells."""

    stop: float = 0.0  # whether it was asked to
    save: float = 0.0  # whether a checkpoint is due
    queries: float = 0.0
    report: Report = Report(0.0, 0.0, 0.0)
    needs: Needs = Needs(1, 1, 0, 0)  # of the next batch's plan


@dataclass(frozen=True)
class Agreed:
    """What every rank then knows of all."""

    loss: float  # the mean
    alpha: float
    notes: tuple[Note, ...]  # by rank

    @property
    def stop(self) -> bool:
        """Return whether any rank was asked to stop."""
        return any(note.stop for note in self.notes)

    @property
    def save(self) -> bool:
        """Return whether a checkpoint is due on any rank."""
        return any(note.save for note in self.notes)

    @property
    def needs(self) -> Needs:
        """Return the most that any rank needs."""
        return Needs(*(max(numbers) for numbers in zip(*(note.needs for note in self.notes), strict=True)))


def agree(loss: Tensor, alpha: Tensor, note: Note) -> Callable[[], Agreed]:
    """Send this rank's loss, alpha and note; what is returned waits for those of all ranks. A collective."""
    own = torch.tensor([note.stop, note.save, note.queries, *note.report, *note.needs], dtype=torch.float64)
    of_device = torch.stack([loss.detach().double().view(()), alpha.detach().double().view(())])
    row = torch.cat([of_device, to_device(own, loss.device)])
    gathered = distributed.all_gather_padded(row[None], 1)

    def read() -> Agreed:
        table = gathered.wait().tolist()
        losses = [numbers[0] for numbers in table]
        return Agreed(sum(losses) / len(losses), table[0][1], tuple(_note(numbers[2:]) for numbers in table))

    return read


def _note(numbers: Sequence[float]) -> Note:
    stop, save, queries, *further = numbers
    return Note(stop, save, queries, Report(*further[:3]), Needs(*map(int, further[3:])))
