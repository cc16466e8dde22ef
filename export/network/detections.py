"""The final detections, inside the graph: scores, per-class boxes, one NMS over all classes, fixed capacity."""
from __future__ import annotations

import torch
from torch import Tensor, nn

from export import ops
from export.network import boxes
from popdet.config import NetworkConfig


class Detections(nn.Module):
    """proposals f [B, P, 4], count int32 [B], class logits f [B, P, C], deltas f [B, P, (C - 1) * 4] ->
    boxes f [B, D, 4], scores f [B, D], classes int32 [B, D] (1..C-1), count int32 [B]; rows from count on are zero.

    Boxes of different classes are moved apart by more than the image, so that one NMS treats each class by itself.
    """

    def __init__(self, config: NetworkConfig):
        super().__init__()
        self.classes = config.num_classes - 1
        self.image_size = (config.image_height, config.image_width)
        self.stds = config.box_stds
        self.score_threshold, self.iou_threshold = config.score_threshold, config.detection_nms_threshold
        self.capacity = config.max_detections

    def forward(self, proposals: Tensor, count: Tensor, logits: Tensor, deltas: Tensor) -> tuple[Tensor, ...]:
        batch, rows = proposals.shape[:2]
        exists = boxes.below(count, rows)[..., None]
        scores = torch.softmax(logits, dim=-1)[..., 1:]
        scores = torch.where(exists, scores, torch.full_like(scores, -1.0)).flatten(1)
        deltas = deltas.unflatten(2, (self.classes, 4))
        candidates = boxes.clip(boxes.decode(deltas, proposals[:, :, None], self.stds), *self.image_size)
        candidates = candidates.flatten(1, 2)
        class_of = torch.arange(1, self.classes + 1, dtype=torch.int32, device=proposals.device).repeat(rows)
        apart = (class_of.to(candidates.dtype) * (max(self.image_size) + 1))[None, :, None]
        keep = ops.nms(scores, candidates + apart, self.iou_threshold, self.capacity, self.score_threshold)
        exists = keep >= 0
        index = torch.where(exists, keep, 0)
        present = exists.to(scores.dtype)
        chosen_class = class_of.index_select(0, index.flatten()).reshape(batch, -1)
        return (boxes.gather_rows(candidates, index) * present[..., None], boxes.gather_rows(scores, index) * present,
                torch.where(exists, chosen_class, torch.zeros_like(chosen_class)), present.sum(dim=1).to(torch.int32))
