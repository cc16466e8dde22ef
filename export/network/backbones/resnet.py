"""ResNet-18, -50 and -101 with frozen norms, split for a C4 detector: He et al. (2015).

A bottleneck that halves the map does so in its 3x3 convolution (torchvision) or, with stride_in_1x1, in its first 1x1 (the
paper, caffe and the weights that come from it). The tensors are the same; weights trained for one are wrong in the other.
"""
from __future__ import annotations

from typing import List

import torch
from torch import Tensor, nn
from torch.nn import functional

from export.network.backbones.parts import BackboneParts
from runtime.errors import ConfigError

DEPTHS = {"resnet18": (2, 2, 2, 2), "resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}
BASIC = ("resnet18",)  # built of BasicBlock, the others of Bottleneck
BRANCH_SCALE = 0.25  # last norm of a block at random: the sum of 33 branches must not grow; (1 + 0.25^2)^33 = 7 in variance


class FrozenNorm(nn.Module):
    """A batch norm that never changes, as x * scale + shift; both [1, C, 1, 1] and in the state, but not trained."""

    scale: Tensor
    shift: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(1, channels, 1, 1))
        self.register_buffer("shift", torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the same shape."""
        return x * self.scale + self.shift


class Shortcut(nn.Module):
    """The 1x1 projection where a block changes channels or stride."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
        self.norm = FrozenNorm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] -> [B, out, H/stride, W/stride]."""
        return self.norm(self.conv(x))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.norm1 = FrozenNorm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = FrozenNorm(channels)
        if stride != 1 or in_channels != channels:
            self.downsample = Shortcut(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] -> [B, channels, H/stride, W/stride]."""
        branch = functional.relu(self.norm1(self.conv1(x)))
        branch = self.norm2(self.conv2(branch))
        return functional.relu(branch + (self.downsample(x) if hasattr(self, "downsample") else x))


class Bottleneck(nn.Module):
    """1x1 down, 3x3, 1x1 up to four times the channels; the stride is in the 3x3, or in the first 1x1."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int, stride_in_1x1: bool) -> None:
        super().__init__()
        out_channels = channels * self.expansion
        first, second = (stride, 1) if stride_in_1x1 else (1, stride)
        self.conv1 = nn.Conv2d(in_channels, channels, 1, first, bias=False)
        self.norm1 = FrozenNorm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, second, padding=1, bias=False)
        self.norm2 = FrozenNorm(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.norm3 = FrozenNorm(out_channels)
        if stride != 1 or in_channels != out_channels:
            self.downsample = Shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] -> [B, 4*channels, H/stride, W/stride]."""
        branch = functional.relu(self.norm1(self.conv1(x)))
        branch = functional.relu(self.norm2(self.conv2(branch)))
        branch = self.norm3(self.conv3(branch))
        return functional.relu(branch + (self.downsample(x) if hasattr(self, "downsample") else x))


class Stem(nn.Module):
    """7x7 convolution and 3x3 max pooling, stride 4 together."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 64, 7, 2, padding=3, bias=False)
        self.norm = FrozenNorm(64)

    def forward(self, image: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, 64, H/4, W/4]."""
        return functional.max_pool2d(functional.relu(self.norm(self.conv(image))), 3, 2, padding=1)


def build_resnet(name: str, stride_in_1x1: bool = False) -> BackboneParts:
    """The parts of `name`, one of DEPTHS, with random weights drawn from torch's current generator.

    Raises ConfigError where stride_in_1x1 is asked of resnet18, whose blocks have no 1x1 convolution.
    """
    depths = DEPTHS[name]
    if stride_in_1x1 and name in BASIC:
        raise ConfigError(f"network.stride_in_1x1: the blocks of {name} have no 1x1 convolution; leave it false")
    expansion = BasicBlock.expansion if name in BASIC else Bottleneck.expansion
    in_channels, layers = 64, []
    for stage, depth in enumerate(depths):
        channels = 64 * 2**stage
        blocks: List[nn.Module] = []
        for position in range(depth):
            stride = 2 if stage and position == 0 else 1
            blocks.append(BasicBlock(in_channels, channels, stride) if name in BASIC else
                          Bottleneck(in_channels, channels, stride, stride_in_1x1))
            in_channels = channels * expansion
        layers.append(nn.Sequential(*blocks))
    layer1, layer2, layer3, layer4 = layers
    parts = BackboneParts(Stem(), layer1, layer2, layer3, layer4, 256 * expansion, 512 * expansion)
    for part in parts.modules():
        _initialise(part)
    return parts


def _initialise(part: nn.Module) -> None:
    for module in part.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
        if isinstance(module, Shortcut):
            nn.init.constant_(module.norm.scale, 0.5**0.5)  # no ReLU behind it: undo the initialisation's gain of 2
        if isinstance(module, (BasicBlock, Bottleneck)):
            last = module.norm3 if isinstance(module, Bottleneck) else module.norm2
            nn.init.constant_(last.scale, BRANCH_SCALE)
