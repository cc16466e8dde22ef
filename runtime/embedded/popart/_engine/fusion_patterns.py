"""What stands around a convolution in a plan, for fusion_rules.py. Nothing else may read what lies between."""
from __future__ import annotations

import numpy as np

from .fusion import Plan
from .ir import Op

LARGEST = float(np.finfo(np.float32).max)  # custom.LARGEST, without torch: no bound
NO_BOUNDS = (-LARGEST, LARGEST)

Bounds = tuple[float, float]


class Clip:
    """A Clip or Relu that a kernel takes along, or none: `ops` is [it] or []."""

    def __init__(self, op: Op | None):
        found = _bounds(op) if op is not None else None
        self.ops = [] if found is None else [op]
        self.bounds: Bounds = found or NO_BOUNDS


def clip_before(plan: Plan, op: Op) -> Clip:
    return Clip(plan.only_maker(op))


def clip_behind(plan: Plan, op: Op) -> Clip:
    return Clip(plan.only_reader(op))


def _bounds(op: Op) -> Bounds | None:
    """(low, high) of a Clip with both, known and in order, or of a Relu."""
    if op.domain not in ("", "ai.onnx"):
        return None
    if op.op_type == "Relu":
        return 0.0, LARGEST
    if op.op_type != "Clip":
        return None
    if op.version < 11:
        low, high = op.attr("min", None), op.attr("max", None)
    elif len(op.inputs) == 3 and 1 in op.constants and 2 in op.constants:
        low, high = op.constants[1].item(), op.constants[2].item()
    else:
        return None
    return (float(low), float(high)) if low is not None and high is not None and low < high else None


def adding(plan: Plan, op: Op) -> tuple[list[Op], str]:
    """([the Add that alone reads op's result, with a tensor of its shape], that tensor), or ([], "")"""
    adding = plan.only_reader(op)
    if adding is None or adding.op_type != "Add" or adding.domain not in ("", "ai.onnx"):
        return [], ""
    other = adding.inputs[1] if adding.inputs[0] == op.outputs[0] else adding.inputs[0]
    same = tuple(plan.graph.info[other].dims) == tuple(plan.graph.info[op.outputs[0]].dims)
    return ([adding], other) if same else ([], "")


def scale_behind(plan: Plan, op: Op) -> tuple[Op, str] | None:
    """(the Mul that alone reads the result of a convolution without bias, with a number a channel, those), or None"""
    mul = plan.only_reader(op) if not bias_of(op) else None
    if mul is None or mul.op_type != "Mul" or mul.domain not in ("", "ai.onnx"):
        return None
    other = mul.inputs[1] if mul.inputs[0] == op.outputs[0] else mul.inputs[0]
    channels, dims = plan.graph.info[op.outputs[0]].dims[1], tuple(plan.graph.info[other].dims)
    return (mul, other) if dims in ((1, channels, 1, 1), (channels, 1, 1)) else None


def pooling(plan: Plan, op: Op) -> tuple[list[Op], str] | None:
    """([roiAlign, Reshape to [B * D,C,h,w], perhaps the Add of a value a channel], the tensor of those values or "") that make
    the first input of op, a float32 map, and that nothing else reads."""
    maps = tuple(plan.graph.info[op.inputs[0]].dims)
    reader, position, adding, column = op, 0, [], ""
    add = plan.only_maker(op)
    if add is not None and add.op_type == "Add" and add.domain in ("", "ai.onnx"):
        dims = [tuple(plan.graph.info[name].dims) for name in add.inputs]
        columns = [i for i in (0, 1) if dims[i] in ((1, maps[1], 1, 1), (maps[1], 1, 1)) and dims[1 - i] == maps]
        if not columns:
            return None
        reader, position, adding, column = add, 1 - columns[0], [add], add.inputs[columns[0]]
    reshape = plan.only_maker(reader, position)
    if reshape is None or reshape.op_type != "Reshape" or reshape.domain not in ("", "ai.onnx"):
        return None
    align = plan.only_maker(reshape)
    if align is None or align.domain != "ai.graphcore" or align.op_type not in ("roiAlign", "roi_align"):
        return None
    pooled = tuple(plan.graph.info[align.outputs[0]].dims)
    return ([align, reshape, *adding], column) if (pooled[0] * pooled[1], *pooled[2:]) == maps else None


def is_mean_over_pixels(op: Op) -> bool:
    """Over height and width of a tensor [B,C,H,W]."""
    if op.domain not in ("", "ai.onnx"):
        return False
    axes = sorted(axis % 4 for axis in op.attr("axes", ()))
    return op.op_type == "GlobalAveragePool" or (op.op_type == "ReduceMean" and axes == [2, 3])


def is_plain(plan: Plan, op: Op, side: int) -> bool:
    """A float32 convolution of maps with side x side filters, padded by side // 2, not dilated."""
    x, w = plan.graph.info[op.inputs[0]], plan.graph.info[op.inputs[1]]
    return (len(x.dims) == 4 and tuple(w.dims[2:]) == (side, side) and x.dtype == "float32" and w.dtype == "float32"
            and tuple(op.attr("pads", (0, 0, 0, 0))) == (side // 2,) * 4 and op.attr("auto_pad", "NOTSET") == "NOTSET"
            and tuple(op.attr("dilations", (1, 1))) == (1, 1) and 0 not in x.dims)  # fmt: skip


def is_pointwise(plan: Plan, op: Op) -> bool:
    return op.op_type == "Conv" and op.domain in ("", "ai.onnx") and is_plain(plan, op, 1) and op.attr("group", 1) == 1


def is_depthwise(plan: Plan, op: Op) -> bool:
    x, w = plan.graph.info[op.inputs[0]], plan.graph.info[op.inputs[1]]
    return (is_plain(plan, op, 3) and tuple(w.dims) == (x.dims[1], 1, 3, 3) and op.attr("group", 1) == x.dims[1] > 1
            and tuple(op.attr("strides", (1, 1))) in ((1, 1), (2, 2)))  # fmt: skip


def has_stride_1(op: Op) -> bool:
    return tuple(op.attr("strides", (1, 1))) == (1, 1)


def bias_of(conv: Op) -> str:
    """The bias's name, "" for none."""
    return conv.inputs[2] if len(conv.inputs) > 2 else ""
