"""Compare training speed with the cached loss of sentence-transformers, and measure the memory of growing batches.

    python tools/bench/bench_train.py speed --pairs ../shared/data/debian_packages/packages.jsonl.xz
    python tools/bench/bench_train.py speed --movielens datasets/source/ml-100k
    python tools/bench/bench_train.py graphs --pairs …    # savings by retained graphs (keep_graph_tokens)
    python tools/bench/bench_train.py memory --pairs …    # peak over base from 256 to 8,192 rows per rank

The pairs are synopsis → description of packages or, for MovieLens-100K, the titles of the last five films → the next
title, with repeated documents. `speed` needs sentence-transformers (`pip install bigdssm[bench]`). Both sides train one
shared encoder with mean pooling from the same weights on the same batches, with the same AdamW and clipping, one thread
per rank; `speed` first verifies that both use the same tokens and compute the same loss. The peer's mini-batch is the
fastest of 16 to 256 rows and of 1,024 to 8,192 tokens. The variants alternate; ratios are medians over the turns.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import json
import lzma
import os
import socket
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import transformers
import yaml
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from bigdssm.cli import at_least
from bigdssm.config import Config, EngineConfig, StageConfig, load_config
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.rows import Rows
from bigdssm.ingest.job import IngestTarget
from bigdssm.ingest.pairs import PairTables, make_pairs
from bigdssm.loader.batch import Batch, Collator
from bigdssm.loader.step_plan import TokenBudget, plan_step
from bigdssm.loader.stream import PairStream
from bigdssm.losses import fps_loss
from bigdssm.losses.declarations import NoCorrection
from bigdssm.models import Encoded, new_model
from bigdssm.models.encoders.pretrained import DROPOUTS
from bigdssm.training.optimizers import AdamW
from bigdssm.utils import timing
from bigdssm.utils.hashing import hash64


class MiniBatch(NamedTuple):
    """The peer's unit of encoding: rows, or tokens without padding."""

    rows: int = 64
    tokens: int | None = None

    def __str__(self) -> str:
        return f"{self.rows} rows" if self.tokens is None else f"{self.tokens} tokens"


MINI_BATCHES = (
    *(MiniBatch(rows) for rows in (16, 32, 64, 128, 256)),
    *(MiniBatch(tokens=tokens) for tokens in (1024, 2048, 4096, 8192)),
)
FAMILIES = ("bert", "modernbert")
SPECIAL_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")
SCALE = 20.0  # alpha, fixed on both sides
HISTORY = 5  # titles in a query
OPTIMIZER = AdamW(lr=1e-4, weight_decay=0.01)
LANES = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "(default: %(default)s)"
    parser.add_argument("task", choices=sorted(TASKS), help="measurement")
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--pairs", type=Path, help="JSONL (.xz) with synopsis and description")
    data.add_argument("--movielens", type=Path, help="folder with ml-100k.inter and .item, from tools.public_data")
    parser.add_argument("--ranks", type=at_least(1), default=1, help=f"number of ranks {default}")
    parser.add_argument("--rows", type=at_least(1), default=2048, help=f"global batch size {default}")
    parser.add_argument("--max-tokens", type=at_least(3), default=64, help=f"maximum length of texts {default}")
    encoder = parser.add_mutually_exclusive_group()
    encoder.add_argument("--encoder", type=Path, help="folder of a pretrained encoder with its tokenizer")
    encoder.add_argument(
        "--family", choices=FAMILIES, default="bert", help=f"of an encoder with random weights {default}"
    )
    parser.add_argument("--layers", type=at_least(1), default=2, help=f"layers of the encoder {default}")
    parser.add_argument("--hidden", type=at_least(1), default=128, help=f"width of the encoder {default}")
    parser.add_argument("--chunk-tokens", type=at_least(0), default=4096, help=f"engine.chunk_tokens {default}")
    parser.add_argument(
        "--keep-graph-tokens",
        type=at_least(0),
        default=10**9,
        help="engine.keep_graph_tokens of `speed` (default: all)",
    )
    parser.add_argument("--zero-stage", type=int, choices=range(4), default=1, help=f"ZeRO stage {default}")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help=f"precision {default}")
    parser.add_argument("--turns", type=at_least(1), default=5, help=f"repetitions {default}")
    parser.add_argument("--steps", type=at_least(1), default=2, help=f"steps per turn {default}")
    args = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", DS_ACCELERATOR="cpu")
    with tempfile.TemporaryDirectory() as folder:
        if args.encoder:
            args.hidden = json.loads((args.encoder / "config.json").read_text())["hidden_size"]
        texts = debian_texts(args.pairs) if args.pairs else movielens_texts(args.movielens)
        prepare(Path(folder), texts, args)
        mp.spawn(_rank, (args, Path(folder), texts), nprocs=args.ranks)


