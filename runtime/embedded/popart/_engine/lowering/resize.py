"""Resize and Upsample: one pass of weighted row gathers per axis whose size changes. Nearest, linear, cubic."""
from __future__ import annotations

import math

import torch

from ..registry import lowers
from .common import refuse


def _source(mode: str, scale: float, size: int, out: int) -> list[float]:
    """The input coordinate of every output position (onnx.ai/onnx/operators, Resize)."""
    if mode == "half_pixel":
        return [(i + 0.5) / scale - 0.5 for i in range(out)]
    if mode == "pytorch_half_pixel":
        return [(i + 0.5) / scale - 0.5 if out > 1 else 0.0 for i in range(out)]
    if mode == "align_corners":
        return [i * (size - 1) / (out - 1) if out > 1 else 0.0 for i in range(out)]
    if mode == "tf_half_pixel_for_nn":
        return [(i + 0.5) / scale for i in range(out)]
    return [i / scale for i in range(out)]


_COORDINATES = ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric", "tf_half_pixel_for_nn")
_NEAREST = {
    "round_prefer_floor": lambda x: math.ceil(x - 0.5),
    "round_prefer_ceil": lambda x: math.floor(x + 0.5),
    "floor": math.floor,
    "ceil": math.ceil,
}


def _linear_taps(position: float, size: int, _a: float) -> list[tuple[int, float]]:
    """(row, weight) of the two neighbours; outside the image its edge."""
    position = min(max(position, 0.0), size - 1.0)
    first = math.floor(position)
    return [(first, 1.0 - (position - first)), (first + 1, position - first)]


def _cubic_taps(position: float, size: int, a: float) -> list[tuple[int, float]]:
    """(row, weight) of four neighbours: Keys' kernel (Cubic Convolution Interpolation, 1981)."""
    first = math.floor(position)
    taps = []
    for row in range(first - 1, first + 3):
        d = abs(position - row)
        near = (a + 2) * d**3 - (a + 3) * d**2 + 1
        taps.append((row, near if d <= 1 else a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a))
    return taps


_TAPS = {"linear": _linear_taps, "cubic": _cubic_taps}


def _resize_axis(op, x, axis, scale, out, how):
    size = x.shape[axis]
    source = _source(how["coordinates"], scale, size, out)
    if how["mode"] == "nearest":
        return _rows(x, axis, [_NEAREST[how["nearest"]](s) for s in source])
    taps = [_TAPS[how["mode"]](s, size, op.attr("cubic_coeff_a", -0.75)) for s in source]
    total = 0.0
    for tap in zip(*taps):
        weight = torch.tensor([w for _, w in tap], dtype=torch.float32, device=x.device)
        weight = weight.reshape([-1 if a == axis else 1 for a in range(x.dim())])
        total = total + _rows(x, axis, [row for row, _ in tap]).float() * weight
    return total.to(x.dtype)


def _rows(x, axis, rows):
    """Rows of an axis by number, those outside clamped to the edge."""
    last = x.shape[axis] - 1
    return x.index_select(axis, torch.tensor([min(max(row, 0), last) for row in rows], device=x.device))


def _resize(op, x, scales, sizes, how):
    if how["mode"] not in ("nearest", *_TAPS):
        raise refuse(op, f"mode '{how['mode']}' is unknown; it is nearest, linear or cubic")
    if how["coordinates"] not in _COORDINATES:
        raise refuse(op, f"coordinate_transformation_mode '{how['coordinates']}' is not supported")
    if how["nearest"] not in _NEAREST:
        raise refuse(op, f"nearest_mode '{how['nearest']}' is unknown")
    if len(sizes or scales) != x.dim():
        raise refuse(op, f"sizes or scales for {len(sizes or scales)} axes, the input has {x.dim()}")
    for axis in range(x.dim()):
        out = sizes[axis] if sizes else math.floor(x.shape[axis] * scales[axis])
        scale = out / x.shape[axis] if sizes else scales[axis]
        if scale != 1.0:
            x = _resize_axis(op, x, axis, scale, out, how)
    return x


def _floats(op, index):
    values = op.constant(index, None)
    return [] if values is None else [float(v) for v in values.reshape(-1)]


@lowers("ai.onnx", "Resize", 11)
def resize(op, x, roi=None, scales=None, sizes=None):
    if op.attr("exclude_outside", 0):
        raise refuse(op, "exclude_outside must be 0")
    how = {
        "mode": op.attr("mode", "nearest"),
        "coordinates": op.attr("coordinate_transformation_mode", "half_pixel"),
        "nearest": op.attr("nearest_mode", "round_prefer_floor"),
    }
    wanted = op.constant(3, None)
    sizes = [] if wanted is None else [int(v) for v in wanted.reshape(-1)]
    scales = _floats(op, 2)
    if bool(sizes) == bool(scales):
        raise refuse(op, "exactly one of 'scales' and 'sizes' must be given")
    return _resize(op, x, scales, sizes, how)


@lowers("ai.onnx", "Resize", 10)
@lowers("ai.onnx", "Upsample", 9)
def upsample(op, x, scales=None):
    """Nearest takes the floor of i / scale, linear and cubic have half-pixel coordinates: PopART resizes as PyTorch does."""
    mode = op.attr("mode", "nearest")
    how = {"mode": mode, "coordinates": "asymmetric" if mode == "nearest" else "half_pixel", "nearest": "floor"}
    return _resize(op, x, _floats(op, 1), [], how)
