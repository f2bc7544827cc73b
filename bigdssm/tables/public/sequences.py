"""Sets that are published as sequences of item ids: SASRec's files and S3-Rec's."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from bigdssm.tables.public.files import check_file, find, is_there, lines, wrong, wrong_line
from bigdssm.tables.public.table import Table

EVENTS = ("user_id", "item_id", "position")
S3REC_SETS = ("sequences", "Beauty", "Sports_and_Outdoors", "Toys_and_Games")
ATTRIBUTES = "item2attributes.json"


def read_sasrec(source: Path) -> Iterator[Table]:
    """Yield the events and the items of a file with a line `user item` for each event, a user's in order of time.

    Raises DataError. Source: Kang and McAuley, Self-Attentive Sequential Recommendation, arXiv 1808.09781.
    """
    check_file(source)
    items: dict[str, None] = {}
    yield Table("interactions", EVENTS, _events_of_pairs(source, items))
    yield Table("items", ("item_id",), ((item,) for item in items))


def read_s3rec(source: Path) -> Iterator[Table]:
    """Yield the events and the items of a line `user item item …` for each user; `source` is the file or its folder.

    Attributes of items come from beside it, where they are there: item2attributes.json, or NAME_item2attributes.json of
    NAME.txt. Raises DataError. Source: Zhou et al., S3-Rec, arXiv 2008.07873.
    """
    path = _sequences_in(source) if source.is_dir() else source
    check_file(path)
    name = path.name.partition(".txt")[0]
    beside = ATTRIBUTES if name == "sequences" else f"{name}_{ATTRIBUTES}"
    attributes = _attributes(find(path.parent, beside)) if is_there(path.with_name(beside)) else {}
    items: dict[str, None] = {}
    yield Table("interactions", EVENTS, _events_of_sequences(path, items))
    unused = len(attributes.keys() - items.keys())
    note = f"{unused:,} items that have attributes but no interaction are left out" if unused else ""
    yield Table("items", ("item_id", "attributes"), ((item, attributes.get(item, "")) for item in items), note)


def _events_of_pairs(path: Path, items: dict[str, None]) -> Iterator[tuple[str, str, str]]:
    lengths: Counter[str] = Counter()
    for number, line in lines(path):
        words = line.split()
        if len(words) != 2:
            raise wrong_line(path, number, line, "two words, `user item`", "sasrec")
        user, item = words
        items[item] = None
        yield user, item, str(lengths[user])
        lengths[user] += 1


def _events_of_sequences(path: Path, items: dict[str, None]) -> Iterator[tuple[str, str, str]]:
    line_of: dict[str, int] = {}
    for number, line in lines(path):
        user, *sequence = line.split()
        if not sequence:
            raise wrong_line(path, number, line, "a user and at least one item, `user item item …`", "s3rec")
        if user in line_of:
            needed = f"each user once (this one stands on line {line_of[user]} already)"
            raise wrong_line(path, number, line, needed, "s3rec")
        line_of[user] = number
        for position, item in enumerate(sequence):
            items[item] = None
            yield user, item, str(position)


def _sequences_in(folder: Path) -> Path:
    found = [f"{name}.txt" for name in S3REC_SETS if is_there(folder / f"{name}.txt")]
    if len(found) != 1:
        known = ", ".join(f"{name}.txt" for name in S3REC_SETS)
        got = " and ".join(found) or "none of them"
        raise wrong(folder, "", got, f"one of {known} (or .xz)", "name the file of the sequences with --source")
    return find(folder, found[0])


def _attributes(path: Path) -> dict[str, str]:
    """Return each item's attributes, separated by spaces."""
    numbered = list(lines(path))
    try:
        content = json.loads("\n".join(line for _, line in numbered))
        json.dumps(content, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        number = numbered[error.lineno - 1][0] if numbered else 1
        raise wrong(path, f"line {number}", error.msg, "one JSON object", "fetch the file again") from None
    except (ValueError, RecursionError) as error:  # thousands of digits or of brackets, or half a character
        got = " ".join(str(error).split())[:80]
        raise wrong(path, "", got, "one JSON object of words and numbers", "fetch the file again") from None
    if not isinstance(content, dict):
        got, needed = f"a JSON {type(content).__name__}", "an object of items, `item: [attribute, …]`"
        raise wrong(path, "line 1", got, needed, "fetch the file again")
    return {item: " ".join(_words(path, item, values)) for item, values in content.items()}


def _words(path: Path, item: str, values: object) -> Iterator[str]:
    for value in values if isinstance(values, list) else [values]:
        word = isinstance(value, int | str) and not isinstance(value, bool) and len(str(value).split()) == 1
        word = word and "\0" not in str(value)
        if not isinstance(values, list) or not word:
            needed = "a list of attributes, each one word or a whole number"
            raise wrong(path, f"item {item!r}", repr(values), needed, "mend its list")
        yield str(value)
