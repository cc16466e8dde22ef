"""Convolutions and matrix products: half storage, partial sums in float unless `__partials_type` is "half"."""
from __future__ import annotations

import torch
import torch.nn.functional as F

from ..registry import lowers
from .common import floats_only, pad_spatial, per_axis, refuse, resolve_pads, same_types, wide

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_PARTIAL_CHANNELS = 16  # input channels that one pass of the IPU's multiply-accumulate unit sums before it rounds


def _half_partials(op, x) -> bool:
    """Whether partial sums are kept in half; float data always has float partials (PopLibs never narrows them)."""
    partials = str(op.settings.get("__partials_type", "float")).lower()
    if partials not in ("float", "half"):
        raise refuse(op, f"Bad partialsType '{partials}'")
    return partials == "half" and x.dtype == torch.float16


def _in_parts(channels: int, part):
    """Sums part(begin, end) over slices of the reduced channels, rounding the running sum to half after each."""
    total = None
    for begin in range(0, channels, _PARTIAL_CHANNELS):
        term = part(begin, min(begin + _PARTIAL_CHANNELS, channels))
        total = term.half() if total is None else (total.float() + term).half()
    return total


def _spatial_rank(op, x) -> int:
    rank = x.dim() - 2
    if rank not in _CONV:
        raise refuse(op, f"an input with {rank} spatial axes; 1 to 3 are supported")
    return rank


@lowers("ai.onnx", "Conv", 1, 11)
def conv(op, x, w, bias=None):
    """x [N,C,*spatial], w [M,C/group,*kernel] -> [N,M,*spatial']."""
    floats_only(op, x, w)
    same_types(op, x, w, doing="convolution")
    rank = _spatial_rank(op, x)
    kernel = tuple(w.shape[2:])
    if tuple(op.attr("kernel_shape", kernel)) not in (kernel, ()):
        raise refuse(op, f"kernel_shape {op.attr('kernel_shape')} does not match the weights {list(w.shape)}")
    strides, dilations = per_axis(op, "strides", rank), per_axis(op, "dilations", rank)
    pads = resolve_pads(op, x.shape[2:], kernel, strides, dilations)
    symmetric = all(begin == end and begin >= 0 for begin, end in pads)
    padding = [begin for begin, _ in pads] if symmetric else [0] * rank
    if not symmetric:
        x = pad_spatial(x, pads)
    group = op.attr("group", 1)

    def run(data, weights, addend=None):
        return _CONV[rank](data, weights, addend, strides, padding, dilations, group)

    if not _half_partials(op, x):
        return wide(run, x, w, bias)
    grouped, weights = x.float().unflatten(1, (group, -1)), w.float()
    out = _in_parts(w.shape[1], lambda b, e: run(grouped[:, :, b:e].flatten(1, 2), weights[:, b:e]))
    return out if bias is None else add_bias(op, out, bias)


@lowers("ai.onnx", "ConvTranspose", 1, 11)
def conv_transpose(op, x, w, bias=None):
    """x [N,C,*spatial], w [C,M/group,*kernel]. `output_shape` or `auto_pad` fix the padding, else `pads` do."""
    rank = _spatial_rank(op, x)
    if _half_partials(op, x):
        raise refuse(op, "half partials of a transposed convolution are not modelled; use '__partials_type' float")
    strides, dilations = per_axis(op, "strides", rank), per_axis(op, "dilations", rank)
    extra = per_axis(op, "output_padding", rank, 0)
    full = [(n - 1) * s + (k - 1) * d + 1 for n, s, k, d in zip(x.shape[2:], strides, w.shape[2:], dilations)]
    pads = _transpose_pads(op, full, x.shape[2:], strides, extra)
    group = op.attr("group", 1)
    out = wide(lambda a, b: _CONV_TRANSPOSE[rank](a, b, None, strides, 0, 0, group, dilations), x, w)
    # The rows that output_padding adds see no input but do get the bias, so they are made before it is added.
    out = pad_spatial(out, [(-begin, e - end) for (begin, end), e in zip(pads, extra)])
    return out if bias is None else add_bias(op, out, bias)


def _transpose_pads(op, full, spatial, strides, extra):
    """(begin, end) to crop from the full output, per axis (onnx.ai/onnx/operators, ConvTranspose)."""
    shape, auto = tuple(op.attr("output_shape", ())), op.attr("auto_pad", "NOTSET")
    if not shape and auto in ("NOTSET", "VALID"):
        return resolve_pads(op, spatial, full, strides, strides)
    wanted = shape[-len(full):] or tuple(n * s for n, s in zip(spatial, strides))
    pads = []
    for size, grown, target in zip(full, extra, wanted):
        cut = size + grown - target
        if cut < 0:  # a larger output than the input reaches: rows without input at the end
            pads.append((0, cut))
            continue
        small, large = cut // 2, cut - cut // 2
        pads.append((small, large) if auto == "SAME_UPPER" else (large, small))
    return pads


@lowers("ai.onnx", "MatMul", 1, 9)
def matmul(op, a, b):
    """numpy's matmul: 1-D operands get an axis for the product, the leading axes broadcast."""
    for side, tensor, name in zip(("lhs", "rhs"), (a, b), op.inputs):
        if tensor.dim() == 0:
            raise refuse(op, f"doesn't support scalar tensor {name} as the {side} input")
    floats_only(op, a, b)
    same_types(op, a, b, doing="matrix product")
    if a.shape[-1] != b.shape[-2 if b.dim() > 1 else 0]:
        raise refuse(op, f"contracting dimensions unequal: lhs '{op.inputs[0]}' {list(a.shape)}, rhs '{op.inputs[1]}' "
                         f"{list(b.shape)}")  # fmt: skip
    if not _half_partials(op, a):
        return wide(torch.matmul, a, b)
    left, right = a.float(), b.float()
    axis = -2 if b.dim() > 1 else -1
    return _in_parts(a.shape[-1], lambda i, j: torch.matmul(left[..., i:j], right.narrow(axis, i, j - i)))


@lowers("ai.onnx", "Gemm", 6, 7, 9, 11)
def gemm(op, a, b, c=None):
    """alpha * A' B' + beta * C; PopART rewrites it to MatMul, Scale and Add, each of which rounds to half."""
    alpha, beta = op.attr("alpha", 1.0), op.attr("beta", 1.0)
    if a.dim() != 2 or b.dim() != 2:
        raise refuse(op, f"the inputs must be matrices, not {list(a.shape)} and {list(b.shape)}")
    a = a.t() if op.attr("transA", 0) else a
    b = b.t() if op.attr("transB", 0) else b
    if c is not None and alpha == beta == 1.0 and a.dtype == torch.float32:
        return torch.addmm(c, a, b)
    out = matmul(op, a, b)
    out = out if alpha == 1.0 else out * alpha
    if c is None:
        return out
    return out + (c if beta == 1.0 else c * beta)


@lowers("ai.graphcore", "AddBias", 1)
def add_bias(op, x, bias):
    """x [N,C,...] + bias [C]."""
    return x + bias.reshape((-1,) + (1,) * (x.dim() - 2))
