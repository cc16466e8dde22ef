"""The compiled host library: its functions by name and dtype, called with raw pointers.

ctypes releases the GIL while a function runs.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any, Callable, Dict, Optional, Tuple

import numpy as np

from custom_ops.schema import CustomOpError
from runtime.errors import EnvironmentProblem

ABI = 4
INT, INT64, DOUBLE, POINTER = ctypes.c_int, ctypes.c_int64, ctypes.c_double, ctypes.c_void_p
_SUFFIX = {"float32": "f32", "float64": "f64"}
_ROI_ALIGN = (POINTER, POINTER, POINTER, DOUBLE, INT, INT, POINTER)
_KERNELS: Dict[str, Tuple[Any, ...]] = {  # name -> types of the arguments
    "nms": (POINTER, POINTER, INT64, INT64, DOUBLE, DOUBLE, INT64, INT, POINTER),
    "roi_align_forward": _ROI_ALIGN,
    "roi_align_backward": _ROI_ALIGN,
    "depthwise_forward": (*[POINTER] * 5, INT, POINTER),
    "depthwise_backward": (*[POINTER] * 6, INT, *[POINTER] * 3),
    "pack_filters": (*[POINTER] * 2, INT, POINTER),
    "pointwise": (*[POINTER] * 6, INT, POINTER),
    "pointwise_mean": (*[POINTER] * 6, INT, POINTER),
    "inverted_residual": (*[POINTER] * 10, INT, POINTER),
    "inverted_residual_of_rois": (*[POINTER] * 9, DOUBLE, POINTER, POINTER, INT, POINTER),
    "winograd_filters": (*[POINTER] * 2, INT, POINTER),
    "winograd_forward": (*[POINTER] * 5, INT, POINTER),
    "winograd_backward": (*[POINTER] * 6, INT, *[POINTER] * 3),
}


class NativeLibrary:
    """A loaded host library. Thread-safe: it holds no state."""

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
        self._functions: Dict[Tuple[str, str], Callable[..., int]] = {}
        for name, types in _KERNELS.items():
            for dtype, suffix in _SUFFIX.items():
                function = self._library[f"popdet_{name}_{suffix}"]
                function.argtypes = types
                self._functions[name, dtype] = function

    def call(self, name: str, dtype: str, *arguments: Any) -> None:
        """Run `popdet_<name>` for this dtype."""
        if dtype not in _SUFFIX:
            raise CustomOpError(f"{name}: host kernels take {' or '.join(_SUFFIX)}, not {dtype}")
        if self._functions[name, dtype](*arguments) != 0:
            raise MemoryError(f"{name}: out of memory in the host kernel")


def common_dtype(op: str, *arrays: np.ndarray) -> str:
    names = [array.dtype.name for array in arrays]
    if len(set(names)) != 1 or names[0] not in _SUFFIX:
        raise CustomOpError(f"{op}: all inputs must be float32, or all float64, not {', '.join(names)}")
    return names[0]


def thread_count(wanted: Optional[int]) -> int:
    """`wanted`, or what OMP_NUM_THREADS allows, or the CPUs this process may use. Results do not depend on it."""
    if wanted is not None:
        return max(1, wanted)
    limit = os.environ.get("OMP_NUM_THREADS", "")
    if limit.isdigit() and int(limit) > 0:
        return int(limit)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
