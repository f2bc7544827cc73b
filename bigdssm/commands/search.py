"""Search an index: print the top documents of one request.

    bigdssm search --model MODEL --index INDEX --user KEY
    bigdssm search --model MODEL --index INDEX --history "first title; second title" --text age=33
    bigdssm search --model MODEL --index INDEX --text "words=running shoes" --filter "section = sports and price < 50"
    bigdssm search --model MODEL --index postgresql://HOST/DATABASE --user KEY
    bigdssm search --model MODEL --index INDEX --request request.json --out results.csv

--user loads features and events of a user from the dataset, --text sets feature values, --history appends events
(document keys or titles, oldest first); --document uses a document as the query. Seen documents are excluded unless the
model's data.exclude_seen is false; --seen overrides it. With --rerank K the cross-encoder of --reranker re-ranks the
top K. --request reads the JSON request of the server (docs/serving.md). --data is required for a filter with a model
without histories, and if the dataset has been moved since training. --out writes the documents as CSV: rank, score,
key, title.
"""

import argparse
import csv
import sys
from dataclasses import fields
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bigdssm.cli import OVERWRITE, RERANKING, SEARCH_OPTIONS, check_file_to_write, command, option, refuse_options
from bigdssm.commands._ranks import QUERY_DEVICE
from bigdssm.errors import ConfigError
from bigdssm.retrieval.request import HELP, Event, Request, load_json, parse_request
from bigdssm.serving.searcher import Searcher
from bigdssm.stores.base import ScoredDocument
from bigdssm.utils.atomic import new_file

HELPS = {field.name: field.metadata[HELP] for field in fields(Request)}
SEEN = {"allow": False, "exclude": True}
SEEN_HELP = "whether results may include seen documents (default: data.exclude_seen of the model)"


@command(
    *SEARCH_OPTIONS,
    option("--user", metavar="KEY", help=HELPS["user"]),
    option("--document", metavar="KEY", help=HELPS["document"]),
    option("--filter", metavar="CONDITIONS", help=HELPS["filter"]),
    option("--exclude", nargs="+", action="extend", metavar="KEY", help=HELPS["exclude"]),
    option(
        "--history", metavar="ITEMS", help="events to append: document keys or titles, oldest first, separated by ;"
    ),
    option("--text", nargs="+", metavar="FEATURE=VALUE", help="values of query features"),
    option("--now", type=float, help=f"time of the request; {HELPS['now']}"),
    option("--context", nargs="+", action="extend", metavar="FEATURE=VALUE", help=HELPS["context"]),
    option("--seen", choices=SEEN, help=SEEN_HELP),
    option("--top", type=int, default=Request.top, help=f"{HELPS['top']} (default: %(default)s)"),
    RERANKING,
    QUERY_DEVICE,
    option("--request", metavar="FILE", help="file with a request as JSON, - for standard input"),
    option("--out", type=Path, metavar="FILE.csv", help="also write the documents as CSV"),
    OVERWRITE,
)
def main(args: argparse.Namespace) -> None:
    """Run the command line."""
    if args.out is not None and args.out.suffix != ".csv":
        raise ConfigError(f"--out {args.out}: needs a file name ending in .csv")
    check_file_to_write("--out", args.out, "search", overwrite=args.overwrite)
    if args.request is not None:
        options = ["--user", "--document", "--history", "--text", "--now", "--context", "--filter", "--exclude"]
        options += ["--seen", "--top"]
        refuse_options(args, options, "with --request, which contains them")
        try:
            text = sys.stdin.read() if args.request == "-" else Path(args.request).read_text(encoding="utf-8")
            content = load_json(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"--request {args.request} is not JSON: {error}") from None
        if not isinstance(content, dict):
            raise ConfigError(f"--request {args.request} is not a JSON object")
        request = parse_request(content)
    else:
        titles = [title for title in (args.history or "").split(";") if title.strip()]
        features = None if args.text is None else feature_values("--text", args.text)
        request = Request(
            args.user, features, [*map(Event, titles)] or None, args.now, args.filter, document=args.document,
            exclude=args.exclude,
            exclude_seen=None if args.seen is None else SEEN[args.seen], top=args.top,
            context=None if args.context is None else feature_values("--context", args.context),
        )  # fmt: skip
    searcher = Searcher.open(
        args.model, args.index, args.data, rerank=args.rerank, reranker=args.reranker, device=args.device
    )  # fmt: skip
    query = searcher.queries.of(request)
    documents = searcher.answer([query])[0].documents
    console = Console(markup=False, emoji=False, highlight=False)
    if newest := searcher.seen(query):
        more = f" and {len(query.seen) - len(newest)} earlier" if len(query.seen) > len(newest) else ""
        console.print(f"history, newest first: {'; '.join(newest)}{more}", soft_wrap=True)
    if query.unknown_user and request.user is not None:
        console.print(f"skipped: {searcher.queries.unknown_user_message(request.user)}", soft_wrap=True)
    for item in query.unknown:
        console.print(f"skipped: {searcher.queries.unknown_item_message(item)}", soft_wrap=True)
    for key in query.unknown_excluded:
        console.print(f"not excluded: no document has the key {key!r}", soft_wrap=True)
    table = Table()
    for column in ("rank", "score"):
        table.add_column(column, justify="right")
    table.add_column("document")
    table.add_column("key")
    for rank, document in enumerate(documents, start=1):
        table.add_row(str(rank), f"{document.score:.4f}", document.title, document.key)
    console.print(table)
    if args.out is not None:
        with new_file(args.out) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["rank", *ScoredDocument._fields])
            writer.writerows([rank, *document] for rank, document in enumerate(documents, start=1))


def feature_values(option: str, pairs: list[str]) -> dict[str, str]:
    """Return the FEATURE=VALUE pairs of `option`. Raises ConfigError: not a pair, or a feature twice."""
    values = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator or not name:
            raise ConfigError(f"{option} {pair!r}: needs feature=value, for example words='running shoes'")
        if name in values:
            raise ConfigError(f"{option} contains {name} twice")
        values[name] = value
    return values


if __name__ == "__main__":
    raise SystemExit(main())
