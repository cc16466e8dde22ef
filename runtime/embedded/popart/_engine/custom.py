"""`popdet_embedded::nms` and `popdet_embedded::roi_align`: popdet's two custom ops as torch ops.

The arithmetic is the host library's (custom_ops/host, C++); where it cannot be built or loaded, torch's, which says so
once. Being torch ops they survive tracing, and a compiled program calls them by name: import this file before one runs.
"""
import functools
import importlib
import math
import pathlib
import sys
import warnings

import torch

from .torch_ops import ANY_LAYOUT, torch_op

_ROOT = pathlib.Path(__file__).resolve().parents[4]  # the repository; also when only runtime/embedded is on the path


@functools.lru_cache(maxsize=None)
def host_kernels():
    """The host library (custom_ops.host.HostKernels), or None after one warning that says why."""
    try:
        module = _import_host()
    except ImportError as error:  # the fallback gives the same numbers, only later
        warnings.warn(
            f"popdet's C++ kernels for nms and roiAlign are not in use, slower torch code is: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return module.load()  # warns itself when it returns None


def _import_host():
    """custom_ops.host of this repository, wherever the program was started."""
    sys.path.insert(0, str(_ROOT))
    try:
        module = importlib.import_module("custom_ops.host")
    finally:
        sys.path.remove(str(_ROOT))
    found = pathlib.Path(module.__file__ or "").resolve()
    if _ROOT not in found.parents:
        raise ImportError(f"another package is named custom_ops: {found}")
    return module


@torch_op()
def nms(
    scores: torch.Tensor, boxes: torch.Tensor, iou_threshold: float, max_keep: int, score_threshold: float
) -> torch.Tensor:
    """scores [B,N], boxes [B,N,4] (x1,y1,x2,y2) float32 -> the kept rows, best first, int32 [B,max_keep], -1 behind."""
    kernels = host_kernels()
    if kernels is None:
        return nms_in_torch(scores, boxes, iou_threshold, max_keep, score_threshold)
    threads = torch.get_num_threads()  # on another device, too: one row at a time, NMS waits for itself more than for copies
    keep = kernels.nms(scores.cpu().numpy(), boxes.cpu().numpy(), iou_threshold, max_keep, score_threshold, threads)
    return torch.from_numpy(keep).to(scores.device)


@nms.register_fake
def _(scores, boxes, iou_threshold, max_keep, score_threshold):
    return scores.new_empty((scores.shape[0], max_keep), dtype=torch.int32)


def nms_in_torch(scores, boxes, iou_threshold, max_keep, score_threshold):
    """The fallback: one kept row at a time, suppressing what overlaps it."""
    keep = torch.full((scores.shape[0], max_keep), -1, dtype=torch.int32)
    for image, (row_scores, row_boxes) in enumerate(zip(scores.detach().cpu(), boxes.detach().cpu())):
        # NaN > anything is false, so a NaN score is absent too.
        live = (row_scores > score_threshold) & ~row_boxes.isnan().any(dim=1)
        rows = torch.nonzero(live).reshape(-1)
        rows = rows[torch.sort(row_scores[rows], descending=True, stable=True).indices]
        count = 0
        while count < max_keep and len(rows):
            keep[image, count] = rows[0]
            count += 1
            above = _overlap(row_boxes[rows[0]], row_boxes[rows[1:]]) > iou_threshold
            rows = rows[1:][~above]
    return keep.to(scores.device)


def _overlap(box, others):
    """IoU of a box [4] with others [M,4], corners in either order; -1 where an area or the overlap is zero or NaN."""
    low, high = torch.minimum(box[:2], box[2:]), torch.maximum(box[:2], box[2:])
    lows, highs = torch.minimum(others[:, :2], others[:, 2:]), torch.maximum(others[:, :2], others[:, 2:])
    sides = torch.minimum(high, highs) - torch.maximum(low, lows)
    shared = sides[:, 0] * sides[:, 1]
    area, areas = (high - low).prod(), (highs - lows).prod(dim=1)
    both = area + areas - shared
    valid = (sides > 0).all(dim=1) & (shared > 0) & (area > 0) & (areas > 0) & (both > 0)
    return torch.where(valid, shared / both, torch.full_like(shared, -1.0))


# The files of compiled programs cannot hold infinity as an argument, so that for a bound this number stands for it.
LARGEST = torch.finfo(torch.float32).max


def with_infinity(low: float, high: float) -> tuple[float, float]:
    """Bounds of a clip as the kernels take them."""
    return low if low > -LARGEST else -math.inf, high if high < LARGEST else math.inf


def channels_last_array(tensor):
    """[..., C, H, W] as the array [..., H, W, C], without a copy where the memory is channels-last."""
    return tensor.detach().movedim(-3, -1).contiguous().numpy()


@torch_op(ANY_LAYOUT, differentiable=True)
def roi_align(
    features: torch.Tensor, rois: torch.Tensor, height: int, width: int, spatial_scale: float, sampling_ratio: int
) -> torch.Tensor:
    """features [B,C,H,W], rois [B,D,4] (x1,y1,x2,y2 in input pixels) float32 -> [B,D,C,height,width], half-pixel."""
    kernels = host_kernels() if features.device.type == "cpu" else None
    if kernels is None:
        out = roi_align_in_torch(features, rois, height, width, spatial_scale, sampling_ratio)
        return out.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    out = kernels.roi_align_forward(
        channels_last_array(features), rois.detach().numpy(), height, width, spatial_scale, sampling_ratio, channels_last=True,
        threads=torch.get_num_threads(),
    )  # fmt: skip
    return torch.from_numpy(out).permute(0, 1, 4, 2, 3)


@roi_align.register_fake
def _(features, rois, height, width, spatial_scale, sampling_ratio):
    return features.new_empty((*rois.shape[:2], height, width, features.shape[1])).permute(0, 1, 4, 2, 3)


@torch_op(ANY_LAYOUT)
def roi_align_backward(
    grad: torch.Tensor, rois: torch.Tensor, feature_height: int, feature_width: int, spatial_scale: float,
    sampling_ratio: int,
) -> torch.Tensor:  # fmt: skip
    """grad [B,D,C,height,width] -> the gradient of the features [B,C,feature_height,feature_width]."""
    kernels = host_kernels() if grad.device.type == "cpu" else None
    if kernels is None:
        out = roi_align_backward_in_torch(grad, rois, feature_height, feature_width, spatial_scale, sampling_ratio)
        return out.contiguous(memory_format=torch.channels_last)
    shape = (grad.shape[0], feature_height, feature_width, grad.shape[2])
    out = kernels.roi_align_backward(
        channels_last_array(grad), rois.numpy(), shape, spatial_scale, sampling_ratio, channels_last=True,
        threads=torch.get_num_threads(),
    )  # fmt: skip
    return torch.from_numpy(out).permute(0, 3, 1, 2)


@roi_align_backward.register_fake
def _(grad, rois, feature_height, feature_width, spatial_scale, sampling_ratio):
    rows = grad.new_empty((grad.shape[0], feature_height, feature_width, grad.shape[2]))
    return rows.permute(0, 3, 1, 2)


def _keep_for_backward(ctx, inputs, output):
    features, rois, _, _, ctx.spatial_scale, ctx.sampling_ratio = inputs
    ctx.feature_size = features.shape[2:]
    ctx.save_for_backward(rois)


def _differentiate(ctx, grad):
    (rois,) = ctx.saved_tensors
    to_features = roi_align_backward(grad, rois, *ctx.feature_size, ctx.spatial_scale, ctx.sampling_ratio)
    return to_features, None, None, None, None, None


roi_align.register_autograd(_differentiate, setup_context=_keep_for_backward)


def _samples(rois, height, width, feature_height, feature_width, spatial_scale, ratio):
    """Rows of the [B*H*W, C] features and their weights: both [B*D*height*width, 4*ratio*ratio]."""
    batch = rois.shape[0]
    y_pixel, y_weight = _axis(rois[..., 1], rois[..., 3], height, feature_height, spatial_scale, ratio)
    x_pixel, x_weight = _axis(rois[..., 0], rois[..., 2], width, feature_width, spatial_scale, ratio)
    # [B, D, height, 1, samples, 1] with [B, D, 1, width, 1, samples]: every (row, column) pair of every bin
    row = y_pixel[:, :, :, None, :, None] * feature_width + x_pixel[:, :, None, :, None, :]
    weight = y_weight[:, :, :, None, :, None] * x_weight[:, :, None, :, None, :] / (ratio * ratio)
    image = torch.arange(batch, device=rois.device).reshape(-1, 1, 1, 1, 1, 1) * (feature_height * feature_width)
    bags = batch * rois.shape[1] * height * width
    return (row + image).reshape(bags, 4 * ratio * ratio), weight.reshape(bags, 4 * ratio * ratio)


def _axis(low, high, bins, size, spatial_scale, ratio):
    """Pixels and weights [B,D,bins,2*ratio] along one axis: each sample's two neighbours; 0 outside [-1, size]."""
    start, end = low * spatial_scale - 0.5, high * spatial_scale - 0.5
    bin_size = ((end - start) / bins)[..., None, None]
    index = torch.arange(bins, device=low.device, dtype=low.dtype)[:, None]
    sample = torch.arange(ratio, device=low.device, dtype=low.dtype) + 0.5
    position = start[..., None, None] + index * bin_size + sample * bin_size / ratio
    inside = (position >= -1) & (position <= size)
    position = torch.where(inside, position, 0.0).clamp(0, size - 1)
    first = position.long()
    upper = position - first
    weights = torch.stack([1 - upper, upper], dim=-1) * inside[..., None]
    pixels = torch.stack([first, (first + 1).clamp(max=size - 1)], dim=-1)
    return pixels.flatten(-2), weights.flatten(-2)


def roi_align_in_torch(features, rois, height, width, spatial_scale, sampling_ratio):
    """The fallback: a weighted gather of channel rows."""
    channels, feature_height, feature_width = features.shape[1:]
    rows, weights = _samples(rois, height, width, feature_height, feature_width, spatial_scale, sampling_ratio)
    table = features.permute(0, 2, 3, 1).reshape(-1, channels)
    if not len(rows):
        return features.new_zeros((*rois.shape[:2], channels, height, width))
    out = torch.nn.functional.embedding_bag(rows, table, per_sample_weights=weights, mode="sum")
    return out.reshape(*rois.shape[:2], height, width, channels).permute(0, 1, 4, 2, 3).contiguous()


def roi_align_backward_in_torch(grad, rois, feature_height, feature_width, spatial_scale, sampling_ratio):
    """The transpose of the gather: scatters each bin's gradient to its rows."""
    batch, _, channels, height, width = grad.shape
    rows, weights = _samples(rois, height, width, feature_height, feature_width, spatial_scale, sampling_ratio)
    bins = grad.permute(0, 1, 3, 4, 2).reshape(-1, channels)
    table = grad.new_zeros((batch * feature_height * feature_width, channels))
    for corner in range(rows.shape[1]):  # one corner at a time: all at once would hold 4 * ratio ** 2 copies of grad
        table.index_add_(0, rows[:, corner], bins * weights[:, corner : corner + 1])
    return table.reshape(batch, feature_height, feature_width, channels).permute(0, 3, 1, 2).contiguous()
