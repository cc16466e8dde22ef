"""The types that shape inference found for a graph, kept for the next start.

  $XDG_CACHE_HOME/popdet/types/<sha256>.json     {tensor: [type, [dim, ...]]}; default ~/.cache

Inference runs on torch's fake tensors, which import a compiler first: a second and 70 MB. The hash is of all that the types
follow from: the graph, the engine's sources, torch. A file that is lacking or damaged costs that second, nothing else.
"""
from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path

import torch

from ..atomic_io import replacing
from ..errors import popart_exception
from ..tensorinfo import TensorInfo
from . import python_ops
from .hashes import graph_sha256, runtime_sha256
from .ir import Graph

LEAST_OPS = 100  # of a graph that is worth a file
KEPT = 64  # older files are dropped; a detector's has 40 KB

Types = dict[str, TensorInfo]


def file_of(graph: Graph) -> Path | None:
    """Where the types of a graph belong, whose ops are not yet inferred; None where none are kept.

    Types inside subgraphs depend on where the graph is used, and those of ops that are Python functions on a function.
    """
    if len(graph.ops) < LEAST_OPS or any(op.subgraphs() or python_ops.is_registered(op) for op in graph.ops):
        return None
    base = os.environ.get("XDG_CACHE_HOME", "")
    with contextlib.suppress(RuntimeError):  # no home
        folder = (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "popdet" / "types"
        key = f"{graph_sha256(graph)} {graph.replicas} {runtime_sha256()} {torch.__version__}"
        return folder / f"{hashlib.sha256(key.encode()).hexdigest()}.json"
    return None


def read(path: Path | None) -> Types | None:
    """The types in a file, None where there is none."""
    try:
        found = json.loads(path.read_bytes()) if path else None
        return found and {name: TensorInfo(kind, dims) for name, (kind, dims) in found.items()}
    except (OSError, ValueError, TypeError, AttributeError, popart_exception):
        return None


def write(path: Path | None, types: Types) -> None:
    """Keeps types, whole or not at all; silently not at all where the folder cannot be written."""
    if path is None:
        return
    text = json.dumps({name: [info.data_type(), info.dims] for name, info in types.items()})
    with contextlib.suppress(OSError, popart_exception):
        with replacing(path, "the types of a graph", make_folder=True) as file:
            file.write(text.encode())
        for old in sorted(path.parent.glob("*.json"), key=lambda file: file.stat().st_mtime)[:-KEPT]:
            old.unlink()
