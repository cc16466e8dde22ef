"""The host kernels as Python methods, on numpy arrays or on raw pointers of contiguous memory (torch's `data_ptr()`).

Boxes and RoIs are x1, y1, x2, y2 in pixels. Every array is C-contiguous, float32 or float64, all of one dtype; half is
for the caller to widen. `channels_last` speaks of the memory: features [B,H,W,C], aligned [B,D,h,w,C]; a torch tensor
in the channels_last memory format has that memory. ctypes releases the GIL while a kernel runs.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, Callable, Dict, Optional, Sequence, Tuple

import numpy as np

from custom_ops.schema import NO_SCORE_THRESHOLD, CustomOpError
from runtime.errors import EnvironmentProblem

ABI = 2
_SUFFIX = {"float32": "f32", "float64": "f64"}
Bounds = Tuple[float, float]
_INT, _INT64, _DOUBLE, _POINTER = ctypes.c_int, ctypes.c_int64, ctypes.c_double, ctypes.c_void_p


@dataclass(frozen=True)
class RoiAlignShape:
    """All sizes of a RoI-Align: features B x C x H x W, rois B x num_rois x roi_columns, output bins, samples per bin."""

    batch: int
    channels: int
    height: int
    width: int
    num_rois: int
    roi_columns: int
    out_height: int
    out_width: int
    sampling_ratio: int = 1

    def __post_init__(self) -> None:
        smallest = min(value for name, value in vars(self).items() if name != "num_rois")
        if smallest < 1 or self.num_rois < 0 or self.roi_columns not in (4, 5):
            raise CustomOpError(f"roi_align: sizes must be positive and rois have 4 or 5 columns: {self}")

    def features(self, channels_last: bool) -> Tuple[int, ...]:
        pixels = (self.height, self.width)
        return (self.batch, *pixels, self.channels) if channels_last else (self.batch, self.channels, *pixels)

    def aligned(self, channels_last: bool) -> Tuple[int, ...]:
        rois, bins = (self.batch, self.num_rois), (self.out_height, self.out_width)
        return (*rois, *bins, self.channels) if channels_last else (*rois, self.channels, *bins)


class HostKernels:
    """A loaded host library; get it from `custom_ops.host.load()`. Thread-safe: it holds no state."""

    def __init__(self, path: Path) -> None:
        """Load the library at `path`, which must come from `build.build_library`. Raises EnvironmentProblem."""
        self.path = path
        try:
            self._library = ctypes.CDLL(str(path))
            abi = self._library.popdet_host_abi()
        except (OSError, AttributeError) as error:
            raise EnvironmentProblem(f"cannot load the host kernels at {path}: {error}; delete that file") from error
        if abi != ABI:
            raise EnvironmentProblem(f"{path} has interface {abi}, not {ABI}; delete that file")
        nms = (_POINTER, _POINTER, _INT64, _INT64, _DOUBLE, _DOUBLE, _INT64, _INT, _POINTER)
        roi_align = (_POINTER, _POINTER, _POINTER, _DOUBLE, _INT, _INT, _POINTER)
        self._functions: Dict[Tuple[str, str], Callable[..., int]] = {}
        kernels: Dict[str, Tuple[Any, ...]] = {
            "nms": nms,
            "roi_align_forward": roi_align,
            "roi_align_backward": roi_align,
            "depthwise_forward": (*[_POINTER] * 5, _INT, _POINTER),
            "depthwise_backward": (*[_POINTER] * 6, _INT, *[_POINTER] * 3),
        }
        for name, types in kernels.items():
            for dtype, suffix in _SUFFIX.items():
                function = self._library[f"popdet_{name}_{suffix}"]
                function.argtypes = types
                self._functions[name, dtype] = function

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
        dtype = _common_dtype("nms", scores, boxes)
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
        self._call("nms", dtype, scores, boxes, *sizes, _threads(threads), keep)

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
        dtype = _common_dtype("roi_align", features, rois)
        shape = _roi_align_shape(features.shape, rois, height, width, sampling_ratio, channels_last)
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
        dtype = _common_dtype("roi_align backward", grad, rois)
        if grad.ndim != 5:
            raise CustomOpError(f"roi_align backward: grad must have 5 dimensions, not {grad.shape}")
        height, width = grad.shape[2:4] if channels_last else grad.shape[3:5]
        shape = _roi_align_shape(tuple(feature_shape), rois, height, width, sampling_ratio, channels_last)
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

        A 3x3 convolution of each channel by itself, padding 1, stride 1 or 2. Bounds are (low, high), infinite where
        there is no clip. NaN stays NaN.
        """
        dtype = _common_dtype("depthwise", x, filters, bias)
        y = np.empty(_depthwise_output(x, filters, stride, before, after), x.dtype)
        if bias.shape != x.shape[3:]:
            raise CustomOpError(f"depthwise: bias [C] expected, C = {x.shape[3]}, not {bias.shape}")
        x, filters, bias = np.ascontiguousarray(x), np.ascontiguousarray(filters), np.ascontiguousarray(bias)
        sizes, bounds = (_INT64 * 5)(*x.shape, stride), (_DOUBLE * 4)(*before, *after)
        pointers = (x.ctypes.data, filters.ctypes.data, bias.ctypes.data)
        self._call("depthwise_forward", dtype, *pointers, sizes, bounds, _threads(threads), y.ctypes.data)
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
        """Gradients of x, filters and bias, from that of y and what forward read and gave.

        A clip has the gradient 1 strictly between its bounds, else 0. The same bits for any number of threads.
        """
        dtype = _common_dtype("depthwise backward", grad, y, x, filters)
        expected = _depthwise_output(x, filters, stride, before, after)
        if grad.shape != expected or y.shape != expected:
            raise CustomOpError(f"depthwise backward: grad is {grad.shape} and y {y.shape}, not {expected}")
        arrays = [np.ascontiguousarray(array) for array in (grad, y, x, filters)]
        made = np.empty(x.shape, x.dtype), np.empty(filters.shape, x.dtype), np.empty(x.shape[3], x.dtype)
        sizes, bounds = (_INT64 * 5)(*x.shape, stride), (_DOUBLE * 4)(*before, *after)
        read, written = [array.ctypes.data for array in arrays], [array.ctypes.data for array in made]
        self._call("depthwise_backward", dtype, *read, sizes, bounds, _threads(threads), *written)
        return made

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
        sizes = (_INT64 * 9)(*astuple(shape))
        self._call(name, dtype, values, rois, sizes, spatial_scale, int(channels_last), _threads(threads), out)

    def _call(self, name: str, dtype: str, *arguments: Any) -> None:
        if dtype not in _SUFFIX:
            raise CustomOpError(f"{name}: host kernels take {' or '.join(_SUFFIX)}, not {dtype}")
        if self._functions[name, dtype](*arguments) != 0:
            raise MemoryError(f"{name}: out of memory in the host kernel")


