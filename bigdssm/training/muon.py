"""Muon and AdamW as one optimizer."""

from collections.abc import Callable
from typing import Any

import torch

Groups = list[dict[str, Any]]


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon for matrices and AdamW for other parameters as one optimizer, with shared groups and states."""

    def __init__(self, groups: Groups, momentum: float, build_adamw: Callable[[Groups], torch.optim.Optimizer]) -> None:
        """Build both over `groups`; Muon takes the group "matrices"."""
        super().__init__(groups, {})
        matrices = [group for group in self.param_groups if group["name"] == "matrices"]
        others = [group for group in self.param_groups if group["name"] != "matrices"]
        self._both: list[torch.optim.Optimizer] = []
        if matrices:
            # its updates are scaled to the RMS of AdamW's, so that one lr fits both
            muon = torch.optim.Muon(matrices, momentum=momentum, adjust_lr_fn="match_rms_adamw")
            self._both.append(muon)
        if others:
            self._both.append(build_adamw(others))
        for optimizer in self._both:
            optimizer.state = self.state
        self.param_groups = [group for optimizer in self._both for group in optimizer.param_groups]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take one step of both."""
        for optimizer in self._both:
            optimizer.step()
