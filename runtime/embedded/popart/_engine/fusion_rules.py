"""Which convolutions one kernel computes with what stands around them, all float32.

    Clip -> Conv (3x3, group = channels) -> Clip    ->   popdet_embedded::depthwise
    Conv (3x3) -> Clip or Relu                      ->   popdet_embedded::winograd
    Conv (1x1) -> Add -> Clip or Relu               ->   popdet_embedded::pointwise, inference only
    the last -> mean over height and width          ->   popdet_embedded::pointwise_mean, inference only
    Conv (1x1) -> the first -> Conv (1x1) -> Add    ->   popdet_embedded::inverted_residual, inference, short rows
    roiAlign -> Add -> the same without its Conv    ->   popdet_embedded::inverted_residual_of_rois, so as well, many small maps
    Conv -> Mul (a number a channel)                ->   scaled.py, training only
    Add (of two maps)                               ->   the same, its gradient in memory: materialize.py, training only

Whatever is neither a Conv nor the mean nor roiAlign may be missing of the first six, of an inverted residual also the first
Conv (1x1). A rule takes an op of its type and says what would cover it, or None.
"""
from __future__ import annotations

import dataclasses
from collections.abc import Callable

from .fusion import Fused, Plan
from .fusion_patterns import (
    Bounds,
    adding,
    bias_of,
    clip_before,
    clip_behind,
    has_stride_1,
    is_depthwise,
    is_mean_over_pixels,
    is_plain,
    is_pointwise,
    pooling,
    scale_behind,
)
from .ir import Op

WINOGRAD_CHANNELS = 96  # with fewer, in or out, the transforms cost what the multiplications save
WINOGRAD_PIXELS = {True: 1024, False: 512}  # training or not; with fewer, transforming the filters does
MANY_MAPS, SMALL_MAP_BYTES = 8, 768 * 1024  # of RoIs; bytes a map, before and behind the 3x3 convolution
BETWEEN_BYTES, LEAST_ROWS = 768 * 1024, 4  # as inverted_residual.hpp's; rows that a task must read for few to be read twice


def depthwise(plan: Plan, op: Op) -> Fused | None:
    if not is_depthwise(plan, op):
        return None
    before, after = clip_before(plan, op), clip_behind(plan, op)
    parts, stride = [*before.ops, op, *after.ops], op.attr("strides", (1, 1))[0]

    def run(fused, x, filters, bias):
        from .depthwise import depthwise

        return depthwise(x, filters, _or_zeros(bias, x, filters.shape[0]), stride, list(before.bounds), list(after.bounds))

    return Fused(parts, [_op(op, (parts[0].inputs[0], op.inputs[1], bias_of(op)), parts[-1].outputs, run)])


