"""BEIR collections, read and written: corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv.

Features other than the text are in `metadata`, by source column; text-only readers ignore it. Source: Thakur et al.
2021 (BEIR).
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from bigdssm.errors import ConfigError, DataError
from bigdssm.features import Feature, Text, texts_of
from bigdssm.sources.text import parse_object, typed
from bigdssm.utils.atomic import check_replaceable

CORPUS_FILE, QUERIES_FILE, QRELS_DIR = "corpus.jsonl", "queries.jsonl", "qrels"
SPLIT_FILES = {"train": "train.tsv", "validation": "dev.tsv", "test": "test.tsv"}  # BEIR calls validation dev

META_FILE = "meta.json"
COLLECTION = {"kind": "collection", "format": 1}  # the content of META_FILE
OWN_FILES = (META_FILE, CORPUS_FILE, QUERIES_FILE, *(f"{QRELS_DIR}/{name}" for name in SPLIT_FILES.values()))

UNWRITABLE = re.compile(r"[\t\r\n]")
INTEGER = re.compile(r"[+-]?[0-9]{1,18}")

Qrels = dict[str, dict[str, int]]
"""Relevance by query id and document id."""


@dataclass(frozen=True)
class CollectionEntry:
    """A document or a query."""

    key: str
    text: str
    metadata: dict[str, Any]


@dataclass(frozen=True)
class Collection:
    """A corpus, the queries of one split, and their relevance judgments."""

    corpus: list[CollectionEntry]
    queries: list[CollectionEntry]  # those with judgments in the split, in the order of queries.jsonl
    qrels: Qrels
    known_positives: Qrels  # relevant documents of the same queries in other splits and not in this one


def read_collection(folder: Path, split: str) -> Collection:
    """Read the collection in `folder`; `split` names a file in qrels/ (validation: dev.tsv).

    Raises DataError: a missing or damaged file, or qrels with an unknown query or document.
    """
    path = folder / QRELS_DIR / SPLIT_FILES.get(split, f"{split}.tsv")
    qrels = read_qrels_tsv(path)
    check_judgements(qrels, path)
    corpus, queries = _entries(folder / CORPUS_FILE), _entries(folder / QUERIES_FILE)
    keys = {entry.key for entry in corpus}
    graded = [entry for entry in queries if entry.key in qrels]
    if len(graded) < len(qrels):
        unknown_query = min(qrels.keys() - {entry.key for entry in graded})
        raise DataError(f"{path} judges query {unknown_query!r}, which is not in {QUERIES_FILE}")
    for documents in qrels.values():
        if unknown := documents.keys() - keys:
            raise DataError(f"{path} judges document {min(unknown)!r}, which is not in {CORPUS_FILE}")
    known_positives: Qrels = {}
    for other in sorted((folder / QRELS_DIR).glob("*.tsv")):
        if other.name != path.name:
            for query, documents in read_qrels_tsv(other).items():
                if query in qrels:
                    grades = qrels[query]
                    positive = {key: grade for key, grade in documents.items() if grade > 0 and grades.get(key, 0) <= 0}
                    known_positives.setdefault(query, {}).update(positive)
    return Collection(corpus, graded, qrels, known_positives)


def read_qrels_tsv(path: Path) -> Qrels:
    """Read a BEIR qrels file: a header, then query-id, corpus-id, score. Raises DataError."""
    qrels: Qrels = {}
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                row = line.rstrip("\n").split("\t")
                if row == [""] or (number == 1 and row[-1] == "score"):  # an empty line, or the header
                    continue
                if len(row) != 3:
                    raise DataError(f"{path}:{number} has {len(row)} fields, needs query-id, corpus-id and score")
                add_judgement(qrels, row[0], row[1], row[2], path, number)
    except FileNotFoundError:
        splits = sorted(p.stem for p in path.parent.glob("*.tsv"))
        raise DataError(f"{path} does not exist; splits there: {', '.join(splits) or 'none'}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise DataError(f"{path} is not a qrels file: {error}") from None
    return qrels


def add_judgement(qrels: Qrels, query: str, document: str, grade: str, path: Path, number: int) -> None:
    """Add one line of a qrels file.

    Raises DataError: the grade is not an integer, or differs from an earlier line.
    """
    value = parse_integer(grade, "relevance", path, number)
    if qrels.setdefault(query, {}).setdefault(document, value) != value:
        raise DataError(
            f"{path}:{number} judges {document} for query {query} {value}, an earlier line {qrels[query][document]}"
        )


def check_judgements(qrels: Qrels, path: Path) -> None:
    """Raise DataError if no document is relevant, so metrics are undefined."""
    if not any(grade > 0 for grades in qrels.values() for grade in grades.values()):
        raise DataError(f"{path} has no relevant documents, so metrics are undefined")


def parse_integer(text: str, field: str, path: Path, number: int) -> int:
    """Parse an integer field of a line. Raises DataError."""
    if not INTEGER.fullmatch(text):
        raise DataError(f"{path}:{number}: {text!r} is not an integer, needed for the {field}")
    return int(text)


def texts_and_metadata(features: Mapping[str, Feature], entries: Iterable[CollectionEntry]) -> pa.Table:
    """Return the features' source columns of `entries`, as input of `canonical`.

    A value is that in `metadata`; a text feature without one takes the entry's text.
    """
    columns: dict[str, list[Any]] = {feature.source: [] for feature in features.values()}
    for entry in entries:
        for feature in features.values():
            text = entry.text if isinstance(feature, Text) else None
            columns[feature.source].append(entry.metadata.get(feature.source, text))
    return pa.table({name: typed(values) for name, values in columns.items()})


def check_output_folder(folder: Path, *, overwrite: bool) -> None:
    """Raise ConfigError if `folder` holds anything but a collection that ingestion wrote, unless `overwrite`."""
    check_replaceable(
        folder, META_FILE, lambda meta: meta == COLLECTION, "holds no collection that bigdssm make_shards wrote",
        overwrite=overwrite,
    )  # fmt: skip


def write_entries(path: Path, features: Mapping[str, Feature], pieces: Iterable[tuple[list[str], pa.Table]]) -> None:
    """Write a corpus or queries from keys and canonical features, chunk by chunk."""
    title = {"title": ""} if path.name == CORPUS_FILE else {}
    texts = texts_of(features)
    with path.open("w", encoding="utf-8") as file:
        for keys, table in pieces:
            columns = {name: table.column(name).combine_chunks() for name in features}
            values = {name: column.to_pylist() for name, column in columns.items()}
            omitted = {  # missing values without a JSON representation, such as NaN
                name: feature.is_missing(columns[name]) & (feature.missing not in ("", []))
                for name, feature in features.items()
            }
            for row, key in enumerate(keys):
                metadata = {  # a single text feature is the entry's text alone
                    feature.source: values[name][row]
                    for name, feature in features.items()
                    if not omitted[name][row] and (len(texts) != 1 or name not in texts)
                }
                text = "\n".join(values[name][row] for name in texts)
                entry = {"_id": key, **title, "text": text, **({"metadata": metadata} if metadata else {})}
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")


def write_judgements(folder: Path, split: str, rows: Iterable[tuple[str, str, float]]) -> None:
    """Write the (query, document, relevance) rows of a split.

    Raises ConfigError: a non-integer relevance, or an id that the format cannot hold.
    """
    with (folder / QRELS_DIR / SPLIT_FILES[split]).open("w", encoding="utf-8") as file:
        file.write("query-id\tcorpus-id\tscore\n")
        for query, document, relevance in rows:
            if relevance != int(relevance):
                raise ConfigError(f"--beir needs integer relevances, got {relevance}; leave it out")
            for key in (query, document):
                if UNWRITABLE.search(key):
                    raise ConfigError(
                        f"--beir: the id {key!r} has a tab or line break, which qrels cannot hold; leave it out"
                    )
            file.write(f"{query}\t{document}\t{int(relevance)}\n")


def numbered_lines(path: Path, hint: str = "") -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, line) of the non-blank lines of a text file.

    Raises DataError: missing (the message ends with `hint`), unreadable, or not UTF-8.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line
    except FileNotFoundError:
        raise DataError(f"{path} does not exist{hint}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise DataError(f"{path} is not a UTF-8 text file") from None


def _entries(path: Path) -> list[CollectionEntry]:
    entries: list[CollectionEntry] = []
    keys: set[str] = set()
    number = 0
    try:
        lines = numbered_lines(path, f"; a BEIR folder has {CORPUS_FILE}, {QUERIES_FILE} and qrels/")
        for number, line in lines:  # noqa: B007, used in the message below
            record = parse_object(line)
            key, text, title = record["_id"], record["text"], record.get("title") or ""
            metadata = record.get("metadata") or {}
            if not (isinstance(text, str) and isinstance(title, str) and isinstance(metadata, dict)):
                raise TypeError("text and title need to be strings, metadata an object")
            if not isinstance(key, str | int) or key == "":
                raise TypeError("_id needs to be a string")
            entries.append(CollectionEntry(str(key), f"{title} {text}".strip(), metadata))
            keys.add(entries[-1].key)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}:{number} is not a BEIR record: {error!r}") from None
    if len(keys) < len(entries):
        raise DataError(f"{path} has {len(entries) - len(keys)} duplicate ids")
    return entries
