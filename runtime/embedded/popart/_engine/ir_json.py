"""The graph as PopART's JSON text: what `Session._serializeIr` returns.

{"maingraph": [op, ...], "<op name>/<attribute>": [op, ...] for each subgraph}. An op is {"name", "domain", "type",
"version", "inputs", "outputs", "attributes"}; inputs and outputs are [{"index", "name", "type", "shape"}]; attributes
are text, placement among them. Copies between virtual graphs are `IpuCopy` ops. Backward and optimizer ops are absent:
torch's autograd and the weight updater do their work, and no list of ops exists for it.
"""
from __future__ import annotations

import json

import numpy as np

from .ir import Graph, Op

MAIN = "maingraph"


def serialise(graph: Graph, recomputed=()) -> str:
    """JSON text of a placed graph; ops in the order in which they run.

    recomputed: the ops that the backward pass computes again (memory.recomputed_ops); their attribute `recompute` is
    YES, that of the others NO.
    """
    again = {id(op) for op in recomputed}
    found = {MAIN: _ops(graph, again)}
    for op, key, inner in _subgraphs(graph, ""):
        found[key] = _ops(inner, again, op)
    return json.dumps(found)


def _subgraphs(graph: Graph, prefix: str):
    for op in graph.ops:
        for name, value in op.attrs.items():
            if isinstance(value, Graph):
                key = f"{prefix}{op.name or op.outputs[0]}/{name}"
                yield op, key, value
                yield from _subgraphs(value, f"{key}/")


def _ops(graph: Graph, again: set[int], around: Op | None = None) -> list[dict]:
    homes = {name: op.ipu for op in graph.ops for name in op.outputs}
    for op in graph.ops:  # a stream goes to the first virtual graph that reads it
        for name in op.inputs:
            if name in graph.inputs:
                homes.setdefault(name, op.ipu)
    found, copied = [], set()
    for op in graph.ops:
        ipu = op.ipu if op.ipu is not None or around is None else around.ipu
        names = []
        for name in op.inputs:
            home = homes.get(name)
            if home is not None and ipu is not None and home != ipu:
                if (name, ipu) not in copied:
                    copied.add((name, ipu))
                    found.append(_copy(graph, name, home, ipu))
                names.append(_copied(name, ipu))
            else:
                names.append(name)
        found.append(_op(graph, op, names, around))
        found[-1]["attributes"]["recompute"] = "YES" if id(op) in again else "NO"
    return found


def _copied(name: str, ipu: int) -> str:
    return f"{name}_c{ipu}"


def _copy(graph: Graph, name: str, source: int, destination: int) -> dict:
    return {
        "name": f"{name}_copy_{source}_to_{destination}", "domain": "ai.graphcore", "type": "IpuCopy", "version": 1,
        "inputs": [_tensor(graph, 0, name, name)],
        "outputs": [_tensor(graph, 0, _copied(name, destination), name)],
        "attributes": {"__sourceIpus": f"[{source}]", "__destIpu": str(destination)},
    }  # fmt: skip


def _op(graph: Graph, op: Op, inputs: list[str], around: Op | None) -> dict:
    attributes = {name: _text(value) for name, value in op.attrs.items() if not isinstance(value, Graph)}
    attributes |= {name: _text(value) for name, value in op.settings.items()}
    for key, own in (("__ipu_number", op.ipu), ("__pipeline_stage", op.stage)):
        attributes.pop(key, None)  # what was annotated; placement may have dropped or changed it
        if own is None and around is not None:
            own = around.ipu if key == "__ipu_number" else around.stage
        if own is not None:
            attributes[key] = str(own)
    return {
        "name": op.name, "domain": op.domain, "type": op.op_type, "version": op.version,
        "inputs": [_tensor(graph, i, name, old) for i, (name, old) in enumerate(zip(inputs, op.inputs)) if name],
        "outputs": [_tensor(graph, i, name, name) for i, name in enumerate(op.outputs) if name],
        "attributes": attributes,
    }  # fmt: skip


def _tensor(graph: Graph, index: int, name: str, described_by: str) -> dict:
    info = graph.info.get(described_by)
    if info is None:
        return {"index": index, "name": name, "type": "UNDEFINED", "shape": "[]"}
    return {"index": index, "name": name, "type": info.data_type(), "shape": _text(info.dims)}


def _text(value) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype.name}{_text(value.shape)}"
    return f"[{' '.join(map(str, value))}]" if isinstance(value, (tuple, list)) else str(value)
