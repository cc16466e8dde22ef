"""What a PopART rule sees (`Case`) and says (`Violation`); the table of ops that PopART has (popart_ops.json)."""
from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional

import onnx_graphsurgeon as gs

from graph_passes.gradient_path import GradientPath, find_gradient_path, np_dtype
from graph_passes.graph import Graph
from graph_passes.pass_manager import PassContext

ONNX_TYPES = {"float32": "FLOAT", "float16": "FLOAT16", "float64": "DOUBLE", "bool": "BOOL", "int8": "INT8",
              "int16": "INT16", "int32": "INT32", "int64": "INT64", "uint8": "UINT8", "uint16": "UINT16",
              "uint32": "UINT32", "uint64": "UINT64"}


@dataclass(frozen=True)
class Violation:
    """One broken rule: where (node with module path, or tensor), what was found, what to do."""

    rule: str
    where: str
    found: str
    remedy: str

    def __str__(self) -> str:
        return f"[{self.rule}] {self.where}: {self.found}; {self.remedy}"


@dataclass
class Case:
    """The graph under test. `accumulation` is None when the training session's is not known."""

    graph: Graph
    context: PassContext
    accumulation: Optional[int] = None
    gradient: GradientPath = field(init=False)

    def __post_init__(self) -> None:
        self.gradient = find_gradient_path(self.graph) if self.training else GradientPath()

    @property
    def training(self) -> bool:
        """True for a graph that a TrainingSession will hold."""
        return self.context.kind == "train"

    @property
    def pipelined(self) -> bool:
        """True when the session will pipeline: one IPU alone never does."""
        return self.context.compile.pipelining and self.context.compile.ipus > 1

    def computing_nodes(self) -> List[gs.Node]:
        """The nodes that become ops: PopART turns Constant nodes into constants at import."""
        return [node for node in self.graph.nodes if not is_constant_node(node)]

    def violation(self, rule: str, node: gs.Node, found: str, remedy: str) -> Violation:
        """A Violation at a node, described with its module path."""
        return Violation(rule, self.graph.describe(node), found, remedy)


Rule = Callable[[Case], Iterator[Violation]]


@lru_cache(maxsize=1)
def popart_ops() -> Dict[str, Any]:
    """The facts table: ops of opset 11 with types and constant inputs, ai.graphcore ops, reserved prefixes."""
    table: Dict[str, Any] = json.loads((Path(__file__).parent / "popart_ops.json").read_text(encoding="utf-8"))
    return table


def is_constant_node(node: gs.Node) -> bool:
    """True for an ONNX Constant."""
    return node.op == "Constant" and not node.domain


def onnx_type(tensor: gs.Tensor) -> Optional[str]:
    """ONNX name of the element type, "OTHER" for one that PopART does not know at all, None when unknown."""
    if tensor.dtype is None:
        return None
    dtype = np_dtype(tensor)
    return "OTHER" if dtype is None else ONNX_TYPES.get(dtype.name, "OTHER")
