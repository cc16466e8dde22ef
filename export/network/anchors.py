"""The anchor boxes of the region proposal network (Faster R-CNN, arXiv 1506.01497, section 3.1.1)."""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def anchor_boxes(rows: int, columns: int, stride: int, sizes: Sequence[float], ratios: Sequence[float]) -> Tensor:
    """All anchors of a feature map, float32 [rows * columns * len(sizes) * len(ratios), 4] in layout [row][column][anchor].

    An anchor of size s and ratio r (height / width) has the area s^2 and is centred on its feature pixel. Unclipped.
    """
    size = torch.tensor([float(s) for s in sizes for _ in ratios])
    root = torch.tensor([float(r) for _ in sizes for r in ratios]).sqrt()
    half = torch.stack([size / root, size * root], dim=1) / 2  # [anchors, (w, h)]
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    centre = (torch.stack([x, y], dim=-1).reshape(-1, 1, 2) + 0.5) * stride
    return torch.cat([centre - half, centre + half], dim=-1).reshape(-1, 4)
