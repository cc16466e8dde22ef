"""Reductions over axes and running sums. Half inputs are reduced in float."""
from __future__ import annotations

import torch

from ..registry import lowers
from .common import axes_of, axis_of, exact, refuse, wide


def _sum(x, axes, keep):
    return x.sum(dim=axes, keepdim=keep, dtype=x.dtype)


def _mean(x, axes, keep):
    if x.dtype.is_floating_point:
        return x.mean(dim=axes, keepdim=keep)
    count = 1
    for axis in axes:
        count *= x.shape[axis]
    return torch.div(_sum(x, axes, keep), count, rounding_mode="trunc")


def _prod(x, axes, keep):
    for axis in sorted(axes, reverse=True):
        x = x.prod(dim=axis, keepdim=keep, dtype=x.dtype)
    return x


def _extreme(function):
    """amax or amin whose gradient goes whole to every element equal to the result (PopART's ReduceMaxGrad)."""

    def reduce(x, axes, keep):
        if not x.requires_grad:
            return function(x, dim=axes, keepdim=keep)
        best = function(x.detach(), dim=axes, keepdim=True)
        chosen = (x.detach() == best) & torch.isfinite(best)  # inf - inf would be NaN
        path = torch.where(chosen, x - x.detach(), torch.zeros_like(x)).sum(dim=axes, keepdim=True)
        out = best + path
        return out if keep else out.reshape([n for a, n in enumerate(x.shape) if a not in axes])

    return reduce


_REDUCTIONS = {
    "ReduceSum": _sum,
    "ReduceMean": _mean,
    "ReduceMax": _extreme(torch.amax),
    "ReduceMin": _extreme(torch.amin),
    "ReduceProd": _prod,
    "ReduceL1": lambda x, axes, keep: _sum(x.abs(), axes, keep),
    "ReduceL2": lambda x, axes, keep: _sum(x.square(), axes, keep).sqrt(),
    "ReduceSumSquare": lambda x, axes, keep: _sum(x.square(), axes, keep),
    "ReduceLogSum": lambda x, axes, keep: _sum(x, axes, keep).log(),
    "ReduceLogSumExp": lambda x, axes, keep: torch.logsumexp(x, dim=axes, keepdim=keep),
}


def _register(op_type, function):
    @lowers("ai.onnx", op_type, 1, 11)
    def lower(op, x):
        """`axes` absent or empty: all of them."""
        axes = axes_of(op, op.attr("axes", ()) or range(x.dim()), x.dim()) if x.dim() else ()
        if not axes:  # a scalar: reduce the one-element vector that it is
            return wide(lambda t: exact(lambda u: function(u.reshape(1), (0,), False), t), x)
        return wide(lambda t: exact(lambda u: function(u, axes, bool(op.attr("keepdims", 1))), t), x)


for _op_type, _function in _REDUCTIONS.items():
    _register(_op_type, _function)


@lowers("ai.graphcore", "ReduceMedian", 1)
def reduce_median(op, x):
    """The lower median over `axes` taken as one; the second output is its INT32 index in them."""
    axes = axes_of(op, op.attr("axes", ()) or range(x.dim()), x.dim())
    kept = [axis for axis in range(x.dim()) if axis not in axes]
    rows = x.permute(*kept, *axes).reshape(*(x.shape[a] for a in kept), -1)
    values, index = torch.median(rows, dim=-1)
    shape = [1 if a in axes else x.shape[a] for a in range(x.dim())] if op.attr("keepdims", 1) else values.shape
    return (values.reshape(shape), index.to(torch.int32).reshape(shape))[: len(op.outputs)]


@lowers("ai.onnx", "CumSum", 11)
def cum_sum(op, x, axis=None):
    position = op.constant(1)
    if position.size != 1:
        raise refuse(op, f"the axis must be one number, not of shape {list(position.shape)}")
    axis = axis_of(op, int(position.reshape(-1)[0]), x.dim())
    backwards = op.attr("reverse", 0)
    x = x.flip(axis) if backwards else x
    out = wide(lambda t: torch.cumsum(t, dim=axis, dtype=t.dtype), x)
    if op.attr("exclusive", 0):
        zero = torch.zeros_like(out.narrow(axis, 0, 1))
        out = torch.cat([zero, out.narrow(axis, 0, x.shape[axis] - 1)], dim=axis)
    return out.flip(axis) if backwards else out
