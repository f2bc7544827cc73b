"""Which formats a model is exported in; one of your own is registered here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bigdssm.artifacts.model_folder import ModelFolder
from bigdssm.export.probe import Parity


@dataclass(frozen=True)
class ExportFormat:
    """How a model is written, and what the card of the folder says of it."""

    write: Callable[[ModelFolder, Path], Parity]  # into a folder; how what it reads back compares with the trainer's
    library: str  # that loads it, as the Hub calls it
    loading: Callable[[ModelFolder, str], str]  # Markdown: how the folder of this name is loaded


FORMATS: dict[str, ExportFormat] = {}


def register_export(name: str, kind: ExportFormat) -> None:
    """Make a format known to `convert_checkpoint --format`."""
    FORMATS[name] = kind
