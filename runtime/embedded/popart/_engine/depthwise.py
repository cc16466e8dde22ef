"""`popdet_embedded::depthwise`: a depthwise 3x3 convolution with the clips (ReLU6) on both sides of it as one torch op.

    clip(conv(clip(x, low, high)) + bias, low', high')      padding 1, stride 1 or 2, one filter a channel, float32

Such a convolution does little arithmetic with much memory, so what it costs is how often its tensors are read. The op
reads and writes each of them once, forward and backward, and keeps x and the result, nothing in between. The arithmetic
is the host library's (custom_ops/host/depthwise.hpp), channels-last; torch's where that cannot be had.
"""
import torch

from .custom import channels_last_array, host_kernels, with_infinity
from .torch_ops import ANY_LAYOUT, torch_op


@torch_op(ANY_LAYOUT, differentiable=True)
def depthwise(
    x: torch.Tensor, filters: torch.Tensor, bias: torch.Tensor, stride: int, before: list[float], after: list[float]
) -> torch.Tensor:
    """x [B,C,H,W], filters [C,1,3,3], bias [C] -> [B,C,h,w], channels-last. Bounds: [low, high], see custom.LARGEST."""
    before, after = with_infinity(*before), with_infinity(*after)
    kernels = host_kernels() if x.device.type == "cpu" else None
    if kernels is None:
        return _last(depthwise_in_torch(x, filters, bias, stride, before, after))
    out = kernels.depthwise_forward(
        channels_last_array(x), filters.contiguous().numpy(), bias.numpy(), stride, before, after,
        torch.get_num_threads(),
    )  # fmt: skip
    return torch.from_numpy(out).permute(0, 3, 1, 2)


@depthwise.register_fake
def _(x, filters, bias, stride, before, after):
    batch, channels, height, width = x.shape
    rows = x.new_empty((batch, (height - 1) // stride + 1, (width - 1) // stride + 1, channels))
    return rows.permute(0, 3, 1, 2)


@torch_op(ANY_LAYOUT)
def depthwise_backward(
    grad: torch.Tensor, y: torch.Tensor, x: torch.Tensor, filters: torch.Tensor, stride: int, before: list[float],
    after: list[float],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients of x (channels-last), filters and bias, from that of the result y."""
    before, after = with_infinity(*before), with_infinity(*after)
    kernels = host_kernels() if grad.device.type == "cpu" else None
    if kernels is None:
        return _backward_in_torch(grad, y, x, filters, stride, before, after)
    to_x, to_filters, to_bias = kernels.depthwise_backward(
        *map(channels_last_array, (grad, y, x)), filters.contiguous().numpy(), stride, before, after,
        torch.get_num_threads(),
    )  # fmt: skip
    return torch.from_numpy(to_x).permute(0, 3, 1, 2), torch.from_numpy(to_filters), torch.from_numpy(to_bias)


@depthwise_backward.register_fake
def _(grad, y, x, filters, stride, before, after):
    rows = x.new_empty((x.shape[0], *x.shape[2:], x.shape[1]))
    return rows.permute(0, 3, 1, 2), filters.new_empty(filters.shape), filters.new_empty(filters.shape[:1])


def _keep_for_backward(ctx, inputs, output):
    x, filters, _, ctx.stride, ctx.before, ctx.after = inputs
    ctx.save_for_backward(x, filters, output)


def _differentiate(ctx, grad):
    x, filters, y = ctx.saved_tensors
    return *depthwise_backward(grad, y, x, filters, ctx.stride, ctx.before, ctx.after), None, None, None


depthwise.register_autograd(_differentiate, setup_context=_keep_for_backward)


def depthwise_in_torch(x, filters, bias, stride, before, after):
    """The fallback, and what the op means."""
    inside = x.clamp(*before)
    return torch.nn.functional.conv2d(inside, filters, bias, stride, 1, 1, x.shape[1]).clamp(*after)


def _backward_in_torch(grad, y, x, filters, stride, before, after):
    grad = torch.where((y > after[0]) & (y < after[1]), grad, 0.0)
    channels = x.shape[1]
    to_x, to_filters, to_bias = torch.ops.aten.convolution_backward(
        grad, x.clamp(*before), filters, [channels], [stride] * 2, [1, 1], [1, 1], False, [0, 0], channels, [True] * 3
    )
    return _last(torch.where((x > before[0]) & (x < before[1]), to_x, 0.0)), to_filters.contiguous(), to_bias


def _last(tensor):
    return tensor.contiguous(memory_format=torch.channels_last)
