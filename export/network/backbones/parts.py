"""What every backbone provides: a body up to stride 16 and the last stage, which runs on RoIs."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Tuple

from torch import Tensor, nn


@dataclass(frozen=True)
class BackboneParts:
    """Five stages in order, and the channels that leave layer3 and layer4. layer3 leaves at stride 16."""

    stem: nn.Module
    layer1: nn.Module
    layer2: nn.Module
    layer3: nn.Module
    layer4: nn.Module
    feature_channels: int
    head_channels: int

    def modules(self) -> Tuple[nn.Module, ...]:
        """The five stages."""
        return self.stem, self.layer1, self.layer2, self.layer3, self.layer4


class Backbone(nn.Module):
    """The body: stem, layer1, layer2, layer3."""

    def __init__(self, parts: BackboneParts) -> None:
        super().__init__()
        self.stem = parts.stem
        self.layer1 = parts.layer1
        self.layer2 = parts.layer2
        self.layer3 = parts.layer3

    def forward(self, image: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, feature_channels, H/16, W/16]."""
        return self.layer3(self.layer2(self.layer1(self.stem(image))))
