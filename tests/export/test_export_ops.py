"""The custom torch ops against loops that are dumb and obviously right."""
from __future__ import annotations

import math

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from export import ops


def naive_iou(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    return width * height / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height)


def naive_nms(scores, boxes, threshold, capacity, score_threshold):
    kept = []
    for row in sorted(range(len(scores)), key=lambda i: (-scores[i], i)):
        absent = not scores[row] > score_threshold
        if len(kept) < capacity and not absent and all(naive_iou(boxes[row], boxes[k]) <= threshold for k in kept):
            kept.append(row)
    return kept + [-1] * (capacity - len(kept))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(1, 8))
def test_nms_equals_the_loop_over_pairs(seed, rows, capacity):
    random = np.random.default_rng(seed)
    corner = random.integers(0, 8, (2, rows, 2))
    boxes = np.concatenate([corner, corner + random.integers(0, 6, (2, rows, 2))], axis=2).astype(np.float32)
    scores = random.integers(-2, 4, (2, rows)).astype(np.float32)  # many ties, some absent
    keep = ops.nms(torch.from_numpy(scores), torch.from_numpy(boxes), 0.4, capacity, -0.5)
    assert keep.dtype == torch.int32
    assert keep.tolist() == [naive_nms(s.tolist(), b.tolist(), 0.4, capacity, -0.5) for s, b in zip(scores, boxes)]


def test_nms_leaves_out_rows_with_nan():
    boxes = torch.tensor([[[0, 0, 2, 2], [10, 0, math.nan, 2], [20, 0, 22, 2.0]]])
    assert ops.nms(torch.tensor([[0.5, 0.9, math.nan]]), boxes, 0.5, 3, -1e9).tolist() == [[0, -1, -1]]


def test_nms_keeps_a_box_whose_overlap_equals_the_threshold():
    boxes = torch.tensor([[[0, 0, 2, 1], [1, 0, 3, 1.0]]])  # IoU 1/3
    third = float(np.float32(1) / np.float32(3))
    assert ops.nms(torch.tensor([[2.0, 1.0]]), boxes, third, 2, -1e9).tolist() == [[0, 1]]
    assert ops.nms(torch.tensor([[2.0, 1.0]]), boxes, third - 1e-6, 2, -1e9).tolist() == [[0, -1]]


def naive_sample(plane, y, x):
    """Bilinear value at (y, x) of a plane [H, W], by the rule of ONNX RoiAlign."""
    height, width = plane.shape
    if y < -1 or y > height or x < -1 or x > width:
        return 0.0
    y, x = min(max(y, 0.0), height - 1), min(max(x, 0.0), width - 1)
    top, left = int(y), int(x)
    below, right = min(top + 1, height - 1), min(left + 1, width - 1)
    upper = plane[top, left] * (1 - (x - left)) + plane[top, right] * (x - left)
    lower = plane[below, left] * (1 - (x - left)) + plane[below, right] * (x - left)
    return upper * (1 - (y - top)) + lower * (y - top)


def naive_roi_align(features, rois, height, width, scale, ratio):
    pooled = np.zeros((*rois.shape[:2], features.shape[1], height, width))
    for b, d, c, i, j in np.ndindex(*pooled.shape):
        x1, y1, x2, y2 = rois[b, d] * scale - 0.5
        samples = [naive_sample(features[b, c], y1 + (y2 - y1) / height * (i + (s + 0.5) / ratio),
                                x1 + (x2 - x1) / width * (j + (t + 0.5) / ratio))
                   for s in range(ratio) for t in range(ratio)]
        pooled[b, d, c, i, j] = sum(samples) / len(samples)
    return pooled


# inside, the whole map, under one feature pixel, empty, reaching outside by less and by more than a pixel, inverted
ROIS = [[[16, 20, 60, 50], [0, 0, 96, 64], [30, 30, 33, 31], [0, 0, 0, 0]],
        [[-12, -12, 40, 40], [-80, -80, 10, 10], [50, 40, 130, 90], [60, 50, 20, 10]]]


