"""Print the documents that an index finds for one query.

    bigdssm search --model MODEL --index INDEX --user KEY
    bigdssm search --model MODEL --index INDEX --history "first title; second title"
    bigdssm search --model MODEL --index INDEX --text "words=running shoes" section=sports

A user's seen documents, and those of a typed history, are left out. A typed history names documents by their key or
their display name, oldest first. --data is needed where the dataset is not at the path that the model was trained with.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from bigdssm.artifacts.model_folder import load_model_folder
from bigdssm.batching.collate import Collator
from bigdssm.cli import command
from bigdssm.dataset.cache import Cache
from bigdssm.dataset.dataset import Dataset
from bigdssm.errors import ConfigError
from bigdssm.features import TextTokenizer
from bigdssm.retrieval.embed import query_vectors
from bigdssm.retrieval.index import open_index
from bigdssm.retrieval.search import DocumentNames, Query, check_typed, feature_query, history_query, user_query


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="model folder")
    parser.add_argument("--index", type=Path, required=True, help="index folder")
    parser.add_argument("--data", help="dataset folder or URL (by default the one that the model was trained on)")
    query = parser.add_mutually_exclusive_group(required=True)
    query.add_argument("--user", metavar="KEY", help="a user of the dataset")
    query.add_argument("--history", metavar="TITLES", help="documents, parted by semicolons, oldest first")
    query.add_argument("--text", nargs="+", metavar="FEATURE=VALUE", help="values of the query's features")
    parser.add_argument("--top", type=int, default=10, help="documents to print (%(default)s)")
    args = parser.parse_args(argv)
    if args.top < 1:
        raise ConfigError(f"--top {args.top}: needs at least 1")
    typed = {} if args.text is None else _typed_values(args.text)
    titles = [title for title in (args.history or "").split(";") if title.strip()]
    check_typed([args.user or "", *titles, *typed.values()])

    folder, index = load_model_folder(args.model), open_index(args.index)
    dataset = Dataset.open(args.data or folder.config.data.dir, cache=Cache.of(folder.config.data))
    folder.check_dataset(dataset)
    if args.user is not None:
        found = user_query(dataset, args.user)
    elif args.history is not None:
        found = history_query(dataset, DocumentNames.of(dataset), titles)
    else:
        tokenizer = None if folder.tokenizer_dir is None else TextTokenizer(folder.tokenizer_dir)
        found = feature_query(folder.schema, typed, tokenizer)

    collator = Collator(folder.schema, dataset.catalogue, dataset.pad_token_id)
    vector = query_vectors(folder.model, collator.query_features(found.columns)).numpy()
    top = min(args.top, index.meta.num_docs)
    scores, rows = index.nearest(vector, top, folder.checksum, [found.seen])
    _show(dataset, found, scores[0], rows[0])


def _typed_values(pairs: list[str]) -> dict[str, str]:
    values = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator or not name:
            raise ConfigError(f"--text {pair!r}: needs feature=value, for example words='running shoes'")
        if name in values:
            raise ConfigError(f"--text gives {name} twice")
        values[name] = value
    return values


def _show(dataset: Dataset, query: Query, scores: np.ndarray, rows: np.ndarray) -> None:
    console = Console()
    if len(query.seen):
        newest = dataset.catalogue.display(query.seen[-5:])
        more = f" and {len(query.seen) - 5} earlier" if len(query.seen) > 5 else ""
        line = f"history, newest first: {'; '.join(reversed(newest))}{more}"
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    table = Table()
    for column in ("rank", "score"):
        table.add_column(column, justify="right")
    table.add_column("document")
    table.add_column("key")
    rows, scores = rows[rows >= 0], scores[rows >= 0]
    names = zip(dataset.catalogue.display(rows), dataset.catalogue.keys(rows), strict=True)
    for rank, (score, (name, key)) in enumerate(zip(scores, names, strict=True), start=1):
        table.add_row(str(rank), f"{score:.4f}", name, key)
    console.print(table, markup=False)
