"""Graphs inside ops: their types at the call site, and running one.

An op with subgraphs has its explicit inputs first and then what its subgraphs read from around them (Op.explicit).
"""
from __future__ import annotations

import numpy as np

from ..errors import popart_exception
from ..tensorinfo import TensorInfo
from . import shapes
from .ir import Graph, Op

_ITERATION, _CONDITION = TensorInfo("INT32", ()), TensorInfo("BOOL", ())


def annotate_nested(op: Op, around: Graph, mode) -> None:
    """Types of everything inside the subgraphs of one op; folds there as in the main graph."""
    read = op.inputs[op.explicit :]
    for graph in op.subgraphs():
        given = _input_infos(op, around, graph)
        if len(given) != len(graph.inputs):
            raise popart_exception(
                f"{op.describe()}: its subgraph has {len(graph.inputs)} inputs, the op gives it {len(given)}"
            )
        graph.info = {name: TensorInfo(array) for name, array in graph.constants.items()}
        graph.info.update(zip(graph.inputs, given))
        graph.info.update({name: around.info[name] for name in read})
        graph.constants.update({name: around.constants[name] for name in read if name in around.constants})
        graph.replicas = 1
        shapes.annotate_ops(graph, mode)


def _input_infos(op: Op, around: Graph, graph: Graph) -> list[TensorInfo]:
    explicit = [around.info[name] if name else None for name in op.inputs[: op.explicit]]
    if op.op_type == "If":
        return []
    if op.op_type == "Loop":
        return [_ITERATION, _CONDITION, *(device(info) for info in explicit[2:])]
    if op.op_type == "Scan":
        states = len(explicit) - op.attr("num_scan_inputs")
        axes = op.attr("scan_input_axes", ()) or (0,) * op.attr("num_scan_inputs")
        slices = [_without(info, axis) for info, axis in zip(explicit[states:], axes)]
        return [*(device(info) for info in explicit[:states]), *slices]
    if op.op_type == "PackedDataBlock":
        batch, longest = op.attr("callbackBatchSize"), op.attr("maxSequenceLengths")
        data = explicit[: 3 * len(longest) : 3]
        return [device(TensorInfo(i.dtype, (batch, size, *i.dims[1:]))) for i, size in zip(data, longest)]
    return [device(info) for info in explicit]


def device(info: TensorInfo) -> TensorInfo:
    return TensorInfo(shapes.device_dtype(info.dtype), info.dims)


def _without(info: TensorInfo, axis: int) -> TensorInfo:
    dims = list(info.dims)
    del dims[axis]
    return device(TensorInfo(info.dtype, dims))


def run(graph: Graph, inputs: list, around: dict) -> list:
    """The outputs of a subgraph. inputs: its own, in order. around: {name: tensor} of what it reads from outside."""
    values = {**around, **dict(zip(graph.inputs, inputs))}

    def value(name):
        if name in graph.constants:  # an annotated constant, also one from around, wins: folding relied on it
            return shapes.device_tensor(graph.constants[name])
        return values[name]

    for op in graph.ops:
        results = shapes.run_op(op, [value(name) if name else None for name in op.inputs])
        values.update({name: tensor for name, tensor in zip(op.outputs, results) if name})
    return [value(name) for name in graph.outputs]


def known_trip_count(op: Op) -> int | None:
    """The value of a Loop's first input where the build knows it."""
    count = op.constants.get(0)
    return None if count is None else int(np.asarray(count).reshape(-1)[0])
