"""How the network's custom torch ops are written in standard ONNX operators (opset 18), for torch.onnx.export.

    popdet::nms           per image NonMaxSuppression -> box column -> padded with -1 -> the first K -> int32
    popdet::roi_align     RoiAlign(half_pixel, avg) over all images' rois, with a constant image index per roi
    popdet::top_rows      TopK, indices cast to int32
    popdet::stop_gradient Identity
"""
from __future__ import annotations

from typing import Any, Callable, Dict, Tuple

import numpy as np
import onnx_ir as ir
import torch
from onnxscript import FLOAT, INT32, opset18

import export.ops  # noqa: F401  (registers torch.ops.popdet.*)

# onnxscript's stubs type every operator by its schema; what passes between them here is a value of the graph.
op: Any = opset18


def _ints(values: Any) -> Any:
    return op.Constant(value=ir.tensor(np.asarray(values, dtype=np.int64)))


def _floats(values: Any) -> Any:
    return op.Constant(value=ir.tensor(np.asarray(values, dtype=np.float32)))


def _shape(value: Any) -> Tuple[int, ...]:
    return tuple(int(dim) for dim in value.shape)


def _nms(scores: FLOAT, boxes: FLOAT, iou_threshold: float, max_keep: int, score_threshold: float) -> INT32:
    """scores [B, N], boxes [B, N, 4] -> int32 [B, max_keep]. Corners may come in either order, so x and y need no swap."""
    batch, rows = _shape(scores)
    keeps = []
    for image in range(batch):
        image_boxes, image_scores = boxes, op.Reshape(scores, _ints([batch, 1, rows]))
        if batch > 1:
            window = (_ints([image]), _ints([image + 1]), _ints([0]))
            image_boxes, image_scores = op.Slice(boxes, *window), op.Slice(image_scores, *window)
        selected = op.NonMaxSuppression(image_boxes, image_scores, _ints([max_keep]), _floats([iou_threshold]),
                                        _floats([score_threshold]))  # int64 [number kept, (image, class, box)]
        kept = op.Gather(selected, _ints(2), axis=1)
        padded = op.Concat(kept, _ints([-1] * max_keep), axis=0)
        first = op.Slice(padded, _ints([0]), _ints([max_keep]), _ints([0]))
        first.shape, first.dtype = ir.Shape([max_keep]), ir.DataType.INT64  # inference cannot see that it is static
        keeps.append(op.Reshape(op.Cast(first, to=ir.DataType.INT32), _ints([1, max_keep])))
    return keeps[0] if batch == 1 else op.Concat(*keeps, axis=0)


def _roi_align(features: FLOAT, rois: FLOAT, height: int, width: int, spatial_scale: float,
               sampling_ratio: int) -> FLOAT:
    """features [B, C, H, W], rois [B, D, 4] -> [B, D, C, height, width]."""
    batch, regions, _ = _shape(rois)
    image_of_roi = _ints(np.repeat(np.arange(batch), regions))
    pooled = op.RoiAlign(features, op.Reshape(rois, _ints([batch * regions, 4])), image_of_roi, mode="avg",
                         output_height=height, output_width=width, sampling_ratio=sampling_ratio,
                         spatial_scale=spatial_scale, coordinate_transformation_mode="half_pixel")
    return op.Reshape(pooled, _ints([batch, regions, _shape(features)[1], height, width]))


def _top_rows(values: FLOAT, count: int) -> Tuple[FLOAT, INT32]:
    """values [B, N] -> values [B, count], indices int32 [B, count]."""
    largest, indices = op.TopK(values, _ints([count]), axis=1, largest=1, sorted=1)
    return largest, op.Cast(indices, to=ir.DataType.INT32)


def _stop_gradient(x: FLOAT) -> FLOAT:
    """x. The exporter marks the node with its role."""
    return op.Identity(x)


def translation_table() -> Dict[Callable, Callable]:
    """For torch.onnx.export(custom_translation_table=...)."""
    return {
        torch.ops.popdet.nms.default: _nms,
        torch.ops.popdet.roi_align.default: _roi_align,
        torch.ops.popdet.top_rows.default: _top_rows,
        torch.ops.popdet.stop_gradient.default: _stop_gradient,
    }
