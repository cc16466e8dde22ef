"""Selecting and writing by index, and ordering. Indices that an op produces are INT32, as on the IPU."""
from __future__ import annotations

import torch

from ..registry import lowers
from .common import DEVICE_INT, axis_of, exact, index_type, ints, refuse, same_types, wrap_index


@lowers("ai.onnx", "Gather", 1, 11)
def gather(op, data, indices):
    """data [..., n, ...], indices of any shape -> indices' shape in place of the axis."""
    axis = axis_of(op, op.attr("axis", 0), data.dim())
    index_type(op, indices)
    if 1 in op.constants and op.constants[1].ndim == 0:  # one known row needs no gather, nor a scatter backward
        return data.select(axis, int(op.constants[1]))
    picked = data.index_select(axis, wrap_index(indices.reshape(-1), data.shape[axis]))
    return picked.reshape(data.shape[:axis] + indices.shape + data.shape[axis + 1 :])


@lowers("ai.onnx", "Scatter", 9, 11)
@lowers("ai.onnx", "ScatterElements", 11)
def scatter_elements(op, data, indices, updates):
    """data with updates[i] written at indices[i] along the axis; what a repeated index gets is undefined."""
    axis = axis_of(op, op.attr("axis", 0), data.dim())
    index_type(op, indices)
    same_types(op, data, updates, doing="scattering")
    if indices.shape != updates.shape or indices.dim() != data.dim():
        raise refuse(op, f"indices {list(indices.shape)} and updates {list(updates.shape)} must have one shape, of as many "
                         f"dimensions as the data {list(data.shape)}")  # fmt: skip
    rows = wrap_index(indices, data.shape[axis])
    return exact(lambda into, values: into.scatter(axis, rows, values), data, updates)


def _top(op, x, k, axis, largest):
    """(values, INT32 indices) of the k first in order; among equals the lower index first, as in onnxruntime."""
    axis = axis_of(op, axis, x.dim())
    if not 0 <= k <= x.shape[axis]:
        raise refuse(op, f"K = {k} of an axis with {x.shape[axis]} elements")
    order = torch.sort(x.detach(), dim=axis, descending=largest, stable=True).indices.narrow(axis, 0, k)
    return exact(lambda values: torch.gather(values, axis, order), x), order.to(DEVICE_INT)


@lowers("ai.onnx", "TopK", 1)
def top_k_attribute(op, x):
    return _top(op, x, op.attr("k"), op.attr("axis", -1), True)


@lowers("ai.onnx", "TopK", 10, 11)
def top_k(op, x, k=None):
    """sorted=0 allows any order; sorted order is one of them."""
    wanted = ints(op, 1)
    if len(wanted) != 1:
        raise refuse(op, f"K must be one number, not {wanted}")
    return _top(op, x, wanted[0], op.attr("axis", -1), bool(op.attr("largest", 1)))


@lowers("ai.graphcore", "Sort", 1)
def sort(op, x):
    axis = op.attr("axis", -1)
    return _top(op, x, x.shape[axis_of(op, axis, x.dim())], axis, bool(op.attr("descending", 0)))


def _arg(op, x, function):
    axis = axis_of(op, op.attr("axis", 0), x.dim())
    if op.attr("select_last_index", 0):
        raise refuse(op, "select_last_index must be 0")
    keep = bool(op.attr("keepdims", 1))
    return exact(lambda values: function(values, dim=axis, keepdim=keep), x).to(DEVICE_INT)


@lowers("ai.onnx", "ArgMax", 1, 11)
def arg_max(op, x):
    """The first of equals."""
    return _arg(op, x, torch.argmax)


@lowers("ai.onnx", "ArgMin", 1, 11)
def arg_min(op, x):
    return _arg(op, x, torch.argmin)


@lowers("ai.onnx", "OneHot", 9, 11)
def one_hot(op, indices, depth=None, values=None):
    """values = [off, on], known or computed; an index outside [-depth, depth) gives a row of `off` (opset 9: [0, depth))."""
    size = ints(op, 1)[0]
    if values.numel() != 2:
        raise refuse(op, f"values must be [off, on], not of shape {list(values.shape)}")
    axis = axis_of(op, op.attr("axis", -1), indices.dim() + 1)
    index = indices.long() if op.version < 11 else wrap_index(indices, size)
    slots = torch.arange(size, device=indices.device)
    slots = slots.reshape([-1 if a == axis else 1 for a in range(indices.dim() + 1)])
    hot = index.unsqueeze(axis) == slots
    off, on = values.reshape(-1)
    return torch.where(hot, on, off)


@lowers("ai.graphcore", "Bucketize", 1)
def bucketize(op, x, boundaries):
    return torch.bucketize(x, boundaries, right=bool(op.attr("right", 0)), out_int32=True)
