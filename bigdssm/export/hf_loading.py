"""Encoding with a folder of `--format hf`: a standalone script, copied into the folder's model card."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer


def load_tower(folder: str | Path) -> Callable[[list[str]], torch.Tensor]:
    """Return a function from n texts to float32 [n, D+1] (without beta [n, D]), whose inner products are scores."""
    head = json.loads((Path(folder) / "projection.json").read_text(encoding="utf-8"))
    weights = load_file(Path(folder) / "projection.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    model = AutoModel.from_pretrained(folder, trust_remote_code=False, **head["loading_arguments"]).eval()

    @torch.no_grad()
    def encode(texts: list[str]) -> torch.Tensor:
        tokens = tokenizer(
            [head["prompt"] + text for text in texts], padding=True, truncation=True, max_length=head["max_tokens"],
            return_tensors="pt",
        )  # fmt: skip
        mask = tokens["attention_mask"]
        x = model(input_ids=tokens["input_ids"], attention_mask=mask).last_hidden_state.float()
        after_prompt = mask * (mask.cumsum(1) > head["prompt_tokens"])
        if head["pooling"] == "mean":
            x = (x * after_prompt.unsqueeze(2)).sum(1) / after_prompt.sum(1, keepdim=True).clamp(min=1)
        else:  # padding may be on either side
            x = x[torch.arange(len(x)), (after_prompt if head["pooling"] == "cls" else mask.cumsum(1)).argmax(1)]
        for number, activation in enumerate([*head["activations"], None]):
            if number == head["normalized_after"]:
                x = F.normalize(x, dim=1)
            if activation:
                x = F.linear(x, weights[f"layers.{number}.weight"], weights.get(f"layers.{number}.bias"))
                x = getattr(torch.nn, activation)()(x)
        vector = F.normalize(x, dim=1) if head["score"] == "cosine" else x
        if head["side"] == "doc":
            vector = head["alpha"] * vector
        if "beta" not in weights and head["beta"] is None:
            return vector
        if head["side"] == "query":
            return torch.cat([vector, torch.ones(len(x), 1)], dim=1)
        beta = F.linear(x, weights["beta"]) if "beta" in weights else torch.full((len(x), 1), head["beta"])
        return torch.cat([vector, beta], dim=1)

    return encode
