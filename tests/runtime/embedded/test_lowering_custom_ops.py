"""nms and roiAlign as torch ops: the C++ library and the torch fallback against dumb references and onnxruntime."""
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "runtime" / "embedded"))
from popart._engine import custom
from popart._engine.ir import Op
from popart._engine.shapes import run_op
from popart.errors import popart_exception

ROOT = Path(__file__).resolve().parents[3]
NMS = {"library": torch.ops.popdet_embedded.nms, "torch": custom.nms_in_torch}
ROI_ALIGN = {"library": torch.ops.popdet_embedded.roi_align, "torch": custom.roi_align_in_torch}


def dumb_nms(scores, boxes, threshold, capacity, score_threshold):
    """Greedy, one pair at a time, in Python floats."""
    keep = np.full((len(scores), capacity), -1, np.int32)
    for image, (row_scores, row_boxes) in enumerate(zip(scores.tolist(), boxes.tolist())):
        kept = []
        for row in sorted(range(len(row_scores)), key=lambda i: (-row_scores[i], i)):
            if row_scores[row] > score_threshold and len(kept) < capacity:
                if all(iou(row_boxes[row], row_boxes[other]) <= threshold for other in kept):
                    kept.append(row)
        keep[image, : len(kept)] = kept
    return keep


def iou(a, b):
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    areas = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return shared / (areas - shared) if shared else 0.0


@pytest.mark.parametrize("how", NMS)
@settings(deadline=None, max_examples=40)
@given(st.integers(0, 12), st.integers(1, 6), st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.3, 0.5, 1.0]))
def test_nms_is_greedy_with_ties_to_the_lower_index(how, rows, capacity, seed, threshold):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 4, (2, rows)).astype(np.float32)
    corner = rng.integers(0, 6, (2, rows, 2))
    boxes = np.concatenate([corner, corner + rng.integers(0, 5, (2, rows, 2))], 2).astype(np.float32)
    keep = NMS[how](torch.from_numpy(scores), torch.from_numpy(boxes), threshold, capacity, 0.0)
    np.testing.assert_array_equal(keep.numpy(), dumb_nms(scores, boxes, threshold, capacity, 0.0))


@pytest.mark.parametrize("how", NMS)
def test_nms_leaves_out_rows_that_are_not_numbers(how):
    boxes = torch.tensor([[[0.0, 0, 1, 1], [5, 5, 6, 6], [9, 9, float("nan"), 10], [20, 20, 21, 21]]])
    scores = torch.tensor([[float("nan"), 0.5, 0.9, 0.1]])
    assert NMS[how](scores, boxes, 0.5, 4, 0.1).tolist() == [[1, -1, -1, -1]]


def roi_align_in_onnxruntime(features, rois, height, width, scale, ratio):
    batch, count = rois.shape[:2]
    node = helper.make_node("RoiAlign", ["x", "r", "b"], ["y"], output_height=height, output_width=width,
                            sampling_ratio=ratio, spatial_scale=scale)  # fmt: skip
    tensor, types = helper.make_tensor_value_info, onnx.TensorProto
    values = [tensor("x", types.FLOAT, features.shape), tensor("r", types.FLOAT, (batch * count, 4)),
              tensor("b", types.INT64, (batch * count,))]  # fmt: skip
    graph = helper.make_graph([node], "g", values, [tensor("y", types.FLOAT, None)])
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 16)])
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {"x": features, "r": rois.reshape(-1, 4), "b": np.repeat(np.arange(batch), count)}
    return session.run(None, feeds)[0].reshape(batch, count, -1, height, width)


def _features_and_rois(seed=0):
    rng = np.random.default_rng(seed)
    corner = rng.uniform(-30, 100, (2, 6, 2))
    rois = np.concatenate([corner, corner + rng.uniform(-10, 80, (2, 6, 2))], 2).astype(np.float32)
    return rng.standard_normal((2, 5, 7, 9)).astype(np.float32), rois


@pytest.mark.parametrize("how", ROI_ALIGN)
@pytest.mark.parametrize("ratio", [1, 2, 3])
def test_roi_align_equals_onnxruntime(how, ratio):
    features, rois = _features_and_rois()
    expected = roi_align_in_onnxruntime(features, rois, 4, 3, 0.0625, ratio)
    actual = ROI_ALIGN[how](torch.from_numpy(features), torch.from_numpy(rois), 4, 3, 0.0625, ratio)
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-4, atol=1e-5)


def test_the_backward_ops_are_the_transpose_of_the_forward():
    features, rois = (torch.from_numpy(a) for a in _features_and_rois(1))
    grad = torch.randn(2, 6, 5, 4, 3)
    for backward in (torch.ops.popdet_embedded.roi_align_backward, custom.roi_align_backward_in_torch):
        pulled = backward(grad, rois, 7, 9, 0.0625, 2)
        pushed = custom.roi_align_in_torch(features, rois, 4, 3, 0.0625, 2)
        assert pulled.shape == features.shape  # <A x, g> = <x, A' g>
        torch.testing.assert_close((pushed * grad).sum(), (features * pulled).sum(), rtol=1e-4, atol=1e-4)


def test_torch_finds_the_ops_well_formed():
    features, rois = (torch.from_numpy(a) for a in _features_and_rois(2))
    torch.library.opcheck(custom.roi_align.overload, (features.requires_grad_(), rois, 2, 2, 0.0625, 1))
    torch.library.opcheck(custom.nms.overload, (torch.rand(2, 6), rois, 0.5, 3, 0.0))


