"""Where a folder that a command line names really stands."""

from __future__ import annotations

from pathlib import Path

from bigdssm.errors import ConfigError


def real_place(folder: Path) -> Path:
    """Return where a folder that will be replaced stands: behind links, which then go on pointing at it.

    Raises ConfigError where links lead in a circle.
    """
    if not folder.is_symlink():
        return folder
    try:
        return folder.resolve()
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"{folder} is a link that leads nowhere: {error}") from None
