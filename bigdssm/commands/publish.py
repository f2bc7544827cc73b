"""Publish document vectors to a vector store, and select the collection that is served.

    bigdssm publish --vectors VECTORS --data DATASET --to postgresql://HOST/DATABASE --verify --switch
    bigdssm publish --to URL                     # lists collections and aliases
    bigdssm publish --to URL --rollback          # back to the collection before the last switch
    bigdssm publish --to URL --rollback --update --data DATASET --model MODELS --vectors VECTORS
    bigdssm publish --to URL --drop NAME

The collection becomes equal to the vectors folder: new and changed documents are written, withdrawn ones deleted. The
same command thus publishes everything, the changes of a day, or the rest after an interruption. Its name is by default
the beginning of the model's checksum, so a new model has a new collection. --verify compares answers with exact inner
products, and fails below a recall of 0.98. A collection is compared with the one that the alias names: which share of
the nearest documents of a sample both have. --switch then lets the alias name the collection. --rollback prints which
documents the previous collection lacks and which it has too much, compared with those of --data or else with the
collection that the alias named. With --update it has those of --data first: new and changed documents are encoded by
its model, found in MODELS (a model folder or a folder of them), into VECTORS, the folder that it was published from.
KEY=VALUE sets an option of the store (docs/config_keys.md). Passwords come from the environment or the files of the
store's client.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from bigdssm.checkpoints.model_folder import doc_checksum, model_folders, model_metas
from bigdssm.cli import command, option, refuse_options
from bigdssm.commands.embed import embed
from bigdssm.config.loading import options_of
from bigdssm.dataset.dataset import Dataset
from bigdssm.errors import ConfigError, DataError
from bigdssm.retrieval.publish import compare_documents, measure_recall, publish
from bigdssm.retrieval.shards import ROWS_PER_SHARD, Share
from bigdssm.retrieval.vectors import read_meta
from bigdssm.stores.base import Collection, Store, open_store, store_class
from bigdssm.utils.log import ProgressBar

LEAST_RECALL = 0.98
SHOWN = 3  # keys of a list


@command(
    option("--to", required=True, metavar="URL", help="the store: postgresql://USER@HOST:PORT/DATABASE"),
    option("--vectors", type=Path, help="folder written by bigdssm embed"),
    option("--data", help="dataset of the vectors, folder or URL, for the columns of filters"),
    option("options", nargs="*", metavar="KEY=VALUE", help="options of the store"),
    option("--as", metavar="NAME", help="collection (default: from the model's checksum)"),
    option(
        "--verify",
        nargs="?",
        const=True,
        metavar="QUERIES.npy",
        help="measure recall with these query vectors, float32 [m, D+1] (default: with vectors of documents)",
    ),
    option(
        "--compare",
        metavar="NAME",
        help="collection or alias whose nearest documents are compared (default: the collection that --alias names)",
    ),
    option("--alias", default="live", help="alias to switch or roll back (default: %(default)s)"),
    option("--switch", action="store_true", help="let the alias name the collection"),
    option("--rollback", action="store_true", help="let the alias name its previous collection"),
    option("--update", action="store_true", help="with --rollback: publish --data to that collection before"),
    option("--model", type=Path, help="with --update: model folder of that collection, or a folder of model folders"),
    option("--drop", metavar="NAME", help="remove a collection that no alias names"),
)
def main(args: argparse.Namespace) -> None:
    """Run the command line."""
    store = open_store(args.to, options_of(args.options, store_class(args.to)))
    if args.update and not args.rollback:
        raise ConfigError("--update needs --rollback; without it, publish --vectors to the collection (--as)")
    if not args.update:
        refuse_options(args, ["--model"], "without --update")
    if args.rollback:
        if not args.update:
            refuse_options(args, ["--vectors", "--verify", "--compare"], "with --rollback, but without --update")
        refuse_options(args, ["--as", "--switch", "--drop"], "with --rollback")
        _roll_back(args, store)
    elif args.vectors is None:
        refuse_options(args, ["--data", "--as", "--verify", "--compare", "--switch"], "without --vectors")
    elif args.drop:
        raise ConfigError("--drop needs no --vectors; run it alone")
    elif args.data is None:
        raise ConfigError("--vectors needs --data, the dataset of the vectors")
    else:
        _publish(args, store, vars(args)["as"])
    if args.drop:
        names = sorted(store.collections())
        store.drop(args.drop)  # an unknown one, too: a killed command may have left files
        if args.drop not in names:
            raise DataError(f"--drop {args.drop}: {store.address} has no such collection, only {names}")
    current = {name: alias for alias, (name, _) in store.aliases().items()}
    for name, collection in store.collections().items():
        age = f"{(time.time() - collection.published) / 3600:.1f} h old" if collection.published else "not complete"
        live = f", {current[name]}" if name in current else ""
        print(f"{name}: {store.count(collection)} documents of model {collection.model[:12]}, {age}{live}")


def _queries(path: str, width: int) -> np.ndarray:
    """Read the query vectors of --verify, float32 [m, width]. Raises DataError: the file has something else."""
    try:
        queries = np.load(path)
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise DataError(f"--verify {path} is not a NumPy array: {error}") from None
    shape = getattr(queries, "shape", "an archive")  # .npz
    if len(shape) != 2 or 0 in shape or shape[1] != width or queries.dtype.kind not in "fiu":
        raise DataError(f"--verify {path}: got {shape}, needs numbers [m, {width}] of at least one query")
    if not np.isfinite(queries).all():
        raise DataError(f"--verify {path}: got values that are not finite")
    return np.asarray(queries, np.float32)


def _roll_back(args: argparse.Namespace, store: Store) -> None:
    """Switch to the previous collection, with --update after a publication to it."""
    alias = store.aliases().get(args.alias)
    if alias is None or alias.previous is None:
        raise ConfigError(f"--rollback: the alias {args.alias} has no previous collection")
    if args.update:
        _embed(args, store.check_complete(alias.previous))
        _publish(args, store, alias.previous)
    store.switch(args.alias, alias.previous)
    print(f"{args.alias} is {alias.previous}")
    other = store.collections().get(alias.name) if args.data is None else Dataset.open(args.data)
    if other is None:
        return  # dropped meanwhile
    where = alias.name if args.data is None else args.data
    difference = compare_documents(store, store.check_complete(alias.previous), other)
    print(
        f"{alias.previous}: lacks {len(difference.missing)} documents of {where}{_some(difference.missing)}, has "
        f"{len(difference.extra)} others{_some(difference.extra)}"
    )


def _some(keys: Sequence[str]) -> str:
    """Return the first of some keys in parentheses."""
    return f" ({', '.join([*keys[:SHOWN], *(['…'] if len(keys) > SHOWN else [])])})" if keys else ""


def _embed(args: argparse.Namespace, collection: Collection) -> None:
    """Bring --vectors, those of a collection, to the state of --data. Raises ConfigError: of another model."""
    for name, what in (
        ("data", "the dataset"), ("model", "the model of the collection, or a folder of model folders"),
        ("vectors", "the folder that the collection was published from"),
    ):  # fmt: skip
        if getattr(args, name) is None:
            raise ConfigError(f"--rollback --update needs --{name}, {what}; without --update nothing is encoded")
    if (model := read_meta(args.vectors).model_checksum) != collection.model:
        raise ConfigError(
            f"--vectors {args.vectors} is of model {model[:12]}, the previous collection {collection.name} of model "
            f"{collection.model[:12]}; give the vectors that it was published from"
        )
    folders = [folder for folder, meta in model_metas(args.model) if doc_checksum(meta) == collection.model]
    if not folders:
        num_folders = len(model_folders(args.model))
        raise ConfigError(
            f"--model {args.model}: none of {num_folders} model folders is model {collection.model[:12]} of the "
            f"previous collection {collection.name}; give the folder of that model"
        )
    with ProgressBar() as progress:
        work = Share.from_launcher(ROWS_PER_SHARD, progress)
        written, _ = embed(folders[0], args.data, args.vectors, work, since=args.vectors)
    print(f"{args.vectors}: {written.encoded} encoded, {written.reused} unchanged")


def _publish(args: argparse.Namespace, store: Store, into: str | None) -> None:
    started = time.perf_counter()
    queries = None if args.verify in (None, True) else _queries(args.verify, read_meta(args.vectors).width)
    compare = args.compare or (args.alias if args.alias in store.aliases() else None)
    with ProgressBar() as progress:
        dataset = Dataset.open(args.data)
        report = publish(store, args.vectors, dataset, into, progress, compare)
    name = report.collection.name
    print(
        f"{name}: {report.written} written, {report.deleted} deleted, {report.unchanged} unchanged in "
        f"{time.perf_counter() - started:.1f} s"
    )
    if report.rejected:
        print(
            f"{name}: {len(report.rejected)} rejected{_some(report.rejected)}: bigdssm forget has removed them from "
            "this collection for good; publish under another name (--as) to have them"
        )
    if (overlap := report.overlap) is not None:
        shares = " and ".join(f"{share:.2f} of the {number} nearest" for number, share in overlap.shares.items())
        print(f"{name}: {shares} documents are those in {overlap.previous} ({overlap.num_documents} documents sampled)")
    if args.verify:
        result = measure_recall(store, report.collection, args.vectors, queries, dataset, report.rejected)
        print(
            f"{name}: recall@{result.top} {result.recall:.4f} of {result.num_queries} queries, "
            f"{1000 * result.seconds:.1f} ms per query, largest difference of a score {result.difference:.1e}"
        )
        if result.recall < LEAST_RECALL:
            raise DataError(
                f"{name}: recall@{result.top} is {result.recall:.4f}, needs {LEAST_RECALL}; publish again with larger "
                "search or build options of the store"
            )
    if args.switch:
        store.switch(args.alias, name)
        print(f"{args.alias} is {name}")


if __name__ == "__main__":
    raise SystemExit(main())
