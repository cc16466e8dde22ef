"""Ops of ai.graphcore that belong to no other family."""
from __future__ import annotations

import sys

import numpy as np
import torch

from ...errors import poplar_application_runtime_error, unsupported
from ..registry import lowers
from .common import refuse
from .elementwise import dtype_of


@lowers("ai.graphcore", "Detach", 1)
def detach(op, x):
    """Stops the gradient."""
    return x.detach()


@lowers("ai.graphcore", "Nop", 1)
@lowers("ai.graphcore", "TensorRemap", 1)
def nop(op, x, reference=None):
    """Identity that no pattern removes; a remap changes the tile layout only."""
    return x


@lowers("ai.graphcore", "Zeros", 1)
def zeros(op):
    return torch.zeros(tuple(op.attr("shape")), dtype=dtype_of(op, op.attr("dtype", "FLOAT")))


@lowers("ai.graphcore", "ZerosLike", 1)
def zeros_like(op, x):
    return torch.zeros_like(x)


@lowers("ai.graphcore", "Init", 1)
def init(op):
    """A tensor of `shape`; also where PopART leaves it uninitialised (init_type NoInit) it is zeros."""
    return torch.zeros(tuple(op.attr("shape")), dtype=dtype_of(op, op.attr("data_type", "FLOAT")))


@lowers("ai.graphcore", "UnaryZeroGrad", 1)
def unary_zero_grad(op, x):
    return torch.zeros_like(x)


@lowers("ai.graphcore", "IncrementMod", 1)
def increment_mod(op, x):
    return torch.remainder(x + op.attr("increment"), op.attr("modulus")).to(x.dtype)


@lowers("ai.graphcore", "CopyVarUpdate", 1)
def copy_var_update(op, variable, updater):
    """The variable's new value; the session stores it."""
    if variable.shape != updater.shape:
        raise refuse(op, f"a variable of shape {list(variable.shape)} cannot become {list(updater.shape)}")
    return updater.to(variable.dtype).detach().clone()


@lowers("ai.graphcore", "AddLhsInplace", 1)
def add_lhs_inplace(op, a, b):
    """a + b, which becomes the value of a where that is a variable."""
    return a + b


