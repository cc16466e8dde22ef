"""The region proposal network: objectness and box deltas for every anchor, and its losses."""
from __future__ import annotations

import torch
from torch import Tensor, nn

from export import ops
from export.network import boxes
from export.network.losses import binary_cross_entropy, smooth_l1
from popdet.config import NetworkConfig

TIE = 1e-5  # relative: anchors this close to a box's best IoU all count as its best, whatever the rounding


class RegionProposalNetwork(nn.Module):
    """features f [B, C, H, W] -> logits f [B, A], deltas f [B, A, 4]; A in layout [row][column][anchor]."""

    def __init__(self, channels: int, config: NetworkConfig):
        super().__init__()
        anchors = len(config.anchor_sizes) * len(config.anchor_ratios)
        self.conv = nn.Conv2d(channels, config.rpn_channels, 3, padding=1)
        self.objectness = nn.Conv2d(config.rpn_channels, anchors, 1)
        self.deltas = nn.Conv2d(config.rpn_channels, anchors * 4, 1)
        for layer in (self.conv, self.objectness, self.deltas):
            nn.init.normal_(layer.weight, std=0.01)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.relu(self.conv(features))
        logits = self.objectness(hidden).permute(0, 2, 3, 1).flatten(1)
        deltas = self.deltas(hidden).permute(0, 2, 3, 1).reshape(logits.shape[0], -1, 4)
        return logits, deltas


class RpnTarget(nn.Module):
    """Which anchors train the RPN, and towards what. All choices follow the random keys.

    anchors f [A, 4], gt_boxes f [B, G, 4], gt_count int32 [B], keys f [B, A] (permutations of 0..A-1) ->
    positive index int32 [B, P] with weight f [B, P] and deltas f [B, P, 4]; negative index int32 [B, N] with weight f [B, N].
    Positive: IoU at or above the threshold, or the best anchor of a box. Straddling anchors take part.
    """

    def __init__(self, config: NetworkConfig):
        super().__init__()
        self.positive_iou, self.negative_iou = config.rpn_positive_iou, config.rpn_negative_iou
        self.batch = config.rpn_batch
        self.positives = max(1, int(config.rpn_batch * config.rpn_positive_fraction))

    def forward(self, anchors: Tensor, gt_boxes: Tensor, gt_count: Tensor, keys: Tensor) -> tuple[Tensor, ...]:
        total = anchors.shape[0]
        exists = boxes.below(gt_count, gt_boxes.shape[1]).to(anchors.dtype)
        iou = boxes.pairwise_iou(anchors[None], gt_boxes) * exists[:, None]
        best_iou, best_gt = iou.amax(dim=2), iou.argmax(dim=2).to(torch.int32)
        best_of_gt = iou.amax(dim=1, keepdim=True)
        is_best = ((iou >= best_of_gt * (1 - TIE)) & (best_of_gt > 0)).to(iou.dtype).amax(dim=2) > 0
        positive = (best_iou >= self.positive_iou) | is_best
        negative = (best_iou < self.negative_iou) & ~positive

        rank, chosen = boxes.smallest(torch.where(positive, keys, keys + total), min(self.positives, total))
        weight = (rank < total).to(iou.dtype)
        room = self.batch - weight.sum(dim=1, keepdim=True)
        negative_rank, negative_index = boxes.smallest(torch.where(negative, keys, keys + total), min(self.batch, total))
        place = torch.arange(negative_index.shape[1], dtype=iou.dtype, device=iou.device)[None]
        negative_weight = ((negative_rank < total) & (place < room)).to(iou.dtype)

        matched = boxes.gather_rows(gt_boxes, boxes.gather_rows(best_gt, chosen))
        targets = boxes.encode(matched, anchors.index_select(0, chosen.flatten()).reshape(*chosen.shape, 4))
        weight, negative_weight = ops.stop_gradient(weight), ops.stop_gradient(negative_weight)
        return chosen, weight, ops.stop_gradient(targets), negative_index, negative_weight


class RpnLoss(nn.Module):
    """Binary cross entropy of the sampled anchors, smooth L1 of the positive ones, both / rpn_batch, mean over images."""

    def __init__(self, config: NetworkConfig):
        super().__init__()
        self.batch, self.beta = config.rpn_batch, config.rpn_smooth_l1_beta

    def forward(self, logits: Tensor, deltas: Tensor, targets: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        positive, positive_weight, target_deltas, negative, negative_weight = targets
        as_object = binary_cross_entropy(boxes.gather_rows(logits, positive), True) * positive_weight
        as_background = binary_cross_entropy(boxes.gather_rows(logits, negative), False) * negative_weight
        class_loss = (as_object.sum(dim=1) + as_background.sum(dim=1)) / self.batch
        error = smooth_l1(boxes.gather_rows(deltas, positive) - target_deltas, self.beta).sum(dim=2)
        box_loss = (error * positive_weight).sum(dim=1) / self.batch
        return class_loss.mean(), box_loss.mean()
