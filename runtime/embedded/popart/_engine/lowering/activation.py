"""Activations. Softmax and LogSoftmax flatten the input at `axis`, as ONNX did before opset 13."""
from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from ..registry import lowers
from .common import axis_of, floats_only, same_types, wide


@lowers("ai.onnx", "Relu", 6)
def relu(op, x):
    return torch.relu(x)


@lowers("ai.onnx", "Sigmoid", 6)
def sigmoid(op, x):
    floats_only(op, x)
    return torch.sigmoid(x)


@lowers("ai.onnx", "Tanh", 6)
def tanh(op, x):
    floats_only(op, x)
    return torch.tanh(x)


@lowers("ai.onnx", "LeakyRelu", 6)
def leaky_relu(op, x):
    return F.leaky_relu(x, op.attr("alpha", 0.01))


@lowers("ai.onnx", "PRelu", 9)
def prelu(op, x, slope):
    """`slope` broadcasts to x from the right, as numpy does; torch's prelu would align it with the channels."""
    same_types(op, x, slope)
    return torch.where(x < 0, x * slope, x)


@lowers("ai.onnx", "Elu", 6)
def elu(op, x):
    return F.elu(x, op.attr("alpha", 1.0))


@lowers("ai.onnx", "Selu", 6)
def selu(op, x):
    """gamma * (x if x > 0 else alpha * (e^x - 1)); the defaults are ONNX's, rounded to float32."""
    alpha, gamma = op.attr("alpha", 1.6732631921768188), op.attr("gamma", 1.0507010221481323)
    return gamma * F.elu(x, alpha)


@lowers("ai.onnx", "HardSigmoid", 6)
def hard_sigmoid(op, x):
    return torch.clamp(op.attr("alpha", 0.2) * x + op.attr("beta", 0.5), 0.0, 1.0)


@lowers("ai.onnx", "Softplus", 1)
def softplus(op, x):
    return torch.logaddexp(x, torch.zeros_like(x))


@lowers("ai.onnx", "Softsign", 1)
def softsign(op, x):
    floats_only(op, x)
    return F.softsign(x)


@lowers("ai.onnx", "ThresholdedRelu", 10)
def thresholded_relu(op, x):
    return torch.where(x > op.attr("alpha", 1.0), x, torch.zeros_like(x))


@lowers("ai.onnx", "Shrink", 9)
def shrink(op, x):
    bias, edge = op.attr("bias", 0.0), op.attr("lambd", 0.5)
    zero = torch.zeros_like(x)
    return torch.where(x < -edge, x + bias, torch.where(x > edge, x - bias, zero))


def _flat(op, x, function):
    """`function` over all axes from `axis` (default 1) on, taken as one."""
    axis = axis_of(op, op.attr("axis", 1), x.dim())
    rows = x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))
    return wide(lambda t: function(t, dim=1), rows).reshape(x.shape)


@lowers("ai.onnx", "Softmax", 1, 11)
def softmax(op, x):
    return _flat(op, x, torch.softmax)


@lowers("ai.onnx", "LogSoftmax", 1, 11)
def log_softmax(op, x):
    return _flat(op, x, torch.log_softmax)


@lowers("ai.graphcore", "Gelu", 1)
def gelu(op, x):
    """The tanh approximation, which is what PopLibs computes."""
    return F.gelu(x, approximate="tanh")


@lowers("ai.graphcore", "GeluErf", 1)
def gelu_erf(op, x):
    return F.gelu(x)


@lowers("ai.graphcore", "Swish", 1)
def swish(op, x):
    return F.silu(x)
