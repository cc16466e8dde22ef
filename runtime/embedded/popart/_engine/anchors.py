"""Anchors: the arrays that hold them and which micro-batches go into them.

Array shape: All [bps, accum, *shape]; EveryN [bps / period, accum, *shape]; Final, Sum [*shape]; prefix dimensions of 1
are dropped. (One replica.)
"""
from __future__ import annotations

import numpy as np

from ..enums import AnchorReturnTypeId as Id
from ..tensorinfo import TensorInfo


def prefix(art, batches: int, accumulation: int) -> tuple[int, int]:
    """(steps returned, micro-batches in each); (1, 1) for Final and Sum."""
    if art.id() is Id.All:
        return batches, accumulation
    if art.id() is Id.EveryN:
        return batches // art.rp(), accumulation
    return 1, 1


def empty_array(art, batches: int, accumulation: int, info: TensorInfo) -> np.ndarray:
    """An uninitialised anchor array."""
    dims = [size for size in prefix(art, batches, accumulation) if size > 1]
    return np.empty([*dims, *info.dims], info.dtype)


class Collector:
    """Takes the anchors of every micro-batch of one run and writes what each return type asks for."""

    def __init__(self, data_flow, accumulation: int, write):
        """write(tensor id, sample index, ndarray)."""
        self.arts = {name: data_flow.art(name) for name in data_flow.anchors()}
        self.batches, self.accumulation, self.write = data_flow.batchesPerStep(), accumulation, write
        self.sums: dict = {}

    def add(self, batch: int, micro: int, values: dict) -> None:
        last = batch == self.batches - 1 and micro == self.accumulation - 1
        for name, art in self.arts.items():
            if art.id() is Id.Sum:
                self.sums[name] = self.sums[name] + values[name] if name in self.sums else values[name]
                if last:
                    self.write(name, 0, _numpy(self.sums[name]))
            elif art.id() is Id.Final:
                if last:
                    self.write(name, 0, _numpy(values[name]))
            elif (batch + 1) % art.rp() == 0:  # All has period 1
                index = ((batch + 1) // art.rp() - 1) * self.accumulation + micro
                self.write(name, index, _numpy(values[name]))


def _numpy(tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()
