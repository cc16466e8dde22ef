"""Ops of a plan that one kernel computes together: what covers what, and where it runs. Which ops: fusion_rules.py.

Only for a program that is compiled ahead of time, and where nothing else reads what lies between. In inference, packing
filters is an op of its own, so that it is done once (constants.py).
"""
from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from .ir import Graph, Op

Steps = list  # of (op, the tensors that nothing reads afterwards), see program.plan


@dataclasses.dataclass
class Fused:
    """`ops` in place of `parts`; the last part is where they run."""

    parts: list[Op]
    ops: list[Op]


def fuse(graph: Graph, steps: Steps, wanted: Iterable[str], training: bool) -> Steps:
    """The same plan with fused ops in place of what they cover. wanted: tensors that must exist."""
    from .fusion_rules import RULES

    plan = Plan(graph, steps, set(wanted), training)
    for kind, rule in RULES:
        for op in (op for op, _ in steps if op.op_type == kind and op.domain in ("", "ai.onnx")):
            made = rule(plan, op) if id(op) not in plan.covered else None
            if made is not None:
                plan.covered.update((id(part), made) for part in made.parts)
    return plan.merged()


class Plan:
    """Who makes and who reads a tensor, and what is covered so far."""

    def __init__(self, graph: Graph, steps: Steps, wanted: set[str], training: bool):
        self.graph, self.steps, self.wanted, self.training = graph, steps, wanted, training
        self.readers: dict[str, list[Op]] = {}
        self.makers: dict[str, Op] = {}
        self.covered: dict[int, Fused] = {}  # id of an op -> what covers it
        for op, _ in steps:
            for name in op.inputs:
                self.readers.setdefault(name, []).append(op)
            self.makers.update(dict.fromkeys(op.outputs, op))

    def only_reader(self, op: Op) -> Op | None:
        """The op that alone, and once, reads the one result of `op`, which need not exist otherwise; None where something
        covers it."""
        name = op.outputs[0]
        readers = self.readers.get(name, ())
        if len(op.outputs) != 1 or name in self.wanted or len(readers) != 1 or id(readers[0]) in self.covered:
            return None
        return readers[0]

    def only_maker(self, op: Op, position: int = 0) -> Op | None:
        """The op that makes this input of `op`, where `op` alone reads that and nothing covers the maker."""
        maker = self.makers.get(op.inputs[position])
        return maker if maker is not None and id(maker) not in self.covered and self.only_reader(maker) is op else None

    def merged(self) -> Steps:
        """Fused ops run where the last one that they cover did; a tensor that the plan freed goes after its last reader."""
        ops: list[Op] = []
        for op, _ in self.steps:
            made = self.covered.get(id(op))
            if made is None:
                ops.append(op)
            elif op is made.parts[-1]:
                ops += made.ops
        freed = {name for _, finished in self.steps for name in finished}
        if freed:
            freed.update(name for made in self.covered.values() for op in made.ops[:-1] for name in op.outputs)
        steps = []
        for op in reversed(ops):
            finished = freed.intersection(op.inputs).union(freed.intersection(op.outputs))
            freed -= finished
            steps.append((op, tuple(finished)))
        return steps[::-1]
