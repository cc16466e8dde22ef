"""A small norm-free backbone for demos and tests: about 0.7 million weights, trains from scratch in minutes."""
from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from export.network.backbones.parts import BackboneParts


class Residual(nn.Module):
    """Two 3x3 convolutions beside a shortcut. The second starts at zero (Fixup, Zhang et al. 2019), so no norm is needed."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the same shape."""
        return functional.relu(x + self.conv2(functional.relu(self.conv1(x))))


class Down(nn.Module):
    """A 3x3 convolution of stride 2 with ReLU."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, 2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] -> [B, out, H/2, W/2]."""
        return functional.relu(self.conv(x))


def build_tiny() -> BackboneParts:
    """The parts with random weights drawn from torch's current generator."""
    parts = BackboneParts(
        stem=nn.Sequential(Down(3, 16), Down(16, 24)),
        layer1=nn.Sequential(Residual(24)),
        layer2=nn.Sequential(Down(24, 48), Residual(48)),
        layer3=nn.Sequential(Down(48, 96), Residual(96)),
        layer4=nn.Sequential(Down(96, 128), Residual(128)),
        feature_channels=96,
        head_channels=128,
    )
    for part in parts.modules():
        for module in part.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            if isinstance(module, Residual):
                with torch.no_grad():
                    module.conv2.weight.zero_()
    return parts
