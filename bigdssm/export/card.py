"""The model card (README.md) of exported folders, generated from the model's metadata."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCardData

from bigdssm.checkpoints.model_folder import ModelFolder
from bigdssm.export.formats import ExportFormat, Parity
from bigdssm.export.text_tower import SIDES, alpha, beta_weight, shared_beta
from bigdssm.features import TextTokenizer

CARD_FILE = "README.md"


@dataclass(frozen=True)
class ReportedMetrics:
    """Metrics of a model on a split."""

    split: str
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
            dataset_split=metrics.split, metric_type=metric, metric_value=round(value, 4),
        )
        for metric, value in metrics.metrics.items()
    ] if metrics else []  # fmt: skip
    metadata = ModelCardData(
        library_name=kind.library, pipeline_tag="feature-extraction", tags=["retrieval", "two-tower", "dssm"],
        model_name=name, eval_results=results or None,
    )  # fmt: skip

    config = model.config.model
    vectors = "of norm 1" if config.score == "cosine" else "of any norm"
    beta = f"{shared_beta(model):.6g}" if beta_weight(model) is None else "a learned number per document"
    parameters = sum(parameter.numel() for parameter in model.model.parameters())
    origin = {key: model.provenance[key] for key in ("stage", "step", "checkpoint") if key in model.provenance}
    weights = ", ".join(f"{key} {value}" for key, value in origin.items()) or "of a model folder"
    description = (
        f"A two-tower retrieval model, trained with bigdssm: it encodes a query as a vector u and a document as a "
        f"vector w, both of width {config.dim} and {vectors}. The score is\n\n    alpha * <u, w> + beta\n\nwhere alpha "
        f"is {alpha(model):.6g} and beta is {beta}. {parameters:,} parameters; checksum of the weights ({weights}): "
        f"`{model.checksum}`. Format of this folder: {kind.format}."
    )

    vocab_size = TextTokenizer(model.tokenizer_dir).vocab_size if model.tokenizer_dir else 0
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
        table = f"| {metrics.split} | {metrics.source} |\n|---|---|\n{values}"
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