def winograd(plan: Plan, op: Op) -> Fused | None:
    y = plan.graph.info[op.outputs[0]]
    if not (is_plain(plan, op, 3) and op.attr("group", 1) == 1 and has_stride_1(op)
            and min(plan.graph.info[op.inputs[0]].dims[1], y.dims[1]) >= WINOGRAD_CHANNELS
            and y.nelms() // y.dims[1] >= WINOGRAD_PIXELS[plan.training]):  # fmt: skip
        return None
    if plan.training and scale_behind(plan, op):
        return _scaled(plan, op, by_winograd=True)
    after = clip_behind(plan, op)
    parts = [op, *after.ops]

    def train(fused, x, filters, bias):
        from .winograd import winograd

        return winograd(x, filters, _or_zeros(bias, x, y.dims[1]), *after.bounds)

    def infer(fused, x, packed, bias):
        from .winograd import winograd_transformed

        return winograd_transformed(x, packed, _or_zeros(bias, x, y.dims[1]), *after.bounds)

    def transform(fused, filters):
        from .winograd import winograd_filters

        return winograd_filters(filters)

    if plan.training:
        return Fused(parts, [_op(op, (*op.inputs[:2], bias_of(op)), parts[-1].outputs, train)])
    packing = _packing(op, transform)
    return Fused(parts, [packing, _op(op, (op.inputs[0], *packing.outputs, bias_of(op)), parts[-1].outputs, infer)])


def pointwise(plan: Plan, op: Op) -> Fused | None:
    if plan.training or not is_pointwise(plan, op):
        return None
    parts, inputs, bounds, packing = _pointwise(plan, op)

    def run(fused, x, packed, bias, addend):
        from .pointwise import pointwise

        return pointwise(_strided(x, op), packed, _or_zeros(bias, x, plan.graph.info[op.outputs[0]].dims[1]), addend, *bounds)

    return Fused(parts, [packing, _op(op, inputs, parts[-1].outputs, run)])


def pointwise_mean(plan: Plan, op: Op) -> Fused | None:
    if plan.training or not is_pointwise(plan, op):
        return None
    parts, inputs, bounds, packing = _pointwise(plan, op)
    mean = plan.only_reader(parts[-1])
    if mean is None or not is_mean_over_pixels(mean):
        return None
    keep = mean.op_type == "GlobalAveragePool" or bool(mean.attr("keepdims", 1))

    def run(fused, x, packed, bias, addend):
        from .pointwise import pointwise_mean

        biases = _or_zeros(bias, x, plan.graph.info[op.outputs[0]].dims[1])
        means = pointwise_mean(_strided(x, op), packed, biases, addend, *bounds)
        return means[:, :, None, None] if keep else means

    return Fused([*parts, mean], [packing, _op(op, inputs, mean.outputs, run)])


def inverted_residual(plan: Plan, op: Op) -> Fused | None:
    """op: the depthwise convolution."""
    block = _narrowing(plan, op, _has_short_rows)
    if block is None:
        return None
    expand = plan.only_maker(block.parts[0])
    if expand is not None and not (is_pointwise(plan, expand) and has_stride_1(expand)):
        expand = None
    expanding = [expand] if expand is not None else []
    parts, packing = [*expanding, *block.parts], [_packing(conv, _pack_filters) for conv in (*expanding, block.project)]
    channels, clips = plan.graph.info[op.outputs[0]].dims[1], block.clips

    def run(fused, x, expand, expand_bias, filters, bias, project, project_bias, addend):
        from .inverted_residual import inverted_residual

        first = (None, None) if expand is None else (expand, _or_zeros(expand_bias, x, channels))
        biases = _or_zeros(bias, x, channels), _or_zeros(project_bias, x, block.outputs)
        return inverted_residual(x, *first, filters, biases[0], project, biases[1], addend, *clips)

    first = (*packing[0].outputs, bias_of(expand)) if expand is not None else ("", "")
    inputs = (parts[0].inputs[0], *first, *block.inputs(op, packing[-1]))
    return Fused(parts, [*packing, _op(op, inputs, parts[-1].outputs, run)])


def inverted_residual_of_rois(plan: Plan, op: Op) -> Fused | None:
    """op: the depthwise convolution."""
    block = _narrowing(plan, op, _has_many_small_maps)
    pooled = pooling(plan, block.parts[0]) if block is not None else None
    if block is None or pooled is None:
        return None
    (align, *others), column = pooled
    size, ratio = [align.attr("aligned_height"), align.attr("aligned_width")], align.attr("sampling_ratio", 1)
    scale, channels, clips = float(align.attr("spatial_scale")), plan.graph.info[op.outputs[0]].dims[1], block.clips

    def run(fused, features, rois, column, filters, bias, project, project_bias, addend):
        from .inverted_residual import inverted_residual_of_rois

        roi_bias = None if column is None else column.flatten()
        biases = _or_zeros(bias, features, channels), _or_zeros(project_bias, features, block.outputs)
        boxes = rois[..., :4].float()
        return inverted_residual_of_rois(
            features, boxes, roi_bias, filters, biases[0], project, biases[1], addend, size, scale, ratio, *clips
        )

    packing = _packing(block.project, _pack_filters)
    inputs = (*align.inputs[:2], column, *block.inputs(op, packing))
    return Fused([align, *others, *block.parts], [packing, _op(op, inputs, block.parts[-1].outputs, run)])


def scaled(plan: Plan, op: Op) -> Fused | None:
    pads = tuple(op.attr("pads", (0, 0, 0, 0)))
    x = plan.graph.info[op.inputs[0]]
    if (not plan.training or x.dtype != "float32" or len(x.dims) != 4 or pads[:2] != pads[2:] or not scale_behind(plan, op)
            or op.attr("auto_pad", "NOTSET") != "NOTSET"):  # fmt: skip
        return None
    return _scaled(plan, op, by_winograd=False)


def _scaled(plan: Plan, op: Op, by_winograd: bool) -> Fused:
    mul, scale = scale_behind(plan, op)

    def run(fused, x, filters, scale):
        from . import scaled, winograd

        if by_winograd:
            return scaled.scaled(x, filters, scale, winograd.convolve, winograd.differentiate)
        settings = op.attr("strides", (1, 1)), op.attr("pads", (0, 0, 0, 0))[:2], op.attr("dilations", (1, 1))
        return scaled.scaled(x, filters, scale, *scaled.plain(*map(list, settings), op.attr("group", 1)))

    return Fused([op, mul], [_op(op, (*op.inputs[:2], scale), mul.outputs, run)])


def residual(plan: Plan, op: Op) -> Fused | None:
    """op: an Add."""
    info = [plan.graph.info[name] for name in (*op.inputs, *op.outputs)]
    if not plan.training or len({(i.dims, i.dtype) for i in info}) > 1 or info[0].dtype != "float32" or len(info[0].dims) != 4:
        return None
    if not all(name in plan.makers for name in op.inputs):
        return None

    def run(fused, x, y):
        from .materialize import materialize

        total = x + y
        if total.requires_grad:
            total.register_hook(materialize)
        return total

    return Fused([op], [_op(op, op.inputs, op.outputs, run)])


# (the type of op that it looks at, the rule), the first that fits is taken
RULES = (
    ("Conv", inverted_residual_of_rois),
    ("Conv", inverted_residual),
    ("Conv", depthwise),
    ("Conv", winograd),
    ("Conv", pointwise_mean),
    ("Conv", pointwise),
    ("Conv", scaled),
    ("Add", residual),
)


@dataclasses.dataclass(frozen=True)
class _Narrowing:
    """An inverted residual from the clip before its depthwise convolution on."""

    parts: list[Op]
    project: Op
    addend: str
    outputs: int  # channels
    clips: tuple[int, list[float], list[float]]  # of the depthwise convolution: stride, bounds before and behind it

    def inputs(self, op: Op, packing: Op) -> tuple[str, ...]:
        """Of the fused op, behind those that its first half reads; op: the depthwise convolution."""
        return op.inputs[1], bias_of(op), *packing.outputs, bias_of(self.project), self.addend


def _narrowing(plan: Plan, op: Op, fits: Callable[[Plan, Op], bool]) -> _Narrowing | None:
    """fits: whether the kernel is worth it for this depthwise convolution."""
    if plan.training or not is_depthwise(plan, op) or not fits(plan, op):
        return None
    before, after = clip_before(plan, op), clip_behind(plan, op)
    project = plan.only_reader([op, *after.ops][-1])
    if project is None or not is_pointwise(plan, project) or not has_stride_1(project):
        return None
    adds, addend = adding(plan, project)
    clips = (op.attr("strides", (1, 1))[0], list(before.bounds), list(after.bounds))
    outputs = plan.graph.info[project.outputs[0]].dims[1]
    return _Narrowing([*before.ops, op, *after.ops, project, *adds], project, addend, outputs, clips)


def _pointwise(plan: Plan, op: Op) -> tuple[list[Op], tuple[str, ...], Bounds, Op]:
    """What one matrix product computes, the Conv first: (the ops, its inputs, bounds, the op that packs the filters)."""
    adds, addend = adding(plan, op)
    after, packing = clip_behind(plan, [op, *adds][-1]), _packing(op, _pack_filters)
    return [op, *adds, *after.ops], (op.inputs[0], *packing.outputs, bias_of(op), addend), after.bounds, packing


def _strided(x, conv: Op):
    """The pixels of x that a 1x1 convolution reads."""
    row_step, column_step = conv.attr("strides", (1, 1))
    return x[:, :, ::row_step, ::column_step]


def _has_many_small_maps(plan: Plan, op: Op) -> bool:
    x, y = plan.graph.info[op.inputs[0]], plan.graph.info[op.outputs[0]]
    return x.dims[0] >= MANY_MAPS and (x.nelms() + y.nelms()) // x.dims[0] * x.dtype.itemsize <= SMALL_MAP_BYTES


def _has_short_rows(plan: Plan, op: Op) -> bool:
    x, y = (plan.graph.info[name] for name in (op.inputs[0], op.outputs[0]))
    read, written = (i.dims[1] * i.dims[3] * i.dtype.itemsize for i in (x, y))
    stride = op.attr("strides", (1, 1))[0]
    rows = (BETWEEN_BYTES - (3 - stride) * read) // (stride * read + written)
    return stride * rows >= LEAST_ROWS


def _or_zeros(bias, x, channels: int):
    return x.new_zeros(channels) if bias is None else bias


def _op(conv: Op, inputs, outputs, run: Callable) -> Op:
    return Op(conv.domain, conv.op_type, conv.version, conv.name, tuple(inputs), tuple(outputs), module=conv.module, run=run)


def _packing(conv: Op, pack: Callable) -> Op:
    """The op that packs the filters of a convolution."""
    return _op(conv, (conv.inputs[1],), (f"{conv.outputs[0]}.packed",), pack)


def _pack_filters(fused, filters):
    from .pointwise import pack_filters

    return pack_filters(filters)
