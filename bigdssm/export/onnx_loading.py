"""Encoding with a folder of `--format onnx`; copied into its card with input functions by type."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

INPUTS: dict[str, Callable[..., np.ndarray]] = {}  # by feature type; filled by code in the card


def load_tower(folder: str | Path, side: str, file: str = "") -> Callable[[list[dict[str, Any]]], np.ndarray]:
    """Return a function from n rows {feature: value} of a side (query or doc) to float32 [n, D+1], without beta [n, D].

    Query-document inner products are scores. Values: a string (text), a string or a list of strings (categorical
    feature, or history, oldest first), or a number; absent features are missing values.
    """
    folder = Path(folder)
    schema = json.loads((folder / "schema.json").read_text(encoding="utf-8"))
    session = onnxruntime.InferenceSession(str(folder / (file or f"{side}.onnx")))
    path = folder / "tokenizer" / "tokenizer.json"
    exported = SimpleNamespace(
        schema=schema,
        tokenizer=Tokenizer.from_file(str(path)) if path.exists() else None,
    )

    def encode(rows: list[dict[str, Any]]) -> np.ndarray:
        inputs = {
            name: INPUTS[feature["type"]](feature, [row.get(name) for row in rows], exported)
            for name, feature in schema[side].items()
        }
        vectors: np.ndarray = session.run(["vectors"], inputs)[0]
        return vectors

    return encode
