"""The one place where popdet imports PopART: `from runtime.popart_api import popart`.

It is the Poplar SDK's module where that is installed, else the embedded one of `runtime/embedded`. Both are found on
first use, so importing `runtime` stays fast and never pulls in torch or onnx (onnx before the SDK's popart is an
ImportError there). `is_embedded` says which one it is.
"""
from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Optional

from runtime.errors import EnvironmentProblem

EMBEDDED_ROOT = Path(__file__).resolve().parent / "embedded"


def __getattr__(name: str) -> Any:
    if name == "popart":
        return load_popart()
    if name == "is_embedded":
        return is_embedded_module(load_popart())
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def load_popart() -> ModuleType:
    """The SDK's popart or the embedded one; raises EnvironmentProblem when neither can be used."""
    if "popart" not in sys.modules and importlib.util.find_spec("popart") is None:
        sys.path.insert(0, str(EMBEDDED_ROOT))
        importlib.invalidate_caches()
    try:
        module = importlib.import_module("popart")
    except ImportError as error:
        raise EnvironmentProblem(
            f"popart cannot be imported: {error}. The embedded runtime needs torch and onnx (`make setup`); the Poplar "
            "SDK needs its environment enabled and popart imported before onnx"
        ) from error
    if not hasattr(module, "TrainingSession"):
        raise EnvironmentProblem(
            f"the package 'popart' at {_origin(module)} is not Graphcore's PopART (it has no TrainingSession): the "
            "public package index has an unrelated package of that name. Remove it: pip uninstall popart"
        )
    if is_embedded_module(module):
        missing = [name for name in ("torch", "onnx") if importlib.util.find_spec(name) is None]
        if missing:
            raise EnvironmentProblem(
                f"this interpreter has neither the Poplar SDK nor {' and '.join(missing)}, which the embedded runtime needs. "
                "Enable the SDK (Python 3.8) or run `make setup` (Python 3.10 or newer)"
            )
    return module


def is_embedded_module(module: ModuleType) -> bool:
    """Whether a popart module is the embedded implementation."""
    return EMBEDDED_ROOT in Path(_origin(module)).resolve().parents


def find_sdk() -> Optional[str]:
    """Where the Poplar SDK's popart lies, or None when this interpreter has none; imports nothing.

    The SDK is recognised by its compiled half, popart_core, which the unrelated package of the same name does not have.
    """
    specs = [importlib.util.find_spec(name) for name in ("popart", "popart_core")]
    origins = [Path(spec.origin).resolve() for spec in specs if spec is not None and spec.origin is not None]
    if len(origins) < len(specs) or any(EMBEDDED_ROOT in origin.parents for origin in origins):
        return None
    return str(origins[0].parent)


def _origin(module: ModuleType) -> str:
    return getattr(module, "__file__", None) or "<unknown>"
