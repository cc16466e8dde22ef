"""popdet's custom ops for the Poplar SDK's PopART: `load()` builds the library if needed and registers the ops.

    from custom_ops.popart import load
    load()                       # before a session is made
    import popart

Only files that this user built from this source tree are ever loaded, see build.py; no model or artifact can name others.
"""

from __future__ import annotations

import ctypes
import threading
from pathlib import Path
from typing import Optional

from runtime.errors import EnvironmentProblem

__all__ = ["load"]

_LOCK = threading.Lock()
_LOADED: Optional[ctypes.CDLL] = None  # a library registers its ops when it is loaded, which must happen once


def load(build: bool = True) -> Path:
    """Load the ops into this process, once, and return the library's path. Thread-safe.

    `build=False` never starts a compiler: it takes what `python -m custom_ops.popart.build` built. Raises
    EnvironmentProblem where there is no SDK, where the build fails or is missing, or where another user could have
    written the files.
    """
    global _LOADED
    from custom_ops.popart import build as _build  # here, so that `python -m custom_ops.popart.build` is the first

    with _LOCK:
        if _LOADED is not None:
            return Path(_LOADED._name)
        sdk = _build.find_sdk()
        library = _build.library_path(sdk)
        if build:
            library = _build.build_library(sdk)
        elif not library.exists():
            raise EnvironmentProblem("popdet's PopART ops are not built; run `python -m custom_ops.popart.build`")
        _build.check_files(library)
        try:
            _LOADED = ctypes.CDLL(str(library))
        except OSError as error:
            message = f"cannot load {library}: {error}; enable the SDK it was built with, or delete its folder"
            raise EnvironmentProblem(message) from error
        return library
