"""What every export is tried on before it is believed: the trainer's own vectors of a probe batch.

The probe is made from the model folder alone: texts of its tokenizer's words, in all lengths from none to more than is
read, and values from every feature's range, missing ones among them. Shapes: n rows, D vector width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import torch
from tokenizers import Tokenizer
from torch import Tensor

from bigdssm.data.batch import Features
from bigdssm.data.ragged import Column, Ragged
from bigdssm.data.tensors import to_features
from bigdssm.data.tokenizer import TextEncoder
from bigdssm.errors import CheckpointError
from bigdssm.export.model_folder import ModelFolder
from bigdssm.export.text_tower import SIDES, Side
from bigdssm.retrieval.embed import document_vectors, query_vectors
from bigdssm.schema import Feature

PROBE_ROWS = 64
PARITY_LIMIT = 1e-5


@dataclass(frozen=True)
class Parity:
    """How far an export's vectors are from the trainer's: the largest difference over the vector's largest entry."""

    query: float
    doc: float
    rows: int = PROBE_ROWS

    def __str__(self) -> str:
        """Return for example `queries 2.1e-07, documents 1.8e-07 on 64 rows each`."""
        return f"queries {self.query:.1e}, documents {self.doc:.1e} on {self.rows} rows each"

    def check(self, what: str) -> None:
        """Raise CheckpointError where a difference is not within PARITY_LIMIT."""
        if not max(self.query, self.doc) <= PARITY_LIMIT:  # NaN is not
            raise CheckpointError(
                f"{what} gives other vectors than the trainer: {self}, needs at most {PARITY_LIMIT:.0e}; nothing was "
                f"written"
            )


class Probe:
    """A probe batch of a model and the trainer's vectors of it."""

    def __init__(self, folder: ModelFolder, rows: int = PROBE_ROWS) -> None:
        self._folder, self._rows = folder, rows
        self._random = np.random.RandomState(0)  # its stream is frozen; a Generator's may change between versions
        self.texts = {side: self._texts(side) for side in SIDES}  # of each text feature, by side and name
        self.features = {side: self._features(side) for side in SIDES}

    @cached_property
    def vectors(self) -> dict[Side, Tensor]:
        """Return the index vectors [n, D+1] of both sides, as the trainer computes them."""
        model = self._folder.model
        return {
            "query": query_vectors(model, self.features["query"]), "doc": document_vectors(model, self.features["doc"])
        }  # fmt: skip

    def only_text(self, side: Side) -> list[str]:
        """Return the n texts of a side with a single text feature."""
        (texts,) = self.texts[side].values()
        return texts

    def _texts(self, side: Side) -> dict[str, list[str]]:
        texts = {}
        for name, feature in getattr(self._folder.schema, side).items():
            if feature.type == "text":
                assert self._folder.tokenizer_dir is not None
                words = _words(Tokenizer.from_file(str(self._folder.tokenizer_dir / "tokenizer.json")))
                lengths = np.linspace(0, 1.5 * feature.max_tokens, self._rows).astype(int)
                drawn = [self._random.choice(words, length) for length in lengths]
                texts[name] = [" ".join(some).capitalize() + "." * (len(some) % 3) for some in drawn]
        return texts

    def _features(self, side: Side) -> Features:
        declared: dict[str, Feature] = getattr(self._folder.schema, side)
        columns = {name: self._column(side, feature) for name, feature in declared.items()}
        return to_features(declared, columns, self._folder.pad_token_id)

    def _column(self, side: Side, feature: Feature) -> Column:
        random, rows = self._random, self._rows
        if feature.type == "text":
            assert self._folder.tokenizer_dir is not None
            texts = pa.array(self.texts[side][feature.name], pa.large_string())
            return Ragged(*TextEncoder(self._folder.tokenizer_dir).encode(texts, feature.max_tokens))
        if feature.type == "numeric":
            values = feature.mean + feature.std * random.randn(rows)
            values = np.abs(values) if feature.log else values
            return np.where(random.rand(rows) < 0.2, np.nan, values).astype(np.float32)
        if feature.type == "categorical" and not feature.multi:
            return random.randint(0, feature.num_codes, rows).astype(np.int32)
        longest = feature.max_items if feature.type == "history" else 4
        of = self._folder.schema.doc[str(feature.of)] if feature.type == "history" else feature
        lengths = np.linspace(0, longest, rows).astype(int)
        return Ragged.of_lists([random.randint(1, of.num_codes, length).tolist() for length in lengths])


def largest_difference(ours: Tensor, trainers: Tensor) -> float:
    """Return the largest difference of any entry, relative to the largest entry of its row of `trainers` [n, D]."""
    if ours.shape != trainers.shape:
        return float("inf")
    ours, trainers = ours.double(), trainers.double()
    scale = trainers.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
    return float(((ours - trainers).abs().amax(dim=1) / scale).max())


def _words(tokenizer: Tokenizer) -> list[str]:
    """Return the whole words of a vocabulary, without the marks that some tokenizers put before them."""
    return sorted(word for word in {token.lstrip("▁Ġ") for token in tokenizer.get_vocab()} if word.isalnum())
