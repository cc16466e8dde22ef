"""What an import moves out of subgraphs: their variables, and the new values that a callee gives to variables.

An op with subgraphs has its explicit inputs first and then what its subgraphs read from around them (Op.explicit).
"""
from __future__ import annotations

import dataclasses

import numpy as np

from ..errors import unsupported

VARIABLE_WRITERS = ("CopyVarUpdate", "AddLhsInplace")  # their output is the new value of their first input
# PopART evaluates these inputs at build time: a float initializer that feeds nothing else is a constant, not a weight.
CONSTANT_ONLY_INPUTS = {
    ("Clip", 1), ("Clip", 2), ("Resize", 1), ("Resize", 2), ("Resize", 3), ("Upsample", 1), ("Pad", 1), ("Pad", 2),
    ("OneHot", 1),
}  # fmt: skip


@dataclasses.dataclass
class Hoisted:
    """The variables of all subgraphs. taken: every name of the main graph, and theirs.

    Two copies of one callee share its variables; a variable of another subgraph, or of the main graph, that has the
    same name is another variable, and the subgraph's gets "/1", "/2" ... behind its name.
    """

    taken: set[str]
    weights: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    homes: dict[tuple[str, str], str] = dataclasses.field(default_factory=dict)  # (graph, name there) -> name here

    def take(self, graph, graph_name: str, weights: dict[str, np.ndarray]) -> None:
        """Takes the variables of one subgraph, which then reads them under the names that they have here."""
        for name, array in weights.items():
            home = self.homes.get((graph_name, name)) if graph_name else None
            if home is None or not _same(self.weights[home], array):
                home = self._free(name)
                self.homes[graph_name, name] = home
                self.weights[home] = array
                self.taken.add(home)
            if home != name:
                _rename(graph, name, home)

    def _free(self, name: str) -> str:
        free, count = name, 0
        while free in self.taken:
            count += 1
            free = f"{name}/{count}"
        return free


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def own_names(graph) -> set[str]:
    """The tensors that a subgraph has itself."""
    return {*graph.inputs, *graph.constants, *(name for op in graph.ops for name in op.outputs)}


def _rename(graph, old: str, new: str) -> None:
    graph.outputs = tuple(new if name == old else name for name in graph.outputs)
    for op in graph.ops:
        op.inputs = tuple(new if name == old else name for name in op.inputs)
        op.updates = tuple((new if name == old else name, made) for name, made in op.updates)
        for inner in op.subgraphs():
            if old not in own_names(inner):
                _rename(inner, old, new)


def updates_of(op) -> list[tuple[str, str]]:
    """(input, output) of each variable that this op gives a new value to; a Call gets further outputs for that.

    Raises where a body that may run any number of times writes what is around it.
    """
    if op.op_type == "BatchNormalization" and len(op.outputs) == 5:
        found = [(op.inputs[3], op.outputs[1]), (op.inputs[4], op.outputs[2])]
    elif op.domain == "ai.graphcore" and op.op_type in VARIABLE_WRITERS:
        found = [(op.inputs[0], op.outputs[0])]
    else:
        found = [pair for graph in op.subgraphs() for pair in _written_inside(op, graph)]
    return [(name, value) for name, value in found if name and value]


def _written_inside(op, graph):
    callee = op.domain == "ai.graphcore" and op.op_type == "Call"
    arguments = dict(zip(graph.inputs, op.inputs[: op.explicit])) if callee else {}
    around = op.inputs[op.explicit :]
    for name, value in [pair for inner in graph.ops for pair in inner.updates]:
        outer = arguments.get(name, name if name in around else "")
        if not outer:
            continue  # a tensor of the subgraph, not a variable
        if not callee:
            raise unsupported(f"{op.describe()}: the variable '{name}' written inside its subgraph", "Use a Call.")
        if value not in graph.outputs:
            op.outputs += ("",) * (len(graph.outputs) - len(op.outputs))
            graph.outputs += (value,)
        index = graph.outputs.index(value)
        if len(op.outputs) <= index or not op.outputs[index]:
            filled = list(op.outputs) + [""] * (index + 1 - len(op.outputs))
            filled[index] = f"{next(filter(None, op.outputs), op.name)}/updated/{outer}"
            op.outputs = tuple(filled)
        yield outer, op.outputs[index]


def uses(ops, names) -> dict[str, set]:
    """name -> the (op type, input index) that read it, those inside subgraphs included."""
    found: dict[str, set] = {}
    for op in ops:
        for index, name in enumerate(op.inputs[: op.explicit]):
            if name in names:
                found.setdefault(name, set()).add((op.op_type, index) if op.domain == "ai.onnx" else ("", index))
        for graph in op.subgraphs():
            visible = names & set(op.inputs[op.explicit :]) - own_names(graph)
            for name, inside in uses(graph.ops, visible).items():
                found.setdefault(name, set()).update(inside)
            for name in visible.intersection(graph.outputs):
                found.setdefault(name, set()).add(("", -1))
    return found
