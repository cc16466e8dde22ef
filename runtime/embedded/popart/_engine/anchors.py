"""Anchors: the shape of their arrays, and what is returned when.

Prefix dimensions are [batchesPerStep, accumulationFactor, replicas] for All, [batchesPerStep / period,
accumulationFactor, replicas] for EveryN, [replicas] for Final and Sum; dimensions of 1 are dropped.
"""
from __future__ import annotations

import numpy as np

from ..enums import AnchorReturnTypeId as Id
from ..tensorinfo import TensorInfo


def prefix(art, batches: int, accumulation: int, replicas: int) -> tuple[int, int, int]:
    """(steps returned, micro-batches in each, replicas); one of each for the first two of Final and Sum."""
    if art.id() is Id.All:
        return batches, accumulation, replicas
    if art.id() is Id.EveryN:
        return batches // art.rp(), accumulation, replicas
    return 1, 1, replicas


def empty_array(art, batches: int, accumulation: int, replicas: int, info: TensorInfo) -> np.ndarray:
    """An uninitialised anchor array."""
    dims = [size for size in prefix(art, batches, accumulation, replicas) if size > 1]
    return np.empty([*dims, *info.dims], info.dtype)


class Collector:
    """Takes the anchors of every micro-batch of one run and writes what each return type asks for."""

    def __init__(self, data_flow, accumulation: int, replicas: int, write):
        """write(tensor id, sample index, ndarray)."""
        self.arts = {name: data_flow.art(name) for name in data_flow.anchors()}
        self.batches, self.accumulation, self.replicas = data_flow.batchesPerStep(), accumulation, replicas
        self.write = write
        self.sums: dict = {}

    def add(self, batch: int, micro: int, values: list[dict]) -> None:
        """values: the anchors of this micro-batch by id, one dict a replica."""
        last = batch == self.batches - 1 and micro == self.accumulation - 1
        for name, art in self.arts.items():
            for replica, tensors in enumerate(values):
                if art.id() is Id.Sum:
                    key = name, replica
                    self.sums[key] = self.sums[key] + tensors[name] if key in self.sums else tensors[name]
                    if last:
                        self.write(name, replica, _numpy(self.sums[key]))
                elif art.id() is Id.Final:
                    if last:
                        self.write(name, replica, _numpy(tensors[name]))
                elif (batch + 1) % art.rp() == 0:  # All has period 1
                    micro_batch = ((batch + 1) // art.rp() - 1) * self.accumulation + micro
                    self.write(name, micro_batch * self.replicas + replica, _numpy(tensors[name]))


def _numpy(tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()
