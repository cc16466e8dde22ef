"""What the ops with bodies return: Call, If, Loop, Scan, PackedDataBlock. Their nodes are gone through with the types given."""
from __future__ import annotations

import numpy as np
from onnx import helper, numpy_helper

from ..tensorinfo import TensorInfo


def outputs(node, known) -> dict[str, TensorInfo]:
    """{output: info} of a node with a body; empty for other nodes. known: the Inference of the graph around it."""
    rule = _RULES.get((node.domain or "ai.onnx", node.op_type))
    infos = rule(node, known) if rule else []
    return {name: info for name, info in zip(node.output, infos) if name and info is not None}


def _body(node, name):
    return next(a.g for a in node.attribute if a.name == name)


def _ints(node, name):
    return next((list(a.ints) for a in node.attribute if a.name == name), [])


def _results(graph, inputs, known) -> list[TensorInfo | None]:
    """The infos of a body's outputs, with these infos for the inputs whose type the body leaves open."""
    inner = known.inner()
    for tensor in graph.initializer:
        inner.initializer(tensor.name, numpy_helper.to_array(tensor))
    formal = [value for value in graph.input if value.name not in inner.info]
    for value, info in zip(formal, [*inputs, *[None] * len(formal)]):
        info = _declared(value) or info
        if info is not None:
            inner.info[value.name] = info
    for node in graph.node:
        inner.node(node)
    return [inner.info_of(value.name) for value in graph.output]


def _declared(value) -> TensorInfo | None:
    tensor = value.type.tensor_type
    if not tensor.elem_type or any(not d.HasField("dim_value") for d in tensor.shape.dim):
        return None
    return TensorInfo(helper.tensor_dtype_to_np_dtype(tensor.elem_type), [d.dim_value for d in tensor.shape.dim])


def _given(node, known, start=0):
    return [known.info_of(name) if name else None for name in node.input[start:]]


def _call(node, known):
    return _results(_body(node, "callee"), _given(node, known), known)


def _if(node, known):
    branches = [_results(_body(node, name), [], known) for name in ("then_branch", "else_branch")]
    return [a or b for a, b in zip(*branches)]


def _loop(node, known):
    """Inputs: trip count, condition, carried values. The body takes (iteration, condition, carried values) and gives
    (condition, carried values, scan outputs); a scan output has one entry an iteration."""
    carried = _given(node, known, 2)
    fixed = [TensorInfo(np.int64, ()), TensorInfo(np.bool_, ())]
    found = _results(_body(node, "body"), [*fixed, *carried], known)[1:]
    count = known.constant_of(node.input[0]) if node.input[0] else None
    scans = [_stacked(info, None if count is None else int(count.reshape(-1)[0]), 0) for info in found[len(carried) :]]
    return [*[a or b for a, b in zip(found, carried)], *scans]


def _stacked(info, count, axis):
    if info is None or count is None:
        return None
    axis %= len(info.dims) + 1
    return TensorInfo(info.dtype, (*info.dims[:axis], count, *info.dims[axis:]))


def _scan(node, known):
    """Inputs: states, then tensors that are gone through along an axis each (the first, unless scan_input_axes)."""
    given = _given(node, known)
    scanned = next(a.i for a in node.attribute if a.name == "num_scan_inputs")
    states, sequences = given[: len(given) - scanned], given[len(given) - scanned :]
    axes = _ints(node, "scan_input_axes") or [0] * scanned
    length, slices = None, []
    for info, axis in zip(sequences, axes):
        if info is None:
            slices.append(None)
            continue
        axis %= len(info.dims)
        length = info.dims[axis]
        slices.append(TensorInfo(info.dtype, (*info.dims[:axis], *info.dims[axis + 1 :])))
    found = _results(_body(node, "body"), [*states, *slices], known)
    stacked = found[len(states) :]
    out_axes = _ints(node, "scan_output_axes") or [0] * len(stacked)
    return [*found[: len(states)], *[_stacked(info, length, axis) for info, axis in zip(stacked, out_axes)]]


def _packed_data_block(node, known):
    """The callback gives [batch, longest sequence, ...]; packed again that is [resultSize, ...]."""
    (made,) = _results(_body(node, "callback"), [], known)
    rows = next(a.i for a in node.attribute if a.name == "resultSize")
    return [made and TensorInfo(made.dtype, (rows, *made.dims[2:]))]


_RULES = {
    ("ai.graphcore", "Call"): _call,
    ("ai.graphcore", "PackedDataBlock"): _packed_data_block,
    ("ai.onnx", "If"): _if,
    ("ai.onnx", "Loop"): _loop,
    ("ai.onnx", "Scan"): _scan,
}
