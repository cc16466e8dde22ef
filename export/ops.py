"""ROI-Align, greedy NMS and stop-gradient as torch custom ops, each with a readable reference.

These are the only operations of the detector that plain torch lacks. The exporter translates them to standard ONNX
(RoiAlign, NonMaxSuppression, Identity); the graph passes swap those for the IPU custom ops. Boxes are x1, y1, x2, y2 in
pixels of the input image, edges, half-open.
"""
from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_CHUNK_ELEMENTS = 1 << 24  # of the largest intermediate of ROI-Align: 64 MB of float32


@torch.library.custom_op("popdet::nms", mutates_args=())
def nms(scores: Tensor, boxes: Tensor, iou_threshold: float, max_keep: int, score_threshold: float) -> Tensor:
    """Greedy non-maximum suppression with a fixed capacity.

    scores f [B, N], boxes f [B, N, 4] -> indices of the kept rows, int32 [B, max_keep], by falling score, padded with -1.
    Rows are visited by falling score, ties by rising index; a row is kept if its IoU with every kept row is at most
    `iou_threshold`. A row whose score is NaN or not above `score_threshold`, or with a NaN coordinate, is absent.
    """
    keep = torch.full((scores.shape[0], max_keep), -1, dtype=torch.int32)
    for image in range(scores.shape[0]):
        kept = _nms_one(scores[image].float().cpu().numpy(), boxes[image].float().cpu().numpy(),
                        iou_threshold, max_keep, score_threshold)
        keep[image, : len(kept)] = torch.from_numpy(kept)
    return keep.to(scores.device)


def _nms_one(scores: np.ndarray, boxes: np.ndarray, iou_threshold: float, max_keep: int, score_threshold: float) -> np.ndarray:
    present = (scores > score_threshold) & ~np.isnan(boxes).any(axis=1)
    order = np.argsort(-scores, kind="stable")
    order = order[present[order]]
    threshold = np.float32(iou_threshold)
    x1, x2 = np.minimum(boxes[:, 0], boxes[:, 2]), np.maximum(boxes[:, 0], boxes[:, 2])
    y1, y2 = np.minimum(boxes[:, 1], boxes[:, 3]), np.maximum(boxes[:, 1], boxes[:, 3])
    area = (x2 - x1) * (y2 - y1)
    kept: list[int] = []
    while len(order) and len(kept) < max_keep:
        best, order = order[0], order[1:]
        kept.append(best)
        width = np.minimum(x2[best], x2[order]) - np.maximum(x1[best], x1[order])
        height = np.minimum(y2[best], y2[order]) - np.maximum(y1[best], y1[order])
        shared = np.maximum(width, 0) * np.maximum(height, 0)
        # shared > threshold * union is the quotient's test without 0 / 0 for boxes of no area
        order = order[~((shared > 0) & (shared / np.maximum(area[best] + area[order] - shared, 1e-30) > threshold))]
    return np.asarray(kept, dtype=np.int32)


@nms.register_fake
def _(scores: Tensor, boxes: Tensor, iou_threshold: float, max_keep: int, score_threshold: float) -> Tensor:
    return scores.new_empty((scores.shape[0], max_keep), dtype=torch.int32)


def interpolation_weights(start: Tensor, bin_size: Tensor, bins: int, sampling_ratio: int, length: int) -> Tensor:
    """Weight of every feature row (or column) in every output bin: [..., bins, length].

    start and bin_size [...] in feature pixels, already shifted by half a pixel. Each bin averages `sampling_ratio`
    bilinear samples at its sub-bin centres; a sample outside [-1, length] weighs nothing, others are clamped to the edge.
    """
    step = torch.arange(bins * sampling_ratio, dtype=start.dtype, device=start.device)
    at = start[..., None] + bin_size[..., None] * ((step + 0.5) / sampling_ratio)
    inside = (at >= -1) & (at <= length)
    distance = at.clamp(0, length - 1)[..., None] - torch.arange(length, dtype=start.dtype, device=start.device)
    weight = (1 - distance.abs()).clamp(min=0) * inside[..., None]
    return weight.unflatten(-2, (bins, sampling_ratio)).mean(dim=-2)


def _roi_weights(rois: Tensor, height: int, width: int, feature_shape: torch.Size, scale: float,
                 ratio: int) -> tuple[Tensor, Tensor]:
    start_x, start_y, end_x, end_y = (rois[..., :4] * scale - 0.5).unbind(-1)
    rows = interpolation_weights(start_y, (end_y - start_y) / height, height, ratio, feature_shape[2])
    columns = interpolation_weights(start_x, (end_x - start_x) / width, width, ratio, feature_shape[3])
    return rows, columns


