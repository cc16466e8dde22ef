"""popdet's custom ops, ai.graphcore nms and roiAlign (Graphcore's published names and signatures), and RoiAlign-10."""
from __future__ import annotations

import torch

from .. import custom  # noqa: F401  registers the torch ops
from ..registry import lowers
from .common import refuse, wide, wrap_index

NO_SCORE_THRESHOLD = -3.4e38  # the default: every row that has a score takes part


@lowers("ai.graphcore", "nms", 1)
def nms(op, scores, boxes):
    """scores [B,N], boxes [B,N,4] -> scores [B,N,1], kept boxes [B,K,4], 0 behind, keep int32 [B,K], -1 behind."""
    if scores.dim() != 2 or tuple(boxes.shape) != (*scores.shape, 4):
        raise refuse(op, f"scores [B,N] and boxes [B,N,4] are wanted, not {list(scores.shape)} and {list(boxes.shape)}")
    threshold, count = float(op.attr("threshold")), int(op.attr("numDetections"))
    if not 0.0 <= threshold <= 1.0 or count < 1:
        raise refuse(op, f"threshold {threshold} must be in [0, 1] and numDetections {count} at least 1")
    score_threshold = float(op.attr("score_threshold", NO_SCORE_THRESHOLD))
    keep = torch.ops.popdet_embedded.nms(
        scores.detach().float(), boxes.detach().float(), threshold, count, score_threshold
    )
    if not scores.shape[1]:
        return scores.unsqueeze(2), boxes.new_zeros((scores.shape[0], count, 4)), keep
    row = keep.clamp(min=0).long().unsqueeze(2).expand(-1, -1, 4)
    kept = torch.where(keep.unsqueeze(2) >= 0, torch.gather(boxes.detach(), 1, row), torch.zeros_like(boxes[:, :1]))
    return scores.unsqueeze(2), kept, keep


@lowers("ai.graphcore", "roiAlign", 1)
@lowers("ai.graphcore", "roi_align", 1)
def roi_align(op, features, rois):
    """features [B,C,H,W], rois [B,D,4 or 5] (x1, y1, x2, y2[, unused]) -> [B,D,C,aligned_height,aligned_width]."""
    if features.dim() != 4 or rois.dim() != 3 or rois.shape[2] not in (4, 5) or rois.shape[0] != features.shape[0]:
        raise refuse(op, f"features [B,C,H,W] and rois [B,D,4 or 5] are wanted, not {list(features.shape)} and "
                         f"{list(rois.shape)}")  # fmt: skip
    batch, channels, height, width = features.shape
    actual = {"batch_size": batch, "num_rois": rois.shape[1], "height": height, "width": width, "channels": channels}
    for name, size in actual.items():
        if op.attr(name, size) != size:
            raise refuse(op, f"the attribute '{name}' is {op.attr(name)}, but the input has {size}")
    out_height, out_width, ratio = op.attr("aligned_height"), op.attr("aligned_width"), op.attr("sampling_ratio", 1)
    if min(out_height, out_width, ratio) < 1:
        raise refuse(op, "aligned_height, aligned_width and sampling_ratio must be at least 1")
    scale, boxes = float(op.attr("spatial_scale")), rois.detach()[..., :4].float()
    return wide(lambda t: torch.ops.popdet_embedded.roi_align(t, boxes, out_height, out_width, scale, ratio), features)


@lowers("ai.onnx", "RoiAlign", 10)
def roi_align_10(op, features, rois, images):
    """features [B,C,H,W], rois [N,4], images int [N] -> [N,C,output_height,output_width], average, not half-pixel.

    As PopART's: 7 x 7 outputs and a sampling_ratio of 1 where the attributes are absent; `mode` is not read. A RoI is
    stretched to at least one feature pixel.
    """
    out_height, out_width = op.attr("output_height", 7), op.attr("output_width", 7)
    ratio, scale = op.attr("sampling_ratio", 1), float(op.attr("spatial_scale", 1.0))
    if features.dim() != 4 or rois.dim() != 2 or rois.shape[1] != 4 or images.shape != rois.shape[:1]:
        raise refuse(op, f"features [B,C,H,W], rois [N,4] and batch indices [N] are wanted, not {list(features.shape)}, "
                         f"{list(rois.shape)} and {list(images.shape)}")  # fmt: skip
    if ratio < 1:
        raise refuse(op, "sampling_ratio must be at least 1; an adaptive one has no static cost")
    start = rois.detach().float()[:, :2] * scale
    size = (rois.detach().float()[:, 2:] * scale - start).clamp(min=1.0)
    # The same RoIs in half-pixel terms, whose feature coordinates are x * scale - 0.5.
    shifted = torch.cat([start + 0.5, start + size + 0.5], dim=1) / scale
    batch, count = features.shape[0], rois.shape[0]
    everywhere = shifted.unsqueeze(0).expand(batch, -1, -1).contiguous()
    pooled = wide(
        lambda t: torch.ops.popdet_embedded.roi_align(t, everywhere, out_height, out_width, scale, ratio), features
    )
    rows = wrap_index(images, batch) * count + torch.arange(count, device=rois.device)
    return pooled.flatten(0, 1).index_select(0, rows)
