"""`popdet_embedded::pointwise`: a 1x1 convolution of an inference program with what follows it, as one matrix product.

    clip(conv(x, filters) + bias + addend, low, high)

`popdet_embedded::pointwise_mean` gives the means of that over height and width, and never writes what they are means of.
Channels-last, float32, by the host library (custom_ops/host/gemm.hpp) or torch where that cannot be had. The filters are
packed ahead, as weights do not change in inference. No gradients.
"""
import torch

from .custom import host_kernels, with_infinity
from .torch_ops import ANY_LAYOUT, torch_op

_PANEL = 32  # output channels side by side in packed filters


@torch_op(ANY_LAYOUT)
def pack_filters(filters: torch.Tensor) -> torch.Tensor:
    """[K,C,1,1] -> what `pointwise` takes, [ceil(K / 32), C, 32]."""
    kernels = host_kernels() if filters.device.type == "cpu" else None
    if kernels is None:
        return pack(filters.flatten(1).t())
    return torch.from_numpy(kernels.pack_filters(filters.contiguous().numpy(), torch.get_num_threads()))


@pack_filters.register_fake
def _(filters):
    return filters.new_empty(packed_shape(*filters.shape[:2]))


@torch_op(ANY_LAYOUT)
def pointwise(
    x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor, addend: torch.Tensor | None, low: float, high: float
) -> torch.Tensor:
    """x [B,C,H,W], filters of `pack_filters`, bias [K], addend [B,K,H,W] -> [B,K,H,W], channels-last."""
    kernels = host_kernels() if x.device.type == "cpu" else None
    if kernels is None:
        return channels_last(_clipped_in_torch(x, packed, bias, addend, low, high))
    return torch.from_numpy(kernels.pointwise(*_arguments(x, packed, bias, addend, low, high))).permute(0, 3, 1, 2)


@pointwise.register_fake
def _(x, packed, bias, addend, low, high):
    return like_channels_last(x, bias.shape[0])


@torch_op(ANY_LAYOUT)
def pointwise_mean(
    x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor, addend: torch.Tensor | None, low: float, high: float
) -> torch.Tensor:
    """As `pointwise`, but the means over height and width: [B,K]."""
    kernels = host_kernels() if x.device.type == "cpu" else None
    if kernels is None:
        return _clipped_in_torch(x, packed, bias, addend, low, high).mean(dim=(2, 3))
    return torch.from_numpy(kernels.pointwise_mean(*_arguments(x, packed, bias, addend, low, high)))


@pointwise_mean.register_fake
def _(x, packed, bias, addend, low, high):
    return x.new_empty((x.shape[0], bias.shape[0]))


def _arguments(x, packed, bias, addend, low, high):
    """Those of the host library's kernels."""
    added = None if addend is None else rows_of(addend)
    return rows_of(x), packed.contiguous().numpy(), bias.numpy(), added, with_infinity(low, high), torch.get_num_threads()


def _clipped_in_torch(x, packed, bias, addend, low, high):
    out = pointwise_in_torch(x, packed, bias)
    return (out if addend is None else out + addend).clamp(*with_infinity(low, high))


def pointwise_in_torch(x, packed, bias):
    """The convolution alone."""
    return (x.permute(0, 2, 3, 1) @ unpack(packed, len(bias)) + bias).permute(0, 3, 1, 2)


def packed_shape(outputs: int, inputs: int) -> tuple[int, int, int]:
    return -(-outputs // _PANEL), inputs, _PANEL


def pack(matrices):
    """[..., C, K] -> [..., ceil(K / 32), C, 32], filled up with zeros."""
    missing = -matrices.shape[-1] % _PANEL
    panels = torch.nn.functional.pad(matrices, (0, missing)).unflatten(-1, (-1, _PANEL))
    return panels.transpose(-3, -2).contiguous()


def unpack(packed, outputs: int):
    """The inverse of `pack`."""
    return packed.transpose(-3, -2).flatten(-2)[..., :outputs]


def rows_of(tensor):
    """[B,C,H,W] as the array [B,H,W,C], without a copy where the memory is channels-last."""
    return tensor.detach().permute(0, 2, 3, 1).contiguous().numpy()


def channels_last(tensor):
    return tensor.contiguous(memory_format=torch.channels_last)


def like_channels_last(x, channels: int):
    """An empty map of x's size with so many channels."""
    return x.new_empty((x.shape[0], *x.shape[2:], channels)).permute(0, 3, 1, 2)
