"""What an inference program computes from weights alone: done once for a set of weights, not at every run.

Scaling weights by a folded normalisation, packing or transforming filters. Such ops are taken out of the program, which
gets their results as arguments.
"""
from __future__ import annotations

from .fusion import Steps
from .ir import Graph
from .program import Tensors, run_ops
from .shapes import RANDOM


def split(graph: Graph, steps: Steps, wanted: list[str]) -> tuple[Steps, Steps, list[str]]:
    """(steps on weights alone, the others, the tensors that the others read of the first)."""
    written = {name for name, _ in graph.variable_updates()}
    known = {name for name in graph.initializers if name not in written}
    given = set(known)
    ahead, others = [], []
    for op, finished in steps:
        inputs = [name for name in op.inputs if name]
        if (op.op_type not in RANDOM and not op.updates and known.intersection(inputs)
                and all(name in known or name in graph.constants for name in inputs)):  # fmt: skip
            ahead.append((op, ()))
            known.update(name for name in op.outputs if name)
        else:
            others.append((op, finished))
    read = {name for op, _ in others for name in op.inputs if name}.union(wanted)
    return ahead, others, sorted(name for name in known - given if name in read)


class Prepared:
    """The tensors of `names` that `steps` make of a set of weights, made again when the weights are others."""

    def __init__(self, graph: Graph, steps: Steps, names: list[str]):
        self._graph, self._steps, self.names = graph, steps, names
        self._read = sorted({name for op, _ in steps for name in op.inputs}.intersection(graph.initializers))
        self._from: list[tuple] = []  # (weight, its version) that _made is of
        self._made: Tensors = {}

    def __call__(self, weights: Tensors) -> Tensors:
        import torch

        given = [(weights[name], weights[name]._version) for name in self._read]
        same = len(given) == len(self._from) and all(
            new is old and version == before for (new, version), (old, before) in zip(given, self._from)
        )
        if not same:
            with torch.no_grad():
                found = run_ops(self._graph, weights, self.names, self._steps)
            self._made = {name: tensor.contiguous() for name, tensor in found.items()}
            self._from = given
        return self._made
