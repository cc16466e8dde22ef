"""Moving elements without computing: reshape, transpose, slice, pad, join, split. Shapes are build-time constants."""
from __future__ import annotations

import math

import torch

from ...errors import popart_exception
from ..registry import lowers
from .common import axes_of, axis_of, exact, ints, pad_spatial, refuse, same_types


def reshape_to(op, x, dims):
    """0 keeps the input's size at that place, one -1 is whatever is left."""
    dims = [int(d) for d in dims]
    if any(d == 0 and i >= x.dim() for i, d in enumerate(dims)) or dims.count(-1) > 1:
        raise refuse(op, f"cannot reshape {list(x.shape)} to {dims}")
    dims = [x.shape[i] if d == 0 else d for i, d in enumerate(dims)]
    known = math.prod(d for d in dims if d != -1)
    if -1 in dims and known:
        dims[dims.index(-1)] = x.numel() // known
    if math.prod(dims) != x.numel():
        raise refuse(op, f"cannot reshape {list(x.shape)} to {dims}")
    return x.reshape(dims)


@lowers("ai.onnx", "Reshape", 1)
@lowers("ai.graphcore", "Reshape", 1)
def reshape_attribute(op, x):
    return reshape_to(op, x, op.attr("shape"))


@lowers("ai.onnx", "Reshape", 5)
def reshape(op, x, shape=None):
    return reshape_to(op, x, ints(op, 1))


@lowers("ai.onnx", "Flatten", 1, 9, 11)
def flatten(op, x):
    """[prod(dims before axis), prod(dims from axis)]; axis may be the rank itself."""
    axis = op.attr("axis", 1)
    if not -x.dim() <= axis <= x.dim():
        raise refuse(op, f"axis {axis} is outside [-{x.dim()}, {x.dim()}]")
    axis = axis + x.dim() if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


@lowers("ai.onnx", "Transpose", 1)
def transpose(op, x):
    return x.permute(tuple(op.attr("perm", ()) or range(x.dim() - 1, -1, -1)))


@lowers("ai.onnx", "Squeeze", 1, 11)
def squeeze(op, x):
    axes = op.attr("axes", ()) or [i for i, size in enumerate(x.shape) if size == 1]
    axes = axes_of(op, axes, x.dim())
    if any(x.shape[a] != 1 for a in axes):
        raise refuse(op, f"axes {axes} of shape {list(x.shape)} are not all 1")
    return x.reshape([size for i, size in enumerate(x.shape) if i not in axes])


@lowers("ai.onnx", "Unsqueeze", 1, 11)
def unsqueeze(op, x):
    axes = op.attr("axes")
    for axis in axes_of(op, axes, x.dim() + len(axes)):
        x = x.unsqueeze(axis)
    return x


@lowers("ai.onnx", "Expand", 8)
def expand(op, x, shape=None):
    """Broadcast both ways: a 1 in the shape leaves the input's size."""
    if any(m != n and 1 not in (m, n) for m, n in zip(reversed(x.shape), reversed(ints(op, 1)))):
        raise refuse(op, f"{list(x.shape)} does not expand to {ints(op, 1)}: corresponding dimensions must have the same "
                         "value or one of them must be 1")  # fmt: skip
    return x.expand(torch.broadcast_shapes(tuple(x.shape), tuple(ints(op, 1))))


@lowers("ai.onnx", "Tile", 6)
def tile(op, x, repeats=None):
    return x.repeat(ints(op, 1))


@lowers("ai.onnx", "Concat", 4, 11)
def concat(op, *xs):
    same_types(op, *xs, doing="concatenation")
    return torch.cat(xs, dim=axis_of(op, op.attr("axis"), xs[0].dim()))


