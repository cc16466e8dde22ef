"""Stochastic rounding from float to half, as an IPU with it enabled rounds every half result.

A value between two halves becomes the upper one with the probability of its position between them, so the mean is exact.
"""
from __future__ import annotations

import torch

from .ir import Graph, Op

_DROPPED = (1 << 13) - 1  # the mantissa bits that float has and half has not
_SMALLEST_NORMAL, _SUBNORMAL_STEP = 2.0**-14, 2.0**-24
ROUNDED = "__stochastic_rounding"  # Op.settings: the outputs, by number, that are half
_EXACT = ("Nll",)  # looks at the type of its input itself


def stochastic_round(x: torch.Tensor) -> torch.Tensor:
    """float -> half. The gradient passes unchanged. Draws from torch's generator."""
    exact = x.detach().float()
    noise = torch.randint(0, _DROPPED + 1, x.shape, dtype=torch.int32, device=x.device)
    normal = ((exact.view(torch.int32) + noise) & ~_DROPPED).view(torch.float32)
    tiny = torch.floor(exact / _SUBNORMAL_STEP + torch.rand(x.shape, device=x.device)) * _SUBNORMAL_STEP
    rounded = torch.where(exact.abs() < _SMALLEST_NORMAL, tiny, normal)
    rounded = torch.where(exact.isfinite(), rounded, exact)
    return (x + (rounded - exact) if x.requires_grad else rounded).half()


def mark(graph: Graph) -> None:
    """Notes on every op which of its outputs are rounded."""
    for op in graph.walk():
        halves = tuple(
            index for index, name in enumerate(op.outputs)
            if name in graph.info and graph.info[name].data_type() == "FLOAT16" and op.op_type not in _EXACT
        )  # fmt: skip
        if halves:
            op.settings[ROUNDED] = halves


def rounding(op: Op, inputs: list, run) -> tuple:
    """run(inputs) in float throughout, then the rounding of the outputs that `mark` noted."""
    wide = [t.float() if t is not None and t.dtype == torch.float16 else t for t in inputs]
    halves = op.settings[ROUNDED]
    return tuple(
        stochastic_round(t) if index in halves and t.dtype == torch.float32 else t for index, t in enumerate(run(wide))
    )
