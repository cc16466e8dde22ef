"""Replace ONNX's NonMaxSuppression, whose result has a dynamic length, by the IPU's custom op of fixed capacity.

per image:  rows = NonMaxSuppression(boxes[1,N,4], scores[1,1,N], max, iou, score)      [n,3], n known at run time only
            keep = Slice(Concat(column 2 of rows, constant padding), 0:K)               any order, with Squeeze, Cast, ...
  ->        keep = Reshape(ai.graphcore.nms(scores[1,N], boxes[1,N,4]).keep)            [K], padded with -1
images of one batch with the same settings, cut out of the same boxes and scores  ->  one nms over [B,N]

Without a fixed capacity behind it there is no static form: the note then names the node that reads the dynamic result.
"""
from __future__ import annotations

from typing import Dict, List, Tuple

import numpy as np
import onnx_graphsurgeon as gs

from custom_ops.schema import DOMAIN, NMS, NO_SCORE_THRESHOLD
from graph_passes.graph import Graph, has_input, shape_of
from graph_passes.matching import VIEWS, ImageOf, image_of, producer
from graph_passes.nms_tail import NoMatch, Tail, follow_kept_rows
from graph_passes.pass_manager import GraphPass, PassContext, PassResult
from graph_passes.swap_roi_align import replace_reshaped, reshaped


class _Match:
    """One NonMaxSuppression that can be swapped: where its boxes and scores come from, settings, and its tail."""

    def __init__(self, node: gs.Node, tail: Tail, boxes: ImageOf, scores: ImageOf, attrs: Dict[str, float], rows: int):
        self.node, self.tail, self.boxes, self.scores, self.attrs, self.rows = node, tail, boxes, scores, attrs, rows


class SwapNms(GraphPass):
    """NonMaxSuppression and its padding -> ai.graphcore.nms; a note says why where it stays."""

    name = "swap_nms"

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        """Swap every NonMaxSuppression that matches."""
        notes: List[str] = []
        matches: List[_Match] = []
        for node in graph.nodes_of("NonMaxSuppression"):
            try:
                matches.append(_match(graph, node))
            except NoMatch as reason:
                notes.append(f"{graph.describe(node)} not swapped: {reason}")
        for group in _batches(matches):
            notes.append(_swap(graph, group))
        return PassResult(len(matches), notes)


def why_not(graph: Graph, node: gs.Node) -> str:
    """Why this NonMaxSuppression has no static form, with the remedy; "" when it has one."""
    try:
        _match(graph, node)
    except NoMatch as reason:
        return str(reason)
    return ""


def _match(graph: Graph, node: gs.Node) -> _Match:
    boxes, scores = shape_of(node.inputs[0]), shape_of(node.inputs[1])
    if boxes is None or scores is None:
        raise NoMatch(f"boxes {node.inputs[0].shape} or scores {node.inputs[1].shape} have a dynamic shape; fix the capacity")
    if node.attrs.get("center_point_box", 0):
        raise NoMatch("boxes are centre, width, height; convert them to corners before the NMS")
    if scores[1] != 1:
        raise NoMatch(f"it treats {scores[1]} classes at once; offset the boxes by class and use one NMS, or one NMS a class")
    if scores[0] != 1:
        raise NoMatch(f"it treats {scores[0]} images at once and mixes their rows; use one NMS an image")
    settings = [_setting(graph, node, index, what) for index, what in ((2, "the limit"), (3, "the IoU threshold"),
                                                                       (4, "the score threshold"))]
    limit = 0 if settings[0] is None else int(min(settings[0], boxes[1]))
    if limit < 1:
        raise NoMatch("max_output_boxes_per_class is 0, it keeps nothing; give it the capacity")
    tail = follow_kept_rows(graph, node)
    attrs = {"threshold": float(settings[1] or 0.0), "numDetections": max(1, min(limit, tail.capacity))}
    attrs["score_threshold"] = NO_SCORE_THRESHOLD if settings[2] is None else float(max(settings[2], NO_SCORE_THRESHOLD))
    box_image, score_image = image_of(graph, node.inputs[0]), image_of(graph, node.inputs[1])
    if not _is_batch(box_image, boxes[1] * 4) or not _is_batch(score_image, boxes[1]) or \
            box_image.base.shape[0] != score_image.base.shape[0]:
        box_image, score_image = ImageOf(node.inputs[0], 0), ImageOf(node.inputs[1], 0)
    return _Match(node, tail, box_image, score_image, attrs, boxes[1])


def _setting(graph: Graph, node: gs.Node, index: int, what: str):
    if not has_input(node, index):
        return None
    value = graph.constant(node.inputs[index])
    if value is None or value.size != 1:
        raise NoMatch(f"{what} is computed at run time; make it a constant")
    return value.ravel()[0]


def _is_batch(image: ImageOf, elements: int) -> bool:
    shape = shape_of(image.base)
    return shape is not None and len(shape) > 0 and int(np.prod(shape[1:])) == elements


