"""Runs passes in order, checks what each one requires and ensures, and records what each one did."""
from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import FrozenSet, List, Optional, Sequence, Tuple

from graph_passes.graph import Graph
from graph_passes.graph_io import save_graph
from graph_passes.invariants import check, known_invariant
from popdet.config import CompileConfig, NetworkConfig
from runtime.errors import GraphError


@dataclass(frozen=True)
class PassContext:
    """What a pass may know besides the graph. `trainable`: names of the initializers that training updates."""

    kind: str  # infer | train
    compile: CompileConfig = field(default_factory=CompileConfig)
    network: Optional[NetworkConfig] = None
    trainable: FrozenSet[str] = frozenset()
    accumulation: Optional[int] = None  # gradient accumulation factor of the training session to come


@dataclass
class PassResult:
    """`changed`: how many places were rewritten. `notes`: what was done, and what did not match and why."""

    changed: int
    notes: List[str] = field(default_factory=list)


class GraphPass:
    """One rewrite, one file. `requires` and `ensures` name invariants of graph_passes/invariants.py."""

    name: str = ""
    requires: Tuple[str, ...] = ()
    ensures: Tuple[str, ...] = ()

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        """Rewrite the graph in place. Raises GraphError naming node, module path and remedy."""
        raise NotImplementedError(f"pass '{self.name}' has no run()")


@dataclass(frozen=True)
class PassRecord:
    """What one pass did: node counts of the main graph, places rewritten, notes, wall-clock seconds."""

    name: str
    nodes_before: int
    nodes_after: int
    changed: int
    notes: List[str]
    seconds: float


class PassManager:
    """Runs `passes` in the given order over one graph."""

    def __init__(self, passes: Sequence[GraphPass]):
        self.passes = list(passes)
        for item in self.passes:
            for invariant in (*item.requires, *item.ensures):
                if not known_invariant(invariant):
                    raise GraphError(f"pass '{item.name}' names the unknown invariant '{invariant}'; "
                                     "add it to graph_passes/invariants.py")

    def run(self, graph: Graph, context: PassContext, dump_after: Optional[Path] = None) -> List[PassRecord]:
        """Rewrite `graph` in place; with `dump_after`, write NN_<pass>.onnx there after every pass.

        Raises GraphError when an invariant that a pass requires (before) or ensures (after) does not hold.
        """
        records: List[PassRecord] = []
        graph.infer_shapes()
        for number, item in enumerate(self.passes):
            started, before = time.perf_counter(), len(graph.nodes)
            _demand(item, "needs", item.requires, graph, context)
            result = item.run(graph, context)
            if result.changed:
                graph.sort()
                graph.infer_shapes()
            _demand(item, "left behind a graph without", item.ensures, graph, context)
            notes = list(result.notes) or ([] if result.changed else ["nothing to do: no match"])
            records.append(PassRecord(item.name, before, len(graph.nodes), result.changed, notes,
                                      time.perf_counter() - started))
            if dump_after is not None:
                save_graph(graph, Path(dump_after) / f"{number:02d}_{item.name}.onnx")
        return records


def _demand(item: GraphPass, verb: str, names: Sequence[str], graph: Graph, context: PassContext) -> None:
    for name in names:
        problems = check(name, graph, context)
        if problems:
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise GraphError(f"pass {item.name} {verb} '{name}': {problems[0]}{more}")