@pytest.mark.parametrize("ratio", [1, 2])
def test_roi_align_equals_the_loop_over_samples(ratio):
    features = np.random.default_rng(0).standard_normal((2, 3, 4, 6))
    rois = np.asarray(ROIS, dtype=np.float64)
    pooled = ops.roi_align(torch.from_numpy(features), torch.from_numpy(rois), 3, 2, 1 / 16, ratio)
    np.testing.assert_allclose(pooled.numpy(), naive_roi_align(features, rois, 3, 2, 1 / 16, ratio), atol=1e-12)


@pytest.mark.parametrize("ratio", [1, 2])
def test_roi_align_equals_onnxruntime(ratio):
    features = np.random.default_rng(1).standard_normal((2, 3, 4, 6)).astype(np.float32)
    rois = np.asarray(ROIS, dtype=np.float32)
    node = helper.make_node("RoiAlign", ["x", "rois", "image"], ["y"], output_height=3, output_width=2, mode="avg",
                            sampling_ratio=ratio, spatial_scale=1 / 16, coordinate_transformation_mode="half_pixel")
    graph = helper.make_graph([node], "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3, 4, 6]),
                                            helper.make_tensor_value_info("rois", TensorProto.FLOAT, [8, 4]),
                                            helper.make_tensor_value_info("image", TensorProto.INT64, [8])],
                              [helper.make_tensor_value_info("y", TensorProto.FLOAT, [8, 3, 3, 2])])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    want, = session.run(None, {"x": features, "rois": rois.reshape(8, 4), "image": np.repeat([0, 1], 4)})
    got = ops.roi_align(torch.from_numpy(features), torch.from_numpy(rois), 3, 2, 1 / 16, ratio)
    np.testing.assert_allclose(got.numpy().reshape(want.shape), want, atol=2e-6)


@pytest.mark.parametrize("ratio", [1, 2])
def test_roi_align_gradient_passes_gradcheck(ratio):
    features = torch.randn(2, 2, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rois = torch.tensor(ROIS, dtype=torch.float64)
    features.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ops.roi_align(x, rois, 3, 2, 1 / 16, ratio), (features,))


def test_roi_align_gives_no_gradient_to_the_rois():
    features = torch.randn(1, 1, 4, 4, requires_grad=True)
    rois = torch.tensor([[[0.0, 0, 32, 32]]], requires_grad=True)
    ops.roi_align(features, rois, 2, 2, 1 / 16, 1).sum().backward()
    assert rois.grad is None
    assert features.grad.sum().item() == pytest.approx(4)  # every bin is an average, its weights sum to 1


def test_custom_ops_agree_with_their_shape_rules():
    features, rois = torch.randn(1, 2, 4, 4, requires_grad=True), torch.tensor([[[0.0, 0, 32, 32]]])
    torch.library.opcheck(torch.ops.popdet.roi_align.default, (features, rois, 2, 2, 1 / 16, 1))
    boxes = torch.tensor([[[0.0, 0, 2, 2], [5, 5, 7, 7]]])
    torch.library.opcheck(torch.ops.popdet.nms.default, (torch.tensor([[1.0, 2.0]]), boxes, 0.5, 3, 0.0))
    torch.library.opcheck(torch.ops.popdet.top_rows.default, (torch.tensor([[1.0, 2.0, 0.0]]), 2))
    torch.library.opcheck(torch.ops.popdet.stop_gradient.default, (torch.tensor([1.0], requires_grad=True),))


def test_top_rows_takes_the_lower_row_of_equal_values():
    values, index = ops.top_rows(torch.tensor([[1.0, 3, 3, 2, 3], [0, 0, 0, 0, 0]]), 3)
    assert index.dtype == torch.int32
    assert index.tolist() == [[1, 2, 4], [0, 1, 2]]
    assert values.tolist() == [[3, 3, 3], [0, 0, 0]]


def test_stop_gradient_passes_the_value_and_stops_the_gradient():
    x = torch.tensor([2.0], requires_grad=True)
    (x * ops.stop_gradient(x * 3)).sum().backward()
    assert x.grad.tolist() == [6.0]
