"""Ops in which replicas talk to each other. A lowering gets the inputs of every replica (registry.py).

A commGroup [type, size] splits the replicas: All (0), Consecutive (1: size neighbours), Orthogonal (2: every
(replicas / size)-th), None (3: each alone).
"""
from __future__ import annotations

import functools

import torch

from ..registry import lowers_across_replicas
from .common import refuse

_OPERATORS = {
    0: torch.add, 2: torch.mul, 3: torch.minimum, 4: torch.maximum, 5: torch.logical_and, 6: torch.logical_or,
    7: lambda a, b: a + b,
}  # fmt: skip
_NUMBERS = {
    "Add": 0, "Mean": 1, "Mul": 2, "Min": 3, "Max": 4, "LogicalAnd": 5, "LogicalOr": 6, "SquareAdd": 7, "Local": 8,
}  # fmt: skip
MEAN, SQUARE_ADD, LOCAL = 1, 7, 8


def _operator(op) -> int:
    value = op.settings.get("__collectiveOperator", 0)
    number = _NUMBERS.get(value, -1) if isinstance(value, str) else value
    if number not in _NUMBERS.values():
        raise refuse(op, f"the collective operator {value!r} is unknown")
    return number


def _groups(op, count: int) -> list[list[int]]:
    """The replicas of each group, in order."""
    kind, size = (*(op.settings.get("__collectiveCommGroup") or (0, 0)), 0)[:2]
    grouping = op.settings.get("__collectiveReplicaGrouping")
    if grouping:
        _, stride, size = (count, *grouping)[-3:]
        kind = 1 if stride == 1 else 2
    if kind == 0 or (kind in (1, 2) and size == 0):
        return [list(range(count))]
    if kind == 3:
        return [[r] for r in range(count)]
    if count % size:
        raise refuse(op, f"{count} replicas do not divide into groups of {size}")
    if kind == 1:
        return [list(range(first, first + size)) for first in range(0, count, size)]
    if kind == 2:
        return [list(range(first, count, count // size)) for first in range(count // size)]
    raise refuse(op, f"the communication group {kind} is unknown")


def _reduce(op, tensors):
    operator = _operator(op)
    if operator == SQUARE_ADD:
        tensors = [t.square() for t in tensors]
    if operator == MEAN:
        return functools.reduce(torch.add, tensors) / len(tensors)
    if operator == LOCAL:
        raise refuse(op, "the collective operator Local reduces nothing")
    return functools.reduce(_OPERATORS[operator], tensors)


def _in_groups(op, replicas, function):
    """function(group's tensors) -> one tensor a member; the outputs of every replica."""
    outputs: list = [None] * len(replicas)
    for group in _groups(op, len(replicas)):
        for replica, tensor in zip(group, function([replicas[r][0] for r in group])):
            outputs[replica] = (tensor,)
    return outputs


@lowers_across_replicas("ai.graphcore", "ReplicatedAllReduce", 1)
@lowers_across_replicas("ai.graphcore", "ReplicatedAllReduceInplace", 1)
def all_reduce(op, replicas):
    """Every replica gets the reduction over its group."""
    if _operator(op) == LOCAL:
        return [(inputs[0].clone(),) for inputs in replicas]
    return _in_groups(op, replicas, lambda tensors: [_reduce(op, tensors)] * len(tensors))


@lowers_across_replicas("ai.graphcore", "ReplicatedReduceScatter", 1)
def reduce_scatter(op, replicas):
    """Replica i of a group gets the i-th part of the flattened reduction, zeros behind its end; Local: of its own."""

    def scatter(tensors):
        count = len(tensors)
        size = -(-tensors[0].numel() // count)

        def part(tensor, i):
            flat = tensor.reshape(-1)
            return torch.nn.functional.pad(flat, (0, size * count - flat.numel()))[i * size : (i + 1) * size]

        if _operator(op) == LOCAL:
            return [part(tensor, i) for i, tensor in enumerate(tensors)]
        total = _reduce(op, tensors)
        return [part(total, i) for i in range(count)]

    return _in_groups(op, replicas, scatter)


@lowers_across_replicas("ai.graphcore", "ReplicatedAllGather", 1)
def all_gather(op, replicas):
    """Every replica gets the flattened tensors of its group, one behind the other."""

    def gather(tensors):
        return [torch.cat([tensor.reshape(-1) for tensor in tensors])] * len(tensors)

    return _in_groups(op, replicas, gather)


@lowers_across_replicas("ai.graphcore", "AllReduce", 1)
def all_reduce_over_ipus(op, replicas):
    """The reduction over the inputs, which lie on different IPUs of one replica; every output is the result."""
    outputs = []
    for inputs in replicas:
        operator = op.attr("sCollectiveOperator", op.settings.get("__collectiveOperator", 0))
        if operator not in (0, "Add"):
            raise refuse(op, f"the collective operator {operator!r}; Add is supported")
        total = functools.reduce(torch.add, inputs)
        outputs.append(tuple(total for _ in op.outputs))
    return outputs
