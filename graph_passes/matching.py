"""Questions that structural patterns share: attributes in old and new form, views, which image a tensor belongs to."""
from __future__ import annotations

from typing import List, NamedTuple, Optional, Tuple

import numpy as np
import onnx_graphsurgeon as gs

from graph_passes.graph import Graph, has_input, shape_of

VIEWS = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity"})  # same elements in the same order
_END = np.iinfo(np.int64).max


class SliceBounds(NamedTuple):
    """A Slice along one axis, normalised: elements start, start + 1, ..., stop - 1 of `axis`."""

    axis: int
    start: int
    stop: int


class ImageOf(NamedTuple):
    """Tensor = image number `image` of `base`, whose dimension 0 is the batch; element order within the image is kept."""

    base: gs.Tensor
    image: int


def producer(tensor: gs.Tensor) -> Optional[gs.Node]:
    """The standard-domain node that makes `tensor`, None for inputs, initializers and custom ops' results."""
    return tensor.inputs[0] if tensor.inputs and tensor.inputs[0].domain == "" else None


def axes_of(graph: Graph, node: gs.Node) -> Optional[List[int]]:
    """`axes` of Squeeze, Unsqueeze, Reduce*: attribute or constant input; None when absent or computed."""
    if "axes" in node.attrs:
        return [int(axis) for axis in node.attrs["axes"]]
    value = graph.constant(node.inputs[1]) if has_input(node, 1) else None
    return None if value is None else [int(axis) for axis in value.ravel()]


def gather_index(graph: Graph, node: gs.Node, axis: int, rank: int) -> Optional[np.ndarray]:
    """Constant indices of a Gather along `axis` of a tensor of this rank, None when it is anything else."""
    if node.op != "Gather" or node.attrs.get("axis", 0) % rank != axis:
        return None
    return graph.constant(node.inputs[1])


def slice_bounds(graph: Graph, node: gs.Node, shape: Tuple[int, ...]) -> Optional[SliceBounds]:
    """The bounds of a one-axis Slice with step 1 of a tensor of this shape (-1: size unknown, bounds stay absolute)."""
    if node.op != "Slice" or len(node.inputs) < 3:
        return None
    parts = [graph.constant(t) if not t.is_empty() else None for t in node.inputs[1:5]]
    starts, ends = parts[0], parts[1]
    if starts is None or ends is None or starts.size != 1:
        return None
    axes = parts[2] if len(parts) > 2 and parts[2] is not None else np.array([0])
    if len(parts) > 3 and (parts[3] is None or parts[3].ravel()[0] != 1):
        return None
    axis = int(axes.ravel()[0]) % len(shape)
    start, stop, size = int(starts.ravel()[0]), int(ends.ravel()[0]), shape[axis]
    if size < 0:
        return SliceBounds(axis, start, stop) if start >= 0 and stop >= 0 else None
    start, stop = (min(max(edge + size if edge < 0 else edge, 0), size) for edge in (start, stop))
    return SliceBounds(axis, start, stop)


def behind_views(tensor: gs.Tensor) -> gs.Tensor:
    """Walk up through nodes that only change the shape."""
    node = producer(tensor)
    while node is not None and node.op in VIEWS:
        tensor = node.inputs[0]
        node = producer(tensor)
    return tensor


def image_of(graph: Graph, tensor: gs.Tensor) -> ImageOf:
    """The batch that `tensor` is one image of: behind views, a Gather, Slice or Split of one index of axis 0.

    A tensor that is not cut out of a batch is image 0 of itself.
    """
    inner = behind_views(tensor)
    node = producer(inner)
    index: Optional[int] = None
    if node is not None:
        shape = shape_of(node.inputs[0]) if node.inputs else None
        if shape and node.op == "Gather":
            value = gather_index(graph, node, 0, len(shape))
            if value is not None and value.size == 1:
                index = int(value.ravel()[0]) % shape[0]
        elif shape and node.op == "Slice":
            bounds = slice_bounds(graph, node, shape)
            if bounds is not None and bounds.axis == 0 and bounds.stop - bounds.start == 1:
                index = bounds.start
        elif shape and node.op == "Split" and node.attrs.get("axis", 0) % len(shape) == 0:
            if len(node.outputs) == shape[0]:
                index = next(i for i, output in enumerate(node.outputs) if output is inner)
    if index is None or node is None:
        return ImageOf(_behind_batch_views(tensor), 0)
    return ImageOf(_behind_batch_views(node.inputs[0]), index)


def _behind_batch_views(tensor: gs.Tensor) -> gs.Tensor:
    """Walk up through views that leave dimension 0 as it is."""
    node = producer(tensor)
    while node is not None and node.op in VIEWS:
        mine, theirs = shape_of(tensor), shape_of(node.inputs[0])
        if not mine or not theirs or mine[0] != theirs[0]:
            break
        tensor = node.inputs[0]
        node = producer(tensor)
    return tensor


def known_value(graph: Graph, tensor: gs.Tensor, depth: int = 16) -> Optional[np.ndarray]:
    """Value of a tensor that is constant although its producers are not all: one known column of a Concat, say."""
    value = graph.constant(tensor)
    node = producer(tensor)
    if value is not None or node is None or depth == 0:
        return value
    shape = shape_of(tensor)
    if node.op == "Cast" or node.op in VIEWS:
        inner = known_value(graph, node.inputs[0], depth - 1)
        if inner is None or shape is None:
            return None
        return inner.reshape(shape).astype(tensor.dtype if node.op == "Cast" else inner.dtype)
    source = shape_of(node.inputs[0]) if node.inputs else None
    if source is None or node.op not in ("Gather", "Slice"):
        return None
    if node.op == "Slice":
        bounds = slice_bounds(graph, node, source)
        picks = None if bounds is None else (bounds.axis, np.arange(bounds.start, bounds.stop))
    else:
        axis = node.attrs.get("axis", 0) % len(source)
        indices = graph.constant(node.inputs[1])
        picks = None if indices is None else (axis, indices % source[axis])
    return None if picks is None else _picked(graph, node.inputs[0], picks[0], picks[1], depth)


def _picked(graph: Graph, tensor: gs.Tensor, axis: int, indices: np.ndarray, depth: int) -> Optional[np.ndarray]:
    """Known value of `tensor[..., indices, ...]` where `tensor` is a Concat and all indices fall into known inputs."""
    whole = known_value(graph, tensor, depth - 1)
    if whole is not None:
        return np.take(whole, indices, axis)
    node = producer(tensor)
    shape = shape_of(tensor)
    if node is None or node.op != "Concat" or shape is None or node.attrs["axis"] % len(shape) != axis:
        return None
    first, result = 0, None
    for part in node.inputs:
        size = shape_of(part)
        if size is None:
            return None
        if indices.size and first <= indices.min() and indices.max() < first + size[axis]:
            value = known_value(graph, part, depth - 1)
            result = None if value is None else np.take(value, indices - first, axis)
        first += size[axis]
    return result
