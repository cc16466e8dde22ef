"""The C4 box head: ROI-Align, the backbone's last stage on every RoI, class logits and class-specific deltas; its losses."""
from __future__ import annotations

import torch
from torch import Tensor, nn

from export import ops
from export.network.losses import smooth_l1
from popdet.config import NetworkConfig


class RoiAlign(nn.Module):
    """features f [B, C, H, W], rois f [B, R, 4] -> f [B * R, C, size, size]."""

    def __init__(self, config: NetworkConfig, stride: int):
        super().__init__()
        self.size, self.ratio, self.scale = config.roi_size, config.roi_sampling_ratio, 1.0 / stride

    def forward(self, features: Tensor, rois: Tensor) -> Tensor:
        return ops.roi_align(features, rois, self.size, self.size, self.scale, self.ratio).flatten(0, 1)


class RoiHead(nn.Module):
    """The backbone's last stage on pooled features f [N, C, size, size], averaged over space: f [N, channels]."""

    def __init__(self, layer4: nn.Module):
        super().__init__()
        self.layer4 = layer4

    def forward(self, pooled: Tensor) -> Tensor:
        return self.layer4(pooled).mean(dim=(2, 3))


class BoxPredictor(nn.Module):
    """hidden f [B * R, channels] -> class logits f [B, R, C], deltas f [B, R, (C - 1) * 4]."""

    def __init__(self, channels: int, config: NetworkConfig):
        super().__init__()
        self.class_logits = nn.Linear(channels, config.num_classes)
        self.box_deltas = nn.Linear(channels, (config.num_classes - 1) * 4)
        nn.init.normal_(self.class_logits.weight, std=0.01)
        nn.init.normal_(self.box_deltas.weight, std=0.001)
        nn.init.zeros_(self.class_logits.bias)
        nn.init.zeros_(self.box_deltas.bias)

    def forward(self, hidden: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        logits, deltas = self.class_logits(hidden), self.box_deltas(hidden)
        return logits.reshape(batch, -1, logits.shape[1]), deltas.reshape(batch, -1, deltas.shape[1])


class RoiLoss(nn.Module):
    """Cross entropy of the sampled RoIs, smooth L1 of the foreground, both / the image's sampled RoIs, mean over images."""

    def __init__(self, config: NetworkConfig):
        super().__init__()
        self.classes, self.beta = config.num_classes, config.roi_smooth_l1_beta

    def forward(self, logits: Tensor, deltas: Tensor, labels: Tensor, targets: Tensor, weight: Tensor,
                foreground: Tensor) -> tuple[Tensor, Tensor]:
        one_hot = (labels[..., None] == torch.arange(self.classes, dtype=torch.int32, device=labels.device)).to(logits.dtype)
        sampled = weight.sum(dim=1).clamp(min=1)
        cross_entropy = -(torch.log_softmax(logits, dim=-1) * one_hot).sum(dim=-1)
        class_loss = (cross_entropy * weight).sum(dim=1) / sampled
        of_label = (deltas.unflatten(2, (self.classes - 1, 4)) * one_hot[..., 1:, None]).sum(dim=2)
        box_error = smooth_l1(of_label - targets, self.beta).sum(dim=2)
        box_loss = (box_error * foreground).sum(dim=1) / sampled
        return class_loss.mean(), box_loss.mean()