@lowers("ai.onnx", "Split", 2, 11)
def split(op, x):
    axis, parts = axis_of(op, op.attr("axis", 0), x.dim()), len(op.outputs)
    sizes = list(op.attr("split", ()) or [x.shape[axis] // parts] * parts)
    if len(sizes) != parts or sum(sizes) != x.shape[axis]:
        raise refuse(op, f"cannot split {x.shape[axis]} elements of axis {axis} into {parts} outputs of sizes {sizes}")
    return torch.split(x, sizes, dim=axis)


def _slice(op, x, starts, ends, axes, steps):
    axes = range(len(starts)) if axes is None else axes
    if not len(starts) == len(ends) == len(axes) == len(steps or axes):
        raise refuse(op, f"starts {list(starts)}, ends {list(ends)}, axes {list(axes)} and steps must have the same length")
    for start, end, axis, step in zip(starts, ends, axes, steps or [1] * len(starts)):
        axis = axis_of(op, axis, x.dim())
        if step == 0:
            raise refuse(op, "a step of 0")
        picked = range(x.shape[axis])[slice(start, _end(end, step), step)]
        if not picked:
            x = x.narrow(axis, 0, 0)
        elif step > 0:
            x = x[(slice(None),) * axis + (slice(picked[0], picked[-1] + 1, step),)]
        else:  # torch has no negative steps: slice the same elements forwards, then turn them round
            x = x[(slice(None),) * axis + (slice(picked[-1], picked[0] + 1, -step),)].flip(axis)
    return x


def _end(end, step):
    """Going down, ONNX says "up to and with element 0" by an end below -size; Python says None."""
    return None if step < 0 and end < -(2**30) else end


@lowers("ai.onnx", "Slice", 1)
@lowers("ai.graphcore", "Slice", 1)
def slice_attributes(op, x):
    return _slice(op, x, op.attr("starts"), op.attr("ends"), op.attr("axes", None) or None, None)


@lowers("ai.onnx", "Slice", 10, 11)
def slice_inputs(op, x, starts=None, ends=None, axes=None, steps=None):
    axes, steps = op.constant(3, None), op.constant(4, None)
    return _slice(op, x, ints(op, 1), ints(op, 2), None if axes is None else ints(op, 3),
                  None if steps is None else ints(op, 4))  # fmt: skip


def _pad(op, x, pads, value):
    if len(pads) != 2 * x.dim():
        raise refuse(op, f"pads {pads} must have {2 * x.dim()} entries")
    pairs = list(zip(pads[: x.dim()], pads[x.dim() :]))
    mode = op.attr("mode", "constant")
    if mode == "constant":
        return pad_spatial(x, pairs, value)
    if mode not in ("edge", "reflect"):
        raise refuse(op, f"mode '{mode}' is unknown")
    for axis, (begin, end) in enumerate(pairs):
        if begin or end:
            x = x.index_select(axis, _padded_positions(op, x.shape[axis], begin, end, mode, x.device))
    return x


def _padded_positions(op, size, begin, end, mode, device):
    """Where each element of the padded axis comes from."""
    position = torch.arange(-begin, size + end, device=device)
    if mode == "edge":
        return position.clamp(0, size - 1)
    if max(begin, end) >= size:
        raise refuse(op, f"reflecting {max(begin, end)} elements of an axis of {size}")
    return (size - 1) - (size - 1 - position.abs()).abs()


@lowers("ai.onnx", "Pad", 2)
def pad_attributes(op, x):
    return _pad(op, x, list(op.attr("pads")), op.attr("value", 0.0))


@lowers("ai.onnx", "Pad", 11)
def pad_inputs(op, x, pads=None, value=None):
    value = op.constant(2, None)
    return _pad(op, x, ints(op, 1), 0 if value is None else value.reshape(-1)[0].item())


@lowers("ai.onnx", "DepthToSpace", 1, 11)
@lowers("ai.graphcore", "DepthToSpace", 1)
def depth_to_space(op, x):
    """[N,C*b*b,H,W] -> [N,C,H*b,W*b]; mode DCR (depth, column, row) or CRD."""
    n, c, h, w = x.shape
    b, mode = op.attr("blocksize"), op.attr("mode", "DCR")
    if mode == "DCR":
        x = x.reshape(n, b, b, c // (b * b), h, w).permute(0, 3, 4, 1, 5, 2)
    elif mode == "CRD":
        x = x.reshape(n, c // (b * b), b, b, h, w).permute(0, 1, 4, 2, 5, 3)
    else:
        raise refuse(op, f"mode '{mode}' is unknown")
    return x.reshape(n, c // (b * b), h * b, w * b)


@lowers("ai.onnx", "SpaceToDepth", 1)
def space_to_depth(op, x):
    n, c, h, w = x.shape
    b = op.attr("blocksize")
    x = x.reshape(n, c, h // b, b, w // b, b).permute(0, 3, 5, 1, 2, 4)
    return x.reshape(n, c * b * b, h // b, w // b)


@lowers("ai.onnx", "Identity", 1)
def identity(op, x):
    return x


@lowers("ai.graphcore", "Reverse", 1)
def reverse(op, x):
    axes = axes_of(op, op.attr("dimensions"), x.dim())
    return exact(lambda t: t.flip(axes), x)


@lowers("ai.graphcore", "Subsample", 1)
def subsample(op, x):
    """Every strides[i]-th element of axis i, from the first."""
    strides = op.attr("strides")
    if len(strides) != x.dim():
        raise refuse(op, f"strides {tuple(strides)} must have {x.dim()} entries, one a dimension")
    for i, step in enumerate(strides):
        if step < 1:
            raise popart_exception(f"Strides invalid. {step} stride at index {i} of {op.describe()}")
    return x[tuple(slice(None, None, step) for step in strides)]


def dynamic_positions(op, offset, size, length):
    """offset .. offset+size-1 as indices into an axis of `length`; a start too far out is moved back inside."""
    start = offset.reshape(()).long().clamp(0, length - size)
    return start + torch.arange(size, device=offset.device)


@lowers("ai.graphcore", "DynamicSlice", 1)
def dynamic_slice(op, x, offset, template=None):
    """The part of x that begins at `offset` (one entry per axis of `axes`) and has `sizes`."""
    offset = _offsets(op, x, offset)
    for i, (axis, size) in enumerate(zip(op.attr("axes"), op.attr("sizes"))):
        x = x.index_select(axis, dynamic_positions(op, offset[i], size, x.shape[axis]))
    return x


def _offsets(op, x, offset):
    """The offsets, one for each of `axes`; raises where they or `sizes` do not fit x."""
    axes, sizes, offset = op.attr("axes"), op.attr("sizes"), offset.reshape(-1)
    if not len(axes) == len(sizes) == len(offset):
        raise refuse(op, f"axes {tuple(axes)}, sizes {tuple(sizes)} and {len(offset)} offsets must be of one length")
    for axis, size in zip(axes, sizes):
        if not 0 <= axis < x.dim() or size > x.shape[axis]:
            raise refuse(op, f"a slice of {size} elements along axis {axis} does not fit the shape {list(x.shape)}")
    return offset


def _written(op, x, offset, part, combine):
    """x with combine(x's region, part) written at `offset` along `axes`."""
    axes, offset = op.attr("axes"), _offsets(op, x, offset)
    index, inside = [], None
    for i, axis in enumerate(axes):
        positions = torch.arange(x.shape[axis], device=x.device)
        start = offset[i].long().clamp(0, x.shape[axis] - part.shape[axis])
        relative = positions - start
        shape = [-1 if a == axis else 1 for a in range(x.dim())]
        hit = ((relative >= 0) & (relative < part.shape[axis])).reshape(shape)
        inside = hit if inside is None else inside & hit
        index.append((axis, relative.clamp(0, part.shape[axis] - 1)))
    for axis, positions in index:
        part = part.index_select(axis, positions)
    return torch.where(inside, combine(x, part), x)


@lowers("ai.graphcore", "DynamicUpdate", 1)
def dynamic_update(op, x, offset, part):
    return _written(op, x, offset, part, lambda old, new: new)


@lowers("ai.graphcore", "DynamicAdd", 1)
def dynamic_add(op, x, offset, part):
    return _written(op, x, offset, part, torch.add)


@lowers("ai.graphcore", "DynamicZero", 1)
def dynamic_zero(op, x, offset):
    """x with zeros in the region of `sizes` at `offset` along `axes`."""
    _offsets(op, x, offset)
    shape = list(x.shape)
    for axis, size in zip(op.attr("axes"), op.attr("sizes")):
        shape[axis] = size
    return _written(op, x, offset, torch.zeros(shape, dtype=x.dtype, device=x.device), lambda old, new: new)
