"""How far a long making has come, for a run that goes on where another one was killed."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from bigdssm.atomic import new_file, sync

State = dict[str, Any]
"""Nested dicts and lists of JSON's types and NumPy arrays."""

SAVE_EVERY_S = 120.0


class Journal:
    """One file, always whole: the newest state, and the fingerprint of what is being made and of what."""

    def __init__(self, path: Path, fingerprint: str) -> None:
        """Read what a killed run with the same fingerprint has left, if there is any."""
        self._path, self._fingerprint = path, fingerprint
        self.state: State | None = None
        self._due_at, self._synced_to = time.monotonic() + SAVE_EVERY_S, 0.0
        if path.exists():
            with np.load(path, allow_pickle=False) as content:
                arrays = [content[f"array{i}"] for i in range(len(content.files) - 1)]
                head = json.loads(content["head"].tobytes())
            if head["fingerprint"] == fingerprint:
                self.state = _joined(head["state"], arrays)

    @property
    def due(self) -> bool:
        """Return whether the state has not been saved for some time."""
        return time.monotonic() >= self._due_at

    def save(self, state: State, folder: Path) -> None:
        """Replace the state, after everything that it speaks of in `folder` is on the disk."""
        now = time.time()
        for path in folder.rglob("*"):
            if path.is_file() and path.stat().st_mtime >= self._synced_to - 1:
                sync(path)
        self._synced_to = now
        arrays: list[np.ndarray] = []
        head = json.dumps({"fingerprint": self._fingerprint, "state": _parted(state, arrays)}).encode()
        with new_file(self._path) as aside, aside.open("wb") as file:
            named: dict[str, Any] = {f"array{i}": array for i, array in enumerate(arrays)}
            np.savez(file, head=np.frombuffer(head, np.uint8), **named)
        self.state, self._due_at = state, time.monotonic() + SAVE_EVERY_S


def _parted(value: Any, arrays: list[np.ndarray]) -> Any:
    """Return `value` with its arrays replaced by their places in `arrays`."""
    if isinstance(value, np.ndarray):
        arrays.append(value)
        return {"array": len(arrays) - 1}
    if isinstance(value, dict):
        return {"dict": [[key, _parted(inner, arrays)] for key, inner in value.items()]}
    return [_parted(inner, arrays) for inner in value] if isinstance(value, list) else value


def _joined(value: Any, arrays: list[np.ndarray]) -> Any:
    if isinstance(value, dict):
        if "array" in value:
            return arrays[value["array"]]
        return {key: _joined(inner, arrays) for key, inner in value["dict"]}
    return [_joined(inner, arrays) for inner in value] if isinstance(value, list) else value
