"""Stamps: the order of the states of a dataset, each of which a build or an append has written.

stamps.json   the stamp of every state that the folder has had, by fingerprint

A stamp is the time of the build or append in milliseconds since 1970, and later than all stamps of the same folder,
whatever the clock. It is no part of a dataset's content: no fingerprint or checksum depends on it, and it is the one
file of a dataset that is not a function of tables, config and seed.
"""

import json
import time
from collections.abc import Mapping
from pathlib import Path

from bigdssm.errors import DataError

STAMPS_FILE = "stamps.json"
FIRST_STAMP = 10**11  # smaller ones count partitions, as before there were stamps; milliseconds reach it in 1973


def read_stamps(folder: Path) -> dict[str, int]:
    """Return the stamps of a dataset folder by fingerprint; none before its first build or append with stamps.

    Raises DataError: the file is damaged.
    """
    path = folder / STAMPS_FILE
    if not path.exists():
        return {}
    try:
        stamps = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, OSError) as error:
        raise DataError(f"{path} is damaged: {error}; copy the dataset whole") from None
    if not all(type(stamp) is int and stamp >= FIRST_STAMP for stamp in stamps.values()):
        raise DataError(f"{path} is damaged: it has a stamp that is no time in milliseconds; copy the dataset whole")
    return stamps


def with_new_stamp(stamps: Mapping[str, int], fingerprint: str) -> dict[str, int]:
    """Return `stamps` with one for the state `fingerprint`, which is later than the others and not before now."""
    now = time.time_ns() // 1_000_000
    return {**stamps, fingerprint: max(now, 1 + max(stamps.values(), default=0))}


def describe_stamp(stamp: int) -> str:
    """Return a stamp as text, for messages."""
    if stamp < FIRST_STAMP:
        return f"of {stamp} partitions and unknown time"
    return time.strftime("of %Y-%m-%d %H:%M:%S UTC", time.gmtime(stamp / 1000))
