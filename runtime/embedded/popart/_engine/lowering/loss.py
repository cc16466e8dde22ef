"""The losses of ai.graphcore. `reduction` is "Mean" (their default), "Sum" or "NoReduction"."""
from __future__ import annotations

import torch

from ..registry import lowers
from .common import floats_only, onnx_name, refuse, wide

_SMALLEST, _SMALLEST_HALF = 1e-7, 6.104e-5  # probabilities are raised to this before the logarithm


def _reduce(op, values, count=None):
    """count: what a mean divides by, where it is not the number of values."""
    reduction = op.attr("reduction", "Mean")
    if reduction == "NoReduction":
        return values
    if reduction == "Sum":
        return wide(lambda t: t.sum(dtype=t.dtype), values)
    if reduction != "Mean":
        raise refuse(op, f"reduction '{reduction}' is unknown; it is Mean, Sum or NoReduction")
    return wide(lambda t: t.sum() / (t.numel() if count is None else count), values)


@lowers("ai.graphcore", "IdentityLoss", 1)
def identity_loss(op, x):
    return _reduce(op, x)


@lowers("ai.graphcore", "L1", 1)
def l1(op, x):
    """lambda * reduce(|x|)."""
    floats_only(op, x)
    return op.attr("lambda") * _reduce(op, x.abs())


@lowers("ai.graphcore", "Nll", 1)
def nll(op, probabilities, labels):
    """probabilities [..., C] (or their logarithms), labels int [...] -> -log p of the label, reduced.

    A label equal to ignoreIndex costs nothing and is not counted by Mean, which divides by at least 1.
    """
    if labels.dtype.is_floating_point or labels.numel() != probabilities.shape[:-1].numel():
        raise refuse(op, f"labels must be integers, one for each of the {list(probabilities.shape[:-1])} rows of "
                         f"probabilities, not {onnx_name(labels.dtype)} of shape {list(labels.shape)}")  # fmt: skip
    floats_only(op, probabilities)
    rows = probabilities.reshape(-1, probabilities.shape[-1])
    flat = labels.reshape(-1).long()
    ignore = op.attr("ignoreIndex", op.attr("ignore_index", None))
    kept = None if ignore is None else flat != ignore
    index = flat if kept is None else torch.where(kept, flat, torch.zeros_like(flat))
    picked = torch.gather(rows, 1, index.unsqueeze(1)).squeeze(1)
    if not op.attr("inputIsLogProbability", op.attr("input_is_log_probability", 0)):
        picked = _log(picked)
    cost = -picked
    if kept is None:
        return _reduce(op, cost.reshape(labels.shape))
    cost = torch.where(kept, cost, torch.zeros_like(cost))
    return _reduce(op, cost.reshape(labels.shape), kept.sum().clamp(min=1))


def _log(p):
    """log(max(p, smallest)), with the gradient 1 / max(p, smallest) below it as well (PopART's NllGrad)."""
    smallest = _SMALLEST_HALF if p.dtype == torch.float16 else _SMALLEST
    return torch.log(torch.where(p < smallest, smallest + (p - p.detach()), p))
