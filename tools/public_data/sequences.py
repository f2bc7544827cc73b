"""Datasets published as sequences of item ids: files of SASRec and S3-Rec."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tools.public_data.files import PublicFile, PublicTable, check_file, existing_file, public_data_error

EVENTS = ("user_id", "item_id", "position")
S3REC_FILES = ("sequences.txt", "Beauty.txt", "Sports_and_Outdoors.txt", "Toys_and_Games.txt")
ATTRIBUTES = "item2attributes.json"


def read_sasrec(source: Path) -> Iterator[PublicTable]:
    """Yield the events and the items of a file with one line `user item` per event, in time order per user.

    Raises DataError. Source: Kang and McAuley, Self-Attentive Sequential Recommendation, arXiv 1808.09781.
    """
    check_file(source)
    items: dict[str, None] = {}
    yield PublicTable("interactions", EVENTS, _events_of_pairs(PublicFile(source, "sasrec"), items))
    yield PublicTable("items", ("item_id",), ((item,) for item in items))


def read_s3rec(source: Path) -> Iterator[PublicTable]:
    """Yield the events and the items of a file with one line `user item item …` per user, or of its folder.

    Attributes of items are read from the same folder if they exist: item2attributes.json, or NAME_item2attributes.json
    for NAME.txt. Raises DataError. Source: Zhou et al., S3-Rec, arXiv 2008.07873.
    """
    path = _sequences_in(source) if source.is_dir() else source
    check_file(path)
    name = path.name.partition(".txt")[0]
    attributes_path = existing_file(path.with_name(ATTRIBUTES if name == "sequences" else f"{name}_{ATTRIBUTES}"))
    attributes = _attributes(PublicFile(attributes_path, "s3rec")) if attributes_path else {}
    items: dict[str, None] = {}
    yield PublicTable("interactions", EVENTS, _events_of_sequences(PublicFile(path, "s3rec"), items))
    unused = len(attributes.keys() - items.keys())
    note = f"{unused:,} items with attributes but without interactions are dropped" if unused else ""
    yield PublicTable("items", ("item_id", "attributes"), ((item, attributes.get(item, "")) for item in items), note)


def _events_of_pairs(file: PublicFile, items: dict[str, None]) -> Iterator[tuple[str, str, str]]:
    lengths: Counter[str] = Counter()
    for line in file.lines():
        words = line.split()
        file.check(len(words) == 2, line, "two words, `user item`")
        user, item = words
        items[item] = None
        yield user, item, str(lengths[user])
        lengths[user] += 1


def _events_of_sequences(file: PublicFile, items: dict[str, None]) -> Iterator[tuple[str, str, str]]:
    line_of: dict[str, int] = {}
    for line in file.lines():
        user, *sequence = line.split()
        file.check(sequence != [], line, "a user and at least one item, `user item item …`")
        file.check(user not in line_of, line, f"each user once (this one is also on line {line_of.get(user)})")
        line_of[user] = file.number
        for position, item in enumerate(sequence):
            items[item] = None
            yield user, item, str(position)


def _sequences_in(folder: Path) -> Path:
    files = {name: path for name in S3REC_FILES if (path := existing_file(folder / name))}
    if len(files) != 1:
        needed, got = f"one of {', '.join(S3REC_FILES)} (or .xz)", " and ".join(files) or "none of them"
        raise public_data_error(folder, "", got, needed, "name the file of the sequences with --source")
    return next(iter(files.values()))


def _attributes(file: PublicFile) -> dict[str, str]:
    """Return the attributes per item, separated by spaces."""
    numbered = [(file.number, line) for line in file.lines()]
    path = file.path
    try:
        content = json.loads("\n".join(line for _, line in numbered))
        json.dumps(content, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        number = numbered[error.lineno - 1][0] if numbered else 1
        raise public_data_error(path, f"line {number}", error.msg, "one JSON object", "download it again") from None
    except (ValueError, RecursionError) as error:  # thousands of digits or brackets, or an unpaired surrogate
        got = " ".join(str(error).split())[:80]
        raise public_data_error(path, "", got, "one JSON object of words and numbers", "download it again") from None
    if not isinstance(content, dict):
        got, needed = f"a JSON {type(content).__name__}", "an object of items, `item: [attribute, …]`"
        raise public_data_error(path, "line 1", got, needed, "download the file again")
    for item, values in content.items():
        if not isinstance(values, list) or not all(map(_is_word, values)):
            needed = "a list of attributes, each one word or a whole number"
            raise public_data_error(path, f"item {item!r}", repr(values), needed, "correct its list")
    return {item: " ".join(map(str, values)) for item, values in content.items()}


def _is_word(value: object) -> bool:
    text = str(value)
    return isinstance(value, int | str) and not isinstance(value, bool) and len(text.split()) == 1 and "\0" not in text
