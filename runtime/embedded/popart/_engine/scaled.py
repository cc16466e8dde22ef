"""A convolution and the frozen scale of its output channels (of a normalisation) in a training program: conv(x, w) * s.

Autograd would write grad * s, as large as the result, for the gradients of x and w to read. Here s goes into the weights,
which are small: dx is that of a convolution with w * s, and dw is s times that of an unscaled one.
"""
from __future__ import annotations

from collections.abc import Callable

import torch

# (grad, x, w, [whether dx is wanted, whether dw is]) -> dx, dw
Backward = Callable[..., tuple["torch.Tensor | None", "torch.Tensor | None"]]


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, scale, convolve, differentiate):
        ctx.save_for_backward(x, w, scale)
        ctx.differentiate = differentiate
        return convolve(x, w) * scale

    @staticmethod
    def backward(ctx, grad):
        x, w, scale = ctx.saved_tensors
        columns = scale.reshape(-1, 1, 1, 1)
        to_x, to_w = ctx.differentiate(grad, x, w * columns, ctx.needs_input_grad[:2])
        return to_x, to_w if to_w is None else to_w * columns, None, None, None


def scaled(
    x: torch.Tensor, w: torch.Tensor, scale: torch.Tensor, convolve: Callable[..., torch.Tensor], differentiate: Backward
) -> torch.Tensor:
    """convolve(x, w) * scale. x [B,C,H,W], w [K,C / groups,h,w], scale [1,K,1,1] or [K,1,1], no gradient to it."""
    if scale.requires_grad:
        return convolve(x, w) * scale
    return _Scaled.apply(x, w, scale, convolve, differentiate)


def plain(strides, pads, dilations, groups: int) -> tuple[Callable[..., torch.Tensor], Backward]:
    """(convolve, differentiate) of torch's convolution; pads: before, the same behind."""

    def convolve(x, w):
        return torch.nn.functional.conv2d(x, w, None, strides, pads, dilations, groups)

    def differentiate(grad, x, w, wanted):
        to_x, to_w, _ = torch.ops.aten.convolution_backward(
            grad, x, w, None, strides, pads, dilations, False, [0, 0], groups, [*wanted, False]
        )
        return to_x if wanted[0] else None, to_w if wanted[1] else None

    return convolve, differentiate
