"""Evaluate a model on a dataset split over the full catalogue, or on a BEIR collection.

    bigdssm evaluate --model MODEL --data DATASET --split test [--baselines] [--compare OTHER] [--by …] [--out JSON]
    bigdssm evaluate --beir DIR --split test [--model MODEL] [--bm25] [--pretrained FOLDER] [--save-run FILE]
    bigdssm evaluate --run FILE --qrels FILE

The first form excludes seen documents according to the model's data.exclude_seen; documents with the same score as the
positive count half in its rank. If items have times (make_shards --items-time-column), a query ranks those that are
available at its time. OTHER is another model folder, or the JSON file of an earlier evaluation. The rank of
each query's document is saved as .npy next to the --out file. The second form reads a BEIR folder (corpus.jsonl,
queries.jsonl, qrels/SPLIT.tsv) and compares the model with BM25, an unchanged pretrained text encoder, and TREC runs
(--compare). The third form evaluates a single TREC run. The metrics of runs equal those of trec_eval.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

from rich.console import Console

from bigdssm import distributed
from bigdssm.checkpoints.model_folder import ModelFolder, load_model_folder
from bigdssm.cli import OVERWRITE, RERANKING, check_file_to_write, command, option, option_group, refuse_options
from bigdssm.commands._ranks import DEVICE, RANKS, process_group, run_on_ranks
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.rows import EventRules
from bigdssm.errors import ConfigError
from bigdssm.evaluation.collection import (
    bm25_run,
    measure_run,
    model_run,
    model_vectors,
    pretrained_run,
    reranked_run,
    vectors_run,
)
from bigdssm.evaluation.comparison import (
    RUN_METRICS,
    System,
    as_json,
    baseline_systems,
    differences,
    differences_as_json,
    distinct_names,
    load_system,
    model_system,
    options_of,
    save_comparison,
    slice_tables,
    table,
)
from bigdssm.evaluation.evaluate import TOP, Reranking
from bigdssm.evaluation.slices import NUMBERS, read_slices
from bigdssm.evaluation.trec import Run, read_qrels, read_run, run_metrics, write_qrels
from bigdssm.models.precision import PRECISION_HELP, PRECISIONS
from bigdssm.retrieval.embed import check_width, encode_in, truncate_vectors
from bigdssm.retrieval.reranking import Reranker, Texts, check_reranking
from bigdssm.sources.beir import Collection, read_collection
from bigdssm.utils.atomic import write_json
from bigdssm.utils.device import find_device
from bigdssm.utils.log import ProgressBar

BEIR_OPTIONS = (
    "--widths", "--bm25", "--pretrained", "--max-tokens", "--filter-known", "--save-run", "--save-qrels",
)  # fmt: skip


@command(
    option("--model", type=Path, help="model folder"),
    option("--data", help="dataset folder or URL"),
    option("--split", default="test", help="split of the dataset or collection (default: %(default)s)"),
    option("--baselines", action="store_true", help="also evaluate popularity and chains of the last items"),
    option(
        "--compare",
        type=Path,
        metavar="OTHER",
        nargs="+",
        default=[],
        help="model folders, JSON files of earlier evaluations, or (with --beir) TREC runs (default: none)",
    ),
    option(
        "--by",
        nargs="*",
        metavar="SLICES",
        help="also report every metric by features, such as country, or conditions, such as 'item_age < 3', and the "
        f"coverage of the top 10 (without a value: {', '.join(NUMBERS)})",
    ),
    option("--out", type=Path, metavar="JSON", help="file for the metrics (default: printed only)"),
    RERANKING,
    option("--precision", choices=PRECISIONS, default="fp32", help=PRECISION_HELP),
    DEVICE,
    RANKS,
    option_group(
        "retrieval collection",
        option("--beir", type=Path, metavar="DIR", help="folder in BEIR layout"),
        option(
            "--widths",
            type=int,
            nargs="+",
            default=[],
            help="also evaluate vectors truncated to these widths, of --model on --beir (default: none)",
        ),
        option("--bm25", action="store_true", help="also evaluate BM25"),
        option(
            "--pretrained", type=Path, metavar="FOLDER", help="also evaluate an unchanged Hugging Face text encoder"
        ),
        option(
            "--max-tokens",
            type=int,
            default=256,
            help="maximum number of tokens per text, with --pretrained (default: %(default)s)",
        ),
        option(
            "--filter-known",
            action="store_true",
            help="exclude from each ranking the documents that are relevant to the query in other splits",
        ),
        option("--run", type=Path, metavar="FILE", help="TREC run to evaluate"),
        option("--qrels", type=Path, metavar="FILE", help="TREC qrels, with --run and without --beir"),
        option(
            "--save-run",
            type=Path,
            metavar="FILE",
            help="write the ranking of the first row of the table (re-ranked with --rerank) as a TREC run",
        ),
        option("--save-qrels", type=Path, metavar="FILE", help="write the qrels in TREC format"),
    ),
    OVERWRITE,
)
def main(args: argparse.Namespace) -> int | None:
    """Run the command line."""
    written = {"--out": args.out, "--save-run": args.save_run, "--save-qrels": args.save_qrels}
    for name, path in written.items():
        check_file_to_write(name, path, "evaluate", overwrite=args.overwrite)
    if args.beir is not None:
        ignored = ["--data", "--baselines", "--by", "--qrels", "--ranks"]
        refuse_options(args, ignored, "with --beir, which has its own documents and qrels")
        for option, needed in (("--widths", "model"), ("--max-tokens", "pretrained"), ("--rerank", "model")):
            if getattr(args, needed) is None:
                refuse_options(args, [option], f"without --{needed}")
        check_reranking(args.rerank, args.reranker)
        _evaluate_collection(args)
    elif args.run is not None and args.qrels is not None:
        of_split = ["--model", "--data", "--split", "--baselines", "--by", "--compare", "--precision"]
        of_split += ["--rerank", "--reranker", "--device", "--ranks"]
        ignored = [*of_split, *BEIR_OPTIONS]
        refuse_options(args, ignored, "with --run and --qrels, which evaluate a single run")
        qrels = read_qrels(args.qrels)
        started = perf_counter()
        metrics = run_metrics(qrels, read_run(args.run))
        _print_and_save(args, [System(args.run.stem, metrics, perf_counter() - started)], len(qrels))
    elif args.model is not None:
        refuse_options(args, ["--run"], "without --qrels")
        refuse_options(args, ["--qrels"], "without --run")
        refuse_options(args, BEIR_OPTIONS, "without --beir")
        if args.data is None:
            raise ConfigError(f"--model {args.model}: needs --data or --beir")
        if (code := run_on_ranks("evaluate", args)) is not None:
            return code
        with process_group(args.device):
            _evaluate_split(args)
    else:
        raise ConfigError("needs --model and --data, or --beir, or --run and --qrels; see --help")
    return None


def _evaluate_split(args: argparse.Namespace) -> None:
    check_reranking(args.rerank, args.reranker)
    name, *other_names = distinct_names([args.model, *args.compare])
    device = find_device(args.device)
    folder = load_model_folder(args.model, device)
    dataset = Dataset.open(args.data).with_rules(EventRules.of(folder.config.data))
    options = {"dataset": dataset, "split": args.split, "exclude_seen": folder.config.data.exclude_seen}
    slices = [] if args.by is None else read_slices(dataset, args.split, args.by)
    coverage = args.by is not None
    is_main = distributed.is_main()
    others: list[System] = []
    if args.baselines and is_main:
        others = baseline_systems(**options, by_day=True, coverage=coverage)
    encode_in(folder.model, args.precision)
    reranking = None
    if args.rerank:
        reranking = Reranking(Reranker(args.reranker, Texts.of(folder.view(dataset))), args.rerank)
    model = _evaluate_model(name, folder, coverage=coverage, **options)
    if reranking is not None:
        others.insert(0, model)
        model = _evaluate_model(f"{name}, top {args.rerank} re-ranked", folder, rerank=reranking, **options)
    for other_name, path in zip(other_names, args.compare, strict=True):
        if path.is_dir():
            other = load_model_folder(path, device)
            encode_in(other.model, args.precision)
            others.append(_evaluate_model(other_name, other, coverage=coverage, **options))
        elif is_main:
            others.append(load_system(path, **options))
    if not is_main:
        return
    pairs = [(model, other) for other in others]

    console = Console()
    console.print(table([model, *others], f"{args.split}, {dataset.num_queries(args.split)} queries"))
    for line in differences(pairs):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    unit = "distinct queries" if dataset.sequences is None else "users"
    for slice_table in slice_tables([model, *others], slices, unit):
        console.print(slice_table)
    notes = options_of(others)
    coverages = [f"{system.name} {system.coverage:.3f}" for system in (model, *others) if system.coverage is not None]
    if coverages:
        notes.append(f"coverage of the top {TOP}: {', '.join(coverages)}")
    if dataset.header.dated:
        notes.append("a query ranks the items whose first version or event is not later than its time")
    if withdrawn := len(dataset.catalogue.withdrawn):
        notes.append(f"{withdrawn} withdrawn items are no candidates, at any time: a withdrawal has no time")
    for note in notes:
        console.print(note, highlight=False, markup=False, soft_wrap=True)
    if args.out is not None:
        save_comparison(args.out, [model, *others], pairs, slices=slices, **options)


def _evaluate_model(name: str, folder: ModelFolder, **options: Any) -> System:
    with ProgressBar() as progress:
        return model_system(name, folder, progress=progress, **options)


def _evaluate_collection(args: argparse.Namespace) -> None:
    collection = read_collection(args.beir, args.split)
    filter_known = args.filter_known
    systems: list[System] = []
    paths = [path for path in (args.model, args.run, *args.compare) if path is not None]
    names = dict(zip(paths, distinct_names(paths), strict=True))

    def add(name: str, compute: Callable[[], Run], spent_s: float = 0.0) -> None:
        file = None if systems else args.save_run  # the ranking of the first row of the table
        systems.append(measure_run(name, compute, collection, spent_s, file))

    with ProgressBar() as progress:
        if args.model is not None:
            name, started = names[args.model], perf_counter()
            folder = load_model_folder(args.model, find_device(args.device))
            for width in args.widths:
                check_width("--widths", width, folder.config.model.dim)
            encode_in(folder.model, args.precision)
            queries, documents = model_vectors(folder.model, folder.schema, folder.tokenizer_dir, collection, progress)
            encoding_s = perf_counter() - started  # counts for every system that uses these vectors
            search = partial(vectors_run, collection, queries, documents, filter_known)
            if args.rerank:
                rerank = partial(reranked_run, folder=folder, cross_encoder=args.reranker, top=args.rerank)
                add(f"{name}, top {args.rerank} re-ranked", lambda: rerank(collection, search()), encoding_s)
            add(name, search, encoding_s)
            normalize = folder.config.model.score == "cosine"
            for width in dict.fromkeys(args.widths):
                truncate = partial(truncate_vectors, width=width, normalize=normalize, has_beta=folder.model.has_beta)
                add(
                    f"{name} truncated to {width}",
                    partial(vectors_run, collection, truncate(queries), truncate(documents), filter_known),
                    encoding_s,
                )
        if args.run is not None:
            add(names[args.run], partial(read_run, args.run))
        if args.bm25:
            add("BM25", partial(bm25_run, collection, filter_known=filter_known))
        if args.pretrained is not None:
            encode_and_search = partial(
                pretrained_run, args.pretrained, collection,
                max_tokens=args.max_tokens, precision=args.precision, filter_known=filter_known, progress=progress,
                device=find_device(args.device),
            )  # fmt: skip
            add(f"{args.pretrained.name}, unchanged", encode_and_search)
        for path in args.compare:
            if path.is_dir():
                add(names[path], partial(_load_and_run, path, collection, args, progress))
            else:
                add(names[path], partial(read_run, path))
    if not systems:
        raise ConfigError("--beir needs a system to evaluate: --model, --run, --bm25, --pretrained or --compare")
    if args.save_qrels is not None:
        write_qrels(args.save_qrels, collection.qrels)
    _print_and_save(args, systems, len(collection.qrels))


def _load_and_run(path: Path, collection: Collection, args: argparse.Namespace, progress: ProgressBar) -> Run:
    folder = load_model_folder(path, find_device(args.device))
    encode_in(folder.model, args.precision)
    return model_run(
        folder.model, folder.schema, folder.tokenizer_dir, collection,
        filter_known=args.filter_known, progress=progress,
    )  # fmt: skip


def _print_and_save(args: argparse.Namespace, systems: list[System], num_queries: int) -> None:
    pairs = [(systems[0], other) for other in systems[1:]]
    console = Console()
    title = f"{num_queries} queries" if args.beir is None else f"{args.split}, {num_queries} queries"
    console.print(table(systems, title, RUN_METRICS))
    for line in differences(pairs, RUN_METRICS):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if args.out is not None:
        split = {} if args.beir is None else {"split": args.split}
        content = {**split, "queries": num_queries, "systems": as_json(systems)}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.out, {**content, "differences": differences_as_json(pairs, RUN_METRICS)})


if __name__ == "__main__":
    raise SystemExit(main())