def _batches(matches: List[_Match]) -> List[List[_Match]]:
    """Groups to be swapped by one op each: all images of a batch in order where that is possible, else one by one."""
    groups: Dict[Tuple, List[_Match]] = {}
    for match in matches:
        key = (match.boxes.base.name, match.scores.base.name, match.rows, tuple(sorted(match.attrs.items())))
        groups.setdefault(key, []).append(match)
    result: List[List[_Match]] = []
    for group in groups.values():
        group.sort(key=lambda match: match.boxes.image)
        complete = list(range(group[0].boxes.base.shape[0]))
        if [m.boxes.image for m in group] == complete == [m.scores.image for m in group]:
            result.append(group)
        else:
            for match in group:
                match.boxes, match.scores = ImageOf(match.node.inputs[0], 0), ImageOf(match.node.inputs[1], 0)
                result.append([match])
    return result


def _swap(graph: Graph, group: List[_Match]) -> str:
    first = group[0]
    like, batch, rows = first.node, len(group), first.rows
    scores = reshaped(graph, first.scores.base, [batch, rows], like)
    boxes = reshaped(graph, first.boxes.base, [batch, rows, 4], like)
    infos = NMS.infer_shapes(first.attrs, [scores.shape, boxes.shape], [scores.dtype, boxes.dtype])
    node = graph.add_node("nms", [scores, boxes], like, first.attrs, 3, DOMAIN)
    for tensor, (dtype, shape) in zip(node.outputs, infos):
        tensor.dtype, tensor.shape = np.dtype(dtype), list(shape)
    keep = node.outputs[2]
    lines = [keep] if batch == 1 else [_row(graph, keep, image, like) for image in range(batch)]
    finished = [_finish(graph, match, line) for match, line in zip(group, lines)]
    if batch > 1 and all(is_plain for is_plain in finished):
        _join(graph, group, keep)
    names = ", ".join(graph.module_of(match.node) or match.node.name for match in group[:1])
    return (f"{names}: {batch} NonMaxSuppression -> 1 nms, {rows} boxes an image, capacity {first.attrs['numDetections']}, "
            f"IoU {first.attrs['threshold']:g}")


def _row(graph: Graph, keep: gs.Tensor, image: int, like: gs.Node) -> gs.Tensor:
    bounds = [graph.add_constant([edge], np.int64, f"{like.name}/image") for edge in (image, image + 1, 0)]
    return graph.op("Slice", [keep, *bounds], like, dtype=np.int32, shape=[1, keep.shape[1]])


def _finish(graph: Graph, match: _Match, line: gs.Tensor) -> bool:
    """Give the tail's consumers the kept rows; True when they are the op's rows as they are (same length, -1 padded)."""
    tail, like = match.tail, match.node
    plain = True
    if line.shape[1] < tail.capacity:  # the NMS keeps fewer than the list has room for
        padding = graph.add_constant(np.full((1, tail.capacity - line.shape[1]), -1), np.int32, f"{like.name}/padding")
        line = graph.op("Concat", [line, padding], like, {"axis": 1}, dtype=np.int32, shape=[1, tail.capacity])
        plain = False
    if tail.fill != -1:
        zero = graph.add_constant(0, np.int32, f"{like.name}/zero")
        fill = graph.add_constant(tail.fill, np.int32, f"{like.name}/fill")
        empty = graph.op("Less", [line, zero], like, dtype=np.bool_, shape=line.shape)
        line = graph.op("Where", [empty, fill, line], like, dtype=np.int32, shape=line.shape)
        plain = False
    tail.line = line
    dtype = np.dtype(tail.result.dtype)
    if dtype != np.int32:
        to = gs.exporters.onnx_exporter.dtype_to_onnx(dtype)
        line = graph.op("Cast", [line], like, {"to": to}, dtype=dtype, shape=line.shape)
    replace_reshaped(graph, tail.result, line, like)
    return plain


def _join(graph: Graph, group: List[_Match], keep: gs.Tensor) -> None:
    """Concat(row 0, row 1, ...) of the whole batch -> the op's output itself."""
    lines = [match.tail.line for match in group]
    first = lines[0]
    for concat in {id(n): n for n in _beyond_views(first)}.values():
        sources = [_source(tensor) for tensor in concat.inputs]
        whole = len(sources) == len(lines) and all(a is b for a, b in zip(sources, lines))
        shape = shape_of(concat.outputs[0])
        if not whole or shape is None or concat.attrs["axis"] % len(shape) != 0:
            continue
        result: gs.Tensor = keep
        dtype = np.dtype(concat.outputs[0].dtype)
        if dtype != np.int32:
            to = gs.exporters.onnx_exporter.dtype_to_onnx(dtype)
            result = graph.op("Cast", [keep], concat, {"to": to}, dtype=dtype, shape=keep.shape)
        replace_reshaped(graph, concat.outputs[0], result, concat)


def _source(tensor: gs.Tensor) -> gs.Tensor:
    """`tensor` behind views and casts between integers: the row as `_row` cut it."""
    node = producer(tensor)
    while node is not None and node.op in (*VIEWS, "Cast"):
        tensor = node.inputs[0]
        node = producer(tensor)
    return tensor


def _beyond_views(tensor: gs.Tensor) -> List[gs.Node]:
    found, stack = [], list(tensor.outputs)
    while stack:
        node = stack.pop()
        if node.op == "Concat" and node.domain == "":
            found.append(node)
        elif node.op in (*VIEWS, "Cast") and node.domain == "" and np.dtype(node.outputs[0].dtype).kind == "i":
            stack.extend(node.outputs[0].outputs)
    return found
