"""What files made ahead are recognised by: hashes of a graph and of the engine's own sources."""
from __future__ import annotations

import functools
import hashlib
from pathlib import Path

import numpy as np

from .ir import Graph


def graph_sha256(graph: Graph) -> str:
    """Of the ops, the constants and the types; not of the weights' values, which are inputs of a program."""
    digest = hashlib.sha256()

    def add(*values):
        for value in values:
            if isinstance(value, np.ndarray):
                digest.update(f"{value.dtype}{value.shape}".encode())
                value = np.ascontiguousarray(value).tobytes()
            digest.update(value if isinstance(value, bytes) else repr(value).encode())
            digest.update(b"\0")

    for op in graph.ops:
        add(op.domain, op.op_type, op.version, op.inputs, op.outputs)
        for name in sorted(op.attrs):
            add(name, op.attrs[name])
        add(op.settings.get("__partials_type"), op.settings.get("__strided_channel_grouping"))
    for name in sorted(graph.constants):
        add(name, graph.constants[name])
    for name in (*sorted(graph.initializers), *graph.inputs):
        add(name, graph.info[name].data_type(), graph.info[name].dims)
    return digest.hexdigest()


@functools.cache
def runtime_sha256() -> str:
    """Of the engine's own sources: a corrected lowering makes other native code from the same graph."""
    folder, digest = Path(__file__).parent, hashlib.sha256()
    for source in sorted(folder.rglob("*.py")):
        digest.update(source.relative_to(folder).as_posix().encode() + b"\0" + source.read_bytes() + b"\0")
    return digest.hexdigest()
