"""Where the value of an anchor comes from: a tensor of the graph, a gradient, a variable or the optimizer.

A weight is returned as it is at the end of the micro-batch, after the update where there is one; an accumulator after
the micro-batch's gradient was added and before the update empties it; other optimizer state after the update.
"""
from __future__ import annotations

import enum
from typing import NamedTuple

from ..errors import popart_exception
from ..tensorinfo import TensorInfo
from . import model_io
from .shapes import info_of

GRADIENT, RESTORED, STASHED = "Gradient___", "Restored___", "Stashed___"
_ACCUMULATORS = ("Accum___", "Accl___")
# other names for an accumulator at one moment of the update
_ACCUMULATOR_FLOW = ("AcclIntoReduce___", "AcclIntoUpdate___", "AcclIntoAccumulator___", "AcclOutOfAcclUpdate___")


class Kind(enum.Enum):
    TENSOR = "tensor"
    GRADIENT = "gradient"
    VARIABLE = "variable"
    ACCUMULATOR = "accumulator"
    STATE = "state"


class Source(NamedTuple):
    kind: Kind
    tensor: str
    info: TensorInfo


def resolve(core) -> dict[str, Source]:
    """{anchor: source}. Raises for an anchor that this session does not have."""
    return {name: _source(core, name) for name in core.data_flow.anchors()}


def _source(core, name: str) -> Source:
    graph = core.graph
    if name in graph.initializers:
        return Source(Kind.VARIABLE, name, graph.info[name])
    if name in graph.info:
        return Source(Kind.TENSOR, name, graph.info[name])
    prefix = next((p for p in (*_ACCUMULATOR_FLOW, *model_io.RESERVED) if name.startswith(p)), "")
    base = name[len(prefix) :]
    if prefix == GRADIENT and base in core.with_gradient:
        return Source(Kind.GRADIENT, base, graph.info[base])
    if prefix in (RESTORED, STASHED) and core.options.enablePipelining and base in graph.info:
        return Source(Kind.TENSOR, base, graph.info[base])
    if core.updater is not None and base in core.trained:
        if prefix == "UpdatedVar___":
            return Source(Kind.VARIABLE, base, graph.info[base])
        if prefix in _ACCUMULATORS or prefix in _ACCUMULATOR_FLOW:
            return _accumulator(core, name, prefix, base)
        if name in core.updater.state:
            return Source(Kind.STATE, name, info_of(core.updater.state[name]))
    known = ", ".join(list(graph.info)[:20])
    raise popart_exception(f"Anchor tensor `{name}' not in Ir Tensors. The tensors are {known}...")


def _accumulator(core, name: str, prefix: str, weight: str) -> Source:
    candidates = (prefix,) if prefix in _ACCUMULATORS else _ACCUMULATORS
    for candidate in candidates:
        info = core.updater.accumulator_info(candidate + weight)
        if info is not None:
            return Source(Kind.ACCUMULATOR, candidate + weight, info)
    raise popart_exception(f"Anchor tensor `{name}' not in Ir Tensors. This optimizer has no such accumulator.")
