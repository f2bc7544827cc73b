"""Open Arrow files memory-mapped, without reading them."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from bigdssm.errors import DataError


def open_arrow(path: Path) -> pa.ipc.RecordBatchFileReader:
    """Return a memory-mapped reader of an Arrow file. Raises DataError: missing, or no Arrow file."""
    try:
        return pa.ipc.open_file(pa.memory_map(str(path)))
    except FileNotFoundError:
        raise DataError(f"{path} is missing; the folder is not complete, make it again or copy it whole") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} is no readable Arrow file ({error}); copy it again or make it again") from None
