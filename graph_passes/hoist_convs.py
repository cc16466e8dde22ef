"""Move 1x1 convolutions from the pooled RoIs onto the feature map that all RoIs share.

Conv 1x1, stride s (RoiAlign[h,w](X, rois), W[, b])  ->  [Add](RoiAlign[ceil(h/s), ceil(w/s)](Conv 1x1(X, W), rois')[, b])
ROI-Align is linear in X, and so is the convolution; the bias comes after the pooling, because samples outside the image
weigh 0. Where that saves more arithmetic than pooling the other number of channels costs. With a stride the new RoiAlign has
the coarser grid of drop_unread_samples, so it needs one sample a bin.
The convolution is placed with the RoiAlign (its module path), the pooling with the convolution: what crosses between stages
is then the map instead of the pooled RoIs, and a stage map that names either module stays legal.
"""
from __future__ import annotations

import math
from typing import Optional, Tuple

import numpy as np
import onnx_graphsurgeon as gs

from graph_passes.graph import MOVED_KEY, Graph, has_input, metadata_of, shape_of
from graph_passes.pass_manager import GraphPass, PassContext, PassResult
from graph_passes.roi_align_node import (
    Pointwise,
    coarser_rois,
    grid,
    pointwise_reader,
    readers,
    strided_grid,
    why_not_coarser,
)

POOLED_VALUE = 32  # multiply-adds of a convolution that take the time of pooling one value, forward


class HoistConvs(GraphPass):
    """1x1 convolution behind RoiAlign -> before it, where that pays."""

    name = "hoist_convs"

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        """Rewrite every match that pays; a second run finds nothing to do."""
        changed, notes = 0, []
        for align in graph.nodes_of("RoiAlign"):
            if align.attrs.get("mode", "avg") != "avg":
                continue  # a maximum is not linear
            convs = [pointwise_reader(reader, align.outputs[0]) for reader in readers(graph, align)]
            remains = graph.is_output(align.outputs[0]) or any(conv is None for conv in convs)
            for conv in filter(None, convs):
                reason, saved = why_not(graph, align, conv, remains)
                if reason:
                    notes.append(f"{graph.describe(conv.node)} stays behind the pooling: {reason}")
                    continue
                notes.append(f"{graph.describe(conv.node)} moved to the feature map, {saved / 1e6:,.0f} M multiply-adds fewer")
                _hoist(graph, align, conv)
                changed += 1
        return PassResult(changed, notes)


def why_not(graph: Graph, align: gs.Node, conv: Pointwise, align_remains: bool) -> Tuple[str, int]:
    """(why `conv` cannot or should not move, "" when it should; multiply-adds saved)."""
    features, rois = shape_of(align.inputs[0]), shape_of(align.inputs[1])
    if features is None or rois is None:
        return "shapes are dynamic", 0
    if conv.stride != 1:
        reason = why_not_coarser(graph, align)
        if reason:
            return f"it has a stride, and of the RoiAlign {reason}", 0
    into, out = conv.channels
    rows, columns = strided_grid(align, conv.stride)
    values = rois[0] * rows * columns
    saved = (values - features[0] * features[2] * features[3]) * into * out
    pooled = values * out - (0 if align_remains else rois[0] * math.prod(grid(align)) * into)
    return ("" if saved > POOLED_VALUE * max(pooled, 0) and saved > 0 else "that would cost more than it saves"), saved


def _hoist(graph: Graph, align: gs.Node, conv: Pointwise) -> None:
    (batch, _, height, width), out, node = align.inputs[0].shape, conv.channels[1], conv.node
    rows, columns = strided_grid(align, conv.stride)
    dtype, count = node.outputs[0].dtype, align.outputs[0].shape[0]
    attrs = {"kernel_shape": [1, 1], "strides": [1, 1], "pads": [0, 0, 0, 0], "dilations": [1, 1], "group": 1}
    mapped = graph.op("Conv", [align.inputs[0], node.inputs[1]], align, attrs, dtype=dtype,
                      shape=[batch, out, height, width])
    metadata_of(mapped.inputs[0])[MOVED_KEY] = graph.module_of(node)
    rois = align.inputs[1] if conv.stride == 1 else coarser_rois(graph, align, conv.stride)
    bins = {"output_height": rows, "output_width": columns}
    pooled = graph.op("RoiAlign", [mapped, rois, align.inputs[2]], node, {**align.attrs, **bins}, dtype=dtype,
                      shape=[count, out, rows, columns])
    bias: Optional[gs.Tensor] = node.inputs[2] if has_input(node, 2) else None
    if bias is not None:
        target = graph.add_constant([1, out, 1, 1], np.int64, f"{node.name}/shape")
        column = graph.op("Reshape", [bias, target], node, dtype=dtype, shape=[1, out, 1, 1])
        pooled = graph.op("Add", [pooled, column], node, dtype=dtype, shape=[count, out, rows, columns])
    graph.replace(node.outputs[0], pooled)
    graph.remove(node)
