"""The node order that placement works on, and the pipeline rules of PopART over it.

A `Line` separates the nodes that compute on data (`main`) from those that only touch weights and constants: these
follow their first consumer, so that a frozen weight or a folded norm never travels between IPUs for no reason.
"""
from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Dict, Iterator, List, Optional, Sequence, Tuple

import onnx_graphsurgeon as gs

from graph_passes.gradient_path import loss_tensor, trainable_names
from graph_passes.graph import Graph, is_weight
from runtime.errors import GraphError


@dataclass(frozen=True)
class Place:
    """Virtual graph id and pipeline stage. Without pipelining the stage means nothing."""

    ipu: int
    stage: int


def parse_place(prefix: str, value: object, pipelining: bool) -> Place:
    """`"2_3"`: IPU 2, stage 3. `"2"` (or 2): IPU 2, and if pipelined stage 2, as PopART infers. Raises GraphError."""
    match = re.fullmatch(r"(\d+)(?:_(\d+))?", str(value)) if isinstance(value, (str, int)) else None
    if match is None or isinstance(value, bool):
        raise GraphError(f"compile.stages: '{prefix}' is {value!r}; expected \"IPU_STAGE\" or \"IPU\", for example "
                         '"1_1" (quote it: YAML 1.1 reads 1_1 as the number 11)')
    ipu = int(match[1])
    return Place(ipu, (ipu if match[2] is None else int(match[2])) if pipelining else 0)


