"""Ops of a plan that one kernel computes together: depthwise 3x3 convolutions with the clips before and behind them.

    Clip -> Conv (group = channels) -> Clip   ->   popdet_embedded::depthwise

Only for a program that is compiled ahead of time, in float32, and where nothing else reads what lies between.
"""
from __future__ import annotations

import math
from collections.abc import Iterable

from .ir import Graph, Op

Steps = list  # of (op, the tensors that nothing reads afterwards), see program.plan
NO_BOUNDS = (-math.inf, math.inf)


def fuse(graph: Graph, steps: Steps, wanted: Iterable[str]) -> Steps:
    """The same plan with fused ops in place of what they cover. wanted: tensors that must exist."""
    wanted, readers, makers = set(wanted), {}, {}
    for op, _ in steps:
        for name in op.inputs:
            readers.setdefault(name, []).append(op)
        makers.update(dict.fromkeys(op.outputs, op))

    def alone(name: str) -> bool:
        return name not in wanted and len(readers.get(name, ())) == 1

    fused: dict[int, Op] = {}  # id of the last op that one covers -> the fused op
    covered: dict[int, int] = {}  # id of an op -> id of that last op
    for op, _ in steps:
        if not _is_depthwise(graph, op):
            continue
        source, last, before, after = op.inputs[0], op, NO_BOUNDS, NO_BOUNDS
        maker = makers.get(source)
        if maker is None or id(maker) in covered or not alone(source) or not _bounds(maker):
            maker = None
        else:
            source, before = maker.inputs[0], _bounds(maker)
        if alone(op.outputs[0]) and _bounds(readers[op.outputs[0]][0]):
            last = readers[op.outputs[0]][0]
            after = _bounds(last)
        covered.update((id(part), id(last)) for part in (maker, op, last) if part is not None)
        fused[id(last)] = _depthwise(op, source, last.outputs[0], before, after)
    return _merged(steps, fused, covered)


def _is_depthwise(graph: Graph, op: Op) -> bool:
    if op.op_type != "Conv" or op.domain not in ("", "ai.onnx"):
        return False
    x, w = graph.info[op.inputs[0]], graph.info[op.inputs[1]]
    stride = tuple(op.attr("strides", (1, 1)))
    return (len(x.dims) == 4 and tuple(w.dims) == (x.dims[1], 1, 3, 3) and op.attr("group", 1) == x.dims[1] > 1
            and x.dtype == "float32" and w.dtype == "float32" and stride in ((1, 1), (2, 2))
            and tuple(op.attr("pads", ())) == (1, 1, 1, 1) and op.attr("auto_pad", "NOTSET") == "NOTSET"
            and tuple(op.attr("dilations", (1, 1))) == (1, 1))  # fmt: skip


def _bounds(op: Op) -> tuple[float, float] | None:
    """(low, high) of a Clip with both, known and in order."""
    if op.op_type != "Clip" or op.domain not in ("", "ai.onnx"):
        return None
    if op.version < 11:
        low, high = op.attr("min", None), op.attr("max", None)
    elif len(op.inputs) == 3 and 1 in op.constants and 2 in op.constants:
        low, high = op.constants[1].item(), op.constants[2].item()
    else:
        return None
    return (float(low), float(high)) if low is not None and high is not None and low < high else None


def _depthwise(conv: Op, source: str, result: str, before, after) -> Op:
    stride = conv.attr("strides", (1, 1))[0]

    def run(op, x, filters, bias=None):
        from .depthwise import depthwise

        bias = x.new_zeros(x.shape[1]) if bias is None else bias
        return depthwise(x, filters, bias, stride, list(before), list(after))

    inputs = (source, *conv.inputs[1:])
    return Op(conv.domain, conv.op_type, conv.version, conv.name, inputs, (result,), module=conv.module, run=run)


def _merged(steps: Steps, fused: dict[int, Op], covered: dict[int, int]) -> Steps:
    """A fused op runs where the last one that it covers did, and frees what they all would have freed."""
    made, freed = [], {}
    for op, finished in steps:
        if id(op) not in covered:
            made.append((op, finished))
            continue
        last = covered[id(op)]
        freed[last] = (*freed.get(last, ()), *finished)
        if id(op) == last:
            made.append((fused[last], freed[last]))
    return made
