"""Which proposals train the box head, and towards what (Fast R-CNN sampling). All choices follow the random keys."""
from __future__ import annotations

import torch
from torch import Tensor, nn

from export import ops
from export.network import boxes
from popdet.config import NetworkConfig


class ProposalTarget(nn.Module):
    """proposals f [B, P, 4], origin int32 [B, P], count int32 [B], gt_boxes f [B, G, 4], gt_classes int32 [B, G],
    gt_count int32 [B], keys f [B, A + G] (permutations) -> rois f [B, R, 4], labels int32 [B, R], deltas f [B, R, 4],
    weight f [B, R], foreground f [B, R].

    The ground truth joins the proposals. At most a fraction of the R rows is foreground, background fills the rest;
    rows that nothing fills have weight 0. A proposal's key is that of the anchor it comes from (origin): when rounding
    swaps or drops one proposal, the others keep their keys and the sample hardly changes.
    """

    def __init__(self, config: NetworkConfig):
        super().__init__()
        self.batch = config.roi_batch
        self.foreground = max(1, int(config.roi_batch * config.roi_positive_fraction))
        self.positive_iou = config.roi_positive_iou
        self.negative_low, self.negative_high = config.roi_negative_iou_low, config.roi_negative_iou_high
        self.stds = config.box_stds

    def forward(self, proposals: Tensor, origin: Tensor, count: Tensor, gt_boxes: Tensor, gt_classes: Tensor,
                gt_count: Tensor, keys: Tensor) -> tuple[Tensor, ...]:
        candidates = torch.cat([proposals, gt_boxes], dim=1)
        rows, total = candidates.shape[1], keys.shape[1]
        anchors = total - gt_boxes.shape[1]
        keys = torch.cat([boxes.gather_rows(keys[:, :anchors], origin), keys[:, anchors:]], dim=1)
        gt_exists = boxes.below(gt_count, gt_boxes.shape[1])
        exists = torch.cat([boxes.below(count, proposals.shape[1]), gt_exists], dim=1)
        iou = boxes.pairwise_iou(candidates, gt_boxes) * gt_exists.to(candidates.dtype)[:, None]
        best_iou, best_gt = iou.amax(dim=2), iou.argmax(dim=2).to(torch.int32)
        foreground = exists & (best_iou >= self.positive_iou)
        background = exists & (best_iou >= self.negative_low) & (best_iou < self.negative_high)

        # keys below `total` rank the foreground, the next `total` the background, the last the rows to leave out
        rank = torch.where(foreground, keys, torch.where(background, keys + total, keys + 2 * total))
        last = boxes.smallest(torch.where(foreground, keys, keys + total), min(self.foreground, rows))[0][:, -1:]
        rank = torch.where(foreground & (keys > last), keys + 2 * total, rank)
        order, chosen = boxes.smallest(rank, min(self.batch, rows))
        weight = (order < 2 * total).to(iou.dtype)
        is_foreground = (order < total).to(iou.dtype)

        rois = boxes.gather_rows(candidates, chosen)
        matched = boxes.gather_rows(best_gt, chosen)
        classes = boxes.gather_rows(gt_classes, matched)
        labels = torch.where(order < total, classes, torch.zeros_like(classes))
        deltas = boxes.encode(boxes.gather_rows(gt_boxes, matched), rois, self.stds)
        return (ops.stop_gradient(rois), labels, ops.stop_gradient(deltas), ops.stop_gradient(weight),
                ops.stop_gradient(is_foreground))
