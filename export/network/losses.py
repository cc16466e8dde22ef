"""Element-wise losses, from operations that every runtime of the chain has a gradient for."""
from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


def binary_cross_entropy(logits: Tensor, target: bool) -> Tensor:
    """Cross entropy of sigmoid(logits) with a constant target, stable for large logits; same shape."""
    return functional.softplus(-logits if target else logits)


def smooth_l1(error: Tensor, beta: float) -> Tensor:
    """Huber loss of Fast R-CNN (arXiv 1504.08083): 0.5 e^2 / beta below beta, |e| - 0.5 beta above; beta 0 is L1."""
    size = error.abs()
    if beta == 0:
        return size
    return torch.where(size < beta, 0.5 * error * error / beta, size - 0.5 * beta)


class TotalLoss(nn.Module):
    """The sum of the four losses of the paper, each weighted 1: scalars -> scalar."""

    def forward(self, rpn_class: Tensor, rpn_box: Tensor, roi_class: Tensor, roi_box: Tensor) -> Tensor:
        return rpn_class + rpn_box + roi_class + roi_box
