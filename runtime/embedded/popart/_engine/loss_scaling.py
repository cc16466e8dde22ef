"""Automatic loss scaling: halve the loss scale when too many gradient elements are near overflow, else double it.

Over the gradients that are tracked, in one update period: if the share of elements whose magnitude is above
binEdgeLocation * 65504 (the largest half) exceeds thresholdUpperCountProportion the scale is halved, else doubled
(PopART 3.4, transforms/automaticlossscaling.cpp). It acts from the next weight update on.
"""
from __future__ import annotations

import torch

from ..enums import GradientTensorTrackingMethod as Method
from ..errors import popart_exception, unsupported
from .ir import Graph

LARGEST_HALF = 65504.0
_VIEWS = {
    "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Identity", "Slice", "Split", "Concat", "Expand", "Gather",
}  # fmt: skip
_PRODUCTS = {"Conv", "ConvTranspose", "MatMul", "Gemm"}


def tracked(graph: Graph, settings, with_gradient: set[str]) -> list[str]:
    """The tensors whose gradients decide. Raises when the settings name one that has none."""
    method = settings.gradientTensorTrackingMethod
    if settings.toTrackTensors is not None:
        if method is not Method.GradientsOfUserSpecifiedTensors:
            raise popart_exception(
                "[AutomaticLossScale transform] toTrackTensors is set, so gradientTensorTrackingMethod must be "
                "GradientsOfUserSpecifiedTensors"
            )
        missing = [name for name in settings.toTrackTensors if name not in with_gradient]
        if missing:
            raise popart_exception(
                f"[AutomaticLossScale transform] The tensor '{missing[0]}' to track has no gradient in this graph"
            )
        return list(settings.toTrackTensors)
    if method is Method.GradientsOfUserSpecifiedTensors:
        raise popart_exception("[AutomaticLossScale transform] GradientsOfUserSpecifiedTensors needs toTrackTensors")
    found = []
    for op in graph.ops:
        if method is Method.ConvAndMatmulGradients and op.op_type not in _PRODUCTS:
            continue
        if op.op_type not in _VIEWS:  # the gradients that this op's backward pass produces are those of its inputs
            found += [name for name in op.inputs if name in with_gradient]
    if not found:
        raise popart_exception("[AutomaticLossScale transform] No gradient tensors to track were found")
    return list(dict.fromkeys(found))


class AutomaticLossScaling:
    """Counts gradients and moves `updater.loss_scale`."""

    def __init__(self, settings, names: list[str], optimizer):
        if optimizer.loss_scaling.isConst():
            raise popart_exception(
                "[AutomaticLossScale transform] The optimizer must have a non-const loss scaling to use automatic loss "
                "scaling"
            )
        if getattr(optimizer, "scaled_optimizer_state", False):  # its state would keep the scales of the past
            raise unsupported("automatic loss scaling with scaled_optimizer_state", "Use one of them.")
        if settings.updatePeriod < 1:
            raise popart_exception("[AutomaticLossScale transform] updatePeriod must be at least 1")
        self.names, self._settings = names, settings
        self._above = self._total = self._updates = 0

    def count(self, gradients: dict[str, torch.Tensor]) -> None:
        """Takes one micro-batch of one replica."""
        edge = self._settings.binEdgeLocation * LARGEST_HALF
        for name in self.names:
            gradient = gradients[name].float()
            self._above += int((~(gradient.abs() <= edge)).sum())  # NaN counts as above
            self._total += gradient.numel()

    def update(self, updater) -> None:
        """Called after every weight update."""
        self._updates += 1
        if self._updates % self._settings.updatePeriod:
            return
        too_many = self._above / max(self._total, 1) > self._settings.thresholdUpperCountProportion
        updater.loss_scale *= 0.5 if too_many else 2.0
        self._above = self._total = 0
