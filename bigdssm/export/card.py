"""The model card that every exported folder carries as its README.md: only what is known, nothing by heart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCardData

from bigdssm.checkpoints.model_folder import ModelFolder
from bigdssm.export.formats import ExportFormat, Parity
from bigdssm.export.text_tower import SIDES, alpha, beta_of_all, beta_weight
from bigdssm.features import Feature, TextTokenizer

CARD_FILE = "README.md"


@dataclass(frozen=True)
class Figures:
    """What was measured of a model."""

    split: str
    where: str
    metrics: Mapping[str, float]


def model_card(model: ModelFolder, name: str, kind: ExportFormat, parity: Parity, figures: Figures | None) -> str:
    """Return the card as Markdown with the front matter that model hubs read; its code runs beside the folder."""
    parts = [
        f"---\n{_metadata(model, name, kind.library, figures).to_yaml()}\n---",
        f"# {name}",
        _what(model, kind.format),
        "## Loading",
        kind.loading(model, name),
        f"On a probe batch the vectors of this folder differ from the trainer's, relative to a vector's largest entry, "
        f"by at most: {parity} (float32, CPU).",
        "## Data",
        _data(model),
        "## Figures",
        _figures(figures, model.config.data.exclude_seen),
        "## Training",
        f"```yaml\n{yaml.safe_dump(model.config.to_dict(), sort_keys=False)}```",
    ]
    return "\n\n".join(parts) + "\n"


def _metadata(model: ModelFolder, name: str, library: str, figures: Figures | None) -> ModelCardData:
    """Return the front matter; what was measured is in the Hub's format (model-index)."""
    measured = [
        EvalResult(
            task_type="information-retrieval", dataset_type="unknown", dataset_name=Path(model.config.data.dir).name,
            dataset_split=figures.split, metric_type=metric, metric_value=round(value, 4),
        )
        for metric, value in figures.metrics.items()
    ] if figures else []  # fmt: skip
    tags = ["retrieval", "two-tower", "dssm"]
    return ModelCardData(
        library_name=library, pipeline_tag="feature-extraction", tags=tags, model_name=name,
        eval_results=measured or None,
    )  # fmt: skip


def _what(model: ModelFolder, target: str) -> str:
    config = model.config.model
    vectors = "of length 1" if config.score == "cosine" else "of any length"
    one_beta = f"{beta_of_all(model):.6g}"
    beta = one_beta if beta_weight(model) is None else "a learned number of the document's own"
    parameters = sum(parameter.numel() for parameter in model.model.parameters())
    known = {key: model.provenance[key] for key in ("stage", "step", "checkpoint") if key in model.provenance}
    taken = ", ".join(f"{key} {value}" for key, value in known.items()) or "of a model folder"
    return (
        f"Two towers for retrieval, trained with bigdssm: a query becomes a vector u and a document a vector w, both "
        f"of width {config.dim} and {vectors}. They score\n\n    alpha * <u, w> + beta\n\nwhere alpha is "
        f"{alpha(model):.6g} and beta is {beta}. {parameters:,} parameters; the weights ({taken}) have the checksum "
        f"`{model.checksum}`. Format of this folder: {target}."
    )


def _data(model: ModelFolder) -> str:
    lines = ["| side | feature | type | |", "|---|---|---|---|"]
    vocab_size = TextTokenizer(model.tokenizer_dir).vocab_size if model.tokenizer_dir else 0
    for side in SIDES:
        declared: dict[str, Feature] = getattr(model.schema, side)
        lines += [
            f"| {side} | {name} | {feature.type} | {feature.describe(vocab_size)} |"
            for name, feature in declared.items()
        ]
    fingerprint = model.provenance.get("dataset")
    trained_on = f"Trained on `{model.config.data.dir}`" + (f", fingerprint `{fingerprint}`." if fingerprint else ".")
    return trained_on + "\n\n" + "\n".join(lines)


def _figures(figures: Figures | None, exclude_seen: bool) -> str:
    if figures is None:
        return "None were recorded for exactly these weights; `bigdssm evaluate` measures them."
    lines = [f"| {figures.split} | {figures.where} |", "|---|---|"]
    lines += [f"| {name} | {value:.4f} |" for name, value in figures.metrics.items()]
    seen = "left out" if exclude_seen else "among them"
    return f"Over the whole catalogue, seen documents {seen}:\n\n" + "\n".join(lines)