def _common_dtype(op: str, *arrays: np.ndarray) -> str:
    names = [array.dtype.name for array in arrays]
    if len(set(names)) != 1 or names[0] not in _SUFFIX:
        raise CustomOpError(f"{op}: all inputs must be float32, or all float64, not {', '.join(names)}")
    return names[0]


def _roi_align_shape(
    features: Tuple[int, ...], rois: np.ndarray, height: int, width: int, sampling_ratio: int, channels_last: bool
) -> RoiAlignShape:
    if len(features) != 4 or rois.ndim != 3 or rois.shape[0] != features[0]:
        raise CustomOpError(f"roi_align: features {features}, rois {rois.shape}: 4 and 3 dimensions, one batch needed")
    batch, rows, columns, channels = features if channels_last else (features[0], *features[2:], features[1])
    num_rois, roi_columns = rois.shape[1:]
    return RoiAlignShape(batch, channels, rows, columns, num_rois, roi_columns, height, width, sampling_ratio)


def _depthwise_output(
    x: np.ndarray, filters: np.ndarray, stride: int, before: Bounds, after: Bounds
) -> Tuple[int, int, int, int]:
    """The shape of y; refuses what the kernel must not be given."""
    if x.ndim != 4 or filters.shape != (x.shape[3], 1, 3, 3) or min(x.shape[1:]) < 1:
        raise CustomOpError(f"depthwise: x [B,H,W,C] and filters [C,1,3,3] expected, not {x.shape} and {filters.shape}")
    if stride not in (1, 2):
        raise CustomOpError(f"depthwise: stride is {stride}; 1 or 2 is needed")
    for low, high in (before, after):
        if not low <= high:
            raise CustomOpError(f"depthwise: bounds are {low}, {high}; low <= high is needed, and no NaN")
    batch, height, width, channels = x.shape
    return batch, (height - 1) // stride + 1, (width - 1) // stride + 1, channels


def _threads(wanted: Optional[int]) -> int:
    """`wanted`, or what OMP_NUM_THREADS allows, or the CPUs this process may use. Results do not depend on it."""
    if wanted is not None:
        return max(1, wanted)
    limit = os.environ.get("OMP_NUM_THREADS", "")
    if limit.isdigit() and int(limit) > 0:
        return int(limit)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
