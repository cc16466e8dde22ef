"""`popdet_embedded::winograd`: a 3x3 convolution with stride 1 and padding 1, then a clip or ReLU, with a quarter of the
multiplications.

    clip(conv(x, filters) + bias, low, high)

Winograd's F(4x4, 3x3), channels-last, float32: the host library's (custom_ops/host/winograd.hpp, where the method and its
accuracy are), or torch's where that cannot be had. Forward keeps x and, for a clip, the result, nothing in between.
Inference takes filters that were transformed ahead, as weights do not change there.
"""
import functools
import math
from fractions import Fraction

import torch

from .custom import LARGEST, host_kernels, with_infinity
from .pointwise import channels_last, like_channels_last, pack, packed_shape, rows_of, unpack
from .torch_ops import ANY_LAYOUT, torch_op

_A, _B = Fraction(3, 4), Fraction(3, 2)  # interpolation at 0, +-_A, +-_B and infinity


@torch_op(ANY_LAYOUT)
def winograd_filters(filters: torch.Tensor) -> torch.Tensor:
    """[K,C,3,3] -> transformed and packed, [36, ceil(K / 32), C, 32]."""
    kernels = host_kernels() if filters.device.type == "cpu" else None
    if kernels is None:
        return pack(torch.einsum("pt,kct->pck", _filter_transform(filters.dtype), filters.flatten(2)))
    return torch.from_numpy(kernels.winograd_filters(filters.contiguous().numpy(), torch.get_num_threads()))


@winograd_filters.register_fake
def _(filters):
    return filters.new_empty((36, *packed_shape(*filters.shape[:2])))


@torch_op(ANY_LAYOUT)
def winograd_transformed(
    x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor, low: float, high: float
) -> torch.Tensor:
    """x [B,C,H,W], filters of `winograd_filters`, bias [K] -> [B,K,H,W], channels-last."""
    kernels = host_kernels() if x.device.type == "cpu" else None
    if kernels is None:
        return channels_last(winograd_in_torch(x, unpack(packed, len(bias)), bias, low, high))
    threads = torch.get_num_threads()
    out = kernels.winograd_forward(rows_of(x), packed.contiguous().numpy(), bias.numpy(), with_infinity(low, high), threads)
    return torch.from_numpy(out).permute(0, 3, 1, 2)


@winograd_transformed.register_fake
def _(x, packed, bias, low, high):
    return like_channels_last(x, bias.shape[0])


@torch_op(ANY_LAYOUT, differentiable=True)
def winograd(x: torch.Tensor, filters: torch.Tensor, bias: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """x [B,C,H,W], filters [K,C,3,3], bias [K] -> [B,K,H,W], channels-last."""
    return winograd_transformed(x, winograd_filters(filters), bias, low, high)


@winograd.register_fake
def _(x, filters, bias, low, high):
    return like_channels_last(x, filters.shape[0])


@torch_op(ANY_LAYOUT)
def winograd_backward(
    grad: torch.Tensor, y: torch.Tensor | None, x: torch.Tensor, filters: torch.Tensor, low: float, high: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x (channels-last), filters and bias, from that of the result y; without bounds y may be absent."""
    kernels = host_kernels() if grad.device.type == "cpu" else None
    if kernels is None:
        return _backward_in_torch(grad, y, x, filters, low, high)
    maps, threads = (rows_of(grad), None if y is None else rows_of(y), rows_of(x)), torch.get_num_threads()
    given = (*maps, filters.contiguous().numpy())
    to_x, to_filters, to_bias = map(torch.from_numpy, kernels.winograd_backward(*given, with_infinity(low, high), threads))
    return to_x.permute(0, 3, 1, 2), to_filters, to_bias


@winograd_backward.register_fake
def _(grad, y, x, filters, low, high):
    return like_channels_last(x, x.shape[1]), filters.new_empty(filters.shape), filters.new_empty(filters.shape[:1])


def _keep_for_backward(ctx, inputs, output):
    x, filters, _, ctx.low, ctx.high = inputs
    ctx.save_for_backward(x, filters, *(() if (ctx.low, ctx.high) == (-LARGEST, LARGEST) else (output,)))


def _differentiate(ctx, grad):
    x, filters, *y = ctx.saved_tensors
    return *winograd_backward(grad, y[0] if y else None, x, filters, ctx.low, ctx.high), None, None


winograd.register_autograd(_differentiate, setup_context=_keep_for_backward)


def convolve(x: torch.Tensor, filters: torch.Tensor) -> torch.Tensor:
    """The convolution alone, as `differentiate` for scaled.py."""
    return winograd(x, filters, x.new_zeros(filters.shape[0]), -LARGEST, LARGEST)


def differentiate(grad, x, filters, wanted):
    to_x, to_filters, _ = winograd_backward(grad, None, x, filters, -LARGEST, LARGEST)
    return to_x, to_filters


@functools.lru_cache(maxsize=None)
def _matrices(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A [6,4], G [6,3], B [6,6] of winograd.hpp."""
    points = [Fraction(0), _A, -_A, _B, -_B]
    outputs = [[p**power for power in range(4)] for p in points] + [[0, 0, 0, 1]]
    filters, inputs = [], []
    for point in points:
        others = [p for p in points if p != point]
        divisor = math.prod(point - other for other in others)
        filters.append([point**power / divisor for power in range(3)])
        inputs.append([*_coefficients(others), 0])
    filters.append([0, 0, 1])
    inputs.append(_coefficients(points))
    rows = [[[float(value) for value in row] for row in matrix] for matrix in (outputs, filters, inputs)]
    a, g, transposed = (torch.tensor(matrix, dtype=torch.float64).to(dtype) for matrix in rows)
    return a, g, transposed.t()


def _coefficients(roots: list[Fraction]) -> list[Fraction]:
    """Of the polynomial with these roots, lowest power first."""
    found = [Fraction(1)]
    for root in roots:
        found = [high - root * low for high, low in zip([Fraction(0), *found], [*found, Fraction(0)])]
    return found


@functools.lru_cache(maxsize=None)
def _filter_transform(dtype: torch.dtype) -> torch.Tensor:
    """[36, 9]: G for rows times G for columns."""
    _, g, _ = _matrices(torch.float64)
    return torch.kron(g, g).to(dtype)


def winograd_in_torch(x, transformed, bias, low, high):
    """The fallback, and what the op means. transformed: [36,C,K]."""
    a, _, b = _matrices(x.dtype)
    batch, channels, height, width = x.shape
    rows, columns = -(-height // 4), -(-width // 4)
    padded = torch.nn.functional.pad(x, (1, 4 * columns + 1 - width, 1, 4 * rows + 1 - height))
    windows = padded.unfold(2, 6, 4).unfold(3, 6, 4)  # [B,C,rows,columns,6,6]
    tiles = torch.einsum("bcrsij,ip,jq->pqbrsc", windows, b, b).reshape(36, -1, channels)
    products = (tiles @ transformed).reshape(6, 6, batch, rows, columns, -1)
    out = torch.einsum("pqbrsk,pi,qj->bkrisj", products, a, a).reshape(batch, -1, 4 * rows, 4 * columns)
    return (out[:, :, :height, :width] + bias[:, None, None]).clamp(*with_infinity(low, high))


def _backward_in_torch(grad, y, x, filters, low, high):
    if y is not None:
        grad = torch.where((y > low) & (y < high), grad, 0.0)
    to_x, to_filters, to_bias = torch.ops.aten.convolution_backward(
        grad, x, filters, list(filters.shape[:1]), [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, True]
    )
    return channels_last(to_x), to_filters, to_bias
