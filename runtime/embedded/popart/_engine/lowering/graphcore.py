"""Ops of ai.graphcore that belong to no other family."""
from __future__ import annotations

import torch

from ..registry import lowers
from .elementwise import dtype_of


@lowers("ai.graphcore", "Detach", 1)
def detach(op, x):
    """Stops the gradient."""
    return x.detach()


@lowers("ai.graphcore", "Nop", 1)
def nop(op, x):
    """Identity that no pattern removes."""
    return x


@lowers("ai.graphcore", "Zeros", 1)
def zeros(op):
    return torch.zeros(tuple(op.attr("shape")), dtype=dtype_of(op, op.attr("dtype", "FLOAT")))


@lowers("ai.graphcore", "ZerosLike", 1)
def zeros_like(op, x):
    return torch.zeros_like(x)


@lowers("ai.graphcore", "IncrementMod", 1)
def increment_mod(op, x):
    return torch.remainder(x + op.attr("increment"), op.attr("modulus"))
