"""`--format onnx`: one onnxruntime file per tower, with dynamic batch size and lengths.

OUT/query.onnx, OUT/doc.onnx   inputs by feature name, as in `dataset.tensors.Features`; output vectors [n, D+1]
OUT/query.int8.onnx            the query tower for online serving, quantized to int8 (onnx_int8)
OUT/schema.json, OUT/tokenizer/

onnxruntime's dynamic quantization uses one scale per tensor, so a query's vector would depend on the other queries of
its batch. Here activations have a scale per row (token or vector).
"""

import importlib.util
import inspect
import json
import logging
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent
from typing import Any, ClassVar

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
from bigdssm.export.onnx_model import onnx_session, run_onnx
from bigdssm.export.text_tower import SIDES, Side
from bigdssm.features import Feature
from bigdssm.loader.batch import Features, paddings
from bigdssm.models import DualEncoder
from bigdssm.models.dual_encoder import document_head, query_head
from bigdssm.utils.atomic import write_json

LEVELS, ZERO_POINT = 127, 128  # of activations: uint8 ZERO_POINT ± LEVELS
LEAST_SCALE = 1e-30  # of a row of zeros, such as padding


@contextmanager
def _errors_only(*names: str) -> Iterator[None]:
    """Hide the warnings of loggers within the block; '' is the root logger."""
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def quantize(path: Path, out: Path) -> None:
    """Quantize the tower `path` to `out`: int8 weights per output channel, activations per row.

    Weights use 7 bits because AVX2 accumulates products in 16 bits with saturation; so the vectors do not depend on
    the processor.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _errors_only(""):  # hides advice on static quantization
        quantize_dynamic(str(path), str(out), weight_type=QuantType.QInt8, per_channel=True, reduce_range=True)
    model = onnx.load(str(out))
    _scale_rows(model.graph)
    onnx.save(model, str(out))


def _scale_rows(graph: Any) -> None:
    """Replace each DynamicQuantizeLinear (one scale per tensor) by nodes with one scale per row."""
    from onnx import helper, numpy_helper

    def named(name: str, value: np.ndarray) -> str:
        graph.initializer.append(numpy_helper.from_array(value, f"rows.{name}"))
        return f"rows.{name}"

    def number(name: str, value: float) -> str:
        return named(name, np.array(value, np.float32))

    last, least, one = named("last", np.array([-1])), number("least", LEAST_SCALE), number("one", 1)
    zero_point, per_level = named("zero_point", np.array(ZERO_POINT, np.uint8)), number("per_level", 1 / LEVELS)
    nodes: list[Any] = []
    scales: dict[str, str] = {}  # row scale by tensor scale, which becomes 1
    zero_points: set[str] = set()
    scale_of: dict[str, str] = {}  # row scale by the product of a tensor's scale and the weights'

    for node in graph.node:
        if node.op_type == "DynamicQuantizeLinear":
            (given,), (codes, scale, point) = node.input, node.output
            row_scale = f"{scale}.row"
            nodes += [
                helper.make_node("Abs", [given], [f"{scale}.abs"]),
                helper.make_node("ReduceMax", [f"{scale}.abs", last], [f"{scale}.max"]),
                helper.make_node("Mul", [f"{scale}.max", per_level], [f"{scale}.step"]),
                helper.make_node("Max", [f"{scale}.step", least], [row_scale]),
                helper.make_node("Reciprocal", [row_scale], [f"{scale}.inverse"]),
                helper.make_node("Mul", [given, f"{scale}.inverse"], [f"{scale}.scaled"]),
                helper.make_node("QuantizeLinear", [f"{scale}.scaled", one, zero_point], [codes]),
            ]
            scales[scale] = row_scale
            zero_points.add(point)
            continue
        for i, name in enumerate(node.input):
            if name in zero_points:
                node.input[i] = zero_point
            elif name in scales:
                scale_of[node.output[0]] = scales[name]
                node.input[i] = one
            elif name in scale_of:
                # Applied outside of the product of both scales: onnxruntime fuses that with the matrix product even if
                # it is not a scalar per tensor and channel, and then uses the first row's scale for every row.
                (product,) = node.output
                node.output[0] = f"{product}.unscaled"
                nodes += [node, helper.make_node("Mul", [f"{product}.unscaled", scale_of[name]], [product])]
                break
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


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
        # The functions that convert values to inputs, by type of feature, and code that registers them.
        types = {feature.type: feature for side in SIDES for feature in getattr(model.schema, side).values()}
        functions = dict.fromkeys(function for feature in types.values() for function in feature.onnx_code)
        table = ", ".join(f'"{name}": {feature.onnx_code[-1].__name__}' for name, feature in types.items())
        inputs = [inspect.getsource(function).replace("  # type: ignore[no-untyped-def]", "") for function in functions]
        loading = python_block(source_of("onnx_loading.py"), *inputs, f"INPUTS.update({{{table}}})", dedent(code))
        scores = f"{loading}\n\nThe scores are the training scores."
        if not self.int8:
            return scores
        return (
            f"{scores} `query.int8.onnx` is the query tower quantized to int8: "
            f'`load_tower("{name}", "query", "query.int8.onnx")`; tools/bench/bench_onnx.py measures the cost in NDCG.'
        )


class _Tower(nn.Module):
    """One side of a model as a module from features, in the schema's order, to index vectors."""

    def __init__(self, folder: ModelFolder, side: Side) -> None:
        super().__init__()
        self.model: DualEncoder = folder.model
        self._side, self._names = side, list(getattr(folder.schema, side))
        self._alpha = folder.alpha

    def forward(self, *features: Tensor) -> Tensor:
        """Return float32 [n, D+1]: queries [u, 1], documents [alpha * w, beta]; without beta [n, D]."""
        given = dict(zip(self._names, features, strict=True))
        encoded = self.model(query=given) if self._side == "query" else self.model(doc=given)
        if self._side == "query":
            return query_head(encoded.U, self.model.has_beta)
        return document_head(encoded.W, self._alpha, encoded.beta)


def _export(tower: _Tower, features: Features, declared: dict[str, Feature], path: Path) -> None:
    import onnx

    rows = torch.export.Dim("rows")
    shapes = []
    for number, name in enumerate(features):
        # Numbered: dimension names must be Python identifiers, feature names need not be.
        feature = declared[name]
        is_list = feature.padding is not None
        lengths = {1: torch.export.Dim(f"length_{number}", max=feature.max_length)} if is_list else {}
        shapes.append({0: rows, **lengths})
    with _errors_only("torch.onnx", "onnxscript", "onnx_ir"), warnings.catch_warnings(), torch.no_grad():
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
        model = program.model_proto
        del model.graph.value_info[:]  # shapes within the graph: those of some versions of PyTorch are refused by onnx
        onnx.save(model, str(path))
