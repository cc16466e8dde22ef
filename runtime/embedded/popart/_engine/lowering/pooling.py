"""Pooling windows: MaxPool, AveragePool and their global forms."""
from __future__ import annotations

import torch
import torch.nn.functional as F

from ..registry import lowers
from .common import pad_spatial, per_axis, refuse, resolve_pads, wide

_MAX = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVERAGE = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def _window(op, x):
    """kernel, strides, pads, and how many rows beyond the end padding `ceil_mode` makes the last window read."""
    rank = x.dim() - 2
    if rank not in _MAX:
        raise refuse(op, f"an input with {rank} spatial axes; 1 to 3 are supported")
    kernel = tuple(op.attr("kernel_shape"))
    strides, dilations = per_axis(op, "strides", rank), per_axis(op, "dilations", rank)
    if any(d != 1 for d in dilations):
        raise refuse(op, f"dilations {dilations}; PopART pools with dilations of 1 only")
    pads = resolve_pads(op, x.shape[2:], kernel, strides, dilations)
    beyond = [0] * rank
    if op.attr("ceil_mode", 0) and op.attr("auto_pad", "NOTSET") == "NOTSET":
        for i, (size, k, s, (begin, end)) in enumerate(zip(x.shape[2:], kernel, strides, pads)):
            outputs = -(-(size + begin + end - k) // s) + 1
            if (outputs - 1) * s >= size + begin:  # a window that starts in the end padding is left out
                outputs -= 1
            beyond[i] = max((outputs - 1) * s + k - (size + begin + end), 0)
    return rank, kernel, strides, pads, beyond


@lowers("ai.onnx", "MaxPool", 1, 8, 10, 11)
def max_pool(op, x):
    """x [N,C,*spatial]; padding never wins."""
    if op.attr("storage_order", 0):
        raise refuse(op, "storage_order must be 0")
    if len(op.outputs) > 1 and op.outputs[1]:
        raise refuse(op, "the output 'Indices' is not supported")
    rank, kernel, strides, pads, beyond = _window(op, x)
    x = pad_spatial(x, [(b, e + more) for (b, e), more in zip(pads, beyond)], float("-inf"))
    return _MAX[rank](x, kernel, strides)


@lowers("ai.onnx", "AveragePool", 1, 7, 10, 11)
def average_pool(op, x):
    """Means over the window's pixels inside the image, or inside image and padding with count_include_pad."""
    rank, kernel, strides, pads, beyond = _window(op, x)
    if not any(b or e for b, e in pads) and not any(beyond):
        return wide(lambda t: _AVERAGE[rank](t, kernel, strides), x)
    counted = torch.ones((1, 1, *x.shape[2:]), dtype=torch.float32, device=x.device)
    counted = pad_spatial(counted, pads, 1.0 if op.attr("count_include_pad", 0) else 0.0)
    counted = pad_spatial(counted, [(0, more) for more in beyond])
    padded = pad_spatial(x, [(b, e + more) for (b, e), more in zip(pads, beyond)])
    return wide(lambda t: _AVERAGE[rank](t, kernel, strides) / _AVERAGE[rank](counted, kernel, strides), padded)


def _spatial(op, x):
    if x.dim() < 3:
        raise refuse(op, f"an input of shape {list(x.shape)}; [N, C, ...] with spatial axes is needed")
    return tuple(range(2, x.dim()))


@lowers("ai.onnx", "GlobalAveragePool", 1)
def global_average_pool(op, x):
    return wide(lambda t: t.mean(dim=_spatial(op, x), keepdim=True), x)


@lowers("ai.onnx", "GlobalMaxPool", 1)
def global_max_pool(op, x):
    return x.amax(dim=_spatial(op, x), keepdim=True)
