"""Remove users and items from a dataset, and from everything that was made from it.

    bigdssm forget --data DATASET --user u17 --item i3 --run RUN --vectors VECTORS --index INDEX --out report.json
    bigdssm forget --data DATASET --item i3 --vectors VECTORS --store postgresql://HOST/DATABASE
    bigdssm forget --data DATASET --users-file ids.txt --run RUN --dry-run

Rows become empty in place: orders, numbers and fingerprints stay, so training, resumes and search go on. A forgotten
user is an unknown user, a forgotten item is no answer; events of other users with it stay. Give every folder that was
made from the dataset: stage folders lose the checkpoints that may contain the ids, and indexes are built again.
Collections of stores hold documents, so that only items leave them: by default those collections that were published
from this dataset, in any of its states; the report names the others. Stop trainings first. If the command was killed,
start it again. The report has the checksum of every changed file and collection, and what cannot be reached; it has no
ids.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np

from bigdssm.checkpoints.model_folder import CONFIG_FILE
from bigdssm.checkpoints.removal import forget_in_model, forget_in_stage
from bigdssm.cli import OVERWRITE, check_file_to_write, command, option
from bigdssm.cluster.run_folder import is_locked
from bigdssm.config import StageName, load_written_config
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.remote import FileCache
from bigdssm.dataset.stamps import read_stamps
from bigdssm.errors import BigDSSMError, CheckpointError, ConfigError
from bigdssm.ingest.forgetting import Forgotten, forget
from bigdssm.retrieval.forgetting import (
    check_index,
    forget_in_collection,
    forget_in_index,
    forget_in_negatives,
    forget_in_teacher,
    forget_in_vectors,
    row_ids,
)
from bigdssm.stores.base import Store, open_store
from bigdssm.training.start import open_segment
from bigdssm.utils.atomic import Changes, write_json

NOT_REACHED = (
    "source tables: a dataset that is built again from them has the rows again",
    "traces in the weights of a trained model, except the rows of its tables; only a new training excludes them",
    "feature values, other than the id, of users without events: a vocabulary has them without their users",
    "the tokenizer, which has parts of frequent texts; counts, means and other figures of the whole dataset",
    "fingerprints, which are hashes of the dataset before; they confirm a guess to whoever has all the rest of it",
    "output for other programs: exports, recommendations, search results, TREC runs, BEIR collections, reports, logs",
    "vector stores that were not given (--store); backups, snapshots, copies and uploads",
    "blocks of the disk that are free now, but not overwritten",
)


@command(
    option("--data", required=True, help="dataset folder"),
    option("--user", action="append", default=[], metavar="ID", help="user to remove; repeatable"),
    option("--users-file", type=Path, metavar="FILE", help="users to remove, one id per line"),
    option("--item", action="append", default=[], metavar="ID", help="item to remove; repeatable"),
    option("--items-file", type=Path, metavar="FILE", help="items to remove, one id per line"),
    *(
        option(name, type=Path, nargs="+", action="extend", default=[], metavar=metavar, help=f"{what}; one or more")
        for name, metavar, what in (
            ("--run", "RUN", "run folder, or the folder of a stage"),
            ("--model", "MODEL", "model folder outside of these runs"),
            ("--vectors", "VECTORS", "folder written by bigdssm embed"),
            ("--index", "INDEX", "folder written by bigdssm build_index; needs its --vectors"),
            ("--negatives", "FILE", "file of hard negatives or candidates"),
            ("--teacher", "FOLDER", "folder written by bigdssm embed_teacher"),
            ("--log", "FOLDER", "folder written by bigdssm serve --log-requests"),
        )
    ),
    option("--store", nargs="+", action="extend", default=[], metavar="URL", help="vector stores"),
    option(
        "--collection",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="collections of these stores (default: all that were published from this dataset)",
    ),
    option(
        "--cache",
        nargs="?",
        const="",
        metavar="DIR",
        help="also empty the cache of datasets at URLs (default: the user's), whose entries name neither",
    ),
    option("--dry-run", action="store_true", help="list what would change, and change nothing"),
    option("--out", type=Path, metavar="FILE", help="file for the report (JSON)"),
    OVERWRITE,
)
def main(args: argparse.Namespace) -> None:
    """Run the command line."""
    check_file_to_write("--out", args.out, "forget", overwrite=args.overwrite)
    users, items = _ids(args.user, args.users_file), _ids(args.item, args.items_file)
    if not users and not items:
        raise ConfigError("no ids; give --user, --item, --users-file or --items-file")
    stages = [folder for run in args.run for folder in _stages(run)]
    for folder in args.log:
        if not folder.is_dir():
            raise ConfigError(f"--log {folder}: not a folder; bigdssm serve --log-requests writes one")
    indexes = [(folder, check_index(folder, args.vectors)) for folder in args.index]
    collections = _collections(args.store, args.collection)
    changes, stored, left = Changes(dry_run=args.dry_run), list[dict[str, Any]](), list[str]()
    with forget(args.data, users, items, changes) as forgotten:  # replaces the dataset's files at the end
        dataset = Dataset.open(args.data)
        rows = {
            view.rows_fingerprint: row_ids(view, dataset.dir, forgotten.train_rows) for view in _views(dataset, stages)
        }
        for folder in stages:
            forget_in_stage(folder, forgotten.codes, changes)
        for folder in args.model:
            forget_in_model(folder, forgotten.codes, changes)
        for folder in args.vectors:
            forget_in_vectors(folder, forgotten.documents, dataset, changes)
        for folder, vectors in indexes:
            forget_in_index(folder, vectors, forgotten.documents, dataset, changes)
        own = {dataset.fingerprint, *read_stamps(dataset.dir)}  # states of this folder
        for url, store, name in collections:
            source = store.collections()[name].dataset
            if not args.collection and source not in own:
                left.append(
                    f"collection {name} at {url}: published from another dataset, {source[:12]}; give it as "
                    "--collection if it has these items"
                )
                continue
            record, of_collection = forget_in_collection(store, name, users, items, dry_run=args.dry_run)
            stored.append({"store": url, **record})
            left += [line for line in of_collection if line not in left]
        for path in [
            *args.negatives,
            *(path for folder in stages for path in sorted(folder.glob("mined_negatives*.npy"))),
        ]:
            forget_in_negatives(path, rows, forgotten.documents, changes)
        for folder in args.teacher:
            forget_in_teacher(folder, rows, forgotten.documents, changes)
        if args.log:
            from bigdssm.serving.request_log import forget_in_log  # needs the extra serve

            catalogue = dataset.catalogue
            titles = sorted({*catalogue.titles(forgotten.documents)})
            others = np.setdiff1d(catalogue.rows_by_key(titles), [*forgotten.documents, -1])
            titles = sorted({*titles} - {*catalogue.keys(others)})  # a request with such a text means the other item
            for folder in args.log:
                open_files = forget_in_log(folder, users, items, changes, titles, dataset)
                left += [
                    f"{path}, which a server writes; start the command again in ten minutes" for path in open_files
                ]
        in_use = [] if args.cache is None else _empty_cache(args.cache, changes)
    left += [f"{path}, which another process uses; end it, and start the command again" for path in in_use]
    report = _report(args, forgotten, (users, items), changes, stored, left)
    if args.out is not None:
        write_json(args.out, report)
    _print(report)


def _ids(given: Sequence[str], file: Path | None) -> list[str]:
    """Return the distinct ids of options and a file."""
    lines = [] if file is None else file.read_text(encoding="utf-8").splitlines()
    return sorted({text.strip() for text in [*given, *lines]} - {""})


def _stages(run: Path) -> list[Path]:
    """Return the stage folders in a run folder, or `run` itself. Raises ConfigError: none; CheckpointError: in use."""
    folders = [
        folder for folder in (run, *(run / name for name in get_args(StageName))) if (folder / CONFIG_FILE).is_file()
    ]
    if not folders:
        raise ConfigError(f"--run {run}: neither a run folder nor a stage folder; it has no {CONFIG_FILE}")
    for folder in folders:
        if is_locked(folder):
            raise CheckpointError(f"{folder} is in use by a training; stop it (bigdssm stop_run {run})")
    return folders


def _collections(urls: Sequence[str], names: Sequence[str]) -> list[tuple[str, Store, str]]:
    """Return (URL, store, name) of the given collections, or of all. Raises ConfigError: no store has one of them."""
    collections = [(url, store, name) for url in urls for store in [open_store(url)] for name in store.collections()]
    if missing := sorted(set(names) - {name for *_, name in collections}):
        raise ConfigError(f"--collection {missing[0]}: none of the stores (--store) has it")
    return [entry for entry in collections if not names or entry[2] in names]


def _views(dataset: Dataset, stages: Sequence[Path]) -> Iterator[Dataset]:
    """Yield the datasets whose rows files of negatives may have: all of it, and those of the stages."""
    yield dataset
    for folder in stages:
        try:
            view = open_segment(load_written_config(folder / CONFIG_FILE), cast(StageName, folder.name))
        except BigDSSMError:  # a dataset that was moved or removed: its files are removed
            continue
        if not view.rules.row_keys:  # else the rows of emptied sequences are unknown
            yield view


def _empty_cache(folder: str, changes: Changes) -> list[Path]:
    """Empty a cache, and return the entries in use."""
    cache = FileCache.from_config()
    if folder:
        cache = FileCache(Path(folder), cache.max_bytes)
    before = cache.entries()
    in_use = [] if changes.dry_run else cache.clear()
    changes.files += [{"file": str(path), "action": "removed"} for path in before if path not in in_use]
    return in_use


def _report(
    args: argparse.Namespace, forgotten: Forgotten, ids: tuple[list[str], list[str]], changes: Changes,
    stored: list[dict[str, Any]], left: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
    (users, items), shared = ids, forgotten.shared
    not_reached = [f"{args.data}: an id is a value of {name} that other rows have, too" for name in shared]
    return {
        "data": str(args.data),
        "dry_run": args.dry_run,
        "users": {"given": len(users), "found": forgotten.users},
        "items": {"given": len(items), "found": forgotten.items},
        "emptied_documents": len(forgotten.documents),
        "emptied_train_rows": int(sum(len(rows) for rows in forgotten.train_rows.values())),
        "files": changes.files,
        "collections": stored,
        "not_reached": [*not_reached, *left, *NOT_REACHED],
    }


def _print(report: dict[str, Any]) -> None:
    for kind in ("users", "items"):
        if report[kind]["given"]:
            print(f"{report[kind]['found']} of {report[kind]['given']} {kind} found in {report['data']}")
    would = "would be " if report["dry_run"] else ""
    for entry in report["files"]:
        print(f"  {would}{entry['action']}: {entry['file']}")
    for entry in report["collections"]:
        documents = f"{entry['found']} of {entry['documents']['before']} documents"
        print(f"  {would}removed: {documents} of collection {entry['collection']} at {entry['store']}")
    print("not reached:")
    for line in report["not_reached"]:
        print(f"  {line}")


if __name__ == "__main__":
    raise SystemExit(main())
