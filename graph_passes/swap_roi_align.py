"""Replace ONNX's RoiAlign by the IPU's custom op.

RoiAlign(X[B,C,H,W], rois[B*D,4], batch_indices){half_pixel, avg, sampling_ratio >= 1}
    ->  Reshape(ai.graphcore.roiAlign(X, Reshape(rois, [B,D,4])), [B*D,C,h,w])

The RoIs must be grouped by image, D for each: batch_indices known to be 0...0 1...1 ... (any, when B is 1). The indices may
be a constant or a known column of the RoIs ([image, x1, y1, x2, y2] rows, as torchvision writes them).
"""
from __future__ import annotations

from typing import List, Sequence

import numpy as np
import onnx_graphsurgeon as gs

from custom_ops.schema import ROI_ALIGN
from graph_passes.graph import Graph, shape_of
from graph_passes.matching import VIEWS, known_value, producer
from graph_passes.pass_manager import GraphPass, PassContext, PassResult
from graph_passes.roi_align_node import is_half_pixel


class SwapRoiAlign(GraphPass):
    """RoiAlign -> ai.graphcore.roiAlign where that is exact; a note says why where it is not."""

    name = "swap_roi_align"

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        """Swap every RoiAlign that matches."""
        changed, notes = 0, []
        for node in graph.nodes_of("RoiAlign"):
            reason = why_not(graph, node)
            if reason:
                notes.append(f"{graph.describe(node)} not swapped: {reason}")
                continue
            notes.append(f"{graph.describe(node)} swapped, {_swap(graph, node)}")
            changed += 1
        return PassResult(changed, notes)


def why_not(graph: Graph, node: gs.Node) -> str:
    """Why this RoiAlign has no exact custom-op form, with the remedy; "" when it has one."""
    attrs = node.attrs
    if attrs.get("mode", "avg") != "avg":
        return f"mode is '{attrs['mode']}', the IPU op averages; use mode avg"
    if not is_half_pixel(graph, node):
        return "coordinates are output_half_pixel (aligned=False); build the network with aligned=True"
    if attrs.get("sampling_ratio", 0) < 1:
        return "sampling_ratio is 0 (adaptive: as many samples as the RoI is large); build it with a fixed sampling_ratio"
    features, rois = shape_of(node.inputs[0]), shape_of(node.inputs[1])
    if features is None or rois is None:
        return f"features {node.inputs[0].shape} or RoIs {node.inputs[1].shape} have a dynamic shape; use a fixed capacity"
    batch = features[0]
    if rois[0] % batch or not rois[0]:
        return f"{rois[0]} RoIs do not divide among {batch} images; use the same capacity for every image"
    if batch > 1:
        indices = known_value(graph, node.inputs[2])
        if indices is None:
            return f"which of the {batch} images a RoI belongs to is computed at run time; group the RoIs by image"
        if not np.array_equal(indices.ravel(), np.repeat(np.arange(batch), rois[0] // batch)):
            return f"the RoIs are not grouped by image, {rois[0] // batch} each; order them by image"
    return ""


def _swap(graph: Graph, node: gs.Node) -> str:
    batch, channels, height, width = node.inputs[0].shape
    count = node.inputs[1].shape[0]
    rois = count // batch
    attrs = {
        "spatial_scale": float(node.attrs.get("spatial_scale", 1.0)),
        "aligned_height": int(node.attrs.get("output_height", 1)),
        "aligned_width": int(node.attrs.get("output_width", 1)),
        "batch_size": batch, "num_rois": rois, "height": height, "width": width, "channels": channels,
        "sampling_ratio": int(node.attrs["sampling_ratio"]),
    }
    boxes = reshaped(graph, node.inputs[1], [batch, rois, 4], node)
    (dtype, shape), = ROI_ALIGN.infer_shapes(attrs, [node.inputs[0].shape, boxes.shape],
                                             [node.inputs[0].dtype, boxes.dtype])
    aligned = graph.op("roiAlign", [node.inputs[0], boxes], node, attrs, "ai.graphcore", dtype, shape)
    node.outputs[0].shape = [count, *shape[2:]]
    replace_reshaped(graph, node.outputs[0], aligned, node)
    return f"{batch} images x {rois} RoIs, {shape[3]} x {shape[4]}, sampling_ratio {attrs['sampling_ratio']}"


def reshaped(graph: Graph, tensor: gs.Tensor, shape: Sequence[int], like: gs.Node) -> gs.Tensor:
    """`tensor` in another shape: itself, the tensor behind a Reshape that had this shape, or a new Reshape."""
    target: List[int] = [int(size) for size in shape]
    if list(tensor.shape) == target:
        return tensor
    node = producer(tensor)
    if node is not None and node.op == "Reshape" and shape_of(node.inputs[0]) == tuple(target):
        return node.inputs[0]
    constant = graph.add_constant(target, np.int64, f"{like.name}/shape")
    return graph.op("Reshape", [tensor, constant], like, dtype=tensor.dtype, shape=target)


def replace_reshaped(graph: Graph, old: gs.Tensor, new: gs.Tensor, like: gs.Node) -> None:
    """Let consumers of `old` read `new`, which has the same elements in the same order in another shape.

    A view of `old` that has the shape of `new` becomes `new` itself; all else reads a Reshape.
    """
    for consumer in list(old.outputs):
        if consumer.op in VIEWS and consumer.inputs[0] is old and shape_of(consumer.outputs[0]) == shape_of(new):
            if not graph.role_of(consumer):
                graph.replace(consumer.outputs[0], new)
                graph.remove(consumer)
    if old.outputs or graph.is_output(old):
        graph.replace(old, reshaped(graph, new, old.shape, like))
