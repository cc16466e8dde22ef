"""The host kernels as Python methods, on numpy arrays or on raw pointers of contiguous memory (torch's `data_ptr()`).

Boxes and RoIs are x1, y1, x2, y2 in pixels. Every array is C-contiguous, float32 or float64, all of one dtype; half is
for the caller to widen. `channels_last` speaks of the memory: features [B,H,W,C], aligned [B,D,h,w,C]; a torch tensor
in the channels_last memory format has that memory. ctypes releases the GIL while a kernel runs.
"""

from __future__ import annotations

from dataclasses import astuple
from typing import Optional, Sequence

import numpy as np

from custom_ops.host.inverted_residual import InvertedResiduals
from custom_ops.host.native import INT64, common_dtype, thread_count
from custom_ops.host.roi_align_shape import RoiAlignShape, roi_align_shape
from custom_ops.schema import NO_SCORE_THRESHOLD, CustomOpError


class HostKernels(InvertedResiduals):
    """A loaded host library; get it from `custom_ops.host.load()`. Thread-safe: it holds no state."""

    def nms(
        self,
        scores: np.ndarray,
        boxes: np.ndarray,
        iou_threshold: float,
        max_keep: int,
        score_threshold: float = NO_SCORE_THRESHOLD,
        threads: Optional[int] = None,
    ) -> np.ndarray:
        """scores [B,N], boxes [B,N,4] -> kept rows, int32 [B,max_keep], best first, padded with -1."""
        dtype = common_dtype("nms", scores, boxes)
        if scores.ndim != 2 or boxes.shape != (*scores.shape, 4):
            raise CustomOpError(f"nms: scores [B,N] and boxes [B,N,4] expected, not {scores.shape} and {boxes.shape}")
        scores, boxes = np.ascontiguousarray(scores), np.ascontiguousarray(boxes)
        batch, rows = scores.shape
        keep = np.empty((batch, max(max_keep, 0)), np.int32)
        pointers = (scores.ctypes.data, boxes.ctypes.data, keep.ctypes.data)
        self.nms_pointers(dtype, *pointers, batch, rows, iou_threshold, max_keep, score_threshold, threads)
        return keep

    def nms_pointers(
        self,
        dtype: str,
        scores: int,
        boxes: int,
        keep: int,
        batch: int,
        rows: int,
        iou_threshold: float,
        max_keep: int,
        score_threshold: float = NO_SCORE_THRESHOLD,
        threads: Optional[int] = None,
    ) -> None:
        """As `nms`, on addresses; `keep` is int32 [batch, max_keep] and is written."""
        if max_keep < 1 or not 0 <= iou_threshold <= 1 or score_threshold != score_threshold:
            settings = f"max_keep {max_keep}, iou_threshold {iou_threshold}, score_threshold {score_threshold}"
            raise CustomOpError(f"nms: {settings}: max_keep >= 1 and 0 <= iou_threshold <= 1 are needed, and no NaN")
        if batch < 0 or not 0 <= rows < 2**31 or max_keep >= 2**31:
            raise CustomOpError(f"nms: sizes out of range: batch {batch}, rows {rows}, max_keep {max_keep}")
        sizes = (batch, rows, iou_threshold, score_threshold, max_keep)
        self.call("nms", dtype, scores, boxes, *sizes, thread_count(threads), keep)

    def roi_align_forward(
        self,
        features: np.ndarray,
        rois: np.ndarray,
        height: int,
        width: int,
        spatial_scale: float,
        sampling_ratio: int = 1,
        channels_last: bool = False,
        threads: Optional[int] = None,
    ) -> np.ndarray:
        """features [B,C,H,W], rois [B,D,4 or 5] -> [B,D,C,height,width]; channels_last: see the module."""
        dtype = common_dtype("roi_align", features, rois)
        shape = roi_align_shape(features.shape, rois, height, width, sampling_ratio, channels_last)
        features, rois = np.ascontiguousarray(features), np.ascontiguousarray(rois)
        aligned = np.empty(shape.aligned(channels_last), features.dtype)
        pointers = (features.ctypes.data, rois.ctypes.data, aligned.ctypes.data)
        self.roi_align_forward_pointers(dtype, *pointers, shape, spatial_scale, channels_last, threads)
        return aligned

    def roi_align_backward(
        self,
        grad: np.ndarray,
        rois: np.ndarray,
        feature_shape: Sequence[int],
        spatial_scale: float,
        sampling_ratio: int = 1,
        channels_last: bool = False,
        threads: Optional[int] = None,
    ) -> np.ndarray:
        """grad [B,D,C,h,w], rois [B,D,4 or 5] -> gradient of the features, of `feature_shape` [B,C,H,W].

        With channels_last, grad is [B,D,h,w,C] and feature_shape [B,H,W,C]. The same bits for any number of threads.
        """
        dtype = common_dtype("roi_align backward", grad, rois)
        if grad.ndim != 5:
            raise CustomOpError(f"roi_align backward: grad must have 5 dimensions, not {grad.shape}")
        height, width = grad.shape[2:4] if channels_last else grad.shape[3:5]
        shape = roi_align_shape(tuple(feature_shape), rois, height, width, sampling_ratio, channels_last)
        if grad.shape != shape.aligned(channels_last):
            raise CustomOpError(f"roi_align backward: grad is {grad.shape}, not {shape.aligned(channels_last)}")
        grad, rois = np.ascontiguousarray(grad), np.ascontiguousarray(rois)
        result = np.empty(shape.features(channels_last), grad.dtype)
        pointers = (grad.ctypes.data, rois.ctypes.data, result.ctypes.data)
        self.roi_align_backward_pointers(dtype, *pointers, shape, spatial_scale, channels_last, threads)
        return result

    def roi_align_forward_pointers(
        self,
        dtype: str,
        features: int,
        rois: int,
        aligned: int,
        shape: RoiAlignShape,
        spatial_scale: float,
        channels_last: bool = False,
        threads: Optional[int] = None,
    ) -> None:
        """As `roi_align_forward`, on addresses; `aligned` is written."""
        self._roi_align("roi_align_forward", dtype, features, rois, aligned, shape, spatial_scale, channels_last, threads)

    def roi_align_backward_pointers(
        self,
        dtype: str,
        grad: int,
        rois: int,
        grad_features: int,
        shape: RoiAlignShape,
        spatial_scale: float,
        channels_last: bool = False,
        threads: Optional[int] = None,
    ) -> None:
        """As `roi_align_backward`, on addresses; `grad_features` is overwritten, not added to."""
        pointers = (grad, rois, grad_features)
        self._roi_align("roi_align_backward", dtype, *pointers, shape, spatial_scale, channels_last, threads)

    def _roi_align(
        self,
        name: str,
        dtype: str,
        values: int,
        rois: int,
        out: int,
        shape: RoiAlignShape,
        spatial_scale: float,
        channels_last: bool,
        threads: Optional[int],
    ) -> None:
        sizes = (INT64 * 9)(*astuple(shape))
        self.call(name, dtype, values, rois, sizes, spatial_scale, int(channels_last), thread_count(threads), out)
