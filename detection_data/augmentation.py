"""Random changes of a training picture: mirrored, drawn larger or smaller, colours varied.

What happens to a picture is an `Augmentation`, drawn from raw random bits, so that a step can be replayed.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Sequence, Tuple

import numpy as np
from PIL import Image, ImageEnhance

from popdet.config import DataConfig

DRAWS = 6  # 64-bit words that `draw` takes


@dataclass(frozen=True)
class Augmentation:
    """What one picture goes through. The default changes nothing."""

    flip: bool = False
    scale: float = 1.0  # of the content, on top of the resize; what does not fit is cropped, what is left is padded
    place_x: float = 0.0  # in [0, 1): where the content lies when it is smaller, or the crop when it is larger
    place_y: float = 0.0
    brightness: float = 1.0  # factors of Pillow's ImageEnhance
    contrast: float = 1.0
    saturation: float = 1.0

    @classmethod
    def draw(cls, data: DataConfig, flip: bool, words: Sequence[int]) -> Augmentation:
        """From DRAWS words of 64 random bits each; scales are uniform in scale_jitter, factors in 1 +- colour_jitter."""
        scale, x, y, *colours = (int(word) / 2.0 ** 64 for word in words)
        low, high = data.scale_jitter
        varied = [1.0 + amount * (2.0 * value - 1.0) for amount, value in zip(data.colour_jitter, colours)]
        if low == high == 1.0:
            x = y = 0.0
        return cls(flip and data.flip, low + (high - low) * scale, x, y, *varied)

    def colours(self, image: Image.Image) -> Image.Image:
        """The RGB picture with its colours varied: brightness, then contrast, then saturation."""
        for enhance, factor in ((ImageEnhance.Brightness, self.brightness), (ImageEnhance.Contrast, self.contrast),
                                (ImageEnhance.Color, self.saturation)):
            if factor != 1.0:
                image = enhance(image).enhance(factor)
        return image


def keep_visible(boxes: np.ndarray, width: int, height: int, least: float = 1.0) -> Tuple[np.ndarray, np.ndarray]:
    """Clip boxes [n, 4] to an input of width x height pixels.

    Returns (float32 [n, 4], bool [n]): whether at least `least` pixels of both sides are left.
    """
    clipped = np.clip(boxes, 0.0, np.array([width, height] * 2, np.float32)).astype(np.float32)
    sides = clipped[:, 2:] - clipped[:, :2]
    return clipped, (sides >= least).all(axis=1)
