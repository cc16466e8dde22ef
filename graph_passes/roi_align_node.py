"""What passes ask of an ONNX RoiAlign: its grid, who reads it, and the RoIs of a coarser grid on the same samples."""
from __future__ import annotations

from typing import List, NamedTuple, Optional, Tuple

import numpy as np
import onnx_graphsurgeon as gs

from graph_passes.graph import Graph, shape_of

COORDINATES_ROLE = "coordinates"  # of nodes that compute pixels: half_precision leaves them alone


class Pointwise(NamedTuple):
    """A 1x1 convolution without padding, groups or dilation that reads a RoiAlign."""

    node: gs.Node
    stride: int  # the same on both axes
    channels: Tuple[int, int]  # in, out


def pointwise_reader(node: gs.Node, tensor: gs.Tensor) -> Optional[Pointwise]:
    """`node` as a Pointwise whose input is `tensor`; None when it is anything else."""
    weight = shape_of(node.inputs[1]) if node.op == "Conv" and node.domain == "" else None
    if weight is None or node.inputs[0] is not tensor or weight[2:] != (1, 1) or node.attrs.get("group", 1) != 1:
        return None
    strides = node.attrs.get("strides", [1, 1])
    if node.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID") or any(node.attrs.get("pads", [])):
        return None
    return Pointwise(node, int(strides[0]), (weight[1], weight[0])) if strides[0] == strides[1] else None


def grid(node: gs.Node) -> Tuple[int, int]:
    """Bins of a RoiAlign: (rows, columns)."""
    return int(node.attrs.get("output_height", 1)), int(node.attrs.get("output_width", 1))


def strided_grid(node: gs.Node, stride: int) -> Tuple[int, int]:
    """How many bins a 1x1 convolution of this stride reads: (rows, columns)."""
    rows, columns = grid(node)
    return (rows - 1) // stride + 1, (columns - 1) // stride + 1


def is_half_pixel(graph: Graph, node: gs.Node) -> bool:
    """Whether a RoiAlign has half-pixel coordinates (aligned=True); without the attribute its opset decides."""
    default = "half_pixel" if graph.opset >= 16 else "output_half_pixel"
    return node.attrs.get("coordinate_transformation_mode", default) == "half_pixel"


def why_not_coarser(graph: Graph, node: gs.Node) -> str:
    """Why every n-th bin of this RoiAlign is no RoiAlign itself; "" where it is one."""
    if node.attrs.get("sampling_ratio", 0) != 1:
        return "its bins average several samples"
    if not is_half_pixel(graph, node):
        return "its RoIs are at least one pixel large (output_half_pixel)"
    return "" if shape_of(node.inputs[1]) is not None else "its RoIs have a dynamic shape"


def coarser_rois(graph: Graph, node: gs.Node, stride: int) -> gs.Tensor:
    """RoIs [N, 4] whose `strided_grid` bins have their centres at every `stride`-th bin of `node`, which has one sample a bin.

    With b the size of a bin and k bins of the coarser grid: x1' = x1 - (stride - 1) / 2 * b, x2' = x1' + k * stride * b. That
    is linear in the corners, so it is one product with a constant matrix.
    """
    rows, columns = grid(node)
    coarse_rows, coarse_columns = strided_grid(node, stride)
    matrix = np.zeros((4, 4))  # of corner (row) in new corner (column)
    for axis, (bins, kept) in enumerate(((columns, coarse_columns), (rows, coarse_rows))):
        low, high = axis, axis + 2
        for corner, size in ((low, -(stride - 1) / 2 / bins), (high, (kept * stride - (stride - 1) / 2) / bins)):
            matrix[low, corner] = 1 - size  # low + size * (high - low)
            matrix[high, corner] = size
    rois = node.inputs[1]
    dtype = rois.dtype if rois.dtype is not None else np.float32
    corners = graph.add_constant(matrix, dtype, f"{node.name}/every_{stride}")
    made = graph.add_node("MatMul", [rois, corners], node, role=COORDINATES_ROLE).outputs[0]
    made.dtype, made.shape = np.dtype(dtype), list(rois.shape)
    return made


def readers(graph: Graph, node: gs.Node) -> List[gs.Node]:
    """The nodes that read a RoiAlign's result, each once; a graph output counts as none."""
    return list({id(reader): reader for reader in node.outputs[0].outputs}.values())
