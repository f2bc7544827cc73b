"""Print the documents that an index finds for one request.

    bigdssm search --model MODEL --index INDEX --user KEY
    bigdssm search --model MODEL --index INDEX --history "first title; second title" --text age=33
    bigdssm search --model MODEL --index INDEX --text "words=running shoes" --filter "section = sports and price < 50"
    bigdssm search --model MODEL --index INDEX --request request.json --out found.csv

--user brings what the dataset knows of a user, --text values of features, --history later events: documents by their
key or title, oldest first; --document is a document that the query is. What was seen is left out unless the
model's data.exclude_seen is false; --seen sets it for one request. With --rerank K the model's scorer ranks the index's
best K documents anew. A JSON request is what the server takes, see docs/serving.md. --data is needed where the dataset
is not at the path that the model was trained with. --out writes the documents as CSV: rank, score, key, title.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bigdssm.cli import add_search_options, at_least, check_file_to_write, command, refuse_options
from bigdssm.errors import ConfigError
from bigdssm.retrieval.index import FoundDocument
from bigdssm.retrieval.request import Event, Request, request_of
from bigdssm.retrieval.search import Query
from bigdssm.serving.searcher import Searcher
from bigdssm.utils.atomic import new_file

SEEN = {"allow": False, "exclude": True}


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_search_options(parser)
    parser.add_argument("--user", metavar="KEY", help="a user of the dataset")
    parser.add_argument("--document", metavar="KEY", help="the document that the query is, of a siamese model")
    parser.add_argument("--history", metavar="TITLES", help="documents, parted by semicolons, oldest first")
    parser.add_argument("--text", nargs="+", metavar="FEATURE=VALUE", help="values of the query's features")
    parser.add_argument("--filter", metavar="CONDITIONS", help="which documents may be found")
    parser.add_argument("--seen", choices=SEEN, help="whether seen documents may be found")
    parser.add_argument("--top", type=int, default=10, help="documents to print (%(default)s)")
    parser.add_argument(
        "--rerank", type=at_least(2), default=0, metavar="K", help="documents that the model's scorer ranks anew"
    )
    parser.add_argument("--request", metavar="FILE", help="a request as JSON, - for standard input")
    parser.add_argument("--out", type=Path, metavar="FILE.csv", help="write the documents as CSV")
    args = parser.parse_args(argv)
    if args.out is not None and args.out.suffix != ".csv":
        raise ConfigError(f"--out {args.out}: needs a file that ends in .csv")
    check_file_to_write("--out", args.out)
    if args.request is not None:
        options = ["--user", "--document", "--history", "--text", "--filter", "--seen", "--top"]
        refuse_options(parser, args, options, "with --request, which holds all of it")
        request = request_of(_read(args.request))
    else:
        request = _typed(args)
    searcher = Searcher.open(args.model, args.index, args.data, rerank=args.rerank)
    query = searcher.queries.of(request)
    documents = searcher.answer([query])[0].documents
    _show(searcher, query, documents)
    if args.out is not None:
        _write(args.out, documents)


def _typed(args: argparse.Namespace) -> Request:
    if args.top < 1:
        raise ConfigError(f"--top {args.top}: needs at least 1")
    titles = [title for title in (args.history or "").split(";") if title.strip()]
    features = None if args.text is None else _typed_values(args.text)
    return Request(
        args.user, features, [*map(Event, titles)] or None, filter=args.filter, document=args.document,
        exclude_seen=None if args.seen is None else SEEN[args.seen], top=args.top,
    )  # fmt: skip


def _read(file: str) -> dict[str, object]:
    try:
        content = json.loads(sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--request {file} is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"--request {file} holds no JSON object")
    return content


def _write(path: Path, documents: Sequence[FoundDocument]) -> None:
    with new_file(path) as aside, aside.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["rank", *FoundDocument._fields])
        writer.writerows([rank, *document] for rank, document in enumerate(documents, start=1))


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


def _show(searcher: Searcher, query: Query, documents: Sequence[FoundDocument]) -> None:
    console = Console(markup=False, emoji=False, highlight=False)
    lines = []
    if newest := searcher.seen(query):
        more = f" and {len(query.seen) - len(newest)} earlier" if len(query.seen) > len(newest) else ""
        lines.append(f"history, newest first: {'; '.join(newest)}{more}")
    for item in query.unknown:
        lines.append(f"skipped: {searcher.queries.unknown(item)}")
    for line in lines:
        console.print(line, soft_wrap=True)
    table = Table()
    for column in ("rank", "score"):
        table.add_column(column, justify="right")
    table.add_column("document")
    table.add_column("key")
    for rank, document in enumerate(documents, start=1):
        table.add_row(str(rank), f"{document.score:.4f}", document.title, document.key)
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