def _rank(rank: int, args: argparse.Namespace, folder: Path, texts: list[tuple[str, str]]) -> None:
    from bigdssm.training.process_group import init_process_group

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(args.ranks))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=(folder / "port").read_text())
    init_process_group()
    for line in TASKS[args.task](args, folder, texts):
        if rank == 0:
            print(line, flush=True)
    dist.destroy_process_group()


# --- training data of both sides ---


def debian_texts(path: Path) -> list[tuple[str, str]]:
    """Return (synopsis, description) of every package."""
    with (lzma.open if path.suffix == ".xz" else open)(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [(row["synopsis"], row["description"]) for row in rows if row["synopsis"] and row["description"]]


def movielens_texts(folder: Path) -> list[tuple[str, str]]:
    """Return (titles of a user's last films, title of the next) for every rating except a user's first."""
    titles, events = {}, defaultdict(list)
    for line in (folder / "ml-100k.item").read_text(encoding="utf-8").splitlines()[1:]:
        number, title, *_ = line.split("\t")
        titles[number] = title
    for line in (folder / "ml-100k.inter").read_text(encoding="utf-8").splitlines()[1:]:
        user, item, _, when = line.split("\t")
        events[user].append((float(when), titles[item]))
    pairs = []
    for user in sorted(events):
        seen = [title for _, title in sorted(events[user], key=lambda event: event[0])]
        pairs += [("; ".join(seen[max(0, end - HISTORY) : end]), seen[end]) for end in range(1, len(seen))]
    return pairs


def prepare(folder: Path, texts: list[tuple[str, str]], args: argparse.Namespace) -> None:
    """Write the dataset, the config and the initial encoder with its tokenizer into `folder`."""
    with (folder / "pairs.jsonl").open("w", encoding="utf-8") as file:
        for number, (query, doc) in enumerate(texts):
            file.write(json.dumps({"number": str(number), "query": query, "doc": doc}) + "\n")
    tower = {"mlp": [], "text": {"init": str(folder / "encoder"), "pooling": "mean"}}
    text = {"type": "text", "max_tokens": args.max_tokens}
    content = {
        "run": {"dir": str(folder / "run")},
        "data": {
            "dir": str(folder / "dataset"), "query": {"query": text}, "doc": {"doc": text}, "lanes": LANES,
            "tokenizer": {"path": str(args.encoder)} if args.encoder else {"vocab_size": 8000},
        },
        "model": {
            "dim": args.hidden, "score": "cosine", "alpha_init": SCALE, "alpha_learned": False, "beta": "none",
            "share_text": True,
            "query": {**tower, "residual": "query"}, "doc": {**tower, "residual": "doc"},
        },
        "pretrain": {"rows_global": args.rows},
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    config = load_config(folder / "config.yaml")
    started = time.process_time()
    tables = PairTables(files=(folder / "pairs.jsonl",), query_id_column="number", split="train")
    report = make_pairs(config.data, tables, IngestTarget(folder / "dataset"))
    print(
        f"{report.rows['train']:,} pairs, {report.num_docs:,} documents; made into shards, tokenizer trained and texts "
        f"tokenized once, in {time.process_time() - started:.0f} CPU-seconds"
    )
    write_encoder(folder / "encoder", Dataset.open(folder / "dataset"), args)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        (folder / "port").write_text(str(probe.getsockname()[1]))


def write_encoder(folder: Path, dataset: Dataset, args: argparse.Namespace) -> None:
    """Write the encoder that both sides start from, without dropout, and the dataset's tokenizer."""
    if args.encoder:
        model = AutoModel.from_pretrained(args.encoder, use_safetensors=True, trust_remote_code=False)
        for key in DROPOUTS:
            if hasattr(model.config, key):
                setattr(model.config, key, 0.0)
    else:
        torch.manual_seed(0)
        feedforward = {"bert": 4 * args.hidden, "modernbert": 3 * args.hidden // 2}[args.family]  # of BERT, ModernBERT
        special = {} if args.family == "bert" else dict.fromkeys(SPECIAL_TOKENS, 0)
        config = AutoConfig.for_model(
            args.family, vocab_size=dataset.vocab_size, hidden_size=args.hidden, num_hidden_layers=args.layers,
            num_attention_heads=max(1, args.hidden // 64), intermediate_size=feedforward,
            max_position_embeddings=args.max_tokens, **dict.fromkeys(DROPOUTS, 0.0), **special,
        )  # fmt: skip
        model = AutoModel.from_config(config, trust_remote_code=False)
    model.save_pretrained(folder)
    assert dataset.tokenizer_dir is not None
    for file in dataset.tokenizer_dir.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())


class Batches:
    """Batches of this rank as rows and as tensors; the first `num` are kept in memory."""

    def __init__(self, folder: Path, rows_global: int, num: int) -> None:
        self.dataset = Dataset.open(folder / "dataset")
        self._collator = Collator(self.dataset.schema, self.dataset.catalogue)
        self._stream = PairStream(
            self.dataset, rows_global=rows_global, lanes=LANES, seed=0, rank=dist.get_rank(),
            world_size=dist.get_world_size(), num_workers=0,
        )  # fmt: skip
        self.rows = list(itertools.islice(self._stream, num))
        self.ready = [self._collator(rows) for rows in self.rows]

    def fresh(self) -> Iterator[Batch]:
        """Read, decode and collate further batches."""
        for rows in self._stream:
            yield self._collator(rows)


# --- this project's side ---


class Ours:
    """The training step of bigdssm.training."""

    def __init__(self, config: Config, dataset: Dataset, engine: EngineConfig, rows_global: int) -> None:
        from bigdssm.training.engine import Engine
        from bigdssm.training.objective import Objective

        self.model = new_model(config.model, dataset.schema, dataset.vocab_size).train()
        self.engine = Engine(self.model, engine, OPTIMIZER, rows_global // dist.get_world_size())
        self.objective = Objective(StageConfig(sampling=NoCorrection()), config.model, None, rows_global)
        self.budget = TokenBudget.of(engine, self.model.accepts_packed(training=True))

    def step(self, batch: Batch, keep_graph_tokens: int | None = None) -> float:
        from bigdssm.training.step import train_step

        budget = self.budget if keep_graph_tokens is None else replace(self.budget, retained_tokens=keep_graph_tokens)
        return train_step(self.engine, batch, plan_step(batch, budget), self.objective, 1.0).loss

    def plain_loss(self, batch: Batch) -> float:
        """Return the loss with one column per row, duplicates being negatives, as the peer's."""
        with torch.no_grad():
            encoded: Encoded = self.engine.forward(batch.query, batch.doc)
            assert encoded.U is not None and encoded.W is not None
            return float(fps_loss(encoded.U, encoded.W[batch.positive], alpha=SCALE).loss)


# --- the peer's side ---


class Peer:
    """CachedMultipleNegativesRankingLoss of sentence-transformers in a plain loop, without its trainer's overhead."""

    def __init__(self, folder: Path, dataset: Dataset, args: argparse.Namespace) -> None:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
        from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

        from bigdssm.training.optimizers import parameter_groups

        transformer = Transformer(str(folder / "encoder"), max_seq_length=args.max_tokens)
        bert = transformer.auto_model if hasattr(transformer, "auto_model") else transformer.model
        bert.pooler = None  # neither side uses it
        if args.precision == "bf16":
            bert.set_attn_implementation("eager")  # the faster one here, as on our side
        self.model = SentenceTransformer(modules=[transformer, Pooling(args.hidden, "mean")], device="cpu").train()
        self.optimizer = OPTIMIZER.build(parameter_groups(self.model, OPTIMIZER))
        self.loss = CachedMultipleNegativesRankingLoss(
            self.model, scale=SCALE, gather_across_devices=args.ranks > 1, mini_batch_size=64
        )
        if args.ranks > 1:
            self.loss.model = nn.parallel.DistributedDataParallel(self.model, broadcast_buffers=False)
        if args.precision == "bf16":
            self.model.forward = torch.autocast("cpu", torch.bfloat16)(self.model.forward)

    def step(self, features: list[dict[str, Tensor]], mini_batch: MiniBatch) -> float:
        self.loss.mini_batch_size, self.loss.mini_batch_num_tokens = mini_batch
        loss = self.loss(features, None)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), OPTIMIZER.gradient_clipping)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())

    def plain_loss(self, features: list[dict[str, Tensor]]) -> float:
        with torch.no_grad():
            return float(self.loss(features, None))

    def tokenized(self, texts: Sequence[tuple[str, str]]) -> list[dict[str, Tensor]]:
        """Tokenize queries and documents with the peer's collator."""
        return [self.model.preprocess(list(side)) for side in zip(*texts, strict=True)]

    def features(self, batch: Batch) -> list[dict[str, Tensor]]:
        """Return the tokens of a batch, one document per row including duplicates."""
        sides = (batch.query["query"], batch.doc["doc"][batch.positive])
        return [{"input_ids": side.clamp(min=0), "attention_mask": (side >= 0).long()} for side in sides]


# --- the tasks ---


def speed(args: argparse.Namespace, folder: Path, texts: list[tuple[str, str]]) -> Iterator[str]:
    """Yield the verification of the comparison, then pairs/s of both sides and their ratio."""
    config = load_config(folder / "config.yaml")
    batches = Batches(folder, args.rows, args.steps)
    engine = EngineConfig(
        zero_stage=args.zero_stage, precision=args.precision, chunk_tokens=args.chunk_tokens,
        keep_graph_tokens=args.keep_graph_tokens,
    )  # fmt: skip
    ours, peer = Ours(config, batches.dataset, engine, args.rows), Peer(folder, batches.dataset, args)
    number_of = {hash64(str(number)): number for number in range(len(texts))}
    rows_texts = [texts_of(rows, number_of, texts) for rows in batches.rows]
    ready = [peer.features(batch) for batch in batches.ready]
    yield from check_sameness(ours, peer, batches.ready[0], rows_texts[0], ready[0])
    distinct = statistics.mean(len(batch.doc_ids) / len(batch.row_ids) for batch in batches.ready)
    yield f"{args.ranks} rank(s), {args.rows} rows per step, {distinct:.0%} of a rank's documents distinct"
    bert: Any = ours.model.text["shared"].architecture
    shape = f"{bert.num_hidden_layers} layers, width {bert.hidden_size}"
    yield f"{bert.model_type} of {shape}, at most {args.max_tokens} tokens, {args.precision}"

    best, tuning = tuned(peer, ready[0])
    rates = (f"{size}: {args.rows / args.ranks / seconds:.0f}" for size, seconds in tuning.items())
    yield f"peer's mini-batch, pairs per CPU-second: {', '.join(rates)}"
    fresh, more_texts = batches.fresh(), itertools.cycle(rows_texts)
    variants: dict[str, Callable[[int], Any]] = {
        "ours": lambda n: ours.step(batches.ready[n]),
        "ours, one chunk's graphs kept": lambda n: ours.step(batches.ready[n], args.chunk_tokens),
        "peer": lambda n: peer.step(ready[n], best),
        "ours, from shards": lambda n: ours.step(next(fresh)),
        "peer, from texts": lambda n: peer.step(peer.tokenized(next(more_texts)), best),
    }
    wall: dict[str, list[float]] = {name: [] for name in variants}
    cpu: dict[str, list[float]] = {name: [] for name in variants}
    peaks = {}
    for name, step in variants.items():  # not timed: trimming the heap causes page faults
        base = reset_peak()
        timed(lambda step=step: [step(n) for n in range(args.steps)])  # type: ignore[misc]
        peaks[name] = status_mb("VmHWM") - base
    flops, spans, products = 0.0, defaultdict[str, float](float), list[float]()
    for _ in range(args.turns):
        for name, step in variants.items():
            timing.pop_seconds()
            seconds, cpu_seconds = timed(lambda step=step: [step(n) for n in range(args.steps)])  # type: ignore[misc]
            wall[name].append(seconds)
            cpu[name].append(cpu_seconds)
            if name == "ours":
                flops += sum(3 * ours.model.flops(*batch.sizes) for batch in batches.ready)
                for span, spent in timing.pop_seconds().items():
                    spans[span] += spent
        products.append(product_flops_per_s(args))
    yield from speed_table(args, best, wall, cpu, peaks)
    yield from time_profile(sum(wall["ours"]), args.turns * args.steps, spans, flops, max(products))


def check_sameness(
    ours: Ours, peer: Peer, batch: Batch, texts: list[tuple[str, str]], ready: list[dict[str, Tensor]]
) -> Iterator[str]:
    """Yield the results of the comparison. Raises AssertionError: different tokens or losses."""
    for mine, theirs in zip(ready, peer.tokenized(texts), strict=True):
        length = theirs["input_ids"].shape[1]
        assert torch.equal(mine["input_ids"][:, :length], theirs["input_ids"]), "the two sides use different tokens"
        assert not mine["attention_mask"][:, length:].any()
    own, other = (mean_over_ranks(side) for side in (ours.plain_loss(batch), peer.plain_loss(ready)))
    assert abs(own - other) < 1e-4, f"the two sides compute different losses: {own} and {other}"
    yield f"same tokens; same loss on the first batch: {own:.6f} and the peer's {other:.6f}"
    yield f"our training loss with masked known positives, which the peer does not support: {ours.step(batch):.6f}"
    peer.step(ready, MiniBatch())


def tuned(peer: Peer, features: list[dict[str, Tensor]]) -> tuple[MiniBatch, dict[MiniBatch, float]]:
    """Return the peer's fastest mini-batch by CPU time, and this rank's CPU seconds per step (best of two)."""
    times: dict[MiniBatch, list[float]] = {size: [] for size in MINI_BATCHES}
    for turn in range(3):
        for size in MINI_BATCHES:
            _, cpu_seconds = timed(lambda size=size: peer.step(features, size))  # type: ignore[misc]
            if turn:
                times[size].append(cpu_seconds)
    best = {size: min(seconds) for size, seconds in times.items()}
    return min(best, key=lambda size: mean_over_ranks(best[size])), best


def speed_table(
    args: argparse.Namespace,
    mini_batch: MiniBatch,
    wall: dict[str, list[float]],
    cpu: dict[str, list[float]],
    peaks: dict[str, float],
) -> Iterator[str]:
    pairs = args.rows * args.steps
    yield f"{'':30s} {'pairs/s':>9s} {'ratio':>6s} {'by CPU time':>11s} {'peak MB':>8s}"
    for name, seconds in wall.items():
        against = "peer, from texts" if "from" in name else "peer"
        ratio, cpu_ratio = (
            statistics.median(b / a for a, b in zip(times[name], times[against], strict=True)) for times in (wall, cpu)
        )
        label = name.replace("peer", f"peer, mini-batch {mini_batch}")
        rate = pairs / statistics.median(seconds)
        yield f"{label:30s} {rate:9.0f} {ratio:6.2f} {cpu_ratio:11.2f} {peaks[name]:8.0f}"


def time_profile(
    elapsed_s: float, steps: int, times: dict[str, float], flops: float, peak_flops: float
) -> Iterator[str]:
    from bigdssm.training.metrics_logger import TimeTable

    yield "time profile of rank 0, ours: " + "\n    ".join(
        TimeTable(elapsed_s, steps, flops, dict(times)).lines(peak_flops)
    )


def graphs(args: argparse.Namespace, folder: Path, texts: list[tuple[str, str]]) -> Iterator[str]:
    """Yield CPU seconds and peak memory of a step with none, some and all of the graphs retained."""
    batches = Batches(folder, args.rows, 1)
    engine = EngineConfig(zero_stage=args.zero_stage, precision=args.precision, chunk_tokens=args.chunk_tokens)
    ours = Ours(load_config(folder / "config.yaml"), batches.dataset, engine, args.rows)
    batch = batches.ready[0]
    tokens = sum(int((side >= 0).sum()) for side in (batch.query["query"], batch.doc["doc"]))
    budgets = {"none": 0, "one chunk": args.chunk_tokens, "half": tokens // 2, "all": 2 * tokens}
    times: dict[str, list[float]] = {name: [] for name in budgets}
    peaks = dict.fromkeys(budgets, 0.0)
    for turn in range(args.turns + 1):
        for name, budget in budgets.items():
            base = reset_peak() if turn == 0 else 0.0
            _, cpu_seconds = timed(lambda budget=budget: ours.step(batch, budget))  # type: ignore[misc]
            if turn == 0:
                peaks[name] = status_mb("VmHWM") - base
            else:
                times[name].append(cpu_seconds)
    yield (
        f"{args.rows // args.ranks} rows per rank, {tokens:,} tokens, chunks of {args.chunk_tokens}, "
        f"ZeRO {args.zero_stage}, {args.precision}"
    )
    for name, values in times.items():
        share = statistics.median(a / b for a, b in zip(values, times["none"], strict=True))
        seconds = statistics.median(values)
        yield f"{name:10s} {seconds:7.2f} CPU-s per step  {share:.0%} of none  peak {peaks[name]:6.0f} MB"


def memory(args: argparse.Namespace, folder: Path, texts: list[tuple[str, str]]) -> Iterator[str]:
    """Yield the peak over base of a step for growing batches, with and without vectors and their gradients."""
    config = load_config(folder / "config.yaml")
    engine = EngineConfig(zero_stage=args.zero_stage, precision=args.precision, chunk_tokens=args.chunk_tokens)
    ours, first = None, 0.0
    yield f"{args.ranks} rank(s), chunks of {args.chunk_tokens} tokens, ZeRO {args.zero_stage}: MB, maximum over ranks"
    for rows in (256, 512, 1024, 2048, 4096, 8192):
        batches = Batches(folder, rows * args.ranks, 2)
        ours = ours or Ours(config, batches.dataset, engine, rows * args.ranks)
        for batch in batches.ready:
            ours.step(batch)  # allocate the optimizer's state and the allocator's pools
        growth = []
        for batch in batches.ready:
            base = reset_peak()
            ours.step(batch)
            growth.append(status_mb("VmHWM") - base)
        vectors = vectors_mb(rows, args.hidden)
        peak = max_over_ranks(max(growth) - vectors)
        first = first or peak
        whole = f"{peak + vectors:7.1f}, vectors {vectors:6.1f}, without them {peak:7.1f}"
        yield f"{rows:6d} rows per rank: {whole}, {peak / first:.2f} ×"


def vectors_mb(rows: int, width: int) -> float:
    """Return the MB of this rank's U and W, W of all ranks, and their gradients, in float32."""
    local, gathered = 2 * rows, dist.get_world_size() * rows
    return 2 * (local + gathered) * width * 4 / 1e6


TASKS: dict[str, Callable[..., Iterator[str]]] = {"speed": speed, "graphs": graphs, "memory": memory}


def texts_of(rows: Rows, number_of: dict[int, int], texts: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return [texts[number_of[query_id]] for query_id in rows.query_ids.tolist()]


def timed(run: Callable[[], Any]) -> tuple[float, float]:
    """Return the seconds until all ranks are done, and this rank's CPU seconds."""
    dist.barrier()
    started, cpu_started = time.perf_counter(), time.process_time()
    run()
    cpu_seconds = time.process_time() - cpu_started
    dist.barrier()
    return time.perf_counter() - started, cpu_seconds


def product_flops_per_s(args: argparse.Namespace) -> float:
    from bigdssm.training.metrics_logger import peak_flops

    return peak_flops(torch.device("cpu"), torch.float32 if args.precision == "fp32" else torch.bfloat16)


def mean_over_ranks(value: float) -> float:
    total = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()


def max_over_ranks(value: float) -> float:
    largest = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return float(largest)


def reset_peak() -> float:
    """Trim the heap, reset the high-water mark of resident memory, and return the resident MB."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return status_mb("VmRSS")


def status_mb(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1e3
    raise KeyError(field)


if __name__ == "__main__":
    main()
