"""The gradient cache under DeepSpeed with the negatives of all ranks: this project, sentence-transformers, GradCache.

    python tools/bench/bench_cached_step.py losses              # three steps of a tiny BERT at each ZeRO stage
    python tools/bench/bench_cached_step.py cost --rows 512     # seconds and memory of a step of a larger BERT

Both sides train one BERT with mean pooling for queries and documents, from the same weights, on the same batches, with
the same SGD, in-batch softmax over the documents of all ranks (cosine, scale 20), on CPU ranks. `in its Trainer`: by
SentenceTransformerTrainer; `around`: the loss is called around the DeepSpeed engine; `inside`: it is in its module.
`gradcache` is the package that tevatron uses, called as its GCTrainer calls it (and, `by chunks`, without no_sync).
`nemo` are the cross-rank negatives of NeMo AutoModel's bi-encoder recipe (pip install --no-deps nemo-automodel), whose
ranks are those of DistributedDataParallel or FSDP: by default without gradients to the documents of other ranks.
The plain loss of either side is the reference: a cached step has to give its curve. Each case has separate processes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SCALE = 20.0
WORDS = 500  # and five special tokens
STAGES = (0, 1, 2, 3)
TRAINER = "cached in its Trainer"
CASES = (
    "plain", TRAINER, "cached around", "cached inside", "gradcache", "gradcache by chunks", "nemo", "nemo, gradients",
    "ours", "ours, chunks",
)  # fmt: skip
Step = Callable[[], float]  # the loss: of this rank, or its mean over ranks


def write_encoder(folder: Path, args: argparse.Namespace) -> None:
    """Write a random BERT and its tokenizer."""
    from transformers import BertConfig, BertModel, BertTokenizer

    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(WORDS))]
    (folder / "vocab.txt").write_text("\n".join(tokens))
    BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    bert = BertModel(
        BertConfig(
            vocab_size=len(tokens), hidden_size=args.hidden, num_hidden_layers=args.layers,
            num_attention_heads=max(2, args.hidden // 64), intermediate_size=4 * args.hidden, pad_token_id=0,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        ),
        add_pooling_layer=False,
    )  # fmt: skip
    with torch.no_grad():
        bert.embeddings.word_embeddings.weight.mul_(100)  # so that texts differ
    bert.save_pretrained(folder)


def local_tokens(args: argparse.Namespace, rank: int, ranks: int) -> tuple[Tensor, Tensor]:
    """Return this rank's queries and documents, int64 [rows, tokens]; a document begins as its query does."""
    generator = torch.Generator().manual_seed(7)
    total, length = args.rows * ranks, args.tokens
    queries = torch.randint(5, WORDS, (total, length), generator=generator)
    rest = torch.randint(5, WORDS, (total, length), generator=generator)
    documents = torch.cat([queries[:, : length // 2], rest[:, length // 2 :]], 1)
    its = slice(rank * args.rows, (rank + 1) * args.rows)
    return queries[its], documents[its]


def deepspeed_config(args: argparse.Namespace) -> dict[str, object]:
    """Return a config that shards small parameters, too."""
    zero = {
        "stage": args.stage, "stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 50_000,
        "reduce_bucket_size": args.bucket,
    }  # fmt: skip
    return {
        "train_micro_batch_size_per_gpu": args.rows, "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False, "zero_optimization": zero, "steps_per_print": 10**9,
    }  # fmt: skip


def peer_step(args: argparse.Namespace, folder: Path, tokens: tuple[Tensor, Tensor]) -> Step:
    """Return a step of sentence-transformers' loss under DeepSpeed."""
    import deepspeed
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import (
        CachedMultipleNegativesRankingLoss,
        MultipleNegativesRankingLoss,
    )
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    modules = [Transformer(str(folder), max_seq_length=args.tokens), Pooling(args.hidden, "mean")]
    model = SentenceTransformer(modules=modules, device="cpu").train()
    if args.case == "plain":
        loss = MultipleNegativesRankingLoss(model, scale=SCALE, gather_across_devices=True)
    else:
        loss = CachedMultipleNegativesRankingLoss(
            model, scale=SCALE, gather_across_devices=True, mini_batch_size=args.chunk
        )
    inside = args.case == "cached inside"
    module = _Inside(loss) if inside else model
    optimizer = torch.optim.SGD(module.parameters(), lr=args.lr)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=deepspeed_config(args))
    if not inside:
        loss.model = engine
    features = [{"input_ids": side, "attention_mask": torch.ones_like(side)} for side in tokens]

    def step() -> float:
        value = engine(features) if inside else loss(features, None)
        engine.backward(value)
        engine.step()
        return float(value.detach())

    return step


class Collator:
    """Collates rows of token ids, as the Trainer's collator collates texts."""

    valid_label_columns: Sequence[str] = ()

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        """Return ids and masks of both sides."""
        sides = {side: torch.tensor([row[side] for row in rows]) for side in ("query", "doc")}
        ids = {f"{side}_input_ids": value for side, value in sides.items()}
        return ids | {f"{side}_attention_mask": torch.ones_like(value) for side, value in sides.items()}


def trainer_steps(args: argparse.Namespace, folder: Path, ranks: int, seen: Callable[[float, float], None]) -> None:
    """Train by SentenceTransformerTrainer under DeepSpeed, a step per epoch; `seen` takes loss and seconds of each."""
    from accelerate import PartialState
    from datasets import Dataset
    from deepspeed import DeepSpeedEngine
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"  # on CPUs; see docs/cached_step.md
    PartialState(backend="gloo")

    class Trainer(SentenceTransformerTrainer):  # type: ignore[misc, unused-ignore]
        def training_step(self, model: Any, *inputs: Any, **options: Any) -> Tensor:
            assert isinstance(model, DeepSpeedEngine) and self.args.world_size == ranks
            started = time.perf_counter()
            loss: Tensor = super().training_step(model, *inputs, **options)
            seen(float(loss), time.perf_counter() - started)
            return loss

    modules = [Transformer(str(folder), max_seq_length=args.tokens), Pooling(args.hidden, "mean")]
    model = SentenceTransformer(modules=modules, device="cpu")
    loss = CachedMultipleNegativesRankingLoss(
        model, scale=SCALE, gather_across_devices=True, mini_batch_size=args.chunk
    )
    queries, documents = zip(*(local_tokens(args, rank, ranks) for rank in range(ranks)), strict=True)
    rows = {"query": torch.cat(queries).tolist(), "doc": torch.cat(documents).tolist()}
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder / "out"), per_device_train_batch_size=args.rows, num_train_epochs=args.steps,
        learning_rate=args.lr, lr_scheduler_type="constant", optim="sgd", report_to=[], save_strategy="no",
        accelerator_config={"use_configured_state": True}, deepspeed=deepspeed_config(args),
    )  # fmt: skip
    Trainer(
        model=model, args=arguments, loss=loss, train_dataset=Dataset.from_dict(rows), data_collator=Collator()
    ).train()


