"""Small models of the families of text encoders, with random weights and their kinds of tokenizers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
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
DECODERS = {"qwen3", "llama", "gemma3_text"}


def write_family(family: str, folder: Path) -> Path:
    """Write a model and its tokenizer to `folder`; the weights are random and large enough to make texts differ."""
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model(family, **FAMILIES[family])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
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
