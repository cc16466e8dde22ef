"""Shapes and types while a model is built: each new node is run once on tensors that hold no data.

The engine's own lowerings say what they return, so the Builder and the session agree. What cannot be inferred is left
unknown and never fails the build: the session will say what is wrong.
"""
from __future__ import annotations

import numpy as np

from ..errors import popart_exception
from ..tensorinfo import TensorInfo


class Inference:
    """info: {tensor: TensorInfo}. constants: {tensor: ndarray}, what shapes may depend on."""

    def __init__(self, opsets: dict[str, int], parent: Inference | None):
        self._opsets, self._parent = opsets, parent
        self.info: dict[str, TensorInfo] = {}
        self.constants: dict[str, np.ndarray] = {}
        self._mode = parent._mode if parent else None

    def initializer(self, name: str, array: np.ndarray) -> None:
        self.info[name] = TensorInfo(array)
        self.constants[name] = array

    def node(self, node) -> dict[str, TensorInfo]:
        """The infos of the node's outputs, as far as they are known; remembered."""
        try:
            found = self._run(node)
        except (popart_exception, KeyError, TypeError, ValueError):
            return {}
        self.info.update(found)
        return found

    def _run(self, node) -> dict[str, TensorInfo]:
        from .._engine import ir, shapes

        if node.op_type == "Constant" and node.domain in ("", "ai.onnx"):
            array = ir._constant_value(node)
            self.constants[node.output[0]] = array
            return {node.output[0]: TensorInfo(array)}
        opsets = {"ai.onnx": 10, **self._opsets}
        op = ir._import_op(node, opsets, True)
        graph = ir.Graph((), (), {}, {}, [op])
        for name in filter(None, op.inputs):
            graph.info[name] = self._find("info", name)
            value = self._find("constants", name, required=False)
            if value is not None:
                graph.constants[name] = value
        op.constants.update({i: graph.constants[n] for i, n in enumerate(op.inputs) if n in graph.constants})
        folded = shapes._fold(op, graph) if _small(op, graph) else None
        if folded is not None:
            self.constants.update(folded)
            return {name: TensorInfo(array) for name, array in folded.items()}
        return shapes._infer(op, graph, self._fake_mode())

    def _find(self, table: str, name: str, required: bool = True):
        where: Inference | None = self
        while where is not None:
            values = getattr(where, table)
            if name in values:
                return values[name]
            where = where._parent
        if required:
            raise KeyError(name)
        return None

    def _fake_mode(self):
        if self._mode is None:
            from torch._subclasses.fake_tensor import FakeTensorMode

            self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        return self._mode


def _small(op, graph) -> bool:
    """Whether folding is worth it here: shapes and the like, not weights."""
    if op.op_type == "Shape":
        return True
    return all(graph.info[name].nelms() <= 4096 for name in filter(None, op.inputs))
