"""What several op families share: errors that name the op, axes, element types, wide accumulation, ONNX padding."""
from __future__ import annotations

from typing import Callable

import torch

from ...errors import popart_exception

DEVICE_INT = torch.int32  # the IPU has no 64-bit integers: INT64 tensors live on it as INT32


def refuse(op, reason: str) -> popart_exception:
    """The exception to raise for an attribute or an input that this op cannot take."""
    return popart_exception(f"{op.describe()}: {reason}")


def axis_of(op, axis: int, rank: int) -> int:
    """`axis` counted from the front; raises when it is outside [-rank, rank)."""
    if not -max(rank, 1) <= axis < max(rank, 1):
        raise refuse(op, f"axis {axis} is outside of acceptable range [{-rank}, {rank - 1}]")
    return axis % max(rank, 1)


def axes_of(op, axes, rank: int) -> tuple[int, ...]:
    """Several axes, sorted, counted from the front; raises on a repeated one."""
    found = sorted(axis_of(op, int(axis), rank) for axis in axes)
    if len(set(found)) != len(found):
        raise refuse(op, f"axes {tuple(axes)} name one dimension twice")
    return tuple(found)


def ints(op, index: int) -> list[int]:
    """A build-time integer input as a flat list of Python ints."""
    return [int(value) for value in op.constant(index).reshape(-1)]


def wide(function: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
    """`function` of the tensors; half inputs are computed in float and rounded once: half storage, float partials."""
    if tensors[0].dtype != torch.float16:
        return function(*tensors)
    return function(*(t.float() if t is not None and t.dtype == torch.float16 else t for t in tensors)).half()


_UNSIGNED = (torch.uint16, torch.uint32)  # torch has few kernels for these


def exact(function: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
    """`function` of the tensors; UINT16 and UINT32 ones are computed in int64 and wrap around at their own width."""
    dtype = tensors[0].dtype
    if dtype not in _UNSIGNED:
        return function(*tensors)
    out = function(*(t.long() for t in tensors))
    return out if out.dtype == torch.bool else out.to(dtype)


def same_types(op, *tensors: torch.Tensor, doing: str = "np broadcasting") -> None:
    """Raises unless all have one element type, as PopART's inference of broadcast shapes does; INT64 is INT32."""
    first, *others = (DEVICE_INT if t.dtype == torch.int64 else t.dtype for t in tensors)
    for number, other in enumerate(others, 1):
        if other != first:
            kinds = [onnx_name(first), onnx_name(other)]
            shapes = [list(tensors[0].shape), list(tensors[number].shape)]
            raise refuse(op, f"{doing} failed, incompatible types {kinds[0]} and {kinds[1]} (shapes {shapes[0]} and "
                             f"{shapes[1]})")  # fmt: skip


def broadcastable(op, *tensors: torch.Tensor) -> None:
    """Raises unless the shapes broadcast as numpy's do."""
    for other in tensors[1:]:
        pairs = zip(reversed(tensors[0].shape), reversed(other.shape))
        if any(m != n and 1 not in (m, n) for m, n in pairs):
            raise refuse(op, f"np broadcasting failed, incompatible shapes {list(tensors[0].shape)} and {list(other.shape)}")


def shaped(op, what: str, tensor: torch.Tensor | None, *dims: int) -> None:
    """Raises unless an input, where it is given, has exactly these dims: torch would broadcast some others silently."""
    if tensor is not None and tuple(tensor.shape) != dims:
        raise refuse(op, f"{what} must have the shape {list(dims)}, not {list(tensor.shape)}")


def onnx_name(dtype: torch.dtype) -> str:
    """FLOAT, FLOAT16, INT32, ... of a torch dtype."""
    name = str(dtype).split(".")[1].upper()
    return "FLOAT" if name == "FLOAT32" else name


def index_type(op, index: torch.Tensor) -> None:
    """Raises unless the indices are integers."""
    if index.dtype.is_floating_point or index.dtype == torch.bool:
        raise refuse(op, f"indices must be integers, not {onnx_name(index.dtype)}")


def floats_only(op, *tensors: torch.Tensor) -> None:
    """Raises unless every tensor is FLOAT or FLOAT16, where PopLibs has this op for nothing else."""
    for tensor in tensors:
        if not tensor.dtype.is_floating_point:
            raise refuse(op, f"an input of type {onnx_name(tensor.dtype)}; only FLOAT and FLOAT16 are supported")


def booleans_only(op, *tensors: torch.Tensor) -> None:
    """Raises unless every tensor is BOOL."""
    for tensor in tensors:
        if tensor.dtype != torch.bool:
            raise refuse(op, f"an input of type {onnx_name(tensor.dtype)}; only BOOL is supported")


def wrap_index(index: torch.Tensor, size: int) -> torch.Tensor:
    """int64 indices in [0, size) from indices in [-size, size)."""
    index = index.long()
    return torch.where(index < 0, index + size, index)


def resolve_pads(op, spatial, kernel, strides, dilations) -> list[tuple[int, int]]:
    """(begin, end) padding per spatial axis from `pads` or `auto_pad` (onnx.ai/onnx/operators, Conv)."""
    rank = len(spatial)
    auto = op.attr("auto_pad", "NOTSET")
    if auto == "NOTSET":
        pads = op.attr("pads", ()) or (0,) * (2 * rank)
        if len(pads) != 2 * rank:
            raise refuse(op, f"pads {tuple(pads)} must have {2 * rank} entries")
        return [(pads[i], pads[i + rank]) for i in range(rank)]
    if auto == "VALID":
        return [(0, 0)] * rank
    if auto not in ("SAME_UPPER", "SAME_LOWER"):
        raise refuse(op, f"auto_pad '{auto}' is unknown")
    found = []
    for size, k, s, d in zip(spatial, kernel, strides, dilations):
        total = max((-(-size // s) - 1) * s + (k - 1) * d + 1 - size, 0)
        small, large = total // 2, total - total // 2
        found.append((small, large) if auto == "SAME_UPPER" else (large, small))
    return found


def per_axis(op, name: str, rank: int, default: int = 1) -> tuple[int, ...]:
    """An attribute with one entry per spatial axis; absent or empty means `default` everywhere."""
    values = tuple(op.attr(name, ()) or (default,) * rank)
    if len(values) != rank:
        raise refuse(op, f"{name} {values} must have {rank} entries")
    return values


def pad_spatial(x: torch.Tensor, pads: list[tuple[int, int]], value: float = 0.0) -> torch.Tensor:
    """Pads the trailing axes; `pads` is (begin, end) per axis, first axis first; negative entries crop."""
    if not any(begin or end for begin, end in pads):
        return x
    flat = [amount for pair in reversed(pads) for amount in pair]
    return torch.nn.functional.pad(x, flat, value=value)
