"""Memory-mapped Arrow files."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from bigdssm.errors import DataError


def open_arrow(path: Path) -> pa.ipc.RecordBatchFileReader:
    """Open an Arrow file memory-mapped. Raises DataError: missing, or not an Arrow file."""
    try:
        return pa.ipc.open_file(pa.memory_map(str(path)))
    except FileNotFoundError:
        raise DataError(f"{path} is missing; the folder is incomplete, build it again or copy all of it") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} is no readable Arrow file ({error}); copy it again or build it again") from None
