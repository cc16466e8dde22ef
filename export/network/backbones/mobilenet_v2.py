"""MobileNetV2 1.0 with its batch norms folded into the convolutions, split for a C4 detector: Sandler et al. (2018)."""
from __future__ import annotations

from typing import List

import torch
from torch import Tensor, nn
from torch.nn import functional

from export.network.backbones.parts import BackboneParts

# (expansion, channels, stride) of the published blocks 1..17; 0 is the first convolution, 18 the last one.
BLOCKS = (
    (1, 16, 1),
    (6, 24, 2), (6, 24, 1),
    (6, 32, 2), (6, 32, 1), (6, 32, 1),
    (6, 64, 2), (6, 64, 1), (6, 64, 1), (6, 64, 1), (6, 96, 1), (6, 96, 1), (6, 96, 1),
    (6, 160, 2), (6, 160, 1), (6, 160, 1), (6, 320, 1),
)
# Published block numbers of every stage; also how pretrained weights find their place.
STAGES = {
    "backbone.stem": range(0, 2),
    "backbone.layer1": range(2, 4),
    "backbone.layer2": range(4, 7),
    "backbone.layer3": range(7, 14),
    "roi_head.layer4": range(14, 19),
}
LAST_CHANNELS = 1280


class ConvRelu6(nn.Module):
    """A convolution with ReLU6."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] -> [B, out, H/stride, W/stride]."""
        return functional.relu6(self.conv(x))


class InvertedResidual(nn.Module):
    """Expand (1x1), depthwise (3x3), project (1x1, linear); with a shortcut where the shape stays."""

    def __init__(self, in_channels: int, out_channels: int, expansion: int, stride: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.has_shortcut = stride == 1 and in_channels == out_channels
        self.expand = nn.Conv2d(in_channels, hidden, 1) if expansion > 1 else None
        self.depthwise = nn.Conv2d(hidden, hidden, 3, stride, padding=1, groups=hidden)
        self.project = nn.Conv2d(hidden, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] -> [B, out, H/stride, W/stride]."""
        hidden = x if self.expand is None else functional.relu6(self.expand(x))
        projected = self.project(functional.relu6(self.depthwise(hidden)))
        return x + projected if self.has_shortcut else projected


def build_mobilenet_v2() -> BackboneParts:
    """The parts with random weights drawn from torch's current generator."""
    blocks: List[nn.Module] = [ConvRelu6(3, 32, 3, 2)]
    in_channels = 32
    for expansion, channels, stride in BLOCKS:
        blocks.append(InvertedResidual(in_channels, channels, expansion, stride))
        in_channels = channels
    blocks.append(ConvRelu6(in_channels, LAST_CHANNELS, 1, 1))
    stem, layer1, layer2, layer3, layer4 = (nn.Sequential(*blocks[numbers.start : numbers.stop])
                                            for numbers in STAGES.values())
    for block in blocks:
        _initialise(block)
    return BackboneParts(stem, layer1, layer2, layer3, layer4, BLOCKS[12][1], LAST_CHANNELS)


def _initialise(block: nn.Module) -> None:
    for name, module in block.named_modules():
        if isinstance(module, nn.Conv2d):
            linear = name == "project"
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="linear" if linear else "relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    if isinstance(block, InvertedResidual) and block.has_shortcut:
        with torch.no_grad():
            block.project.weight.mul_(0.25)  # as in resnet.py: random branches must not grow the sum