def test_ops_without_a_gradient_take_tensors_that_want_one_and_refuse_it_by_name():
    """As plain torch code calls them; what they do inside is not differentiated."""
    features, rois = (torch.from_numpy(a).requires_grad_() for a in _features_and_rois(2))
    keep = torch.ops.popdet_embedded.nms(torch.rand(2, 6, requires_grad=True), rois, 0.5, 3, 0.0)
    assert keep.dtype == torch.int32 and not keep.requires_grad
    pulled = torch.ops.popdet_embedded.roi_align_backward(torch.randn(2, 6, 5, 4, 3, requires_grad=True), rois, 7, 9, 0.0625, 2)
    with pytest.raises(RuntimeError, match="popdet_embedded::roi_align_backward has no gradient"):
        pulled.sum().backward()
    aligned = torch.ops.popdet_embedded.roi_align(features, rois, 4, 3, 0.0625, 2)
    aligned.sum().backward()
    assert features.grad is not None and rois.grad is None


def _lower(op_type, inputs, outputs, **attrs):
    names = tuple(f"x{i}" for i in range(len(inputs)))
    return run_op(Op("ai.graphcore", op_type, 1, "n", names, tuple(f"y{i}" for i in range(outputs)), attrs), inputs)


def test_the_nms_op_returns_scores_kept_boxes_and_rows():
    scores, boxes = torch.tensor([[0.2, 0.9, 0.8]]), torch.tensor([[[0.0, 0, 2, 2], [0, 0, 2, 2], [5, 5, 6, 6]]])
    same, kept, keep = _lower("nms", [scores, boxes], 3, threshold=0.5, numDetections=3)
    assert torch.equal(same, scores.unsqueeze(2))
    assert keep.tolist() == [[1, 2, -1]]
    assert kept.tolist() == [[[0, 0, 2, 2], [5, 5, 6, 6], [0, 0, 0, 0]]]


def test_the_nms_op_without_rows_keeps_nothing():
    _, kept, keep = _lower("nms", [torch.zeros(2, 0), torch.zeros(2, 0, 4)], 3, threshold=0.5, numDetections=2)
    assert keep.tolist() == [[-1, -1]] * 2 and not kept.any()


@pytest.mark.parametrize("columns", [4, 5])
@pytest.mark.parametrize("op_type", ["roiAlign", "roi_align"])
def test_the_roi_align_op_reads_four_columns_and_differentiates_features_only(op_type, columns):
    features, rois = (torch.from_numpy(a) for a in _features_and_rois(3))
    wide = torch.cat([rois, torch.full((2, 6, 1), float("nan"))], 2)[..., :columns].requires_grad_()
    (out,) = _lower(op_type, [features.requires_grad_(), wide], 1, spatial_scale=0.0625, aligned_height=4,
                    aligned_width=3, batch_size=2, num_rois=6, channels=5, height=7, width=9)  # fmt: skip
    torch.testing.assert_close(out, custom.roi_align_in_torch(features, rois, 4, 3, 0.0625, 1))
    out.sum().backward()
    assert features.grad is not None and wide.grad is None


def test_half_features_stay_half_and_boxes_are_measured_in_float():
    features, rois = (torch.from_numpy(a) for a in _features_and_rois(4))
    sizes = {"spatial_scale": 0.0625, "aligned_height": 4, "aligned_width": 3}
    (half,) = _lower("roiAlign", [features.half(), rois], 1, **sizes)
    (exact,) = _lower("roiAlign", [features.half().float(), rois], 1, **sizes)
    torch.testing.assert_close(half, exact.half(), rtol=0, atol=0)


@pytest.mark.parametrize(("name", "value"), [("batch_size", 3), ("num_rois", 5), ("channels", 1), ("height", 9)])
def test_an_attribute_that_contradicts_the_input_is_refused(name, value):
    features, rois = (torch.from_numpy(a) for a in _features_and_rois(5))
    with pytest.raises(popart_exception, match=name):
        _lower("roiAlign", [features, rois], 1, spatial_scale=1.0, aligned_height=2, aligned_width=2, **{name: value})


PROGRAM = """
import sys, warnings
sys.path = [p for p in sys.path if p not in ("", {root!r})] + [{embedded!r}]
{before}
warnings.simplefilter("always")
with warnings.catch_warnings(record=True) as caught:
    import torch
    from popart._engine import custom
    for _ in range(2):
        keep = torch.ops.popdet_embedded.nms(torch.tensor([[1.0, 2.0]]), torch.zeros(1, 2, 4), 0.5, 3, 0.0)
warned = sum("kernels" in str(w.message) for w in caught)
print(keep.tolist(), custom.host_kernels() is not None, warned, {root!r} in sys.path)
"""


@pytest.mark.parametrize(("before", "found", "warned"), [
    ("", True, 0),
    ("import types; sys.modules['custom_ops'] = types.ModuleType('custom_ops')", False, 1),
])  # fmt: skip
def test_with_only_the_embedded_folder_on_the_path_the_library_is_found_or_missed_with_one_warning(
    before, found, warned, tmp_path
):
    program = PROGRAM.format(root=str(ROOT), embedded=str(ROOT / "runtime" / "embedded"), before=before)
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.stdout.split("\n")[0] == f"[[1, 0, -1]] {found} {warned} False", result.stderr
