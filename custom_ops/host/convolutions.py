"""Convolutions of the host library, channels-last: depthwise 3x3, pointwise (1x1), and 3x3 by Winograd's method.

Each takes a bias and a clip along. Bounds are (low, high), infinite where there is no clip; a clip has the gradient 1
strictly between its bounds, else 0. NaN stays NaN. The same bits for any number of threads. Filters come as a
convolution has them, [K, C / group, height, width], and for the last two kinds are packed once, ahead.
"""

from __future__ import annotations

from typing import Callable, Optional, Tuple

import numpy as np

from custom_ops.host.native import DOUBLE, INT64, NativeLibrary, common_dtype, thread_count
from custom_ops.schema import CustomOpError

PANEL = 32  # channels side by side in packed filters, see gemm.hpp
WINOGRAD_POINTS = 36  # of a tile of 6x6, see winograd.hpp
Bounds = Tuple[float, float]


def pointwise_packed_shape(outputs: int, inputs: int) -> Tuple[int, int, int]:
    """Of what `pack_filters` makes of [outputs, inputs, 1, 1]."""
    return -(-outputs // PANEL), inputs, PANEL


def winograd_packed_shape(outputs: int, inputs: int) -> Tuple[int, int, int, int]:
    """Of what `winograd_filters` makes of [outputs, inputs, 3, 3]."""
    return (WINOGRAD_POINTS, *pointwise_packed_shape(outputs, inputs))


class Convolutions(NativeLibrary):
    """The methods; see the module."""

    def depthwise_forward(
        self,
        x: np.ndarray,
        filters: np.ndarray,
        bias: np.ndarray,
        stride: int,
        before: Bounds,
        after: Bounds,
        threads: Optional[int] = None,
    ) -> np.ndarray:
        """clip(conv(clip(x, before)) + bias, after): x [B,H,W,C], filters [C,1,3,3], bias [C] -> y [B,h,w,C].

        A 3x3 convolution of each channel by itself, padding 1, stride 1 or 2.
        """
        dtype = common_dtype("depthwise", x, filters, bias)
        y = np.empty(depthwise_output(x.shape, filters, stride, before, after), x.dtype)
        if bias.shape != x.shape[3:]:
            raise CustomOpError(f"depthwise: bias [C] expected, C = {x.shape[3]}, not {bias.shape}")
        x, filters, bias = np.ascontiguousarray(x), np.ascontiguousarray(filters), np.ascontiguousarray(bias)
        sizes, bounds = (INT64 * 5)(*x.shape, stride), (DOUBLE * 4)(*before, *after)
        pointers = (x.ctypes.data, filters.ctypes.data, bias.ctypes.data)
        self.call("depthwise_forward", dtype, *pointers, sizes, bounds, thread_count(threads), y.ctypes.data)
        return y

    def depthwise_backward(
        self,
        grad: np.ndarray,
        y: np.ndarray,
        x: np.ndarray,
        filters: np.ndarray,
        stride: int,
        before: Bounds,
        after: Bounds,
        threads: Optional[int] = None,
    ) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Gradients of x, filters and bias, from that of y and what forward read and gave."""
        dtype = common_dtype("depthwise backward", grad, y, x, filters)
        expected = depthwise_output(x.shape, filters, stride, before, after)
        if grad.shape != expected or y.shape != expected:
            raise CustomOpError(f"depthwise backward: grad is {grad.shape} and y {y.shape}, not {expected}")
        arrays = [np.ascontiguousarray(array) for array in (grad, y, x, filters)]
        made = np.empty(x.shape, x.dtype), np.empty(filters.shape, x.dtype), np.empty(x.shape[3], x.dtype)
        sizes, bounds = (INT64 * 5)(*x.shape, stride), (DOUBLE * 4)(*before, *after)
        read, written = [array.ctypes.data for array in arrays], [array.ctypes.data for array in made]
        self.call("depthwise_backward", dtype, *read, sizes, bounds, thread_count(threads), *written)
        return made

    def pack_filters(self, filters: np.ndarray, threads: Optional[int] = None) -> np.ndarray:
        """[K,C,1,1] -> what `pointwise` takes, [ceil(K / 32), C, 32]."""
        return self._packed("pack_filters", filters, 1, pointwise_packed_shape, threads)

    def pointwise(
        self,
        x: np.ndarray,
        packed: np.ndarray,
        bias: np.ndarray,
        addend: Optional[np.ndarray],
        after: Bounds,
        threads: Optional[int] = None,
    ) -> np.ndarray:
        """clip(conv(x) + bias + addend, after): x [B,H,W,C], bias [K], addend [B,H,W,K] or None -> [B,H,W,K]."""
        return self._pointwise("pointwise", x, packed, bias, addend, after, (*x.shape[:3], *bias.shape), threads)

    def pointwise_mean(
        self,
        x: np.ndarray,
        packed: np.ndarray,
        bias: np.ndarray,
        addend: Optional[np.ndarray],
        after: Bounds,
        threads: Optional[int] = None,
    ) -> np.ndarray:
        """The means of what `pointwise` gives over height and width: [B,K]."""
        return self._pointwise("pointwise_mean", x, packed, bias, addend, after, (*x.shape[:1], *bias.shape), threads)

    def winograd_filters(self, filters: np.ndarray, threads: Optional[int] = None) -> np.ndarray:
        """[K,C,3,3] -> what `winograd_forward` takes, [36, ceil(K / 32), C, 32]."""
        return self._packed("winograd_filters", filters, 3, winograd_packed_shape, threads)

    def winograd_forward(
        self, x: np.ndarray, packed: np.ndarray, bias: np.ndarray, after: Bounds, threads: Optional[int] = None
    ) -> np.ndarray:
        """clip(conv(x) + bias, after), 3x3 with padding 1 and stride 1: x [B,H,W,C], bias [K] -> y [B,H,W,K].

        Method and accuracy: winograd.hpp.
        """
        dtype = common_dtype("winograd", x, packed, bias)
        check_packed("winograd", x.shape, packed, bias, after, winograd_packed_shape)
        y = np.empty((*x.shape[:3], bias.shape[0]), x.dtype)
        x, packed, bias = np.ascontiguousarray(x), np.ascontiguousarray(packed), np.ascontiguousarray(bias)
        sizes, pointers = (INT64 * 5)(*x.shape, bias.shape[0]), (x.ctypes.data, packed.ctypes.data, bias.ctypes.data)
        self.call("winograd_forward", dtype, *pointers, sizes, (DOUBLE * 2)(*after), thread_count(threads), y.ctypes.data)
        return y

    def winograd_backward(
        self,
        grad: np.ndarray,
        y: Optional[np.ndarray],
        x: np.ndarray,
        filters: np.ndarray,
        after: Bounds,
        threads: Optional[int] = None,
    ) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Gradients of x, filters [K,C,3,3] and bias, from that of y and what forward read and gave; y None: no clip."""
        given = [array for array in (grad, x, filters, y) if array is not None]
        dtype = common_dtype("winograd backward", *given)
        _check_filters("winograd backward", filters, 3)
        expected = (*x.shape[:3], filters.shape[0])
        if (x.ndim != 4 or min(x.shape[1:]) < 1 or x.shape[3] != filters.shape[1]
                or {array.shape for array in (grad, y) if array is not None} != {expected}):  # fmt: skip
            found = "absent" if y is None else y.shape
            raise CustomOpError(f"winograd backward: x is {x.shape}, grad {grad.shape} and y {found}, not {expected}")
        _check_bounds("winograd backward", after)
        if y is None and after != (-np.inf, np.inf):
            raise CustomOpError(f"winograd backward: with bounds {after} y is needed")
        arrays = [None if array is None else np.ascontiguousarray(array) for array in (grad, y, x, filters)]
        made = np.empty(x.shape, x.dtype), np.empty(filters.shape, x.dtype), np.empty(filters.shape[0], x.dtype)
        sizes, bounds = (INT64 * 5)(*x.shape, filters.shape[0]), (DOUBLE * 2)(*after)
        read, written = [None if array is None else array.ctypes.data for array in arrays], [a.ctypes.data for a in made]
        self.call("winograd_backward", dtype, *read, sizes, bounds, thread_count(threads), *written)
        return made

    def _pointwise(
        self,
        name: str,
        x: np.ndarray,
        packed: np.ndarray,
        bias: np.ndarray,
        addend: Optional[np.ndarray],
        after: Bounds,
        result: Tuple[int, ...],
        threads: Optional[int],
    ) -> np.ndarray:
        arrays = [x, packed, bias] if addend is None else [x, packed, bias, addend]
        dtype = common_dtype(name, *arrays)
        check_packed(name, x.shape, packed, bias, after, pointwise_packed_shape)
        (batch, height, width, inputs), outputs = x.shape, bias.shape[0]
        if addend is not None and addend.shape != (batch, height, width, outputs):
            raise CustomOpError(f"{name}: the addend is {addend.shape}, not {(batch, height, width, outputs)}")
        y, pixels = np.empty(result, x.dtype), height * width
        x, packed, bias, *added = (np.ascontiguousarray(array) for array in arrays)
        sizes = (INT64 * 4)(batch * pixels, outputs, inputs, pixels)
        pointers = (x.ctypes.data, packed.ctypes.data, bias.ctypes.data, added[0].ctypes.data if added else None)
        self.call(name, dtype, *pointers, sizes, (DOUBLE * 2)(*after), thread_count(threads), y.ctypes.data)
        return y

    def _packed(
        self,
        name: str,
        filters: np.ndarray,
        side: int,
        shape: Callable[[int, int], Tuple[int, ...]],
        threads: Optional[int],
    ) -> np.ndarray:
        dtype, filters = common_dtype(name, filters), np.ascontiguousarray(filters)
        _check_filters(name, filters, side)
        packed = np.empty(shape(*filters.shape[:2]), filters.dtype)
        sizes = (INT64 * 3)(0, *filters.shape[:2]) if side == 1 else (INT64 * 2)(*filters.shape[:2])
        self.call(name, dtype, filters.ctypes.data, sizes, thread_count(threads), packed.ctypes.data)
        return packed


def _check_filters(op: str, filters: np.ndarray, side: int) -> None:
    if filters.ndim != 4 or filters.shape[2:] != (side, side) or min(filters.shape) < 1:
        raise CustomOpError(f"{op}: filters [K,C,{side},{side}] expected, not {filters.shape}")


def check_packed(
    op: str,
    x: Tuple[int, ...],
    packed: np.ndarray,
    bias: np.ndarray,
    after: Bounds,
    shape: Callable[[int, int], Tuple[int, ...]],
) -> None:
    """Refuses an x of this shape with these filters where their sizes do not fit, `shape` being that of packed filters."""
    if (len(x) != 4 or min(x[1:]) < 1 or bias.ndim != 1 or bias.size < 1
            or packed.shape != shape(bias.shape[0], x[3])):  # fmt: skip
        raise CustomOpError(f"{op}: x [B,H,W,C], packed filters and bias [K] expected, not {x}, {packed.shape} and "
                            f"{bias.shape}")
    _check_bounds(op, after)


def _check_bounds(op: str, bounds: Bounds) -> None:
    if not bounds[0] <= bounds[1]:
        raise CustomOpError(f"{op}: bounds are {bounds[0]}, {bounds[1]}; low <= high is needed, and no NaN")


def depthwise_output(
    x: Tuple[int, ...], filters: np.ndarray, stride: int, before: Bounds, after: Bounds
) -> Tuple[int, int, int, int]:
    """The shape of y for an x of this shape; refuses what the kernel must not be given."""
    if len(x) != 4 or filters.shape != (x[3], 1, 3, 3) or min(x[1:]) < 1:
        raise CustomOpError(f"depthwise: x [B,H,W,C] and filters [C,1,3,3] expected, not {x} and {filters.shape}")
    if stride not in (1, 2):
        raise CustomOpError(f"depthwise: stride is {stride}; 1 or 2 is needed")
    _check_bounds("depthwise", before)
    _check_bounds("depthwise", after)
    batch, height, width, channels = x
    return batch, (height - 1) // stride + 1, (width - 1) // stride + 1, channels