@lowers("ai.graphcore", "ConvFlipWeights", 1)
def conv_flip_weights(op, w):
    """[O, I/g, *kernel] -> [I, O/g, *kernel] turned round: the weights of the convolution that is its data gradient."""
    group = op.attr("group", 1)
    o, i = w.shape[:2]
    w = w.reshape(group, o // group, i, *w.shape[2:]).transpose(1, 2).reshape(group * i, o // group, *w.shape[2:])
    return w.flip(tuple(range(2, w.dim())))


_BINARY = {
    "Add": torch.add, "Sub": torch.sub, "Mul": torch.mul, "Div": torch.div, "Pow": torch.pow, "Max": torch.maximum,
    "Min": torch.minimum,
}  # fmt: skip


@lowers("ai.graphcore", "BinaryConstScalar", 1)
def binary_const_scalar(op, x):
    """op(x, value), or op(value, x) with scalar_in_index 0."""
    names = list(_BINARY)
    kind = op.attr("op")
    function = _BINARY.get(kind if isinstance(kind, str) else names[kind] if 0 <= kind < len(names) else None)
    if function is None:
        raise refuse(op, f"the operation {kind!r} is unknown")
    value = torch.full((), op.attr("value"), dtype=x.dtype, device=x.device)
    return function(x, value) if op.attr("scalar_in_index", 1) else function(value, x)


@lowers("ai.graphcore", "Histogram", 1)
def histogram(op, x):
    """Counts of x (or |x|) below levels[0], between neighbours, from the last level on: UINT32 [levels + 1]."""
    values = x.detach().abs() if op.attr("absoluteOfInput", 0) else x.detach()
    levels = torch.tensor(op.attr("levels"), dtype=torch.float32, device=x.device)
    bins = torch.bucketize(values.reshape(-1).float(), levels, right=True)
    slots = torch.arange(len(levels) + 1, device=x.device)
    return (bins.unsqueeze(1) == slots).sum(dim=0).to(torch.uint32)


@lowers("ai.graphcore", "NormalizeImage", 1)
def normalize_image(op, image, offsets, scales):
    """image [..., 3] -> [..., 4]: (image * scale - offsets) * scales in three channels, the fourth is 0."""
    if image.shape[-1] != 3:
        raise refuse(op, f"an image with {image.shape[-1]} channels last; 3 are needed")
    out = (image.float() * op.attr("scale", 1.0) - offsets.float()) * scales.float()
    return torch.nn.functional.pad(out, (0, 1)).to(offsets.dtype)


@torch.library.custom_op("popdet_embedded::print_tensor", mutates_args=())
def _print(x: torch.Tensor, text: str, threshold: int, edge: int, width: int, digits: int) -> torch.Tensor:
    array = (x.float() if x.dtype == torch.float16 else x).detach().cpu().numpy()
    shown = np.array2string(array, threshold=threshold, edgeitems=edge, max_line_width=width, precision=digits)
    print(f"{text.rpartition('|')[0]}: {shown}", file=sys.stderr)
    return x.clone()


@_print.register_fake
def _(x, text, threshold, edge, width, digits):
    return torch.empty_like(x)


def _print_gradient(ctx, grad):
    text, threshold, edge, width, digits, also_gradient = ctx.how
    if also_gradient:
        grad = _print(grad, text, threshold, edge, width, digits)
    return grad, None, None, None, None, None


def _remember(ctx, inputs, output):
    _, text, *numbers = inputs
    name, _, also = text.rpartition("|")
    ctx.how = (f"Gradient___{name}|0", *numbers, also == "1")


_print.register_autograd(_print_gradient, setup_context=_remember)


@lowers("ai.graphcore", "PrintTensor", 1)
def print_tensor(op, x):
    """Prints x on standard error and, with print_gradient, its gradient; returns x.

    `floatFormat` and the bracket and separator characters of the text are numpy's.
    """
    title = op.attr("title", "") or (op.inputs[0] if op.inputs else op.name)
    threshold, edge = op.attr("summariseThreshold", 1000), op.attr("edgeItems", 3)
    width, digits = op.attr("maxLineWidth", 75), op.attr("digits", 8)
    return _print(x, f"{title}|{op.attr('print_gradient', 1)}", threshold, edge, width, digits)


@torch.library.custom_op("popdet_embedded::abort_if", mutates_args=())
def _abort_if(condition: torch.Tensor, text: str) -> torch.Tensor:
    if bool(condition.any()):
        raise poplar_application_runtime_error(text)
    return condition.clone()


@_abort_if.register_fake
def _(condition, text):
    return torch.empty_like(condition)


@lowers("ai.graphcore", "Abort", 1)
def abort(op, condition=None):
    """Ends the run: always, or where its input is true. It has no output."""
    text = f"{op.describe()}: the program was aborted"
    _abort_if(torch.ones(1, dtype=torch.bool) if condition is None else condition.bool(), text)
    return ()


_POPXL, _FLOAT8 = "It belongs to PopART's own IR (popxl).", "It needs 8-bit floats."
_SCALING = "Use SessionOptions.automaticLossScalingSettings."
REFUSED = {
    **dict.fromkeys(("HostLoad", "HostStore", "RemoteLoad", "RemoteLoadInplace", "RemoteStore", "RemoteCodeLoad"), _POPXL),
    **dict.fromkeys(("CastThenPow2Scale", "Pow2ScaleThenCast"), _FLOAT8),
    **dict.fromkeys(("AutoLossScaleProxy", "LossScaleUpdate"), _SCALING),
}  # fmt: skip


def _refuse(op_type, why):
    @lowers("ai.graphcore", op_type, 1)
    def lower(op, *inputs):
        raise unsupported(f"the op {op.describe()}", why)


for _op_type, _why in REFUSED.items():
    _refuse(_op_type, _why)
