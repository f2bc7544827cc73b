"""Export formats: options, writing, the model card, and a parity check against the trainer on a probe batch.

A new format is a subclass of `ExportFormat`, registered with `register_export`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import yaml
from huggingface_hub import EvalResult, ModelCardData
from torch import Tensor

from bigdssm.checkpoints.model_folder import ModelFolder
from bigdssm.errors import CheckpointError
from bigdssm.export.text_tower import SIDES, Side, beta_weight
from bigdssm.features import Column, History, Ragged, encode_values, texts_of
from bigdssm.features.base import ITEM_ROW, REQUEST_PREFIX
from bigdssm.loader.batch import Features, to_features
from bigdssm.retrieval.embed import document_vectors, query_vectors
from bigdssm.utils.components import Registry

PROBE_ROWS = 64
PARITY_LIMIT = 1e-5


@dataclass(frozen=True)
class Parity:
    """Largest difference from the trainer's vectors, relative to the vector's largest entry."""

    query: float
    doc: float
    rows: int = PROBE_ROWS

    @classmethod
    def of(cls, ours: Mapping[Side, Tensor], trainers: Mapping[Side, Tensor]) -> "Parity":
        """Compare the vectors of both sides with the trainer's."""
        query, doc = (largest_difference(ours[side], trainers[side]) for side in SIDES)
        return cls(query, doc)

    def __str__(self) -> str:
        """Return for example `queries 2.1e-07, documents 1.8e-07 on 64 rows each`."""
        return f"queries {self.query:.1e}, documents {self.doc:.1e} on {self.rows} rows each"

    def check(self, what: str) -> None:
        """Raise CheckpointError unless the differences are within PARITY_LIMIT."""
        if not max(self.query, self.doc) <= PARITY_LIMIT:  # also raises for NaN
            raise CheckpointError(
                f"{what} does not match the trainer: {self}, needs at most {PARITY_LIMIT:.0e}; nothing was written"
            )


class Probe:
    """A probe batch of random features and the trainer's vectors of it."""

    def __init__(self, folder: ModelFolder) -> None:
        self._folder = folder
        self._random = np.random.RandomState(0)  # frozen stream; a Generator's may change between versions
        words = [] if folder.tokenizer is None else folder.tokenizer.words()
        self.texts: dict[Side, dict[str, list[str]]] = {}  # by side and text feature
        for side in SIDES:
            text_features = texts_of(folder.schema.sides[side])
            self.texts[side] = {
                name: text.texts(self._random, PROBE_ROWS, words) for name, text in text_features.items()
            }
        self.features = {side: self._features(side) for side in SIDES}

    @cached_property
    def vectors(self) -> dict[Side, Tensor]:
        """Return the trainer's index vectors [n, D+1] of both sides."""
        model = self._folder.model
        previous = None
        if model.content_ids:  # histories read the contents of a catalogue: of random numbers
            random = np.random.RandomState(1).standard_normal((PROBE_ROWS, self._folder.config.model.dim))
            contents = torch.from_numpy(np.concatenate([np.zeros_like(random[:1]), random])).float()
            previous = model.set_contents(contents)
        try:
            query = query_vectors(model, self.features["query"])
        finally:
            if previous is not None:
                model.set_contents(previous)
        return {"query": query, "doc": document_vectors(model, self.features["doc"])}

    def only_text(self, side: Side) -> list[str]:
        """Return the n texts of a side with a single text feature."""
        (texts,) = self.texts[side].values()
        return texts

    def _features(self, side: Side) -> Features:
        schema = self._folder.schema
        columns: dict[str, Column] = {}
        for name, feature in schema.sides[side].items():
            if name in self.texts[side]:
                columns[name] = encode_values(feature, self.texts[side][name], self._folder.tokenizer)
            else:
                columns[name] = feature.probe(self._random, PROBE_ROWS, schema.doc)
            if isinstance(feature, History) and isinstance(items := columns[name], Ragged):
                for key, event in schema.event_inputs.items():
                    values = event.probe(self._random, len(items.values), {})
                    columns[f"{name}.{key}"] = Ragged(np.asarray(values), items.offsets)
                if self._folder.model.content_ids:
                    rows = self._random.randint(1, 1 + PROBE_ROWS, len(items.values))
                    columns[f"{name}.{ITEM_ROW}"] = Ragged(rows.astype(np.int64), items.offsets)
        if side == "query":
            requests = {name: schema.event[name].probe(self._random, PROBE_ROWS, {}) for name in schema.request}
            columns |= {REQUEST_PREFIX + name: values for name, values in requests.items()}
        return to_features(schema.sides[side], columns)


def largest_difference(ours: Tensor, trainers: Tensor) -> float:
    """Return the largest difference, relative to the largest entry of the row of `trainers` [n, D]."""
    if ours.shape != trainers.shape:
        return float("inf")
    ours, trainers = ours.double(), trainers.double()
    scale = trainers.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
    return float(((ours - trainers).abs().amax(dim=1) / scale).max())


