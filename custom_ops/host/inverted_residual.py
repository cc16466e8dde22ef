"""MobileNetV2's inverted residual, of maps and of RoIs, as one call of the host library, see inverted_residual.hpp.

What lies between is never written out. Bounds, NaN and threads: see convolutions.py.
"""

from __future__ import annotations

from dataclasses import astuple
from typing import Any, Optional, Sequence, Tuple

import numpy as np

from custom_ops.host.convolutions import Bounds, Convolutions, check_packed, depthwise_output, pointwise_packed_shape
from custom_ops.host.native import DOUBLE, INT64, common_dtype, thread_count
from custom_ops.host.roi_align_shape import roi_align_shape
from custom_ops.schema import CustomOpError

Weights = Tuple[np.ndarray, np.ndarray]  # filters and bias


class InvertedResiduals(Convolutions):
    """The methods; see the module."""

    def inverted_residual(
        self,
        x: np.ndarray,
        expand: Optional[Weights],
        depthwise: Weights,
        project: Weights,
        addend: Optional[np.ndarray],
        stride: int,
        before: Bounds,
        after: Bounds,
        threads: Optional[int] = None,
    ) -> np.ndarray:
        """project(depthwise(expand(x))) + addend, with the clips of `depthwise_forward`: x [B,H,W,C] -> y [B,h,w,K].

        expand (None: x as it is) and project are (packed filters of `pack_filters`, bias), depthwise is (filters
        [M,1,3,3], bias [M]). addend is [B,h,w,K] or None.
        """
        op, wide = "inverted_residual", x.shape
        if expand is not None:
            check_packed(op, x.shape, *expand, before, pointwise_packed_shape)
            wide = (*x.shape[:3], *expand[1].shape)
        sources = (x, *(expand or (None, None)))
        clips = (stride, before, after)
        return self._inverted_residual(op, sources, wide, (), x.shape[3:], depthwise, project, addend, clips, threads)

    def inverted_residual_of_rois(
        self,
        features: np.ndarray,
        rois: np.ndarray,
        roi_bias: Optional[np.ndarray],
        size: Tuple[int, int],
        spatial_scale: float,
        sampling_ratio: int,
        depthwise: Weights,
        project: Weights,
        addend: Optional[np.ndarray],
        stride: int,
        before: Bounds,
        after: Bounds,
        threads: Optional[int] = None,
    ) -> np.ndarray:
        """`inverted_residual` of RoI-Align: features [B,H,W,M], rois [B,D,4 or 5] -> y [B * D,h,w,K].

        That of x [B * D,*size,M], with expand None, where x is what `roi_align_forward` gives (channels_last), plus roi_bias
        [M] (None: as it is). rois are x1, y1, x2, y2 in pixels of the image, 1 / spatial_scale of them a feature pixel.
        """
        op = "inverted_residual_of_rois"
        shape = roi_align_shape(features.shape, rois, *size, sampling_ratio, channels_last=True)
        if roi_bias is not None and roi_bias.shape != features.shape[3:]:
            raise CustomOpError(f"{op}: roi_bias [M] expected, M = {shape.channels}, not {roi_bias.shape}")
        wide, sizes = (shape.batch * shape.num_rois, *size, shape.channels), (INT64 * 9)(*astuple(shape))
        clips, sources = (stride, before, after), (features, rois, roi_bias)
        return self._inverted_residual(
            op, sources, wide, (sizes, spatial_scale), (), depthwise, project, addend, clips, threads
        )

    def _inverted_residual(
        self,
        op: str,
        sources: Sequence[Optional[np.ndarray]],
        wide: Tuple[int, ...],
        settings: Tuple[Any, ...],
        inputs: Tuple[int, ...],
        depthwise: Weights,
        project: Weights,
        addend: Optional[np.ndarray],
        clips: Tuple[int, Bounds, Bounds],
        threads: Optional[int],
    ) -> np.ndarray:
        """What both do. wide: shape of what the depthwise convolution reads. inputs: channels of what is expanded to it."""
        arrays = (*sources, *depthwise, *project, addend)
        dtype = common_dtype(op, *(array for array in arrays if array is not None))
        rows = depthwise_output(wide, depthwise[0], *clips)
        check_packed(op, rows, *project, clips[2], pointwise_packed_shape)
        y = np.empty((*rows[:3], *project[1].shape), dtype)
        if depthwise[1].shape != rows[3:] or (addend is not None and addend.shape != y.shape):
            raise CustomOpError(f"{op}: bias {depthwise[1].shape} or addend {None if addend is None else addend.shape} does "
                                f"not fit {rows[3]} channels and {y.shape}")
        kept = [None if array is None else np.ascontiguousarray(array) for array in arrays]
        pointers = (None if array is None else array.ctypes.data for array in kept)
        numbers = (*wide, clips[0], y.shape[3], *inputs)
        sizes, bounds = (INT64 * len(numbers))(*numbers), (DOUBLE * 4)(*clips[1], *clips[2])
        self.call(op, dtype, *pointers, *settings, sizes, bounds, thread_count(threads), y.ctypes.data)
        return y