class _Inside(nn.Module):
    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, features: list[dict[str, Tensor]]) -> Tensor:
        value: Tensor = self.loss(features, None)
        return value


class _Pooled(nn.Module):
    def __init__(self, folder: Path) -> None:
        super().__init__()
        from transformers import BertModel

        self.bert = BertModel.from_pretrained(folder, add_pooling_layer=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        return nn.functional.normalize(self.bert(input_ids).last_hidden_state.mean(1), dim=1)


def pooled_engine(args: argparse.Namespace, folder: Path) -> Any:
    """Return a DeepSpeed engine of a BERT with mean pooling."""
    import deepspeed

    module = _Pooled(folder).train()
    optimizer = torch.optim.SGD(module.parameters(), lr=args.lr)
    return deepspeed.initialize(model=module, optimizer=optimizer, config=deepspeed_config(args))[0]


def gradcache_step(args: argparse.Namespace, folder: Path, tokens: tuple[Tensor, Tensor]) -> Step:
    """Return a step of GradCache around a DeepSpeed engine."""
    import gradcache.context_managers
    import torch.distributed as dist

    sys.modules["grad_cache"] = gradcache  # the release imports itself by the name of its repository's package
    sys.modules["grad_cache.context_managers"] = gradcache.context_managers
    from gradcache.grad_cache import GradCache
    from gradcache.loss import DistributedContrastiveLoss

    engine = pooled_engine(args, folder)
    loss_of, ranks = DistributedContrastiveLoss(), dist.get_world_size()
    cache = GradCache([engine, engine], args.chunk, lambda x, y: ranks * loss_of(SCALE * x, y))
    no_sync = args.case == "gradcache"

    def step() -> float:
        value = cache(*tokens, no_sync_except_last=no_sync)
        engine.step()
        return float(value) / ranks

    return step


def nemo_step(args: argparse.Namespace, folder: Path, tokens: tuple[Tensor, Tensor]) -> Step:
    """Return a step of NeMo AutoModel's bi-encoder recipe with cross-rank negatives, under DistributedDataParallel."""
    import torch.distributed as dist
    from nemo_automodel.components.models.common.inbatch_neg_utils import dist_gather_tensor

    model = nn.parallel.DistributedDataParallel(_Pooled(folder).train())
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr)
    labels = torch.arange(args.rows) + dist.get_rank() * args.rows

    def step() -> float:  # as TrainBiEncoderRecipe._forward_backward_step
        queries, documents = model(tokens[0]), model(tokens[1])
        every = dist_gather_tensor(documents, preserve_grad=args.case == "nemo, gradients")
        loss = nn.functional.cross_entropy(SCALE * queries @ every.T, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # DeepSpeed's default
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def our_step(args: argparse.Namespace, folder: Path, tokens: tuple[Tensor, Tensor]) -> Step:
    """Return a cached step of this project around a DeepSpeed engine."""
    import bigdssm

    engine = pooled_engine(args, folder)
    query, doc = ({"input_ids": side, "attention_mask": torch.ones_like(side)} for side in tokens)
    batch = bigdssm.pair_batch(query, doc)
    chunk_tokens = args.chunk * (args.tokens + 1) if args.case == "ours, chunks" else 0

    def step() -> float:
        output = bigdssm.cached_step(
            engine, batch, chunk_tokens=chunk_tokens, retained_tokens=0, alpha=SCALE,
            encode_side=lambda engine, side, inputs: engine(inputs["input_ids"]),
        )  # fmt: skip
        engine.step()
        return float(output.loss)

    return step


def one_case(args: argparse.Namespace) -> None:
    """Run the steps of one case on this rank; rank 0 writes its results."""
    import deepspeed
    import torch.distributed as dist

    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiles nothing
    deepspeed.init_distributed("gloo", verbose=False)
    args.rank, ranks = dist.get_rank(), dist.get_world_size()
    losses: list[float] = []
    seconds: list[float] = []
    base = _peak_mb()

    def seen(loss: float, took: float) -> None:
        mean = torch.tensor(loss)
        dist.all_reduce(mean)
        losses.append(float(mean) / ranks)
        seconds.append(took)

    if args.case == TRAINER:
        trainer_steps(args, args.encoder, ranks, seen)
    else:
        tokens = local_tokens(args, args.rank, ranks)
        steps = {"ours": our_step, "gradcache": gradcache_step, "nemo": nemo_step}
        of_case = steps.get(re.split("[, ]", args.case)[0], peer_step)
        step, base = of_case(args, args.encoder, tokens), _peak_mb()
        for _ in range(args.steps):
            started = time.perf_counter()
            loss = step()
            seen(loss, time.perf_counter() - started)
    if args.rank == 0:
        result = {"losses": losses, "seconds": statistics.median(seconds[1:]), "megabytes": _peak_mb() - base}
        args.out.write_text(json.dumps(result))


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run_case(args: argparse.Namespace, case: str, stage: int, encoder: Path) -> dict[str, object]:
    """Run one case in separate processes; return its results, or the error that ended it."""
    out = encoder / "result.json"
    out.unlink(missing_ok=True)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={args.ranks}",
        __file__,
    ]
    sizes = ("rows", "tokens", "layers", "hidden", "chunk", "steps", "bucket", "lr")
    options = [word for name in sizes for word in (f"--{name}", str(getattr(args, name)))]
    child = ["--case", case, "--stage", str(stage), "--encoder", str(encoder), "--out", str(out)]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run([*command, args.task, *options, *child], capture_output=True, text=True, env=environment)
    if out.exists():
        result: dict[str, object] = json.loads(out.read_text())
        return result
    errors = re.findall(r"^\[rank\d+\]: (\w*Error.*)", done.stderr, re.M)
    return {"error": errors[0] if errors else f"exit code {done.returncode}"}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("losses", "cost"), help="compare curves, or time and memory")
    for name, value, text in (
        ("ranks", 2, "CPU ranks"), ("rows", 16, "rows per rank"), ("tokens", 8, "tokens per text"),
        ("layers", 2, "layers of the BERT"), ("hidden", 64, "width of the BERT"),
        ("chunk", 4, "texts per chunk or mini-batch"), ("steps", 3, "steps per case"),
        ("bucket", 500_000_000, "DeepSpeed's reduce_bucket_size; the default is its own"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{text} (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=0.1, help="learning rate (default: %(default)s)")
    parser.add_argument("--stages", type=int, nargs="+", default=list(STAGES), help="ZeRO stages (default: all)")
    parser.add_argument("--cases", choices=CASES, nargs="+", default=list(CASES), help="cases (default: all)")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--stage", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--encoder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.case:
        one_case(args)
        return
    names = ("sentence-transformers", "gradcache", "nemo-automodel", "deepspeed", "torch")
    releases = ", ".join(f"{name} {version(name)}" for name in names)
    print(
        f"{releases}; {args.ranks} CPU ranks × {args.rows} rows of {args.tokens} tokens, chunks of {args.chunk} texts"
    )
    with tempfile.TemporaryDirectory() as folder:
        write_encoder(Path(folder), args)
        for case in args.cases:
            for stage in args.stages:
                result = run_case(args, case, stage, Path(folder))
                print(f"| {case} | ZeRO {stage} | {_shown(args.task, result)} |", flush=True)


def _shown(task: str, result: dict[str, object]) -> str:
    if "error" in result:
        return str(result["error"])
    if task == "losses":
        return ", ".join(f"{loss:.6f}" for loss in result["losses"])  # type: ignore[attr-defined]
    return f"{result['seconds']:.2f} s, {result['megabytes']:.0f} MB"


if __name__ == "__main__":
    main()
