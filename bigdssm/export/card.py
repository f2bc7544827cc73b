"""The model card that every exported folder carries as its README.md: only what is known, nothing by heart."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

import yaml
from huggingface_hub import EvalResult, ModelCardData

from bigdssm.checkpoints.model_folder import ModelFolder
from bigdssm.export.formats import FORMATS, Parity
from bigdssm.export.sentence_transformers_format import CODE, brings_code, scores_by_dot
from bigdssm.export.text_tower import SIDES, alpha, beta_of_all, beta_weight
from bigdssm.features import Feature, TextTokenizer

CARD_FILE = "README.md"


@dataclass(frozen=True)
class Figures:
    """What was measured of a model."""

    split: str
    where: str
    metrics: Mapping[str, float]


def model_card(model: ModelFolder, name: str, target: str, parity: Parity, figures: Figures | None) -> str:
    """Return the card as Markdown with the front matter that model hubs read; its code runs beside the folder."""
    kind = FORMATS[target]
    parts = [
        f"---\n{_metadata(model, name, kind.library, figures).to_yaml()}\n---",
        f"# {name}",
        _what(model, target),
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


def load_model(model: ModelFolder, name: str) -> str:
    """Return how a folder of this format is loaded."""
    code = f"""
        from pathlib import Path
        from bigdssm.checkpoints.model_folder import load_model_folder

        folder = load_model_folder(Path("{name}"))
        folder.model  # a torch module; folder.schema, folder.config and folder.tokenizer_dir come with it
        """
    tools = "`bigdssm embed`, `search`, `serve` and `evaluate` take this folder as `--model`."
    return f"{_python(dedent(code))}\n\n{tools}"


def load_sentence_transformers(model: ModelFolder, name: str) -> str:
    """Return how a folder of this format is loaded."""
    trusted = ", trust_remote_code=True" if brings_code(model) else ""
    code = f"""
        from sentence_transformers import SentenceTransformer

        model = SentenceTransformer("{name}"{trusted})
        queries = model.encode_query(["the text of a query"])
        documents = model.encode_document(["the text of a document"])
        scores = model.similarity(queries, documents)
        """
    scores = (
        "The scores are the training scores: alpha and beta are inside the vectors. Search by dot product; do not "
        "normalise them."
        if scores_by_dot(model)
        else "The scores are cosines, <u, w>; alpha and beta are left out: the same for all, they rank nothing."
    )
    if trusted:
        scores += (
            f" `trust_remote_code` lets {CODE.name} of this folder run, which puts beta behind the cosine's vector."
        )
    routes = 'The two towers differ, so plain `encode` needs `task="query"` or `task="document"`.'
    return f"{_python(dedent(code))}\n\n{scores} {routes}"


def load_hf(model: ModelFolder, name: str) -> str:
    """Return how a folder of this format is loaded."""
    example = f"""
        encode_query, encode_document = load_tower("{name}/query"), load_tower("{name}/document")
        scores = encode_query(["the text of a query"]) @ encode_document(["the text of a document"]).T
        """
    return f"{_python(_source('hf_loading.py') + chr(10) * 2 + dedent(example))}\n\nThe scores are the training scores."


def load_onnx(model: ModelFolder, name: str) -> str:
    """Return how a folder of this format is loaded."""
    example = {}
    for side in SIDES:
        declared: dict[str, Feature] = getattr(model.schema, side)
        example[side] = ", ".join(f"{json.dumps(name)}: {feature.example}" for name, feature in declared.items())
    code = f"""
        encode_query, encode_document = load_tower("{name}", "query"), load_tower("{name}", "doc")
        queries = encode_query([{{{example["query"]}}}])
        documents = encode_document([{{{example["doc"]}}}])
        scores = queries @ documents.T
        """
    loading = _python(_source("onnx_loading.py"), *_onnx_inputs(model), dedent(code))
    return (
        f"{loading}\n\nThe scores are the training scores. "
        f"`query.int8.onnx` is the query tower with weights of 8 bits: "
        f'`load_tower("{name}", "query", "query.int8.onnx")`; tools/bench/bench_onnx.py measures the cost in NDCG.'
    )


def _onnx_inputs(model: ModelFolder) -> list[str]:
    """Return the code of the features' inputs, each function once, and the table of them."""
    types = {feature.type: feature for features in model.schema.sides.values() for feature in features.values()}
    functions = dict.fromkeys(function for feature in types.values() for function in feature.onnx_code)
    table = ", ".join(f'"{name}": {feature.onnx_code[-1].__name__}' for name, feature in types.items())
    code = [inspect.getsource(function).replace("  # type: ignore[no-untyped-def]", "") for function in functions]
    return [*code, f"INPUTS.update({{{table}}})"]


def _source(module: str) -> str:
    """Return the code of a module beside this one without its docstring; it need not be able to be imported here."""
    return Path(__file__).with_name(module).read_text(encoding="utf-8").split('"""', 2)[2].strip()


def _python(*parts: str) -> str:
    code = "\n\n".join(part.strip() for part in parts)
    return f"```python\n{code}\n```"
