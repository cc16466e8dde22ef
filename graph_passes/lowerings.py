"""How single ops of ai.onnx 12..21 are written in opset 11: one function each, in the table of lower_opset.py.

A function edits the graph in place (`graph.sort()` drops what it leaves unused) or raises GraphError with the remedy.
"""
from __future__ import annotations

from typing import Any, List, Optional

import numpy as np
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.exporters.onnx_exporter import dtype_to_onnx

from graph_passes.graph import Graph, drop_inputs, has_input, shape_of


def axes_input_to_attribute(graph: Graph, node: gs.Node) -> None:
    """Squeeze, Unsqueeze, Reduce*(x, axes) -> op(x){axes}; a reduction over no axes at all may be nothing to do."""
    noop = bool(node.attrs.pop("noop_with_empty_axes", 0))
    axes = graph.require_constant(node, 1, "axes") if has_input(node, 1) else None
    drop_inputs(node, 1)
    if axes is not None and axes.size:
        node.attrs["axes"] = [int(axis) for axis in axes.ravel()]
    elif noop:
        _become(graph, node, node.inputs[0])


def split_input_to_attribute(graph: Graph, node: gs.Node) -> None:
    """Split(x, sizes) or Split(x){num_outputs} -> Split(x){split}."""
    parts = len(node.outputs)
    node.attrs.pop("num_outputs", None)
    if has_input(node, 1):
        sizes = [int(size) for size in graph.require_constant(node, 1, "split")]
    else:
        total = _static(graph, node, node.inputs[0])[node.attrs.get("axis", 0)]
        chunk = -(-total // parts)
        sizes = [chunk] * (parts - 1) + [total - chunk * (parts - 1)]
    drop_inputs(node, 1)
    node.attrs["split"] = sizes


def softmax(graph: Graph, node: gs.Node) -> None:
    """Softmax along one axis -> opset 11's, which flattens everything from `axis` on: transpose unless it is the last."""
    shape = _static(graph, node, node.inputs[0])
    rank = len(shape)
    axis = node.attrs.get("axis", -1) % rank
    if int(np.prod(shape[axis + 1:])) == 1:
        node.attrs["axis"] = axis
        return
    order = [i for i in range(rank) if i != axis] + [axis]
    moved = [shape[i] for i in order]
    dtype = node.inputs[0].dtype
    last = graph.op("Transpose", [node.inputs[0]], node, {"perm": order}, dtype=dtype, shape=moved)
    result = graph.op(node.op, [last], node, {"axis": rank - 1}, dtype=dtype, shape=moved)
    back = [int(i) for i in np.argsort(order)]
    _become(graph, node, graph.op("Transpose", [result], node, {"perm": back}, dtype=dtype, shape=shape))


def clip(graph: Graph, node: gs.Node) -> None:
    """Clip of integers, new in 12 -> Where(Less, Greater); floats stay."""
    if np.dtype(node.inputs[0].dtype).kind == "f":
        return
    value = node.inputs[0]
    for index, comparison in ((1, "Less"), (2, "Greater")):
        if has_input(node, index):
            bound = node.inputs[index]
            beyond = graph.op(comparison, [value, bound], node)
            value = graph.op("Where", [beyond, bound, value], node, dtype=value.dtype, shape=node.outputs[0].shape)
    _become(graph, node, value)


def extremum(graph: Graph, node: gs.Node) -> None:
    """Max and Min of integers, new in 12 -> Where(Greater | Less); floats stay."""
    if np.dtype(node.inputs[0].dtype).kind == "f":
        return
    comparison = "Greater" if node.op == "Max" else "Less"
    value = node.inputs[0]
    for other in list(node.inputs)[1:]:
        value = graph.op("Where", [graph.op(comparison, [value, other], node), value, other], node, dtype=value.dtype)
    _become(graph, node, value)


def or_equal(graph: Graph, node: gs.Node) -> None:
    """GreaterOrEqual -> Not(Less) for integers, Or(Greater, Equal) for floats: NaN >= NaN stays false."""
    strict, opposite = ("Greater", "Less") if node.op == "GreaterOrEqual" else ("Less", "Greater")
    inputs = list(node.inputs)
    if np.dtype(inputs[0].dtype).kind == "f":
        value = graph.op("Or", [graph.op(strict, inputs, node), graph.op("Equal", inputs, node)], node)
    else:
        value = graph.op("Not", [graph.op(opposite, inputs, node)], node)
    _become(graph, node, value)


def reshape(graph: Graph, node: gs.Node) -> None:
    """allowzero=1: a 0 in the target means 0, in opset 11 it means "copy": only the same when the target has none."""
    if node.attrs.pop("allowzero", 0) and (graph.require_constant(node, 1, "the target shape") == 0).any():
        raise graph.error(node, "reshapes to a dimension of size 0", "PopART has no empty tensors; fix the capacity")


def pad(graph: Graph, node: gs.Node) -> None:
    """Pad(x, pads, value, axes) -> Pad(x, pads over all axes, value)."""
    if node.attrs.get("mode", "constant") == "wrap":
        raise graph.error(node, "pads by wrapping", "opset 11 has none; write it as a Concat of slices")
    if not has_input(node, 3):
        return
    rank = len(_static(graph, node, node.inputs[0]))
    axes = [int(axis) % rank for axis in graph.require_constant(node, 3, "axes")]
    pads = graph.require_constant(node, 1, "pads")
    full = np.zeros(2 * rank, np.int64)
    full[axes], full[[rank + axis for axis in axes]] = pads[:len(axes)], pads[len(axes):]
    node.inputs[1] = graph.add_constant(full, np.int64, f"{node.name}/pads")
    node.inputs.pop()


def power(graph: Graph, node: gs.Node) -> None:
    """Pow with an exponent of another type -> exponent cast to the base's type."""
    base, exponent = node.inputs
    if np.dtype(base.dtype).kind != "f":
        raise graph.error(node, "is a power of integers", "opset 11 has none; write it as a product")
    if np.dtype(base.dtype) != np.dtype(exponent.dtype):
        node.inputs[1] = graph.op("Cast", [exponent], node, {"to": dtype_to_onnx(base.dtype)}, dtype=base.dtype,
                                  shape=exponent.shape)


def relu(graph: Graph, node: gs.Node) -> None:
    """Relu of integers, new in 14 -> Where(Less(x, 0), 0, x)."""
    value = node.inputs[0]
    if np.dtype(value.dtype).kind != "f":
        zero = graph.add_constant(0, value.dtype, f"{node.name}/zero")
        _become(graph, node, graph.op("Where", [graph.op("Less", [value, zero], node), zero, value], node))


def constant(graph: Graph, node: gs.Node) -> None:
    """Constant{value_ints, ...} -> Constant{value}."""
    if "value" not in node.attrs:
        value = graph.constant(node.outputs[0])
        if value is None:
            raise graph.error(node, "holds a string or sparse value", "PopART has tensors of numbers only")
        node.attrs = {"value": gs.Constant("", np.array(value))}


def cast(graph: Graph, node: gs.Node) -> None:
    """Cast{saturate} -> Cast: saturation concerns 8-bit floats only, which opset 11 has not."""
    node.attrs.pop("saturate", None)


def cast_like(graph: Graph, node: gs.Node) -> None:
    """CastLike(x, y) -> Cast(x){to = type of y}."""
    _become(graph, node, graph.op("Cast", [node.inputs[0]], node, {"to": dtype_to_onnx(node.inputs[1].dtype)}))


def batch_normalization(graph: Graph, node: gs.Node) -> None:
    """training_mode=0 is opset 11's one-output form; the training form differs in what it returns."""
    if node.attrs.pop("training_mode", 0):
        raise graph.error(node, "updates batch statistics", "freeze the norm, or use ai.graphcore.BatchNormalization")


def dropout(graph: Graph, node: gs.Node) -> None:
    """Only a Dropout that drops nothing has an opset-11 form that PopART runs the same way: x itself."""
    training = graph.constant(node.inputs[2]) if has_input(node, 2) else np.array(False)
    mask_used = len(node.outputs) > 1 and bool(node.outputs[1].outputs)
    if training is None or training.any() or mask_used:
        raise graph.error(node, "drops at random", "PopART's masks cannot be replayed; export the network without dropout")
    _become(graph, node, node.inputs[0])


def roi_align(graph: Graph, node: gs.Node) -> None:
    """output_half_pixel is opset 10's RoiAlign; half_pixel is swap_roi_align's job and has no older form."""
    if node.attrs.get("coordinate_transformation_mode", "half_pixel") != "output_half_pixel":
        from graph_passes.swap_roi_align import why_not

        raise graph.error(node, "half-pixel RoiAlign has no opset-11 form",
                          why_not(graph, node) or "run swap_roi_align before lower_opset")
    if node.attrs.get("sampling_ratio", 0) < 1 or node.attrs.get("mode", "avg") != "avg":
        raise graph.error(node, "PopART's RoiAlign averages a fixed number of samples", "set mode avg, sampling_ratio >= 1")
    del node.attrs["coordinate_transformation_mode"]


def hard_swish(graph: Graph, node: gs.Node) -> None:
    """x * HardSigmoid(x){alpha=1/6, beta=1/2}."""
    x = node.inputs[0]
    gate = graph.op("HardSigmoid", [x], node, {"alpha": 1 / 6, "beta": 0.5})
    _become(graph, node, graph.op("Mul", [x, gate], node))


def mish(graph: Graph, node: gs.Node) -> None:
    """x * tanh(softplus(x))."""
    x = node.inputs[0]
    gate = graph.op("Tanh", [graph.op("Softplus", [x], node)], node)
    _become(graph, node, graph.op("Mul", [x, gate], node))


def gelu(graph: Graph, node: gs.Node) -> None:
    """0.5 x (1 + erf(x / sqrt 2)), or its tanh approximation (ONNX Gelu-20)."""
    x = node.inputs[0]

    def binary(op: str, left: gs.Tensor, right: Any) -> gs.Tensor:
        other = right if isinstance(right, gs.Tensor) else graph.add_constant(right, x.dtype, f"{node.name}/c")
        return graph.op(op, [left, other], node)

    if node.attrs.get("approximate", "none") == "tanh":
        cubed = binary("Mul", binary("Mul", binary("Mul", x, x), x), 0.044715)
        inner = graph.op("Tanh", [binary("Mul", binary("Add", cubed, x), float(np.sqrt(2 / np.pi)))], node)
    else:
        inner = graph.op("Erf", [binary("Mul", x, float(np.sqrt(0.5)))], node)
    _become(graph, node, binary("Mul", binary("Mul", binary("Add", inner, 1.0), x), 0.5))


def celu(graph: Graph, node: gs.Node) -> None:
    """alpha * Elu(x / alpha)."""
    alpha = graph.add_constant(node.attrs.get("alpha", 1.0), node.inputs[0].dtype, f"{node.name}/alpha")
    elu = graph.op("Elu", [graph.op("Div", [node.inputs[0], alpha], node)], node, {"alpha": 1.0})
    _become(graph, node, graph.op("Mul", [elu, alpha], node))


def layer_normalization(graph: Graph, node: gs.Node) -> None:
    """(x - mean) / sqrt(mean((x - mean)^2) + epsilon) * scale [+ bias] over the axes from `axis` on."""
    if any(tensor.outputs or graph.is_output(tensor) for tensor in node.outputs[1:]):
        raise graph.error(node, "its mean or inverse deviation is used", "compute them with ReduceMean")
    x, scale = node.inputs[:2]
    rank = len(_static(graph, node, x))
    mean = {"axes": list(range(node.attrs.get("axis", -1) % rank, rank)), "keepdims": 1}
    centred = graph.op("Sub", [x, graph.op("ReduceMean", [x], node, mean)], node)
    variance = graph.op("ReduceMean", [graph.op("Mul", [centred, centred], node)], node, mean)
    epsilon = graph.add_constant(node.attrs.get("epsilon", 1e-5), x.dtype, f"{node.name}/epsilon")
    deviation = graph.op("Sqrt", [graph.op("Add", [variance, epsilon], node)], node)
    value = graph.op("Mul", [graph.op("Div", [centred, deviation], node), scale], node)
    if has_input(node, 2):
        value = graph.op("Add", [value, node.inputs[2]], node)
    _become(graph, node, value)


def trilu(graph: Graph, node: gs.Node) -> None:
    """Where(constant triangle, x, 0)."""
    shape = _static(graph, node, node.inputs[0])
    k = int(graph.require_constant(node, 1, "the diagonal")) if has_input(node, 1) else 0
    ones = np.ones(shape[-2:], np.bool_)
    mask = np.triu(ones, k) if node.attrs.get("upper", 1) else np.tril(ones, k)
    zero = graph.add_constant(0, node.inputs[0].dtype, f"{node.name}/zero")
    triangle = graph.add_constant(mask, np.bool_, f"{node.name}/triangle")
    _become(graph, node, graph.op("Where", [triangle, node.inputs[0], zero], node))


def _become(graph: Graph, node: gs.Node, value: gs.Tensor) -> None:
    """Let everything read `value` instead of the node's first output; the node goes with the next sort."""
    old = node.outputs[0]
    if value.dtype is None:
        value.dtype = old.dtype
    if isinstance(value, gs.Variable) and value.shape is None:
        value.shape = old.shape
    graph.replace(old, value)


def _static(graph: Graph, node: gs.Node, tensor: gs.Tensor) -> List[int]:
    shape: Optional[Any] = shape_of(tensor)
    if shape is None:
        raise graph.error(node, f"its input has the dynamic shape {tensor.shape}", "export it with fixed sizes")
    return list(shape)
