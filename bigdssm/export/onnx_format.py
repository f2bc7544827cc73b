"""`--format onnx`: one onnxruntime file per tower, with dynamic batch size and lengths.

OUT/query.onnx, OUT/doc.onnx   inputs by feature name, as in `dataset.tensors.Features`; output vectors [n, D+1]
OUT/query.int8.onnx            the query tower for online serving, quantized to int8 (onnx_int8)
OUT/schema.json, OUT/tokenizer/
"""

import importlib.util
import inspect
import json
import logging
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from bigdssm.checkpoints.model_folder import TOKENIZER_DIR, ModelFolder
from bigdssm.dataset.schema import SCHEMA_FILE
from bigdssm.errors import ConfigError
from bigdssm.export.formats import (
    ExportFormat,
    Parity,
    Probe,
    largest_difference,
    python_block,
    register_export,
    source_of,
)
from bigdssm.export.onnx_int8 import quantize
from bigdssm.export.onnx_model import onnx_session, run_onnx
from bigdssm.export.text_tower import SIDES, Side, alpha
from bigdssm.features import Feature
from bigdssm.loader.batch import Features, paddings
from bigdssm.models import DualEncoder
from bigdssm.models.dual_encoder import document_head, query_head
from bigdssm.utils.atomic import write_json

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
OPSET = 18
SINGLE_ROWS = 8  # probe rows that are also run alone, to check dynamic sizes


@register_export
@dataclass(frozen=True)
class OnnxExport(ExportFormat):
    """query.onnx and doc.onnx for onnxruntime; any towers."""

    format: ClassVar[str] = "onnx"
    library: ClassVar[str] = "onnx"

    int8: bool = True  # also write query.int8.onnx, the query tower quantized to int8

    def write(self, model: ModelFolder, out: Path) -> Parity:
        """Write both towers. Raises ConfigError: a package is not installed, or histories read contents of items."""
        if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
            raise ConfigError(f"--format {self.format} needs {', '.join(missing)}: pip install 'bigdssm[onnx]'")
        if model.model.content_ids:
            raise ConfigError(
                f"--format {self.format}: got model.query.history.items={model.config.model.query.history.items}, "
                "needs id: an exported query tower has no catalogue to read the contents of items from"
            )
        write_json(out / SCHEMA_FILE, model.schema.exported())
        if model.tokenizer_dir is not None:
            shutil.copytree(model.tokenizer_dir, out / TOKENIZER_DIR)
        probe = Probe(model)
        differences = {}
        for side in SIDES:
            features, path = probe.features[side], out / f"{side}.onnx"
            declared: dict[str, Feature] = getattr(model.schema, side)
            _export(_Tower(model, side), features, declared, path)
            # The probe batch, and single rows without padding: sizes and lengths are dynamic.
            session, trainers, fills = onnx_session(path), probe.vectors[side], paddings(declared)
            difference = largest_difference(run_onnx(session, features), trainers)
            for row in np.linspace(0, len(trainers) - 1, SINGLE_ROWS).astype(int):
                alone = {name: values[row : row + 1] for name, values in features.items()}
                for name, fill in fills.items():
                    alone[name] = alone[name][:, : max(1, int((alone[name] != fill).sum()))]
                difference = max(difference, largest_difference(run_onnx(session, alone), trainers[row : row + 1]))
            differences[side] = difference
        if self.int8:
            quantize(out / "query.onnx", out / "query.int8.onnx")
        return Parity(differences["query"], differences["doc"])

    def loading(self, model: ModelFolder, name: str) -> str:
        """Return the loading code and a note on the scores."""
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
        loading = python_block(source_of("onnx_loading.py"), *_inputs(model), dedent(code))
        scores = f"{loading}\n\nThe scores are the training scores."
        if not self.int8:
            return scores
        return (
            f"{scores} `query.int8.onnx` is the query tower quantized to int8: "
            f'`load_tower("{name}", "query", "query.int8.onnx")`; tools/bench/bench_onnx.py measures the cost in NDCG.'
        )


def _inputs(model: ModelFolder) -> list[str]:
    """Return the source of the feature types' input functions, and code that registers them."""
    types = {feature.type: feature for side in SIDES for feature in getattr(model.schema, side).values()}
    functions = dict.fromkeys(function for feature in types.values() for function in feature.onnx_code)
    table = ", ".join(f'"{name}": {feature.onnx_code[-1].__name__}' for name, feature in types.items())
    code = [inspect.getsource(function).replace("  # type: ignore[no-untyped-def]", "") for function in functions]
    return [*code, f"INPUTS.update({{{table}}})"]


class _Tower(nn.Module):
    """One side of a model as a module from features, in the schema's order, to index vectors."""

    def __init__(self, folder: ModelFolder, side: Side) -> None:
        super().__init__()
        self.model: DualEncoder = folder.model
        self._side, self._names = side, list(getattr(folder.schema, side))
        self._alpha = alpha(folder)

    def forward(self, *features: Tensor) -> Tensor:
        """Return float32 [n, D+1]: queries [u, 1], documents [alpha * w, beta]; without beta [n, D]."""
        given = dict(zip(self._names, features, strict=True))
        encoded = self.model(query=given) if self._side == "query" else self.model(doc=given)
        if self._side == "query":
            return query_head(encoded.U, self.model.has_beta)
        return document_head(encoded.W, self._alpha, encoded.beta)


def _export(tower: _Tower, features: Features, declared: dict[str, Feature], path: Path) -> None:
    rows = torch.export.Dim("rows")
    shapes = []
    for number, name in enumerate(features):
        # Numbered: dimension names must be Python identifiers, feature names need not be.
        feature = declared[name]
        is_list = feature.padding is not None
        lengths = {1: torch.export.Dim(f"length_{number}", max=feature.max_length)} if is_list else {}
        shapes.append({0: rows, **lengths})
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                tower.eval(), tuple(features.values()), dynamo=True, verbose=False, input_names=list(features),
                output_names=["vectors"], opset_version=OPSET, dynamic_shapes={"features": tuple(shapes)},
            )  # fmt: skip
            assert program is not None, "dynamo returns a program"
            for node in program.model.graph:
                for value in node.outputs:
                    # a feature may have the exporter's name of a result, such as "embedding"
                    if value.name in features:
                        value.name += ".result"
            program.save(str(path), external_data=False)
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
