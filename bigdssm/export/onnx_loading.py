"""How to encode with a folder of `--format onnx`: complete as it stands, and copied into the folder's model card."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from tokenizers import Tokenizer


def load_tower(folder: str | Path, side: str, file: str = "") -> Callable[[list[dict[str, Any]]], np.ndarray]:
    """Return a function from n rows {feature: value} of a side (query or doc) to float32 [n, D+1].

    A query's and a document's inner product is their score. Values are a string of a text, a string or a list of
    strings of a categorical feature or a history (oldest first), a number; a feature that is not given is missing.
    """
    folder = Path(folder)
    schema = json.loads((folder / "schema.json").read_text(encoding="utf-8"))
    session = onnxruntime.InferenceSession(str(folder / (file or f"{side}.onnx")))
    path = folder / "tokenizer" / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path)) if path.exists() else None
    pad = json.loads((folder / "bigdssm_export.json").read_text(encoding="utf-8"))["pad_token_id"]

    def codes(feature: dict[str, Any], values: list[str]) -> list[int]:
        if feature["hash_buckets"]:
            import xxhash

            hashes = (np.uint64(xxhash.xxh3_64_intdigest(value.encode())).view(np.int64) for value in values)
            return [
                2 + int(number) % feature["hash_buckets"] if value else 0
                for value, number in zip(values, hashes, strict=True)
            ]
        known = {value: number for number, value in enumerate(feature["vocabulary"], start=2)}
        return [known.get(value, 1) if value else 0 for value in values]

    def column(feature: dict[str, Any], values: list[Any]) -> np.ndarray:
        kind = feature["type"]
        if kind == "numeric":
            return np.array([np.nan if value is None else value for value in values], np.float32)
        if kind == "categorical" and not feature["multi"]:
            return np.array(codes(feature, [value or "" for value in values]), np.int64)
        if kind == "text":
            assert tokenizer is not None
            tokenizer.no_padding()
            tokenizer.enable_truncation(feature["max_tokens"])
            rows = [encoding.ids for encoding in tokenizer.encode_batch([value or "" for value in values])]
        elif kind == "history":
            item = schema["doc"][feature["of"]]
            rows = [codes(item, (value or [])[-feature["max_items"] :]) for value in values]
        else:
            rows = [codes(feature, value or []) for value in values]
        padded = np.full((len(rows), max(1, *map(len, rows), 1)), pad if kind == "text" else 0, np.int64)
        for row, numbers in enumerate(rows):
            padded[row, : len(numbers)] = numbers
        return padded

    def encode(rows: list[dict[str, Any]]) -> np.ndarray:
        inputs = {name: column(feature, [row.get(name) for row in rows]) for name, feature in schema[side].items()}
        vectors: np.ndarray = session.run(["vectors"], inputs)[0]
        return vectors

    return encode
