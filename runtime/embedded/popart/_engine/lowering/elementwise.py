"""Element by element: arithmetic, comparison, logic, casts. numpy broadcasting; `axis`, `broadcast` before opset 7."""
from __future__ import annotations

import functools

import torch

from ..registry import lowers
from .common import DEVICE_INT, booleans_only, broadcastable, exact, floats_only, refuse, same_types

_UNARY = {
    ("Abs", 6): torch.abs, ("Acos", 7): torch.acos, ("Acosh", 9): torch.acosh, ("Asin", 7): torch.asin,
    ("Asinh", 9): torch.asinh, ("Atan", 7): torch.atan, ("Atanh", 9): torch.atanh, ("Ceil", 6): torch.ceil,
    ("Cos", 7): torch.cos, ("Cosh", 9): torch.cosh, ("Erf", 9): torch.erf, ("Exp", 6): torch.exp,
    ("Floor", 6): torch.floor, ("IsNaN", 9): torch.isnan, ("Log", 6): torch.log, ("Neg", 6): torch.neg,
    ("Not", 1): torch.logical_not, ("Reciprocal", 6): torch.reciprocal, ("Round", 11): torch.round,
    ("Sign", 9): torch.sign, ("Sin", 7): torch.sin, ("Sinh", 9): torch.sinh, ("Sqrt", 6): torch.sqrt,
    ("Tan", 7): torch.tan,
}  # fmt: skip
_GRAPHCORE_UNARY = {
    "Expm1": torch.expm1, "Log1p": torch.log1p, "Square": torch.square, "NearbyInt": torch.round,
    "BitwiseNot": torch.bitwise_not,
}  # fmt: skip
_ONNX_TYPES = {1: "FLOAT", 2: "UINT8", 3: "INT8", 4: "UINT16", 5: "INT16", 6: "INT32", 7: "INT64", 9: "BOOL",
               10: "FLOAT16", 11: "DOUBLE", 12: "UINT32", 13: "UINT64", 16: "BFLOAT16"}  # fmt: skip
_TORCH_TYPES = {"FLOAT": torch.float32, "UINT8": torch.uint8, "INT8": torch.int8, "INT16": torch.int16,
                "UINT16": torch.uint16, "UINT32": torch.uint32, "INT32": torch.int32, "INT64": DEVICE_INT,
                "BOOL": torch.bool, "FLOAT16": torch.float16}  # fmt: skip


def dtype_of(op, code) -> torch.dtype:
    """The torch dtype of an ONNX type code or name, as the device stores it (INT64 -> INT32)."""
    name = code.upper() if isinstance(code, str) else _ONNX_TYPES.get(code, f"ONNX type {code}")
    if name not in _TORCH_TYPES:
        raise refuse(op, f"the element type {name} is not supported")
    return _TORCH_TYPES[name]


_ANY_TYPE = {"Abs", "Neg", "Sign", "BitwiseNot", "Square", "IsNaN"}  # the other functions of numbers are of floats


def _register_unary(domain, op_type, version, function):
    @lowers(domain, op_type, version)
    def lower(op, x):
        if op_type == "Not":
            booleans_only(op, x)
        elif op_type not in _ANY_TYPE:
            floats_only(op, x)
        return exact(function, x)


for (_op_type, _version), _function in _UNARY.items():
    _register_unary("ai.onnx", _op_type, _version, _function)
for _op_type, _function in _GRAPHCORE_UNARY.items():
    _register_unary("ai.graphcore", _op_type, 1, _function)


@lowers("ai.graphcore", "Round", 1)
def round_half_away(op, x):
    return torch.sign(x) * torch.floor(torch.abs(x) + 0.5)


@lowers("ai.onnx", "IsInf", 10)
def is_inf(op, x):
    found = torch.zeros_like(x, dtype=torch.bool)
    if op.attr("detect_positive", 1):
        found = found | (x == float("inf"))
    if op.attr("detect_negative", 1):
        found = found | (x == float("-inf"))
    return found


def align(op, a, b):
    """`b` reshaped for the explicit broadcasting of opset 6 and before; numpy's rules need nothing."""
    if op.version >= 7 or op.domain != "ai.onnx" or op.op_type not in _LEGACY_BROADCAST:
        return b
    if not op.attr("broadcast", 0):
        if a.shape != b.shape:
            raise refuse(op, f"shapes {list(a.shape)} and {list(b.shape)} differ and 'broadcast' is 0")
        return b
    axis = op.attr("axis", a.dim() - b.dim())
    return b.reshape(tuple(b.shape) + (1,) * (a.dim() - b.dim() - axis))


def divide(a, b):
    """Integers are divided towards zero, as in C."""
    if a.dtype.is_floating_point or b.dtype.is_floating_point:
        return torch.div(a, b)
    return torch.div(a, b, rounding_mode="trunc")


def power(a, b):
    return torch.pow(a, b).to(a.dtype)


_BINARY = {
    "Add": (torch.add, (6, 7)), "Sub": (torch.sub, (6, 7)), "Mul": (torch.mul, (6, 7)), "Div": (divide, (6, 7)),
    "Pow": (power, (1, 7)), "And": (torch.logical_and, (1, 7)), "Or": (torch.logical_or, (1, 7)),
    "Equal": (torch.eq, (1, 7, 11)), "Greater": (torch.gt, (1, 7, 9)), "Less": (torch.lt, (7, 9)),
}  # fmt: skip
_LEGACY_BROADCAST = frozenset(_BINARY)
_ARITHMETIC = ("Add", "Sub", "Mul", "Div", "Pow")
_GRAPHCORE_BINARY = {
    "Atan2": torch.atan2, "Fmod": torch.fmod, "Remainder": torch.remainder, "BitwiseAnd": torch.bitwise_and,
    "BitwiseOr": torch.bitwise_or, "BitwiseXor": torch.bitwise_xor,
}  # fmt: skip