class Line:
    """`nodes` in topological order; `main` are positions of nodes on data, `home[i]` the index in `main` of node i."""

    def __init__(self, graph: Graph):
        if not _is_sorted(graph):
            graph.sort()
        self.graph = graph
        self.nodes: List[gs.Node] = list(graph.nodes)
        self.position: Dict[int, int] = {id(node): i for i, node in enumerate(self.nodes)}
        self.variables = trainable_names(graph)
        self.modules = frozenset(filter(None, map(graph.module_of, self.nodes)))
        self.main: List[int] = []
        derived: List[int] = []  # nodes whose inputs are all known before the first sample
        constant = [False] * len(self.nodes)
        for i, node in enumerate(self.nodes):
            constant[i] = all(self._is_constant(tensor, constant) for tensor in node.inputs)
            (derived if constant[i] else self.main).append(i)
        self.main_index = {position: index for index, position in enumerate(self.main)}
        self.home: List[Optional[int]] = [self.main_index.get(i) for i in range(len(self.nodes))]
        for i in reversed(derived):
            homes = [self.home[j] for j in self.consumers(i)]
            self.home[i] = min((home for home in homes if home is not None), default=None)

    def consumers(self, i: int) -> List[int]:
        """Positions of the nodes that read an output of node i."""
        return [self.position[id(node)] for tensor in self.nodes[i].outputs for node in tensor.outputs
                if id(node) in self.position]

    def producers(self, i: int) -> List[int]:
        """Positions of the nodes that write an input of node i."""
        return [self.position[id(node)] for tensor in self.nodes[i].inputs for node in tensor.inputs
                if id(node) in self.position]

    def spans(self) -> Iterator[Tuple[gs.Tensor, int, int]]:
        """(tensor, first home, last home) of everything that ties homes together: data, graph inputs and weights.

        The first home is the producer's, or for a weight or a graph input that of its first reader. Constants are left
        out: PopART may hold them on several IPUs.
        """
        for tensor in self._tensors():
            homes = [home for node in tensor.outputs for home in [self._home_of(node)] if home is not None]
            homes += [home for node in tensor.inputs for home in [self._home_of(node)] if home is not None]
            if homes:
                yield tensor, min(homes), max(homes)

    def complete(self, places: Sequence[Optional[Place]]) -> List[Place]:
        """Fill the gaps: the latest producer's place, without one the earliest consumer's; constants by their home."""
        result = list(places)
        for i in self.main:
            found = [(result[j], j) for j in self.producers(i) if j in self.main_index and result[j] is not None]
            if result[i] is None and found:
                result[i] = max(found, key=lambda item: (item[0].stage, item[1]))[0]  # type: ignore[union-attr]
        for i in reversed(self.main):
            if result[i] is None:
                result[i] = self._earliest_consumer(result, i)
        first = min((place for place in result if place is not None), key=lambda p: p.stage, default=Place(0, 0))
        for i in reversed(range(len(result))):
            if i not in self.main_index:
                result[i] = result[i] or self._earliest_consumer(result, i)
        return [first if place is None else place for place in result]

    def check(self, places: Sequence[Place], kind: str, pipelining: bool) -> None:
        """Raise GraphError, naming nodes, modules and remedy, where `places` break a rule of PopART."""
        for i in self.main if pipelining else ():
            for j in self.consumers(i):
                if places[j].stage < places[i].stage:
                    raise self.graph.error(
                        self.nodes[j], f"is on stage {places[j].stage}, but reads from stage {places[i].stage} "
                        f"({self.graph.describe(self.nodes[i])}); stages may not decrease along an edge",
                        f"place it on stage {places[i].stage} or later, or that node on {places[j].stage} or earlier")
        for weight, users in self.shared_weights():
            ipus = sorted({places[j].ipu for j in users})
            if len(ipus) > 1:
                first, other = (next(j for j in users if places[j].ipu == ipu) for ipu in ipus[:2])
                raise self.graph.error(
                    self.nodes[other], f"reads the weight '{weight.name}' on IPU {ipus[1]}, and "
                    f"{self.graph.describe(self.nodes[first])} on IPU {ipus[0]}; a weight sits on one IPU only",
                    "place both on one IPU")
        last, loss = max((place.stage for place in places), default=0), self.loss_position(kind)
        if pipelining and loss is not None and places[loss].stage != last:
            raise self.graph.error(self.nodes[loss], f"makes the loss on stage {places[loss].stage} of 0 to {last}",
                                   f"the loss must be on the last stage: place it on stage {last}")

    def raise_stages(self, places: Sequence[Place], kind: str) -> Tuple[List[Place], List[str]]:
        """The least placement at or above `places` that obeys the rules; and what was raised, one text a module."""
        ipu_of = {place.stage: place.ipu for place in places}
        stages = [place.stage for place in places]
        weights, loss, settled = self.shared_weights(), self.loss_position(kind), False
        while not settled:
            before = list(stages)
            for i in range(len(stages)):
                stages[i] = max([stages[i], *(stages[j] for j in self.producers(i))])
            for _, users in weights:
                if len({ipu_of[stages[j]] for j in users}) > 1:
                    top = max(stages[j] for j in users)
                    for j in users:
                        stages[j] = top
            if loss is not None:
                stages[loss] = max(stages)
            settled = stages == before
        notes: Dict[Tuple[str, int, int], str] = {}
        for i in self.main:
            old, new = places[i].stage, stages[i]
            module = self.graph.module_of(self.nodes[i]) or self.nodes[i].name
            if new != old:
                notes.setdefault((module, old, new), f"{module} moves from stage {old} to {new}, since a stage may not "
                                 "decrease along an edge, a weight sits on one IPU and the loss on the last stage")
        lifted = [Place(ipu_of[stage], stage) for stage in stages]
        waiting: List[Optional[Place]] = [lifted[i] if i in self.main_index else None for i in range(len(lifted))]
        for _, users in weights:  # arithmetic on a weight that several nodes share moves with that weight
            for j in users:
                waiting[j] = lifted[j]
        return self.complete(waiting), list(notes.values())

    def close_holes(self, places: Sequence[Place]) -> Tuple[List[Place], List[str]]:
        """Renumber the stages to 0..N-1: PopART refuses a stage without nodes."""
        used = sorted({place.stage for place in places})
        rank = {stage: index for index, stage in enumerate(used)}
        if used == list(range(len(used))):
            return list(places), []
        empty = [stage for stage in range(used[-1]) if stage not in rank]
        text = f"no node of this graph is on stage {', '.join(map(str, empty))}: the stages above are renumbered down"
        return [Place(place.ipu, rank[place.stage]) for place in places], [text]

    def shared_weights(self) -> List[Tuple[gs.Constant, List[int]]]:
        """Weights that several nodes read, with the positions of these nodes."""
        users: Dict[int, Tuple[gs.Constant, List[int]]] = {}
        for i, node in enumerate(self.nodes):
            for tensor in node.inputs:
                if self.is_variable(tensor):
                    users.setdefault(id(tensor), (tensor, []))[1].append(i)
        return [entry for entry in users.values() if len(entry[1]) > 1]

    def is_variable(self, tensor: gs.Tensor) -> bool:
        """True for an initializer that PopART holds as a weight: external, or trained."""
        return isinstance(tensor, gs.Constant) and (is_weight(tensor) or tensor.name in self.variables)

    def loss_position(self, kind: str) -> Optional[int]:
        """Position of the node that makes the loss, None outside training."""
        loss = loss_tensor(self.graph) if kind == "train" else None
        return self.position.get(id(loss.inputs[0])) if loss is not None and loss.inputs else None

    def _home_of(self, node: gs.Node) -> Optional[int]:
        position = self.position.get(id(node))
        return None if position is None else self.home[position]

    def _is_constant(self, tensor: gs.Tensor, constant: Sequence[bool]) -> bool:
        if tensor.is_empty() or isinstance(tensor, gs.Constant):
            return True
        return bool(tensor.inputs) and all(constant[self.position[id(node)]] for node in tensor.inputs)

    def _tensors(self) -> Iterator[gs.Tensor]:
        """What nodes read, each once, without constants."""
        seen = set()
        for node in self.nodes:
            for tensor in node.inputs:
                inline = isinstance(tensor, gs.Constant) and not self.is_variable(tensor)
                constant = inline or any(p.op == "Constant" and not p.domain for p in tensor.inputs)
                if not constant and not tensor.is_empty() and id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield tensor

    def _earliest_consumer(self, places: Sequence[Optional[Place]], i: int) -> Optional[Place]:
        found = [(place.stage, j, place) for j in self.consumers(i) for place in [places[j]] if place is not None]
        return min(found, key=lambda item: item[:2])[2] if found else None


def _is_sorted(graph: Graph) -> bool:
    written = set()
    mine = {id(node) for node in graph.nodes}
    for node in graph.nodes:
        if any(id(p) in mine and id(p) not in written for tensor in node.inputs for p in tensor.inputs):
            return False
        written.add(id(node))
    return True
