"""Small ingestion sizes, so that few rows make many parts, files and blocks."""

import sys
from collections.abc import Callable
from typing import Any

# With these every module that has one of the sizes is imported.
import bigdssm.ingest.engines
import bigdssm.ingest.interactions
import bigdssm.ingest.pairs  # noqa: F401

SIZES = {
    "BLOCKS_PER_SHARD": 6,
    "DOCUMENTS_PER_FILE": 60,
    "MAX_BLOCK_ROWS": 30,
    "MIN_BLOCK_ROWS": 8,
    "ROWS_PER_BUCKET": 150,
    "ROWS_PER_BUCKET_JOB": 250,
    "ROWS_PER_FIT": 400,
    "ROWS_PER_PART": 600,
    "ROWS_PER_READ": 48,
    "ROWS_PER_RUN": 300,
    "SEQUENCES_PER_FILE": 30,
    "SMALL_WORK": 0,
    "UNITS_PER_JOB": 400,
}


def make_small(change: Callable[[Any, str, int], None]) -> None:
    """Change every module that has one of the SIZES."""
    unknown = set(SIZES)
    for name, module in list(sys.modules.items()):
        for constant, size in SIZES.items() if name.startswith("bigdssm.") else ():
            if hasattr(module, constant):
                change(module, constant, size)
                unknown.discard(constant)
    assert not unknown, f"no module has {unknown}"
