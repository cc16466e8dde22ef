"""From RPN outputs to a fixed number of proposals: decode, clip, pre-NMS top-k, NMS, pad."""
from __future__ import annotations

import torch
from torch import Tensor, nn

from export import ops
from export.network import boxes
from popdet.config import NetworkConfig

ABSENT = -30000.0  # a score that half precision holds; NMS leaves out what is not above the next
PRESENT = -20000.0


class ProposalLayer(nn.Module):
    """logits f [B, A], deltas f [B, A, 4], anchors f [A, 4] -> proposals f [B, P, 4], origin int32 [B, P], count int32 [B].

    origin: the anchor that a proposal comes from. Rows of proposals from `count` on are zero. No gradient flows through it.
    """

    def __init__(self, config: NetworkConfig, training: bool):
        super().__init__()
        self.pre_nms = config.rpn_pre_nms_train if training else config.rpn_pre_nms_test
        self.post_nms = config.rpn_post_nms_train if training else config.rpn_post_nms_test
        self.threshold = config.rpn_nms_threshold
        self.min_size = config.rpn_min_size
        self.image_size = (config.image_height, config.image_width)

    def forward(self, logits: Tensor, deltas: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, deltas = ops.stop_gradient(logits), ops.stop_gradient(deltas)
        scores, index = ops.top_rows(logits, min(self.pre_nms, logits.shape[1]))
        chosen = anchors.index_select(0, index.flatten()).reshape(*index.shape, 4)
        candidates = boxes.clip(boxes.decode(boxes.gather_rows(deltas, index), chosen), *self.image_size)
        wide = (candidates[..., 2] - candidates[..., 0]) >= self.min_size
        high = (candidates[..., 3] - candidates[..., 1]) >= self.min_size
        scores = torch.where(wide & high, scores, torch.full_like(scores, ABSENT))
        keep = ops.nms(scores, candidates, self.threshold, self.post_nms, PRESENT)
        exists = keep >= 0
        kept = torch.where(exists, keep, 0)
        rows, origin = boxes.gather_rows(candidates, kept), boxes.gather_rows(index, kept)
        present = exists.to(rows.dtype)
        return rows * present[..., None], origin, present.sum(dim=1).to(torch.int32)
