"""Weights in a pipeline that trains without gradient accumulation: they change while micro-batches are in flight.

Stage k of micro-batch m runs forward in cycle m + f and backward, with the update, in cycle m + b, where f and b are the
positions of the stage and of its backward stage in the chain. So the forward pass reads the weights as they were
b - f updates ago, the backward pass the weights of now. Activations are stashed, weights are not, as in PopART. The
pipeline drains at the end of every Session.run.
"""
from __future__ import annotations

import torch

from .ir import Graph


def delays(graph: Graph, weights: list[str], lag: dict[int, int]) -> dict[str, int]:
    """How many updates the forward value of each weight lags. lag: the same by forward stage, see Placement."""
    consumers = graph.consumers()
    return {name: max((lag.get(op.stage, 0) for op in consumers.get(name, ())), default=0) for name in weights}


class StaleWeights:
    """The versions of the weights that a run has seen."""

    def __init__(self, lags: dict[str, int]):
        self.lags = lags
        self.begin()

    def begin(self) -> None:
        """A run starts: the pipeline is empty."""
        self._versions: list[dict[str, torch.Tensor]] = []

    def forward_weights(self, current: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What the next micro-batch reads in its forward pass; `current` is remembered as the newest version."""
        self._versions.append({name: current[name].clone() for name in self.lags})
        del self._versions[: -1 - max(self.lags.values(), default=0)]
        newest = len(self._versions) - 1
        old = {n: self._versions[max(newest - lag, 0)][n] for n, lag in self.lags.items()}
        return {**current, **{name: tensor for name, tensor in old.items() if self.lags[name]}}

    @staticmethod
    def backward_with(current: dict[str, torch.Tensor], stale: dict[str, torch.Tensor]):
        """Context in which autograd keeps, wherever it would keep a stale weight or a view of one, the current one."""
        fresh = {t.untyped_storage()._cdata: current[n] for n, t in stale.items() if t is not current[n]}

        def keep(tensor):
            weight = fresh.get(tensor.untyped_storage()._cdata)
            if weight is None:
                return tensor
            return torch.as_strided(weight, tensor.size(), tensor.stride(), tensor.storage_offset()).clone()

        return torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
