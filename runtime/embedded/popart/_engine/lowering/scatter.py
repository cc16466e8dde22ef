"""ScatterReduce and GroupedGather of ai.graphcore."""
from __future__ import annotations

import torch

from ..registry import lowers
from .common import axis_of, index_type, refuse, wrap_index

# ScatterReduction as an attribute: its number, or a name
_REDUCTIONS = {0: "sum", 1: "max", 2: "min", 3: "mul", 4: "none"}
_TORCH = {"sum": "sum", "max": "amax", "min": "amin", "mul": "prod"}


def _reduction(op) -> str:
    value = op.attr("reduction", "sum")
    name = _REDUCTIONS.get(value) if isinstance(value, int) else value.lower()
    if name not in _REDUCTIONS.values():
        raise refuse(op, f"reduction '{value}' is unknown")
    return name


def _start(reduction: str, shape, data):
    """What an element holds that no index names."""
    if reduction in ("sum", "none"):
        return torch.zeros(shape, dtype=data.dtype, device=data.device)
    if reduction == "mul":
        return torch.ones(shape, dtype=data.dtype, device=data.device)
    limits = torch.finfo(data.dtype) if data.dtype.is_floating_point else torch.iinfo(data.dtype)
    return torch.full(shape, limits.min if reduction == "max" else limits.max, dtype=data.dtype, device=data.device)


def _scatter(op, data, indices, initial, axis):
    """Reduces data [..., n, ...] into [..., axis_size, ...] by indices, broadcast along the other axes."""
    reduction, size = _reduction(op), op.attr("axis_size")
    index_type(op, indices)
    if size < 1:
        raise refuse(op, f"axis_size attribute must be at least 1: axis_size = {size}")
    if indices.dim() < data.dim():
        if not op.attr("enable_index_broadcast", 1):
            raise refuse(op, f"indices of shape {list(indices.shape)} need enable_index_broadcast")
        shape = [-1 if a == axis else 1 for a in range(data.dim())] if indices.dim() == 1 else None
        indices = indices.reshape(shape) if shape else indices.reshape(*indices.shape, *[1] * (data.dim() - indices.dim()))
    if any(n not in (1, m) for n, m in zip(indices.shape, data.shape)):
        raise refuse(op, f"indices {list(indices.shape)} do not fit the data {list(data.shape)}")
    if indices.shape != data.shape and any(n != 1 for a, n in enumerate(indices.shape) if a != axis):
        raise refuse(op, f"Partial broadcasting of indices is not currently supported: indices {list(indices.shape)}, data "
                         f"{list(data.shape)}")  # fmt: skip
    indices = indices.long().expand(data.shape)
    shape = [size if a == axis else n for a, n in enumerate(data.shape)]
    if initial is not None and list(initial.shape) != shape:
        raise refuse(op, f"initial values of shape {list(initial.shape)}; the output has {shape}")
    start = _start(reduction, shape, data) if initial is None else initial
    if reduction == "none":
        return start.scatter(axis, indices, data)
    if reduction == "sum":
        return start.scatter_add(axis, indices, data)
    return start.scatter_reduce(axis, indices, data, _TORCH[reduction])


@lowers("ai.graphcore", "ScatterReduce", 1)
def scatter_reduce(op, data, indices, initial=None):
    """Sum, max, min, product or last writer of the initial values and the data that share an index.

    group_size g > 1: data, indices and initial values have a leading axis of g groups, each reduced by itself.
    """
    groups = op.attr("group_size", 1)
    if groups == 1:
        return _scatter(op, data, indices, initial, axis_of(op, op.attr("axis", -1), data.dim()))
    if data.shape[0] != groups:
        raise refuse(op, f"data of shape {list(data.shape)} has no leading axis of group_size {groups}")
    axis = axis_of(op, op.attr("axis", -1), data.dim())
    if axis == 0:
        raise refuse(op, "the axis cannot be the axis of the groups")
    parts = [
        _scatter(op, data[g], indices[g], None if initial is None else initial[g], axis - 1) for g in range(groups)
    ]
    return torch.stack(parts)


@lowers("ai.graphcore", "GroupedGather", 1)
def grouped_gather(op, data, indices):
    """Gather along `axis` in each of the leading group_size groups."""
    groups, axis = op.attr("group_size", 1), op.attr("axis", 0)

    def gather(values, rows, along):
        along = axis_of(op, along, values.dim())
        picked = values.index_select(along, wrap_index(rows.reshape(-1), values.shape[along]))
        return picked.reshape(values.shape[:along] + rows.shape + values.shape[along + 1 :])

    if groups == 1:
        return gather(data, indices, axis)
    axis = axis_of(op, axis, data.dim())
    if axis == 0 or data.shape[0] != groups or indices.shape[0] != groups:
        raise refuse(op, f"data {list(data.shape)} and indices {list(indices.shape)} with group_size {groups}, axis {axis}")
    return torch.stack([gather(data[g], indices[g], axis - 1) for g in range(groups)])
