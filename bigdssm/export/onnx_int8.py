"""Int8 quantization of an exported tower, with independent rows.

onnxruntime's dynamic quantization uses one scale per tensor, so a query's vector would depend on the other queries of
its batch. Here activations have a scale per row (token or vector).
"""

import logging
from pathlib import Path
from typing import Any

import numpy as np

LEVELS, ZERO_POINT = 127, 128  # of activations: uint8 ZERO_POINT ± LEVELS
LEAST_SCALE = 1e-30  # of a row of zeros, such as padding


def quantize(path: Path, out: Path) -> None:
    """Quantize the tower `path` to `out`: int8 weights per output channel, activations per row.

    Weights use 7 bits because AVX2 accumulates products in 16 bits with saturation; so the vectors do not depend on
    the processor.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # hides advice on static quantization
    try:
        quantize_dynamic(str(path), str(out), weight_type=QuantType.QInt8, per_channel=True, reduce_range=True)
    finally:
        root.setLevel(level)
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
