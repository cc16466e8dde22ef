"""Normalisation layers. Statistics are always float, whatever the storage (PopART: poplar::FLOAT)."""
from __future__ import annotations

import torch
import torch.nn.functional as F

from ..registry import lowers
from .common import floats_only, refuse


def _per_channel(values, rank):
    return values.float().reshape((1, -1) + (1,) * (rank - 2))


def _normalise(x, scale, bias, mean, var, epsilon):
    """scale * (x - mean) / sqrt(var + epsilon) + bias in float, per channel, stored as x is."""
    rank = x.dim()
    factor = _per_channel(scale, rank) * torch.rsqrt(_per_channel(var, rank) + epsilon)
    return ((x.float() - _per_channel(mean, rank)) * factor + _per_channel(bias, rank)).to(x.dtype)


@lowers("ai.onnx", "BatchNormalization", 6, 7, 9)
@lowers("ai.graphcore", "BatchNormalization", 1)
def batch_normalization(op, x, scale, bias, mean, var):
    """x [N,C,...]. One output: inference. Five: training, [Y, running mean, running var, saved mean, saved var].

    running = momentum * old + (1 - momentum) * batch; the batch variance is biased for ai.onnx and unbiased for
    ai.graphcore. The saved variance is a variance.
    """
    floats_only(op, x, scale, bias, mean, var)
    for tensor in (scale, bias, mean, var):
        if list(tensor.shape) != [x.shape[1]]:
            raise refuse(op, f"scale, bias, mean and variance must be of shape [{x.shape[1]}], not {list(tensor.shape)}")
    if not op.attr("spatial", 1):
        raise refuse(op, "spatial must be 1")
    epsilon, momentum = op.attr("epsilon", 1e-5), op.attr("momentum", 0.9)
    outputs = len([name for name in op.outputs if name])
    if outputs == 1:
        return _normalise(x, scale, bias, mean, var, epsilon)
    if outputs != 5:
        raise refuse(op, f"{outputs} outputs; 1 (inference) or 5 (training) are supported")
    axes = (0, *range(2, x.dim()))
    batch_var, batch_mean = torch.var_mean(x.float(), dim=axes, unbiased=False)
    y = _normalise(x, scale, bias, batch_mean, batch_var, epsilon)
    saved_var = batch_var
    if op.domain == "ai.graphcore":
        count = x.numel() // x.shape[1]
        saved_var = batch_var * (count / max(count - 1, 1))

    def running(old, batch):
        return (momentum * old.float() + (1.0 - momentum) * batch).detach().to(old.dtype)

    return (y, running(mean, batch_mean), running(var, saved_var),
            batch_mean.detach().to(mean.dtype), saved_var.detach().to(var.dtype))  # fmt: skip


@lowers("ai.onnx", "InstanceNormalization", 6)
def instance_normalization(op, x, scale, bias):
    """x [N,C,...]: statistics per image and channel."""
    axes = tuple(range(2, x.dim()))
    var, mean = torch.var_mean(x.float(), dim=axes, unbiased=False, keepdim=True)
    y = (x.float() - mean) * torch.rsqrt(var + op.attr("epsilon", 1e-5))
    return (y * _per_channel(scale, x.dim()) + _per_channel(bias, x.dim())).to(x.dtype)


@lowers("ai.graphcore", "GroupNormalization", 1)
def group_normalization(op, x, scale, bias):
    """x [N,C,...] -> [Y, mean [N*groups], inverse standard deviation [N*groups]].

    A group is adjacent channels or, with SessionOptions.groupNormStridedChannelGrouping, every groups-th channel.
    """
    groups, strided = op.attr("num_groups"), op.settings.get("__strided_channel_grouping", 0)
    if groups < 1 or x.shape[1] % groups:
        raise refuse(op, f"{x.shape[1]} channels do not divide into num_groups {groups}")
    blocks = x.float()
    if strided:
        blocks = blocks.unflatten(1, (-1, groups)).transpose(1, 2)
    rows = blocks.reshape(x.shape[0] * groups, -1)
    var, mean = torch.var_mean(rows, dim=1, unbiased=False, keepdim=True)
    inverse = torch.rsqrt(var + op.attr("epsilon", 1e-5))
    y = ((rows - mean) * inverse).reshape(blocks.shape)
    y = (y.transpose(1, 2) if strided else y).reshape(x.shape)
    y = y * _per_channel(scale, x.dim()) + _per_channel(bias, x.dim())
    statistics = mean.reshape(-1).to(scale.dtype), inverse.reshape(-1).to(scale.dtype)
    return (y.to(x.dtype), *statistics)[: len(op.outputs)]


@lowers("ai.onnx", "LRN", 1)
def lrn(op, x):
    """Across channels: x / (bias + alpha / size * sum of squares over `size` channels) ** beta."""
    size = op.attr("size")
    squares = F.pad(x.float().square().unsqueeze(1), (0,) * (2 * (x.dim() - 2)) + ((size - 1) // 2, size // 2))
    window = squares.unfold(2, size, 1).sum(dim=-1).squeeze(1)
    factor = op.attr("bias", 1.0) + op.attr("alpha", 1e-4) / size * window
    return (x.float() / factor ** op.attr("beta", 0.75)).to(x.dtype)
