"""Small models of the families of text encoders, with random weights and their kinds of tokenizers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModel

WORDS = [
    *("red", "wine", "glass", "old", "house", "garden", "blue", "sea", "stone", "light", "small", "river", "paper"),
    *("green", "tree"),
]
ENCODER = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
DECODER = {**ENCODER, "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 48, "max_position_embeddings": 64}
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": {**ENCODER, "intermediate_size": 48, "max_position_embeddings": 64},
    "xlm-roberta": {**ENCODER, "intermediate_size": 48, "max_position_embeddings": 66, "pad_token_id": 1},
    "mpnet": {**ENCODER, "intermediate_size": 48, "max_position_embeddings": 66, "pad_token_id": 1},
    "modernbert": {**ENCODER, "intermediate_size": 48, "max_position_embeddings": 64, "local_attention": 8,
                   "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3},
    "qwen3": {**DECODER, "pad_token_id": 3, "eos_token_id": 3, "bos_token_id": None},  # pads with its EOS
    "llama": {**DECODER, "bos_token_id": 2, "eos_token_id": 3},  # without a padding token
    "gemma3_text": {**DECODER, "sliding_window": 4, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3,
                    "query_pre_attn_scalar": 16},
}  # fmt: skip
# further families whose texts are packed; only their attention differs
PACKED_FAMILIES: dict[str, dict[str, Any]] = {
    "roberta": FAMILIES["xlm-roberta"],
    "mistral": {**DECODER, "sliding_window": 4},
    "qwen2": DECODER,
    "gemma": DECODER,
}
LORA = ["model.query.text.lora_rank=4", "model.doc.text.lora_rank=4"]
DECODERS = {"qwen3", "llama", "gemma3_text"}


def write_family(family: str, folder: Path) -> Path:
    """Write a model and its tokenizer to `folder`; the weights are random and large enough to make texts differ."""
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model(family, **(FAMILIES | PACKED_FAMILIES)[family])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder, max_shard_size="20KB")  # several files
    special = ["<unk>", "<pad>", "<s>", "</s>"]
    vocabulary = {word: number for number, word in enumerate([*special, ".", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(special)
    begin = "" if family == "qwen3" else "<s> "
    end = "" if family == "llama" else " </s>"
    ends = [(token, vocabulary[token]) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(f"{begin}$A{end}", f"{begin}$A{end} $B{end}", ends)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    padding = {} if family == "llama" else {"pad_token": "</s>" if family == "qwen3" else "<pad>"}
    side = {"padding_side": "left"} if family in DECODERS else {}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **names, **padding, **side}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def write_pairs(folder: Path, family: str, *, pairs: int = 240) -> Path:
    """Write a model, pairs of texts with prompts, their config and dataset in `folder`; return the config's path."""
    from bigdssm.config import load_config
    from bigdssm.ingest.job import IngestTarget
    from bigdssm.ingest.pairs import PairTables, make_pairs
    from bigdssm.utils.log import no_progress

    encoder = write_family(family, folder / family)
    random = np.random.RandomState(0)
    with (folder / "pairs.jsonl").open("w") as file:
        for number in range(pairs):
            words = random.choice(WORDS, 3 + number % 5).tolist()
            text = {"query": " ".join(words[:2]), "doc_key": f"d{number}", "text": " ".join(words)}
            file.write(json.dumps(text) + "\n")
    text = {"type": "text", "max_tokens": 10}
    towers = {side: {"residual": name, "mlp": []} for side, name in (("query", "query"), ("doc", "text"))}
    content = {
        "run": {"dir": str(folder / "run"), "trackers": []},
        "engine": {"precision": "fp32"},
        "data": {
            "dir": str(folder / "dataset"), "lanes": 6, "num_workers": 0, "tokenizer": {"path": str(encoder)},
            "query": {"query": {**text, "prompt": "red : ", "pool_prompt": False}},
            "doc": {"text": {**text, "prompt": "wine . "}},
        },
        "model": {"dim": 32, "score": "cosine", "share_text": True, **towers},
        "pretrain": {
            "rows_global": 24, "steps": 4, "optimizer": {"lr": 1.0e-3, "warmup_steps": 1}, "log_every_steps": 1,
            "save_every_steps": 0,
        },
        "sft": {
            "rows_global": 12, "steps": 2, "loss": {"name": "pair_ce"}, "log_every_steps": 1,
            "negatives": {"hard": 2, "in_batch": False, "mining": {"first": 1, "last": 20}},
        },
    }  # fmt: skip
    for tower in ("query", "doc"):
        content["model"][tower]["text"] = {"init": str(encoder)}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    tables = PairTables((folder / "pairs.jsonl",), doc_id_column="doc_key", validation_fraction=0.1, test_fraction=0.1)
    make_pairs(load_config(path).data, tables, IngestTarget(folder / "dataset"), no_progress)
    return path
