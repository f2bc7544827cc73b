"""Parts of gpu.py other than loss and step: versions, families of text encoders, chunks, tables, repeats, encoding."""

from __future__ import annotations

import subprocess
import tempfile
import time
from contextlib import nullcontext, suppress
from importlib import metadata
from typing import Any

import numpy as np
import torch
from gpu_bench import Bench, ours, timed, vectors
from gpu_towers import text_tower
from torch import Tensor, nn

PACKAGES = ("torch", "triton", "deepspeed", "transformers", "bigdssm")
LIMITS = "name,driver_version,memory.total,power.limit,clocks.max.sm,clocks.max.memory,pcie.link.gen.max"
FAMILIES = ("bert", "modernbert", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma3_text", "roberta")
SPECIAL_TOKENS = dict.fromkeys(("bos_token_id", "cls_token_id", "eos_token_id", "sep_token_id"), 1) | {
    "pad_token_id": 0
}
CHUNK_TOKENS, TOKENS = tuple(16_384 << k for k in range(5)), 64
TABLE_ROWS, TABLE_DIM = 375_000, 256  # new rows of a step and rank, of 65,536 rows with histories


def versions(bench: Bench, args: Any) -> None:
    """Record versions and limits of the device."""
    row: dict[str, Any] = {}
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            row[package] = metadata.version(package)
    if bench.device.type == "cuda":
        properties: Any = torch.cuda.get_device_properties(bench.device)
        row |= {"cuda": torch.version.cuda, "multiprocessors": properties.multi_processor_count}
        row["shared memory"] = properties.shared_memory_per_block_optin
        with suppress(OSError, subprocess.SubprocessError):
            command = ["nvidia-smi", f"--query-gpu={LIMITS}", "--format=csv,noheader"]
            row["limits"] = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    bench.add("versions", row)


def families(bench: Bench, args: Any) -> None:
    """Encode texts with a small encoder of each family in bf16, packed on a GPU, against padded ones in fp32."""
    from transformers import AutoConfig, AutoModel

    from bigdssm.features.text import NO_TOKEN
    from bigdssm.models.encoders.pretrained import build_pretrained, pretrained_architecture
    from bigdssm.models.packed import flash_attention, pack

    shape = {
        "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 1000, **SPECIAL_TOKENS,
    }  # fmt: skip
    lengths = [TOKENS - row for row in range(16)]
    tokens = torch.full((len(lengths), TOKENS), NO_TOKEN)
    for row, length in enumerate(lengths):
        tokens[row, :length] = torch.randint(5, 1000, (length,))
    for family in FAMILIES:
        with bench.or_skip(f"family {family}"), tempfile.TemporaryDirectory() as folder:
            torch.manual_seed(0)
            config = AutoConfig.for_model(family, **shape)
            AutoModel.from_config(config, trust_remote_code=False).save_pretrained(folder)
            encoder = build_pretrained(pretrained_architecture(folder), folder).to(bench.device).eval()
            exact = encoder(tokens.to(bench.device))
            inputs: Any = tokens.to(bench.device)
            if bench.device.type == "cuda":
                encoder.use_packing(flash_attention)
                inputs = pack(inputs, NO_TOKEN, sum(lengths), TOKENS)
            with torch.autocast(bench.device.type, torch.bfloat16):
                rounded = encoder(inputs)
            rounded.float().sum().backward()
            difference = float(((exact - rounded).norm() / exact.norm()).detach())
            bench.add("families", {"family": family, "relative difference": f"{difference:.1e}"})


def chunks(bench: Bench, args: Any) -> None:
    """Time forward and backward of a BERT-base in bf16 by tokens per chunk, eager and compiled."""
    for compiled in (False, True) if bench.device.type == "cuda" else (False,):
        for tokens in CHUNK_TOKENS[:1] if bench.small else CHUNK_TOKENS:
            what = f"chunk of {tokens} tokens, compile {compiled}"
            if bench.left() < (5 if bench.small else 40):
                bench.skip(what, "no time is left for it")
                continue
            with bench.or_skip(what):
                tower, batch, flops = text_tower(bench, 12, 768, tokens // TOKENS, TOKENS)
                run = torch.compile(tower) if compiled else tower

                def both(run: Any = run, side: tuple[Tensor, ...] = batch.query) -> None:
                    with torch.autocast(bench.device.type, torch.bfloat16):
                        out = run(*side)
                    out.float().sum().backward()

                seconds, memory = timed(bench, both, 0.0)
                row = {"chunk": tokens, "compile": compiled, "ms": round(1e3 * seconds, 2)}
                row |= {"TFLOP/s": round(3 * flops / seconds / 1e12, 1), "MB": round(memory / 1e6)}
                bench.add("chunks", row)


def tables(bench: Bench, args: Any) -> None:
    """Time a step of a sharded table on the device: rows that are new, and rows that are stored."""
    from bigdssm.config import TABLE_OPTIMIZERS
    from bigdssm.tables.rows import TableSpec
    from bigdssm.tables.sharded import ShardedTables

    rows, dim = (1000, 16) if bench.small else (TABLE_ROWS, TABLE_DIM)
    optimizer = TABLE_OPTIMIZERS.find("rowwise_adagrad", "")(lr=0.1)
    spec = TableSpec("items", 16 * rows, dim)
    sharded = ShardedTables([spec], optimizer, 0, device=bench.device, storage=bench.device)
    for which, first in (("new rows", 2), ("new rows", 2 + rows), ("stored rows", 2), ("stored rows", 2 + rows)):
        distinct = np.arange(first, first + rows)
        row: dict[str, Any] = {"table": which, "rows": rows, "width": dim}
        working = sharded.fetch({"items": distinct})
        places = torch.arange(1, rows + 1, device=bench.device)

        def fetch(distinct: np.ndarray = distinct) -> None:
            sharded.fetch({"items": distinct})

        row["fetch ms"] = round(1e3 * timed(bench, fetch, 2.0)[0], 2)
        working.look_up("items", places).sum().backward()
        row["reduce ms"] = round(1e3 * timed(bench, lambda working=working: sharded.reduce(working), 2.0)[0], 2)
        bench.synchronize()
        sharded.reduce(working)
        row["commit ms"] = round(1e3 * _once(bench, lambda: sharded.commit(1.0, 1.0)), 2)
        bench.add("tables", row)


def _once(bench: Bench, run: Any) -> float:
    """Return the seconds of a run that cannot be repeated."""
    bench.synchronize()
    begun = time.perf_counter()
    run()
    bench.synchronize()
    return time.perf_counter() - begun


def repeats(bench: Bench, args: Any) -> None:
    """Compare the gradients of two equal steps: of the loss, and of an embedding table with repeated ids."""
    rows, dim = (64, 16) if bench.small else (8192, 256)

    def gradients() -> list[Tensor]:
        torch.manual_seed(1 + bench.rank)
        U, W = (vectors(rows, dim, bench) for _ in "UW")
        ours(U, W, "both").backward()
        table = nn.Embedding(100, dim, device=bench.device)
        ids = torch.randint(0, 100, (rows,), device=bench.device)
        (table(ids) * torch.randn(rows, dim, device=bench.device)).sum().backward()
        return [part.grad for part in (U, W, table.weight) if part.grad is not None]

    for name, first, second in zip(("loss, U", "loss, W", "embedding"), gradients(), gradients(), strict=True):
        bench.add("repeats", {"gradient": name, "same bits": torch.equal(first, second)})


def encode(bench: Bench, args: Any) -> None:
    """Time encoding without gradients: texts of 64 tokens by a MiniLM, fp32 and bf16."""
    for precision in ("fp32", "bf16"):
        with bench.or_skip(f"encode {precision}"), torch.no_grad():
            tower, batch, _ = text_tower(bench, 6, 384, 1024, TOKENS)
            tower.eval()
            autocast = torch.autocast(bench.device.type, torch.bfloat16) if precision == "bf16" else nullcontext()
            with autocast:
                seconds, _ = timed(bench, lambda tower=tower, batch=batch: tower(*batch.query), 0.0)
            bench.add("encode", {"encode": precision, "texts/s": round(batch.rows * bench.world_size / seconds)})
