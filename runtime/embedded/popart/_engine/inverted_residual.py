"""`popdet_embedded::inverted_residual`: MobileNetV2's block of an inference program as one torch op.

    project(clip(depthwise(clip(expand(x), before)), after)) + addend

`popdet_embedded::inverted_residual_of_rois` has RoI-Align of a map, plus a bias, in place of expand(x): the pass hoist_convs
expands the map that all RoIs share. What lies between is six times as large as x; it never leaves the processor's caches.
The arithmetic is the host library's (custom_ops/host/inverted_residual.hpp), channels-last, float32; torch's where that
cannot be had. No gradients.
"""
import torch

from .custom import host_kernels, roi_align_in_torch, with_infinity
from .depthwise import depthwise_in_torch
from .pointwise import channels_last, pointwise_in_torch, rows_of
from .torch_ops import ANY_LAYOUT, torch_op


@torch_op(ANY_LAYOUT)
def inverted_residual(
    x: torch.Tensor, expand: torch.Tensor | None, expand_bias: torch.Tensor | None, filters: torch.Tensor, bias: torch.Tensor,
    project: torch.Tensor, project_bias: torch.Tensor, addend: torch.Tensor | None, stride: int, before: list[float],
    after: list[float],
) -> torch.Tensor:  # fmt: skip
    """x [B,C,H,W] -> [B,K,h,w], channels-last. expand (may be absent) and project come from `pack_filters`; filters
    [M,1,3,3]; biases [M], [M] and [K]; addend [B,K,h,w]. Bounds: [low, high], see custom.LARGEST.
    """
    before, after = with_infinity(*before), with_infinity(*after)
    kernels = host_kernels() if x.device.type == "cpu" else None
    if kernels is None:
        wide = x if expand is None else pointwise_in_torch(x, expand, expand_bias)
        return _narrowed_in_torch(wide, filters, bias, project, project_bias, addend, stride, before, after)
    first = None if expand is None else (expand.contiguous().numpy(), expand_bias.numpy())
    rest = _arguments(filters, bias, project, project_bias, addend, stride, before, after)
    return torch.from_numpy(kernels.inverted_residual(rows_of(x), first, *rest)).permute(0, 3, 1, 2)


@inverted_residual.register_fake
def _(x, expand, expand_bias, filters, bias, project, project_bias, addend, stride, before, after):
    height, width = ((size - 1) // stride + 1 for size in x.shape[2:])
    return x.new_empty((x.shape[0], height, width, project_bias.shape[0])).permute(0, 3, 1, 2)


@torch_op(ANY_LAYOUT)
def inverted_residual_of_rois(
    features: torch.Tensor, rois: torch.Tensor, roi_bias: torch.Tensor | None, filters: torch.Tensor, bias: torch.Tensor,
    project: torch.Tensor, project_bias: torch.Tensor, addend: torch.Tensor | None, size: list[int], spatial_scale: float,
    sampling_ratio: int, stride: int, before: list[float], after: list[float],
) -> torch.Tensor:  # fmt: skip
    """features [B,M,H,W], rois [B,D,4] (x1,y1,x2,y2 in input pixels), roi_bias [M] -> [B * D,K,h,w], channels-last.

    `size` is (height, width) of what RoI-Align gives, see custom.roi_align; the rest is as of `inverted_residual`.
    """
    before, after = with_infinity(*before), with_infinity(*after)
    kernels = host_kernels() if features.device.type == "cpu" else None
    if kernels is None:
        wide = roi_align_in_torch(features, rois, *size, spatial_scale, sampling_ratio).flatten(0, 1)
        wide = wide if roi_bias is None else wide + roi_bias[:, None, None]
        return _narrowed_in_torch(wide, filters, bias, project, project_bias, addend, stride, before, after)
    added = None if roi_bias is None else roi_bias.numpy()
    rest = _arguments(filters, bias, project, project_bias, addend, stride, before, after)
    out = kernels.inverted_residual_of_rois(
        rows_of(features), rois.detach().numpy(), added, tuple(size), spatial_scale, sampling_ratio, *rest
    )
    return torch.from_numpy(out).permute(0, 3, 1, 2)


@inverted_residual_of_rois.register_fake
def _(features, rois, roi_bias, filters, bias, project, project_bias, addend, size, scale, ratio, stride, before, after):
    height, width = ((length - 1) // stride + 1 for length in size)
    count = rois.shape[0] * rois.shape[1]
    return features.new_empty((count, height, width, project_bias.shape[0])).permute(0, 3, 1, 2)


def _arguments(filters, bias, project, project_bias, addend, stride, before, after):
    """Those of the host library's kernels, behind what they make `wide` of."""
    return (
        (filters.contiguous().numpy(), bias.numpy()), (project.contiguous().numpy(), project_bias.numpy()),
        None if addend is None else rows_of(addend), stride, before, after, torch.get_num_threads(),
    )  # fmt: skip


def _narrowed_in_torch(wide, filters, bias, project, project_bias, addend, stride, before, after):
    out = pointwise_in_torch(depthwise_in_torch(wide, filters, bias, stride, before, after), project, project_bias)
    return channels_last(out if addend is None else out + addend)
