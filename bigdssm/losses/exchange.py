"""One small all-gather before a loss: each rank's numbers and verdict.

So bad input ends in one error on every rank and never in a hang. On a device the host waits for it once.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from bigdssm import distributed
from bigdssm.distributed import Group
from bigdssm.errors import DataError


class LossInputError(DataError, ValueError):
    """Vectors, ids or weights that a loss cannot work with."""


def need(condition: bool, message: str) -> None:
    """Raise LossInputError with the message unless the condition holds."""
    if not condition:
        raise LossInputError(message)


def exchange(
    error: LossInputError | None,
    agreed: Mapping[str, str],
    numbers: Sequence[Tensor | float],
    verdict: Callable[[Sequence[float]], str | None],
    device: torch.device,
    group: Group | None,
) -> tuple[list[list[float]], Tensor]:
    """Return every rank's `numbers`, also as a tensor, where no rank has an error and all agree; a collective.

    agreed: what the ranks must agree on, in words; only a checksum of it is sent unless they differ. verdict: what is
    wrong with a rank by its numbers, if anything. Raises: LossInputError on the ranks that bring it or where ranks
    disagree, PeerError on the others.
    """
    checksum = zlib.crc32(repr(sorted(agreed.items())).encode())
    header = _vector([float(error is None), float(checksum), *numbers], device)[None]
    table = distributed.all_gather_padded(header, 1, group).wait()
    told: list[list[float]] = table.tolist()
    if not all(row[0] and verdict(row[2:]) is None for row in told):
        mine = verdict(told[distributed.rank(group)][2:])
        distributed.raise_together(error or (None if mine is None else LossInputError(mine)), group)
    if any(row[1] != checksum for row in told):
        others = distributed.all_gather_object(dict(agreed), group)
        for what in agreed:
            agree(what, [other[what] for other in others])
    return [row[2:] for row in told], table[:, 2:]


def _vector(numbers: Sequence[Tensor | float], device: torch.device) -> Tensor:
    """Return float64 [numbers]. On a device those of the host are filled in: an upload would wait for what runs."""
    if device.type == "cpu":
        return torch.tensor([float(number) for number in numbers], dtype=torch.float64)
    vector = torch.zeros(len(numbers), dtype=torch.float64, device=device)
    for at, number in enumerate(numbers):
        if isinstance(number, Tensor) and number.device.type == device.type:
            vector[at : at + 1].copy_(number.reshape(1))
        elif float(number):
            vector[at : at + 1].fill_(float(number))
    return vector


def agree(what: str, told: Sequence[object]) -> None:
    """Raise on every rank where they were told different things."""
    if any(repr(other) != repr(told[0]) for other in told):
        words = "; ".join(f"rank {rank} has {other}" for rank, other in enumerate(told))
        raise LossInputError(f"the ranks disagree on {what}: {words}")
