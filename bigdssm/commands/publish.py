"""Publish document vectors to a vector store, and select the collection that is served.

    bigdssm publish --vectors VECTORS --data DATASET --to postgresql://HOST/DATABASE --verify --switch
    bigdssm publish --to URL                     # lists collections and aliases
    bigdssm publish --to URL --rollback          # back to the collection before the last switch
    bigdssm publish --to URL --drop NAME

The collection becomes equal to the vectors folder: new and changed documents are written, withdrawn ones deleted. The
same command thus publishes everything, the changes of a day, or the rest after an interruption. Its name is by default
the beginning of the model's checksum, so a new model has a new collection. --verify compares answers with exact inner
products, and fails below a recall of 0.98. A collection is compared with the one that the alias names: which share of
the nearest documents of a sample both have. --switch then lets the alias name the collection. KEY=VALUE sets an option
of the store (docs/config_keys.md). Passwords come from the environment or the files of the store's client.
"""

import argparse
import time
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from bigdssm.cli import command, option, refuse_options
from bigdssm.config.loading import options_of
from bigdssm.dataset.dataset import Dataset
from bigdssm.errors import ConfigError, DataError
from bigdssm.retrieval.publish import measure_recall, publish
from bigdssm.retrieval.vectors import read_meta
from bigdssm.stores.base import Store, open_store, store_class
from bigdssm.utils.log import ProgressBar

LEAST_RECALL = 0.98


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
    option("--drop", metavar="NAME", help="remove a collection that no alias names"),
)
def main(args: argparse.Namespace) -> None:
    """Run the command line."""
    store = open_store(args.to, options_of(args.options, store_class(args.to)))
    if args.vectors is None:
        refuse_options(args, ["--data", "--as", "--verify", "--compare", "--switch"], "without --vectors")
    elif args.rollback or args.drop:
        raise ConfigError("--rollback and --drop need no --vectors; run them alone")
    elif args.data is None:
        raise ConfigError("--vectors needs --data, the dataset of the vectors")
    else:
        _publish(args, store)
    if args.rollback:
        alias = store.aliases().get(args.alias)
        if alias is None or alias.previous is None:
            raise ConfigError(f"--rollback: the alias {args.alias} has no previous collection")
        store.switch(args.alias, alias.previous)
    if args.drop:
        store.drop(args.drop)
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


def _publish(args, store: Store) -> None:  # type: ignore[no-untyped-def]
    started = time.perf_counter()
    queries = None if args.verify in (None, True) else _queries(args.verify, read_meta(args.vectors).width)
    compare = args.compare or (args.alias if args.alias in store.aliases() else None)
    with ProgressBar() as progress:
        dataset = Dataset.open(args.data)
        report = publish(store, args.vectors, dataset, vars(args)["as"], progress, compare)
    name = report.collection.name
    print(
        f"{name}: {report.written} written, {report.deleted} deleted, {report.unchanged} unchanged in "
        f"{time.perf_counter() - started:.1f} s"
    )
    if (overlap := report.overlap) is not None:
        shares = " and ".join(f"{share:.2f} of the {number} nearest" for number, share in overlap.shares.items())
        print(f"{name}: {shares} documents are those in {overlap.previous} ({overlap.num_documents} documents sampled)")
    if args.verify:
        result = measure_recall(store, report.collection, args.vectors, queries, dataset)
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
