"""popdet's custom ops on the CPU: `load()` builds the C++ kernels if needed and returns them, or None.

    kernels = load()
    keep = kernels.nms(scores, boxes, 0.7, 300) if kernels else slower_python_nms(...)

None comes with one warning for the whole process, which says why and what to do. Only a library that this user built
from this source tree is ever loaded, see build.py; no model or artifact can name another.
"""

from __future__ import annotations

import threading
import warnings
from typing import Optional

from custom_ops.host.library import HostKernels
from custom_ops.host.roi_align_shape import RoiAlignShape
from runtime.errors import EnvironmentProblem

__all__ = ["HostKernels", "RoiAlignShape", "load"]


class _Loader:
    """Loads once and remembers; a failure is remembered too, so that a hot path does not start a compiler again."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kernels: Optional[HostKernels] = None
        self._failed = False
        self._warned = False

    def load(self, build: bool) -> Optional[HostKernels]:
        if self._kernels is not None:  # without the lock: set once, never unset
            return self._kernels
        with self._lock:
            if self._kernels is None and not self._failed:
                try:
                    self._kernels = self._open(build)
                except EnvironmentProblem as error:
                    self._failed = build
                    self._warn(error)
            return self._kernels

    def _open(self, build: bool) -> HostKernels:
        from custom_ops.host import build as _build  # here, so that `python -m custom_ops.host.build` is the first

        compiler = _build.find_compiler()
        if compiler is None:
            raise EnvironmentProblem("g++ is not on PATH; install it (apt install g++), then run `make setup`")
        path = _build.library_path(compiler)
        if build:
            path = _build.build_library(compiler)
        elif not path.exists():
            raise EnvironmentProblem("they are not built; run `make setup`")
        _build.check_owner(path)
        return HostKernels(path)

    def _warn(self, error: EnvironmentProblem) -> None:
        if not self._warned:
            self._warned = True
            message = f"popdet's C++ host kernels are not in use, slower Python code is: {error}"
            warnings.warn(message, RuntimeWarning, stacklevel=4)


_LOADER = _Loader()


def load(build: bool = True) -> Optional[HostKernels]:
    """The host kernels, loaded once per process; None, and one RuntimeWarning, where they cannot be had.

    `build=False` never starts the compiler on the kernels: it takes what `make setup` built. Thread-safe.
    """
    return _LOADER.load(build)
