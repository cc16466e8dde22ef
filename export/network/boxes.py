"""Arithmetic on boxes: coding against anchors, IoU, clipping, gathering rows. All shapes are static.

Boxes are x1, y1, x2, y2 in image pixels. The (dx, dy, dw, dh) code is that of R-CNN (arXiv 1311.2524, appendix C).
"""
from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from export import ops

MAX_LOG_SCALE = math.log(1000.0 / 16)  # a delta never enlarges a box more than this, so exp cannot overflow
MIN_SIDE = 1e-3  # pixels; padded boxes have no side, and their code must be finite


def decode(deltas: Tensor, anchors: Tensor, stds: Sequence[float] = (1.0, 1.0, 1.0, 1.0)) -> Tensor:
    """Boxes from deltas f [..., 4] relative to anchors f [..., 4] (broadcast): f [..., 4]."""
    width, height = anchors[..., 2] - anchors[..., 0], anchors[..., 3] - anchors[..., 1]
    centre_x = anchors[..., 0] + 0.5 * width + deltas[..., 0] * stds[0] * width
    centre_y = anchors[..., 1] + 0.5 * height + deltas[..., 1] * stds[1] * height
    half_width = 0.5 * width * torch.exp((deltas[..., 2] * stds[2]).clamp(max=MAX_LOG_SCALE))
    half_height = 0.5 * height * torch.exp((deltas[..., 3] * stds[3]).clamp(max=MAX_LOG_SCALE))
    return torch.stack([centre_x - half_width, centre_y - half_height, centre_x + half_width, centre_y + half_height], dim=-1)


def encode(boxes: Tensor, anchors: Tensor, stds: Sequence[float] = (1.0, 1.0, 1.0, 1.0)) -> Tensor:
    """Deltas f [..., 4] that turn anchors into boxes; the inverse of `decode`. Sides below MIN_SIDE count as MIN_SIDE."""
    width = (anchors[..., 2] - anchors[..., 0]).clamp(min=MIN_SIDE)
    height = (anchors[..., 3] - anchors[..., 1]).clamp(min=MIN_SIDE)
    box_width = (boxes[..., 2] - boxes[..., 0]).clamp(min=MIN_SIDE)
    box_height = (boxes[..., 3] - boxes[..., 1]).clamp(min=MIN_SIDE)
    shift_x = (boxes[..., 0] + boxes[..., 2] - anchors[..., 0] - anchors[..., 2]) * 0.5 / width
    shift_y = (boxes[..., 1] + boxes[..., 3] - anchors[..., 1] - anchors[..., 3]) * 0.5 / height
    return torch.stack([shift_x / stds[0], shift_y / stds[1],
                        torch.log(box_width / width) / stds[2], torch.log(box_height / height) / stds[3]], dim=-1)


def clip(boxes: Tensor, height: int, width: int) -> Tensor:
    """Boxes f [..., 4] cut at the image's edges."""
    x = boxes[..., 0::2].clamp(0, width)
    y = boxes[..., 1::2].clamp(0, height)
    return torch.stack([x[..., 0], y[..., 0], x[..., 1], y[..., 1]], dim=-1)


def pairwise_iou(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union of first f [..., N, 4] and second f [..., M, 4]: f [..., N, M]; 0 where neither has an area."""
    first, second = first[..., :, None, :], second[..., None, :, :]
    width = torch.minimum(first[..., 2], second[..., 2]) - torch.maximum(first[..., 0], second[..., 0])
    height = torch.minimum(first[..., 3], second[..., 3]) - torch.maximum(first[..., 1], second[..., 1])
    shared = width.clamp(min=0) * height.clamp(min=0)
    area = (first[..., 2] - first[..., 0]) * (first[..., 3] - first[..., 1])
    other = (second[..., 2] - second[..., 0]) * (second[..., 3] - second[..., 1])
    return shared / (area + other - shared).clamp(min=MIN_SIDE)


def gather_rows(table: Tensor, index: Tensor) -> Tensor:
    """Rows of each image: table [B, N, ...], index int32 [B, M] -> [B, M, ...].

    One flat index_select, which is ONNX Gather; torch.gather would be GatherElements, which PopART lacks.
    """
    batch, rows = table.shape[:2]
    first = (torch.arange(batch, dtype=torch.int32, device=index.device) * rows)[:, None]
    flat = table.flatten(0, 1).index_select(0, (index + first).flatten())
    return flat.reshape(batch, index.shape[1], *table.shape[2:])


def below(count: Tensor, length: int) -> Tensor:
    """Which of `length` rows exist: count int32 [B] -> bool [B, length]."""
    return torch.arange(length, dtype=torch.int32, device=count.device)[None] < count[:, None]


def smallest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` smallest of f [B, N] in rising order: (values f [B, count], index int32 [B, count])."""
    found, index = ops.top_rows(-values, count)
    return -found, index
