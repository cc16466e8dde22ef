"""RoI-Align of the host library and of the ONNX fallback, against plain loops and onnxruntime's RoiAlign-16."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from op_oracles import onnx_roi_align, roi_align_by_loops, roi_align_problem, run_fallback

from custom_ops.host import RoiAlignShape
from custom_ops.schema import ROI_ALIGN, CustomOpError

F = np.float32


def last(array):
    """Channels to the end: [B,C,H,W] or [B,D,C,h,w] in channels-last memory."""
    return np.ascontiguousarray(np.moveaxis(array, -3, -1))


@pytest.mark.parametrize("channels", [1, 7, 8, 31, 33, 64, 67])
@pytest.mark.parametrize("rois", [0, 1, 4])
@pytest.mark.parametrize("ratio", [1, 2])
def test_forward_equals_the_loops(kernels, channels, rois, ratio):
    features, boxes = roi_align_problem(channels + rois, channels=channels, rois=rois, dtype=np.float64)
    expected = roi_align_by_loops(features, boxes, 3, 2, 0.25, ratio)
    found = kernels.roi_align_forward(features, boxes, 3, 2, 0.25, ratio)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
    found = kernels.roi_align_forward(last(features), boxes, 3, 2, 0.25, ratio, channels_last=True)
    np.testing.assert_allclose(found, last(expected), rtol=0, atol=1e-12)


@pytest.mark.parametrize("ratio", [1, 2, 3])
@pytest.mark.parametrize("size", [(1, 1), (1, 5), (6, 9)])
def test_forward_and_fallback_equal_onnxruntime(kernels, ratio, size):
    features, boxes = roi_align_problem(ratio, height=size[0], width=size[1], columns=5)
    expected = onnx_roi_align(features, boxes, 4, 3, 0.25, ratio)
    found = kernels.roi_align_forward(features, boxes, 4, 3, 0.25, ratio)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)
    attrs = {"spatial_scale": 0.25, "aligned_height": 4, "aligned_width": 3, "sampling_ratio": ratio}
    np.testing.assert_array_equal(run_fallback(ROI_ALIGN, attrs, [features, boxes])[0], found)


edge = st.one_of(
    st.sampled_from([0.0, -4.0, -2.0, 2.0, 18.0, 22.0, 26.0, 1e30, -1e30, np.inf, -np.inf, np.nan, 1e-30]),
    st.floats(-50, 80, width=32),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(*[edge] * 4), max_size=4), st.sampled_from([1, 2]), st.integers(1, 3), st.integers(1, 3))
def test_hostile_rois(kernels, rois, ratio, height, width):
    features = np.random.default_rng(0).standard_normal((1, 2, 5, 6)).astype(F)
    boxes = np.array(rois, F).reshape(1, -1, 4)
    found = kernels.roi_align_forward(features, boxes, height, width, 0.25, ratio)
    assert np.isfinite(found).all()
    attrs = {"spatial_scale": 0.25, "aligned_height": height, "aligned_width": width, "sampling_ratio": ratio}
    np.testing.assert_array_equal(run_fallback(ROI_ALIGN, attrs, [features, boxes])[0], found)
    back = kernels.roi_align_backward(np.ones_like(found), boxes, features.shape, 0.25, ratio)
    assert np.isfinite(back).all() and abs(back).max() <= found.size


@pytest.mark.parametrize(
    "y, adds", [(-1.0, True), (np.nextafter(F(-1), F(-2)), False), (5.0, True), (np.nextafter(F(5), F(6)), False)]
)
def test_the_border_belongs_to_the_map_and_no_more(kernels, y, adds):
    # A RoI of no extent at scale 1 samples at (y, y) = y1 - 0.5, exactly for these numbers.
    features, roi = np.ones((1, 1, 5, 5), F), np.full((1, 1, 4), F(y) + F(0.5), F)
    attrs = {"spatial_scale": 1.0, "aligned_height": 1, "aligned_width": 1}
    for found in (kernels.roi_align_forward(features, roi, 1, 1, 1.0), run_fallback(ROI_ALIGN, attrs, [features, roi])[0]):
        assert found.item() == (1.0 if adds else 0.0)


def test_a_sample_outside_reads_nothing_even_next_to_nan(kernels):
    features = np.full((1, 1, 3, 3), np.nan, F)
    rois = np.array([[[100, 100, 120, 120]]], F)
    attrs = {"spatial_scale": 1.0, "aligned_height": 2, "aligned_width": 2}
    np.testing.assert_array_equal(kernels.roi_align_forward(features, rois, 2, 2, 1.0), 0)
    np.testing.assert_array_equal(run_fallback(ROI_ALIGN, attrs, [features, rois])[0], 0)


def test_images_do_not_mix(kernels):
    features, boxes = roi_align_problem(8, batch=3)
    together = kernels.roi_align_forward(features, boxes, 2, 2, 0.25)
    for image in range(3):
        one = slice(image, image + 1)
        np.testing.assert_array_equal(kernels.roi_align_forward(features[one], boxes[one], 2, 2, 0.25), together[one])


def test_the_fallback_in_half_rounds_once(kernels):
    features, boxes = (a.astype(np.float16) for a in roi_align_problem(9))
    attrs = {"spatial_scale": 0.25, "aligned_height": 3, "aligned_width": 3, "sampling_ratio": 2}
    exact = kernels.roi_align_forward(features.astype(F), boxes.astype(F), 3, 3, 0.25, 2)
    np.testing.assert_array_equal(run_fallback(ROI_ALIGN, attrs, [features, boxes])[0], exact.astype(np.float16))


@pytest.mark.parametrize("dtype, tolerance", [(F, 1e-5), (np.float64, 1e-13)])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("channels, ratio", [(1, 1), (5, 3), (40, 1), (70, 2)])
def test_backward_is_the_transpose_of_forward(kernels, dtype, tolerance, channels_last, channels, ratio):
    features, boxes = roi_align_problem(2, channels=channels, columns=5, dtype=dtype)
    grad = np.random.default_rng(3).standard_normal((2, 4, channels, 3, 2)).astype(dtype)
    if channels_last:
        features, grad = last(features), last(grad)
    forward = kernels.roi_align_forward(features, boxes, 3, 2, 0.25, ratio, channels_last)
    backward = kernels.roi_align_backward(grad, boxes, features.shape, 0.25, ratio, channels_last)
    left, right = np.vdot(grad, forward), np.vdot(backward, features)
    assert abs(left - right) <= tolerance * max(np.linalg.norm(grad) * np.linalg.norm(forward), 1)


def test_backward_entry_by_entry(kernels):
    features, boxes = roi_align_problem(4, batch=2, channels=2, height=3, width=4, rois=2, dtype=np.float64)
    grad = np.random.default_rng(5).standard_normal((2, 2, 2, 2, 2))
    backward = kernels.roi_align_backward(grad, boxes, features.shape, 0.25, 2)
    for at in np.ndindex(features.shape):
        unit = np.zeros_like(features)
        unit[at] = 1
        np.testing.assert_allclose(backward[at], np.vdot(grad, roi_align_by_loops(unit, boxes, 2, 2, 0.25, 2)), atol=1e-12)


@pytest.mark.parametrize("channels_last", [False, True])
def test_backward_has_the_same_bits_for_any_number_of_threads(kernels, channels_last):
    features, boxes = roi_align_problem(6, batch=2, channels=150, rois=9)
    grad = np.random.default_rng(7).standard_normal((2, 9, 150, 3, 3)).astype(F)
    if channels_last:
        features, grad = last(features), last(grad)
    arguments = (grad, boxes, features.shape, 0.25, 2, channels_last)
    alone = kernels.roi_align_backward(*arguments, threads=1)
    for threads in (2, 3, 8):
        np.testing.assert_array_equal(kernels.roi_align_backward(*arguments, threads=threads), alone)


def test_no_rois_give_a_gradient_of_zero(kernels):
    back = kernels.roi_align_backward(np.zeros((2, 0, 3, 2, 2), F), np.zeros((2, 0, 4), F), (2, 3, 4, 5), 0.25)
    np.testing.assert_array_equal(back, np.zeros((2, 3, 4, 5), F))


def test_pointers_of_a_torch_tensor_in_channels_last_memory(kernels):
    torch = pytest.importorskip("torch")
    features, boxes = (torch.from_numpy(a) for a in roi_align_problem(10))
    channels_last = features.contiguous(memory_format=torch.channels_last)
    shape = RoiAlignShape(2, 5, 6, 9, 4, 4, 3, 2)
    out = torch.empty(shape.aligned(channels_last=True))
    kernels.roi_align_forward_pointers(
        "float32", channels_last.data_ptr(), boxes.data_ptr(), out.data_ptr(), shape, 0.25, channels_last=True
    )
    expected = kernels.roi_align_forward(features.numpy(), boxes.numpy(), 3, 2, 0.25)
    np.testing.assert_allclose(out.permute(0, 1, 4, 2, 3), expected, atol=1e-6)
    back = torch.full(shape.features(channels_last=True), 7.0)
    kernels.roi_align_backward_pointers(
        "float32", out.data_ptr(), boxes.data_ptr(), back.data_ptr(), shape, 0.25, channels_last=True
    )
    again = kernels.roi_align_backward(expected, boxes.numpy(), features.shape, 0.25)
    np.testing.assert_allclose(back.permute(0, 3, 1, 2), again, atol=1e-5)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rois": np.zeros((1, 2, 3), F)}, "4 or 5 columns"),
        ({"rois": np.zeros((2, 2, 4), F)}, "one batch"),
        ({"rois": np.zeros((2, 4), F)}, "dimensions"),
        ({"rois": np.zeros((1, 2, 4))}, "all inputs must be float32"),
        ({"sampling_ratio": 0}, "positive"),
        ({"height": 0}, "positive"),
    ],
)
def test_bad_arguments_are_refused(kernels, change, message):
    arguments = dict(features=np.zeros((1, 2, 3, 3), F), rois=np.zeros((1, 2, 4), F), height=2, width=2, spatial_scale=1.0)
    with pytest.raises(CustomOpError, match=message):
        kernels.roi_align_forward(**{**arguments, **change})


def test_a_gradient_of_another_shape_is_refused(kernels):
    with pytest.raises(CustomOpError, match="grad is"):
        kernels.roi_align_backward(np.zeros((1, 2, 4, 2, 2), F), np.zeros((1, 2, 4), F), (1, 3, 5, 5), 1.0)
