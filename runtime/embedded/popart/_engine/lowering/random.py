"""Random ops. They draw from torch's generator, which the session seeds (setRandomSeed); `seed` attributes are ignored,
as PopART ignores them. The numbers are not an IPU's: only their distribution is."""
from __future__ import annotations

import torch

from ..registry import lowers
from .common import refuse
from .elementwise import dtype_of


def _ratio(op) -> float:
    ratio = op.attr("ratio", 0.5)
    if not 0.0 <= ratio < 1.0:
        raise refuse(op, f"ratio value {ratio} is not valid. Please use a value in the interval [0,1)")
    return ratio


@lowers("ai.onnx", "Dropout", 6, 7, 10)
def dropout(op, x):
    """Drops in a training step only, which is where a program runs with gradients enabled. Second output: the mask."""
    ratio = _ratio(op)
    training = torch.is_grad_enabled() and not op.attr("is_test", 0)
    if not training:
        return (x, torch.ones_like(x, dtype=torch.bool))[: len(op.outputs)]
    kept = torch.rand(x.shape, device=x.device) >= ratio
    return (x * kept / (1.0 - ratio), kept)[: len(op.outputs)]


@lowers("ai.graphcore", "ShapedDropout", 1)
def shaped_dropout(op, x):
    """One decision per element of `shape`, which broadcasts to x."""
    ratio, shape = _ratio(op), tuple(op.attr("shape"))
    if len(shape) > x.dim() or any(n not in (1, m) for n, m in zip(reversed(shape), reversed(x.shape))):
        raise refuse(op, f"the shape {list(shape)} does not broadcast to the input's {list(x.shape)}")
    if not torch.is_grad_enabled():
        return x
    return x * (torch.rand(shape, device=x.device) >= ratio) / (1.0 - ratio)


def _normal(op, shape, dtype, device):
    return (torch.randn(shape, device=device) * op.attr("scale", 1.0) + op.attr("mean", 0.0)).to(dtype)


def _uniform(op, shape, dtype, device):
    low, high = op.attr("low", 0.0), op.attr("high", 1.0)
    return (torch.rand(shape, device=device) * (high - low) + low).to(dtype)


@lowers("ai.onnx", "RandomNormal", 1)
def random_normal(op):
    return _normal(op, tuple(op.attr("shape")), dtype_of(op, op.attr("dtype", 1)), None)


@lowers("ai.onnx", "RandomUniform", 1)
def random_uniform(op):
    return _uniform(op, tuple(op.attr("shape")), dtype_of(op, op.attr("dtype", 1)), None)


def _like(op, x):
    return dtype_of(op, op.attr("dtype")) if "dtype" in op.attrs else x.dtype


@lowers("ai.onnx", "RandomNormalLike", 1)
def random_normal_like(op, x):
    return _normal(op, x.shape, _like(op, x), x.device)


@lowers("ai.onnx", "RandomUniformLike", 1)
def random_uniform_like(op, x):
    return _uniform(op, x.shape, _like(op, x), x.device)
