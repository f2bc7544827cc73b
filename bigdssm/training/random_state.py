"""The random state of a rank, to be saved and replayed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomState:
    """The random state at one moment, of the CPU and of this rank's device."""

    cpu: Tensor
    device: Tensor | None

    @classmethod
    def now(cls) -> RandomState:
        """Return the present state."""
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None)

    def restore(self) -> None:
        """Make this the present state."""
        torch.set_rng_state(self.cpu)
        if self.device is not None:
            torch.cuda.set_rng_state(self.device)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Within it this state runs; afterwards the one from before goes on."""
        present = RandomState.now()
        self.restore()
        yield
        present.restore()
