"""From a picture on disk to the network's input and back: decode, resize, flip, normalise, and the box arithmetic.

`Preprocessing` says what the network expects (the manifest's `preprocessing`), `ImageTransform` what happened to one
image.
Boxes are (x1, y1, x2, y2) in pixels, edges, half-open.
"""
from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any, Dict, Mapping, Tuple, Union

import numpy as np
from PIL import Image, ImageOps

from detection_data.augmentation import Augmentation
from popdet.config import DataConfig
from runtime.errors import BadInputFile

PathLike = Union[str, "os.PathLike[str]"]
RESIZES = ("squash", "pad")
CHANNEL_ORDERS = ("rgb", "bgr")
UNCHANGED = Augmentation()


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes a [3, height, width] float32 input: (pixel * pixel_scale - mean) / std per channel.

    mean and std are in the order of channel_order.
    """

    resize: str
    height: int
    width: int
    channel_order: str
    pixel_scale: float
    mean: Tuple[float, ...]
    std: Tuple[float, ...]

    @classmethod
    def from_config(cls, data: DataConfig, height: int, width: int) -> Preprocessing:
        """What the `data` section of a config asks for, at the network's input size."""
        return cls(data.resize, height, width, data.channel_order, data.pixel_scale, data.pixel_mean, data.pixel_std)

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any], source: str = "manifest.json") -> Preprocessing:
        """Read a manifest's `preprocessing`. Raises BadInputFile naming `source` and the key that is wrong."""
        names = tuple(cls.__dataclass_fields__)
        wrong = sorted(set(names) ^ set(tree))
        if wrong:
            state = "missing" if wrong[0] in names else "unknown"
            raise BadInputFile(f"{source}: preprocessing.{wrong[0]} is {state}; compile the artifact again")
        try:
            made = cls(
                str(tree["resize"]), int(tree["height"]), int(tree["width"]), str(tree["channel_order"]),
                float(tree["pixel_scale"]), tuple(map(float, tree["mean"])), tuple(map(float, tree["std"])),
            )
        except (TypeError, ValueError) as error:
            raise BadInputFile(f"{source}: unusable preprocessing ({error}); compile the artifact again") from error
        usable = {
            "resize": made.resize in RESIZES,
            "channel_order": made.channel_order in CHANNEL_ORDERS,
            "height": made.height > 0,
            "width": made.width > 0,
            "pixel_scale": bool(np.isfinite(made.pixel_scale)),
            "mean": len(made.mean) == 3 and bool(np.isfinite(made.mean).all()),
            "std": len(made.std) == 3 and bool(np.isfinite(made.std).all()) and all(made.std),
        }
        for name, good in usable.items():
            if not good:
                raise BadInputFile(f"{source}: preprocessing.{name} is {tree[name]!r}; compile the artifact again")
        return made

    def to_dict(self) -> Dict[str, Any]:
        """Plain JSON values, as the manifest stores them."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


@dataclass(frozen=True)
class ImageTransform:
    """What was done to one image: input x = image x * scale_x + offset_x, mirrored inside the content when `flip`."""

    scale_x: float  # content_width / image_width
    scale_y: float
    content_width: int  # input pixels that the whole image covers; the rest of the input is padding
    content_height: int
    image_width: int
    image_height: int
    flip: bool = False
    offset_x: int = 0  # where the content begins in the input; negative: so much of it is cropped
    offset_y: int = 0

    def boxes_to_input(self, boxes: np.ndarray) -> np.ndarray:
        """Boxes [..., 4] in image pixels -> float32 [..., 4] in input pixels."""
        scaled = np.asarray(boxes, np.float64) * self._scales()
        return (self._mirrored(scaled) + self._offsets()).astype(np.float32)

    def boxes_to_original(self, boxes: np.ndarray) -> np.ndarray:
        """Boxes [..., 4] in input pixels -> float32 [..., 4] in image pixels, clipped to the image."""
        original = self._mirrored(np.asarray(boxes, np.float64) - self._offsets()) / self._scales()
        limits = [self.image_width, self.image_height] * 2
        return np.clip(original, 0.0, limits).astype(np.float32)

    def _scales(self) -> np.ndarray:
        return np.array([self.scale_x, self.scale_y, self.scale_x, self.scale_y])

    def _offsets(self) -> np.ndarray:
        return np.array([self.offset_x, self.offset_y, self.offset_x, self.offset_y], np.float64)

    def _mirrored(self, boxes: np.ndarray) -> np.ndarray:
        if not self.flip:
            return boxes
        mirrored = boxes.copy()
        mirrored[..., 0] = self.content_width - boxes[..., 2]
        mirrored[..., 2] = self.content_width - boxes[..., 0]
        return mirrored


def transform_for(
    image_width: int, image_height: int, pre: Preprocessing, change: Augmentation = UNCHANGED
) -> ImageTransform:
    """The transform that `pre` and `change` ask for on an image of this size.

    squash: each side is scaled on its own. pad: one ratio, rounded to whole pixels, so that the scales stay exact.
    """
    width, height = pre.width, pre.height
    if pre.resize == "pad":
        ratio = min(pre.width / image_width, pre.height / image_height)
        width = min(pre.width, max(1, round(image_width * ratio)))
        height = min(pre.height, max(1, round(image_height * ratio)))
    offset_x = offset_y = 0
    if change.scale != 1.0:
        width, height = max(1, round(width * change.scale)), max(1, round(height * change.scale))
        offset_x = round((pre.width - width) * change.place_x)
        offset_y = round((pre.height - height) * change.place_y)
    return ImageTransform(width / image_width, height / image_height, width, height, image_width, image_height, change.flip,
                          offset_x, offset_y)


def image_to_input(
    image: Image.Image, pre: Preprocessing, change: Augmentation = UNCHANGED
) -> Tuple[np.ndarray, ImageTransform]:
    """An RGB picture -> (input float32 [3, height, width], the transform that leads there and back).

    Pillow's bilinear resize, which filters when it shrinks. Padding is the mean colour: zero after normalisation.
    """
    transform = transform_for(image.width, image.height, pre, change)
    content = image.resize((transform.content_width, transform.content_height), Image.Resampling.BILINEAR)
    if change.flip:
        content = content.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    left, top = max(0, transform.offset_x), max(0, transform.offset_y)
    crop = (left - transform.offset_x, top - transform.offset_y)
    shown = (min(pre.width - left, content.width - crop[0]), min(pre.height - top, content.height - crop[1]))
    content = content.crop((*crop, crop[0] + shown[0], crop[1] + shown[1]))
    pixels = np.asarray(change.colours(content), np.float32)
    if pre.channel_order == "bgr":
        pixels = pixels[:, :, ::-1]
    mean, std = np.array(pre.mean, np.float32), np.array(pre.std, np.float32)
    normalised = (pixels * np.float32(pre.pixel_scale) - mean) / std
    made = np.zeros((3, pre.height, pre.width), np.float32)
    made[:, top : top + shown[1], left : left + shown[0]] = normalised.transpose(2, 0, 1)
    return made, transform


def load_image(path: PathLike, upright: bool = False) -> Image.Image:
    """Decode a picture completely, as RGB. Raises BadInputFile naming the file when that fails.

    upright: turn the picture as its EXIF orientation says. Annotations of data sets refer to the pixels as stored, so
    the loader leaves it off; `run` on a photograph turns it on.
    """
    try:
        with Image.open(path) as opened:
            image: Image.Image = ImageOps.exif_transpose(opened) if upright else opened
            image.load()
            return _as_rgb(image)
    except FileNotFoundError as error:
        raise BadInputFile(f"{path}: no such image; check the path") from error
    except IsADirectoryError as error:
        raise BadInputFile(f"{path}: is a folder; name an image file") from error
    except PermissionError as error:
        raise BadInputFile(f"{path}: not readable; check its permissions") from error
    except Exception as error:  # Pillow's decoders raise almost anything on damaged bytes
        raise BadInputFile(f"{path}: {_why_unreadable(error)}; replace the file or take it out of the list") from error


def image_size(path: PathLike) -> Tuple[int, int]:
    """(width, height) from the header alone. Raises BadInputFile naming the file."""
    try:
        with Image.open(path) as opened:
            return opened.width, opened.height
    except FileNotFoundError as error:
        raise BadInputFile(f"{path}: no such image; check the path") from error
    except Exception as error:  # as in load_image
        raise BadInputFile(f"{path}: {_why_unreadable(error)}; replace the file or take it out of the list") from error


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":  # convert() would clip 16 bits to 255 instead of scaling
        deep = np.asarray(image).astype(np.int64)
        return Image.fromarray(np.clip(deep // 257, 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined range")
    return image.convert("RGB")


def _why_unreadable(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image that can be read (unknown or damaged header)"
    detail = " ".join(str(error).split()) or type(error).__name__
    return f"the image is truncated or damaged ({detail})"