def _chunks(rois: Tensor, channels: int, height: int, feature_width: int) -> range:
    return range(0, max(1, rois.shape[1]), max(1, _CHUNK_ELEMENTS // (rois.shape[0] * channels * height * feature_width)))


@torch.library.custom_op("popdet::roi_align", mutates_args=())
def roi_align(features: Tensor, rois: Tensor, height: int, width: int, spatial_scale: float, sampling_ratio: int) -> Tensor:
    """ROI-Align with half-pixel sampling (Mask R-CNN, arXiv 1703.06870; ONNX RoiAlign-16 `half_pixel`, average).

    features f [B, C, H, W], rois f [B, D, 4] in image pixels -> f [B, D, C, height, width]. Differentiable in the features;
    the rois receive no gradient. The pooling is separable, so it is two products with small interpolation matrices.
    """
    rows, columns = _roi_weights(rois, height, width, features.shape, spatial_scale, sampling_ratio)
    batch, count = rois.shape[:2]
    pooled = features.new_empty((batch, count, features.shape[1], height, width))
    chunks = _chunks(rois, features.shape[1], height, features.shape[3])
    for first in chunks:
        part = slice(first, first + chunks.step)
        pooled[:, part] = torch.einsum("bdih,bchw,bdjw->bdcij", rows[:, part], features, columns[:, part])
    return pooled


@roi_align.register_fake
def _(features: Tensor, rois: Tensor, height: int, width: int, spatial_scale: float, sampling_ratio: int) -> Tensor:
    return features.new_empty((rois.shape[0], rois.shape[1], features.shape[1], height, width))


@torch.library.custom_op("popdet::roi_align_backward", mutates_args=())
def roi_align_backward(grad: Tensor, rois: Tensor, feature_shape: list[int], spatial_scale: float,
                       sampling_ratio: int) -> Tensor:
    """Gradient of roi_align in its features: grad f [B, D, C, h, w] -> f [B, C, H, W]."""
    height, width = grad.shape[3:]
    rows, columns = _roi_weights(rois, height, width, torch.Size(feature_shape), spatial_scale, sampling_ratio)
    total = grad.new_zeros(feature_shape)
    chunks = _chunks(rois, feature_shape[1], height, feature_shape[3])
    for first in chunks:
        part = slice(first, first + chunks.step)
        total += torch.einsum("bdih,bdcij,bdjw->bchw", rows[:, part], grad[:, part], columns[:, part])
    return total


@roi_align_backward.register_fake
def _(grad: Tensor, rois: Tensor, feature_shape: list[int], spatial_scale: float, sampling_ratio: int) -> Tensor:
    return grad.new_empty(feature_shape)


def _keep_rois(ctx, inputs, output):  # type: ignore[no-untyped-def]
    features, rois, _, _, ctx.spatial_scale, ctx.sampling_ratio = inputs
    ctx.feature_shape = list(features.shape)
    ctx.save_for_backward(rois)


def _roi_align_gradient(ctx, grad):  # type: ignore[no-untyped-def]
    (rois,) = ctx.saved_tensors
    return roi_align_backward(grad, rois, ctx.feature_shape, ctx.spatial_scale, ctx.sampling_ratio), *[None] * 5


roi_align.register_autograd(_roi_align_gradient, setup_context=_keep_rois)


@torch.library.custom_op("popdet::top_rows", mutates_args=())
def top_rows(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of f [B, N], falling, ties by rising index: values f [B, count], index int32 [B, count].

    torch.topk leaves the order of ties open; equal logits are common on blank pictures. No gradient flows through it.
    """
    found, index = values.sort(dim=1, descending=True, stable=True)
    return found[:, :count].clone(), index[:, :count].to(torch.int32)


@top_rows.register_fake
def _(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    shape = (values.shape[0], count)
    return values.new_empty(shape), values.new_empty(shape, dtype=torch.int32)


@torch.library.custom_op("popdet::stop_gradient", mutates_args=())
def stop_gradient(x: Tensor) -> Tensor:
    """x itself, through which no gradient flows. (`detach` leaves no trace in an exported graph; this does.)"""
    return x.clone()


@stop_gradient.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


stop_gradient.register_autograd(lambda ctx, grad: None)