def _register_binary(domain, op_type, versions, function):
    @lowers(domain, op_type, *versions)
    def lower(op, a, b):
        same_types(op, a, b)
        if op_type in ("And", "Or"):
            booleans_only(op, a, b)
        elif op_type in _ARITHMETIC and a.dtype == torch.bool:
            raise refuse(op, "inputs of type BOOL; they have no arithmetic")
        elif op_type == "Atan2":
            floats_only(op, a, b)
        b = align(op, a, b)
        broadcastable(op, a, b)
        return exact(function, a, b)


for _op_type, (_function, _versions) in _BINARY.items():
    _register_binary("ai.onnx", _op_type, _versions, _function)
for _op_type, _function in _GRAPHCORE_BINARY.items():
    _register_binary("ai.graphcore", _op_type, (1,), _function)


@lowers("ai.graphcore", "BitwiseXnor", 1)
def bitwise_xnor(op, a, b):
    same_types(op, a, b)
    return exact(lambda x, y: torch.bitwise_not(torch.bitwise_xor(x, y)), a, b)


@lowers("ai.onnx", "Mod", 10)
def mod(op, a, b):
    """fmod=1: the sign of the dividend (C's fmod); fmod=0: of the divisor (Python's %), integers only."""
    same_types(op, a, b)
    if op.attr("fmod", 0):
        return exact(torch.fmod, a, b)
    if a.dtype.is_floating_point:
        raise refuse(op, "fmod must be 1 for floating point inputs")
    return exact(torch.remainder, a, b)


@lowers("ai.onnx", "Sum", 6, 8)
def total(op, *xs):
    same_types(op, *xs)
    broadcastable(op, *xs)
    return exact(lambda *ts: functools.reduce(torch.add, ts), *xs)


@lowers("ai.onnx", "Mean", 6, 8)
def mean(op, *xs):
    same_types(op, *xs)
    broadcastable(op, *xs)
    return functools.reduce(torch.add, xs) / len(xs)


def _extreme(op, xs, function):
    """Equal inputs each get the whole gradient, as PopART's MaxArgGrad compares with the output; torch halves it."""
    same_types(op, *xs)
    broadcastable(op, *xs)
    if not xs[0].dtype.is_floating_point:
        return exact(lambda *ts: functools.reduce(function, ts), *xs)

    def pair(a, b):
        tied = (a == b) & torch.isfinite(a)
        return torch.where(tied, a + (b - b.detach()), function(a, b))

    return functools.reduce(pair, xs)


@lowers("ai.onnx", "Max", 6, 8)
def maximum(op, *xs):
    return _extreme(op, xs, torch.maximum)


@lowers("ai.onnx", "Min", 6, 8)
def minimum(op, *xs):
    return _extreme(op, xs, torch.minimum)


@lowers("ai.onnx", "Where", 9)
def where(op, condition, a, b):
    booleans_only(op, condition)
    same_types(op, a, b)
    broadcastable(op, condition, a, b)
    return torch.where(condition, a, b)


class _Clip(torch.autograd.Function):
    """torch's hardtanh, with the gradient read off the result: what comes in need not be kept for the backward pass."""

    @staticmethod
    def forward(ctx, x, low, high):
        result = x.clamp(low, high)
        ctx.save_for_backward(result)
        ctx.low, ctx.high = low, high
        return result

    @staticmethod
    def backward(ctx, grad):
        (result,) = ctx.saved_tensors
        return torch.where((result > ctx.low) & (result < ctx.high), grad, torch.zeros_like(grad)), None, None


def clip(x, low, high):
    """The gradient is 1 strictly between the bounds and 0 on them, as in torch's relu6 and PopART's ClipGrad."""
    if low is None and high is None:
        return x
    if not x.dtype.is_floating_point:
        return torch.clamp(x, min=low, max=high)
    if low is not None and high is not None and low < high:
        return _Clip.apply(x, low, high)
    inside = torch.ones_like(x, dtype=torch.bool)
    if low is not None:
        inside = inside & (x > low)
    if high is not None:
        inside = inside & (x < high)
    return torch.where(inside, x, torch.clamp(x.detach(), min=low, max=high))


@lowers("ai.onnx", "Clip", 6)
def clip_attributes(op, x):
    return clip(x, op.attr("min", None), op.attr("max", None))


@lowers("ai.onnx", "Clip", 11)
def clip_inputs(op, x, low=None, high=None):
    low, high = op.constant(1, None), op.constant(2, None)
    return clip(x, None if low is None else low.item(), None if high is None else high.item())


@lowers("ai.onnx", "Cast", 6, 9)
def cast(op, x):
    return x.to(dtype_of(op, op.attr("to")))


@lowers("ai.graphcore", "Scale", 1)
def scale(op, x):
    return x * op.attr("scale")


@lowers("ai.graphcore", "ScaledAdd", 1)
def scaled_add(op, x, y, a=None, b=None):
    """scale0 * x + scale1 * y; each scale is an attribute or an input."""
    first = op.attr("scale0", 1.0) if a is None else a
    second = op.attr("scale1", 1.0) if b is None else b
    return x * first + y * second
