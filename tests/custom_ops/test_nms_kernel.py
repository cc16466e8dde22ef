"""NMS of the host library and of the ONNX fallback, against plain loops and onnxruntime's NonMaxSuppression."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from op_oracles import nms_by_loops, onnx_nms, run_fallback

from custom_ops.schema import NMS, CustomOpError

F = np.float32
EDGES = [0.0, 1.0, 4.0, -3.0, 50.0, 1e30, -1e30, 3e38, np.inf, -np.inf, np.nan, 1e-30]


def padded(rows, capacity):
    return np.array(list(rows) + [-1] * (capacity - len(rows)), np.int32)


def random_problem(seed, batch, rows):
    """Overlapping boxes on a coarse grid with few score levels, so that ties and exact thresholds are common."""
    random = np.random.default_rng(seed)
    corner = random.integers(0, 6, (batch, rows, 2))
    boxes = np.concatenate([corner, corner + random.integers(-2, 5, (batch, rows, 2))], 2).astype(F)
    return (random.integers(0, 5, (batch, rows)) / 4).astype(F), boxes


@pytest.mark.parametrize("rows", [0, 1, 7, 8, 9, 150])
@pytest.mark.parametrize("capacity", [1, 8, 200])
@pytest.mark.parametrize("iou", [0.0, 0.5, 1.0])
def test_kept_rows_are_those_of_the_loops(kernels, rows, capacity, iou):
    scores, boxes = random_problem(rows, 3, rows)
    found = kernels.nms(scores, boxes, iou, capacity, 0.1)
    for image in range(3):
        expected = nms_by_loops(scores[image], boxes[image], iou, capacity, 0.1)
        np.testing.assert_array_equal(found[image], padded(expected, capacity))


number = st.one_of(st.sampled_from(EDGES), st.integers(-4, 8).map(float), st.floats(-100, 100, width=32))
row = st.tuples(st.sampled_from([0.0, -0.0, 0.5, 1.0, -1.0, np.inf, -np.inf, np.nan, -3.4e38]), *[number] * 4)


@settings(max_examples=300, deadline=None)
@given(st.lists(row, max_size=12), st.sampled_from([0.0, 0.3, 0.5, 1.0]), st.integers(1, 13), st.sampled_from([-3.4e38, 0]))
def test_hostile_boxes_and_scores(kernels, rows, iou, capacity, threshold):
    table = np.array(rows, F).reshape(-1, 5)
    scores, boxes = np.ascontiguousarray(table[:, 0]), np.ascontiguousarray(table[:, 1:])
    expected = nms_by_loops(scores, boxes, iou, capacity, threshold)
    found = kernels.nms(scores[None], boxes[None], iou, capacity, threshold)[0]
    np.testing.assert_array_equal(found, padded(expected, capacity))
    if not np.isnan(boxes).any():  # onnxruntime keeps boxes of NaN: that part of the definition is ours
        np.testing.assert_array_equal(onnx_nms(scores, boxes, iou, capacity, threshold), expected)


@settings(max_examples=25, deadline=None)
@given(st.lists(row, max_size=9), st.sampled_from([0.0, 0.5]), st.integers(1, 10), st.sampled_from([-3.4e38, 0]))
def test_the_fallback_keeps_the_same_rows(kernels, rows, iou, capacity, threshold):
    table = np.array([rows, rows[::-1]], F).reshape(2, -1, 5)  # two images, not alike
    scores, boxes = np.ascontiguousarray(table[..., 0]), np.ascontiguousarray(table[..., 1:])
    attrs = {"threshold": iou, "numDetections": capacity, "score_threshold": threshold}
    column, kept, keep = run_fallback(NMS, attrs, [scores, boxes])
    expected = kernels.nms(scores, boxes, iou, capacity, threshold)
    np.testing.assert_array_equal(keep, expected)
    np.testing.assert_array_equal(column, scores[..., None])
    for image, slot in np.ndindex(keep.shape):
        wanted = boxes[image, expected[image, slot]] if expected[image, slot] >= 0 else np.zeros(4, F)
        np.testing.assert_array_equal(kept[image, slot], wanted)


def test_the_half_fallback_equals_the_float_one_on_half_values():
    scores, boxes = random_problem(5, 2, 40)
    attrs = {"threshold": 0.4, "numDetections": 10}
    single = run_fallback(NMS, attrs, [scores, boxes])
    half = run_fallback(NMS, attrs, [scores.astype(np.float16), boxes.astype(np.float16)])
    assert half[1].dtype == np.float16
    for a, b in zip(single, half):
        np.testing.assert_array_equal(a, b)


def test_a_large_random_problem_equals_onnxruntime(kernels):
    random = np.random.default_rng(1)
    corner = random.uniform(0, 300, (2000, 2))
    boxes = np.concatenate([corner, corner + random.uniform(5, 90, (2000, 2))], 1).astype(F)
    scores = random.random(2000, F)
    expected = onnx_nms(scores, boxes, 0.5, 400, -3.4e38)
    np.testing.assert_array_equal(kernels.nms(scores[None], boxes[None], 0.5, 400)[0], expected)


def test_the_iou_is_rounded_step_by_step(kernels):
    """At a threshold of exactly the IoU both boxes stay, one float below one goes; a fused multiply-add would differ."""
    corner = np.random.default_rng(2).uniform(0, 20, (300, 2, 2)).astype(F)
    boxes = np.concatenate([corner, corner + F(30.7)], 2)
    sides = np.minimum(boxes[:, 0, 2:], boxes[:, 1, 2:]) - np.maximum(boxes[:, 0, :2], boxes[:, 1, :2])
    areas = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
    shared = sides[:, 0] * sides[:, 1]
    scores = np.array([[2, 1]], F)
    for pair, iou in zip(boxes, shared / (areas[:, 0] + areas[:, 1] - shared)):
        assert kernels.nms(scores, pair[None], iou, 2).tolist() == [[0, 1]]
        assert kernels.nms(scores, pair[None], np.nextafter(iou, F(0)), 2).tolist() == [[0, -1]]


def test_threads_and_batch_do_not_change_the_answer(kernels):
    scores, boxes = random_problem(3, 5, 60)
    alone = np.concatenate([kernels.nms(scores[i : i + 1], boxes[i : i + 1], 0.3, 20) for i in range(5)])
    for threads in (1, 2, 7):
        np.testing.assert_array_equal(kernels.nms(scores, boxes, 0.3, 20, threads=threads), alone)


def test_float64_is_computed_in_float64(kernels):
    # IoU is 1/3 rounded: in float32 above the threshold, in float64 not.
    boxes = np.array([[[0, 0, 2, 1], [1, 0, 3, 1]]], np.float64)
    scores, third = np.array([[0.9, 0.8]]), 1 / 3
    assert kernels.nms(scores, boxes, third, 2).tolist() == [[0, 1]]
    lower = np.nextafter(third, 0)
    assert kernels.nms(scores, boxes, lower, 2).tolist() == [[0, -1]]
    assert kernels.nms(scores.astype(F), boxes.astype(F), lower, 2).tolist() == [[0, 1]]


def test_pointers_of_another_library_are_taken(kernels):
    torch = pytest.importorskip("torch")
    scores, boxes = (torch.from_numpy(a) for a in random_problem(4, 2, 30))
    keep = torch.empty((2, 6), dtype=torch.int32)
    kernels.nms_pointers("float32", scores.data_ptr(), boxes.data_ptr(), keep.data_ptr(), 2, 30, 0.4, 6)
    np.testing.assert_array_equal(keep, kernels.nms(scores.numpy(), boxes.numpy(), 0.4, 6))


def test_memory_that_is_not_contiguous_is_read_right(kernels):
    scores, boxes = random_problem(6, 2, 40)
    found = kernels.nms(scores[:, ::2], boxes[:, ::2], 0.4, 9)
    np.testing.assert_array_equal(found, kernels.nms(scores[:, ::2].copy(), boxes[:, ::2].copy(), 0.4, 9))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"max_keep": 0}, "max_keep >= 1"),
        ({"iou_threshold": 1.1}, "iou_threshold"),
        ({"score_threshold": float("nan")}, "no NaN"),
        ({"boxes": np.zeros((1, 3, 4), F)}, "expected"),
        ({"boxes": np.zeros((1, 2, 4))}, "all inputs must be float32"),
        ({"boxes": np.zeros((1, 2, 4), np.float16), "scores": np.zeros((1, 2), np.float16)}, "float16"),
    ],
)
def test_bad_arguments_are_refused(kernels, change, message):
    arguments = dict(scores=np.zeros((1, 2), F), boxes=np.zeros((1, 2, 4), F), iou_threshold=0.5, max_keep=2)
    with pytest.raises(CustomOpError, match=message):
        kernels.nms(**{**arguments, **change})
