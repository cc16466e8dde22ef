"""The sizes of a RoI-Align, checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Tuple

import numpy as np

from custom_ops.schema import CustomOpError


@dataclass(frozen=True)
class RoiAlignShape:
    """All sizes of a RoI-Align: features B x C x H x W, rois B x num_rois x roi_columns, output bins, samples per bin."""

    batch: int
    channels: int
    height: int
    width: int
    num_rois: int
    roi_columns: int
    out_height: int
    out_width: int
    sampling_ratio: int = 1

    def __post_init__(self) -> None:
        smallest = min(value for name, value in vars(self).items() if name != "num_rois")
        if smallest < 1 or self.num_rois < 0 or self.roi_columns not in (4, 5):
            raise CustomOpError(f"roi_align: sizes must be positive and rois have 4 or 5 columns: {self}")

    def features(self, channels_last: bool) -> Tuple[int, ...]:
        pixels = (self.height, self.width)
        return (self.batch, *pixels, self.channels) if channels_last else (self.batch, self.channels, *pixels)

    def aligned(self, channels_last: bool) -> Tuple[int, ...]:
        rois, bins = (self.batch, self.num_rois), (self.out_height, self.out_width)
        return (*rois, *bins, self.channels) if channels_last else (*rois, self.channels, *bins)


def roi_align_shape(
    features: Tuple[int, ...], rois: np.ndarray, height: int, width: int, sampling_ratio: int, channels_last: bool
) -> RoiAlignShape:
    """Of features [B,C,H,W] or, channels_last, [B,H,W,C] and rois [B,D,4 or 5]."""
    if len(features) != 4 or rois.ndim != 3 or rois.shape[0] != features[0]:
        raise CustomOpError(f"roi_align: features {features}, rois {rois.shape}: 4 and 3 dimensions, one batch needed")
    batch, rows, columns, channels = features if channels_last else (features[0], *features[2:], features[1])
    num_rois, roi_columns = rois.shape[1:]
    return RoiAlignShape(batch, channels, rows, columns, num_rois, roi_columns, height, width, sampling_ratio)