@dataclass(frozen=True)
class ExportFormat(ABC):
    """An export format; dataclass fields are options."""

    format: ClassVar[str]
    library: ClassVar[str]  # the Hub's name of the library that loads the format
    keeps_adapters: ClassVar[bool] = False  # else they are merged into the weights before `write`
    keeps_tables: ClassVar[bool] = False  # else the rows of sharded tables become dense weights

    @abstractmethod
    def write(self, model: ModelFolder, out: Path) -> Parity:
        """Write a model into the folder `out`, load it again and return the parity of its vectors.

        Raises ConfigError: the format does not support the model, or a package is not installed.
        """

    @abstractmethod
    def loading(self, model: ModelFolder, name: str) -> str:
        """Return Markdown for the model card: code that loads the folder `name`."""


EXPORT_FORMATS: Registry[ExportFormat] = Registry(
    "an export format", "format", ExportFormat, home="bigdssm.export.convert"
)
register_export = EXPORT_FORMATS.register


def python_block(*parts: str) -> str:
    """Join code into one Markdown block."""
    code = "\n\n".join(part.strip() for part in parts)
    return f"```python\n{code}\n```"


def source_of(module: str) -> str:
    """Return the source of a module of this package without its docstring, for the model card."""
    return Path(__file__).with_name(module).read_text(encoding="utf-8").split('"""', 2)[2].strip()


CARD_FILE = "README.md"


@dataclass(frozen=True)
class ReportedMetrics:
    """Metrics of a model on the validation split."""

    source: str
    metrics: Mapping[str, float]


def model_card(
    model: ModelFolder, name: str, kind: ExportFormat, parity: Parity, metrics: ReportedMetrics | None
) -> str:
    """Return the card as Markdown with Hub metadata; its code runs next to the folder."""
    # The front matter, with metrics in the Hub's model-index format.
    results = [
        EvalResult(
            task_type="information-retrieval", dataset_type="unknown", dataset_name=Path(model.config.data.dir).name,
            dataset_split="validation", metric_type=metric, metric_value=round(value, 4),
        )
        for metric, value in metrics.metrics.items()
    ] if metrics else []  # fmt: skip
    metadata = ModelCardData(
        library_name=kind.library, pipeline_tag="feature-extraction", tags=["retrieval", "two-tower", "dssm"],
        model_name=name, eval_results=results or None,
    )  # fmt: skip

    config = model.config.model
    vectors = "of norm 1" if config.score == "cosine" else "of any norm"
    beta = "0" if beta_weight(model) is None else "a learned number per document"
    parameters = sum(parameter.numel() for parameter in model.model.parameters())
    origin = {key: model.provenance[key] for key in ("stage", "step", "checkpoint") if key in model.provenance}
    weights = ", ".join(f"{key} {value}" for key, value in origin.items()) or "of a model folder"
    if model.provenance.get("initial"):
        weights += ", unchanged since the start of the stage"
    description = (
        f"A two-tower retrieval model, trained with bigdssm: it encodes a query as a vector u and a document as a "
        f"vector w, both of width {config.dim} and {vectors}. The score is\n\n    alpha * <u, w> + beta\n\nwhere alpha "
        f"is {model.alpha:.6g} and beta is {beta}. {parameters:,} parameters; checksum of the weights ({weights}): "
        f"`{model.checksum}`. Format of this folder: {kind.format}."
    )

    vocab_size = model.tokenizer.vocab_size if model.tokenizer else 0
    features = "\n".join(
        f"| {side} | {name} | {feature.type} | {feature.describe(vocab_size)} |"
        for side in SIDES
        for name, feature in model.schema.sides[side].items()
    )
    fingerprint = model.provenance.get("dataset")
    trained_on = f"Trained on `{model.config.data.dir}`" + (f", fingerprint `{fingerprint}`." if fingerprint else ".")

    if metrics is None:
        measured = "None were recorded for exactly these weights; `bigdssm evaluate` computes them."
    else:
        exclude_seen = model.config.data.exclude_seen
        words: dict[bool | str, str] = {True: "excluded", False: "included"}
        seen = words.get(exclude_seen, f"of {exclude_seen} excluded")
        values = "\n".join(f"| {name} | {value:.4f} |" for name, value in metrics.metrics.items())
        table = f"| validation | {metrics.source} |\n|---|---|\n{values}"
        measured = f"Over the full catalogue, seen documents {seen}:\n\n{table}"

    parts = [
        f"---\n{metadata.to_yaml()}\n---",
        f"# {name}",
        description,
        "## Loading",
        kind.loading(model, name),
        f"On a probe batch, the vectors of this folder differ from the trainer's, relative to a vector's largest "
        f"entry, by at most: {parity} (float32, CPU).",
        "## Data",
        f"{trained_on}\n\n| side | feature | type | |\n|---|---|---|---|\n{features}",
        "## Metrics",
        measured,
        "## Training",
        f"```yaml\n{yaml.safe_dump(model.config.to_dict(), sort_keys=False)}```",
    ]
    return "\n\n".join(parts) + "\n"
