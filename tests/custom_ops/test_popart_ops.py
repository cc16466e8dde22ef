"""The PopART ops in C++, against schema.py and the host library: shapes, refusals, hashes, gradients, whole programs."""
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from popart_simulator import PopartError, Simulator, compile_simulator

from custom_ops.schema import NMS, ROI_ALIGN, CustomOpError

F, HALF = np.float32, np.float16
NMS_ATTRS = {"threshold": 0.5, "numDetections": 20}
ALIGN_ATTRS = {"spatial_scale": 0.25, "aligned_height": 3, "aligned_width": 2, "sampling_ratio": 2}
NAMES = {F: "float", HALF: "half"}
bounded = settings(max_examples=100, deadline=None, derandomize=True)


@pytest.fixture(scope="module")
def simulator(tmp_path_factory):
    return Simulator(compile_simulator(tmp_path_factory.mktemp("simulator")))


def nms_inputs(seed, batch, rows, score_type=F, box_type=F):
    random = np.random.default_rng(seed)
    corner = random.uniform(0, 100, (batch, rows, 2))
    boxes = np.concatenate([corner, corner + random.uniform(5, 60, (batch, rows, 2))], 2)
    return random.integers(-3, 40, (batch, rows)).astype(score_type) / 8, boxes.astype(box_type)


def align_inputs(seed, batch=2, channels=5, rois=4, columns=4, feature_type=F, roi_type=F):
    random = np.random.default_rng(seed)
    boxes = random.uniform(-20, 60, (batch, rois, columns)).astype(roi_type)
    return random.standard_normal((batch, channels, 6, 7)).astype(feature_type), boxes


# The op, as PopART's IR sees it --------------------------------------------------------------------------------------


def agrees(simulator, schema, op_type, attrs, arrays):
    """The op accepts what the schema accepts, and says the same shapes, at setup and to the Builder."""
    shapes, dtypes = [a.shape for a in arrays], [a.dtype for a in arrays]
    try:
        expected = schema.infer_shapes(attrs, shapes, dtypes)
    except CustomOpError:
        with pytest.raises(PopartError, match=f"ai.graphcore.{schema.op_type}: "):
            simulator.op(op_type, attrs, arrays)
        return False
    op = simulator.op(op_type, attrs, arrays)
    for at, info in enumerate(expected):
        assert op.output_info(at) == op.output_info(at, inferred=True) == info
    return True


@bounded
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "threshold": st.sampled_from([0.0, 0.5, 1.0, 1.5, -0.25, float("nan")]),
            "numDetections": st.sampled_from([-1, 0, 1, 7]),
            "score_threshold": st.sampled_from([-1.0, 0.0, float("nan"), float("inf"), -float("inf")]),
        },
    ),
    st.sampled_from([((2, 3), (2, 3, 4)), ((1, 0), (1, 0, 4)), ((0, 3), (0, 3, 4)), ((2, 3), (2, 4, 4)), ((2, 3), (2, 3, 5))]),
    st.sampled_from([F, HALF]),
)
def test_nms_agrees_with_the_schema(simulator, attrs, shapes, dtype):
    agrees(simulator, NMS, "nms", attrs, [np.zeros(shapes[0], dtype), np.zeros(shapes[1], F)])


@bounded
@given(
    st.fixed_dictionaries(
        {"spatial_scale": st.sampled_from([0.25, 1.0, 0.0, 2e6]), "aligned_height": st.sampled_from([3, 0, 4097, 4096])},
        optional={
            "aligned_width": st.sampled_from([1, 3]),
            "sampling_ratio": st.sampled_from([0, 1, 64, 65]),
            "batch_size": st.sampled_from([2, 3]),
            "num_rois": st.sampled_from([6, 7]),
            "height": st.sampled_from([4, 5]),
            "width": st.sampled_from([5, 4]),
            "channels": st.sampled_from([3, 1]),
        },
    ),
    st.sampled_from([(2, 6, 4), (2, 6, 5), (2, 6, 3), (1, 6, 4), (2, 6)]),
    st.sampled_from(["roiAlign", "roi_align"]),
)
def test_roi_align_agrees_with_the_schema(simulator, attrs, rois, op_type):
    agrees(simulator, ROI_ALIGN, op_type, attrs, [np.zeros((2, 3, 4, 5), HALF), np.zeros(rois, F)])


def test_the_agreement_covers_ops_that_are_accepted(simulator):
    assert agrees(simulator, NMS, "nms", NMS_ATTRS, nms_inputs(0, 2, 5))
    assert agrees(simulator, NMS, "nms", NMS_ATTRS, nms_inputs(0, 1, 0))
    full = ROI_ALIGN.validate(ALIGN_ATTRS, [(2, 5, 6, 7), (2, 0, 4)])
    for op_type in ("roiAlign", "roi_align"):
        assert agrees(simulator, ROI_ALIGN, op_type, full, align_inputs(0, rois=0))


def test_the_registered_attributes_are_the_schemas(simulator):
    assert simulator.op("nms", NMS_ATTRS, nms_inputs(0, 1, 2)).definition() == sorted(a.name for a in NMS.attributes)
    found = simulator.op("roiAlign", ALIGN_ATTRS, align_inputs(0)).definition()
    assert found == sorted(spec.name for spec in ROI_ALIGN.attributes)


def test_the_defaults_are_the_schemas(simulator):
    required = {"spatial_scale": 0.25, "aligned_height": 3, "aligned_width": 2}
    for schema, op_type, attrs, inputs in (
        (NMS, "nms", NMS_ATTRS, nms_inputs(0, 1, 2)),
        (ROI_ALIGN, "roiAlign", required, align_inputs(0)),
    ):
        full = schema.validate(attrs, [a.shape for a in inputs])
        assert len(full) > len(attrs)
        assert simulator.op(op_type, attrs, inputs).serialised() == simulator.op(op_type, full, inputs).serialised()


@pytest.mark.parametrize("outline", [False, True])
def test_every_attribute_is_part_of_the_hash(simulator, outline):
    def texts(op_type, inputs, attrs, changes):
        all_attrs = [attrs, *({**attrs, **change} for change in changes)]
        ops = [simulator.op(op_type, each, inputs) for each in all_attrs]
        return [op.serialised(outline) for op in ops], ops

    changes = [{"threshold": 0.25}, {"numDetections": 21}, {"score_threshold": 0.5}]
    found, _ = texts("nms", nms_inputs(0, 1, 2), NMS_ATTRS, changes)
    assert len(set(found)) == 4 and all(text.startswith("base=1;") for text in found)
    changes = [{"spatial_scale": 0.5}, {"aligned_height": 4}, {"aligned_width": 4}, {"sampling_ratio": 3}]
    features, rois = align_inputs(0)
    found, ops = texts("roiAlign", [features, rois], ALIGN_ATTRS, changes)
    assert len(set(found)) == 5 and all(text.startswith("base=1;") for text in found)
    gradients = {op.gradient(np.zeros(op.output_info(0)[1], F)).serialised(outline) for op in ops}
    larger = simulator.op("roiAlign", ALIGN_ATTRS, [np.zeros((2, 5, 6, 8), F), rois])
    gradients.add(larger.gradient(np.zeros(larger.output_info(0)[1], F)).serialised(outline))
    assert len(gradients) == 6  # the size of the map included, which no input of the gradient op shows


# The program ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score_type, box_type", [(F, F), (HALF, HALF), (F, HALF), (HALF, F)])
@pytest.mark.parametrize("tiles", [1, 7, 40])
def test_the_program_of_nms_gives_what_the_host_library_gives(simulator, kernels, score_type, box_type, tiles):
    scores, boxes = nms_inputs(tiles, 2, 150, score_type, box_type)
    attrs = {"threshold": 0.5, "numDetections": 155, "score_threshold": 0.25}  # all rows are looked at
    op = simulator.op("nms", attrs, [scores, boxes])
    column, kept, keep = op.run(3, tiles)
    expected = kernels.nms(scores.astype(F), boxes.astype(F), 0.5, 155, 0.25)
    np.testing.assert_array_equal(keep, expected)
    np.testing.assert_array_equal(column[..., 0], scores)
    rows = np.take_along_axis(boxes, np.maximum(expected, 0)[..., None].astype(np.int64), 1)
    np.testing.assert_array_equal(kept, np.where(expected[..., None] >= 0, rows, 0))
    assert op.codelet_files() == 1


@pytest.mark.parametrize("rows", [129, 131, 150, 199])
@pytest.mark.parametrize("tiles", [9, 13, 40])
def test_the_last_tile_may_hold_fewer_rows(simulator, kernels, rows, tiles):
    scores, boxes = nms_inputs(rows, 1, rows)
    *_, keep = simulator.op("nms", {"threshold": 0.25, "numDetections": 200}, [scores, boxes]).run(3, tiles)
    np.testing.assert_array_equal(keep, kernels.nms(scores, boxes, 0.25, 200))


@pytest.mark.parametrize("rows", [0, 1, 19, 20, 21])
def test_the_program_of_nms_at_its_capacity(simulator, kernels, rows):
    scores, boxes = nms_inputs(rows, 1, rows)
    _, kept, keep = simulator.op("nms", {"threshold": 1.0, "numDetections": 20}, [scores, boxes]).run(3)
    np.testing.assert_array_equal(keep, kernels.nms(scores, boxes, 1.0, 20))
    assert (kept[keep < 0] == 0).all()


def budget(tile_bytes):
    """What tile_plan.hpp lets an op use."""
    return int(0.6 * tile_bytes) - 16384


def smallest_tile(op, tiles):
    """Bytes of the smallest tile, to within 50, on which the op still has a plan; the op's last run is on it."""
    low, high = 20_000, 200_000
    while high - low > 50:
        middle = (low + high) // 2
        try:
            op.run(1, tiles, middle)
            high = middle
        except PopartError as error:
            assert "bytes on a tile" in str(error)
            low = middle
    op.run(1, tiles, high)
    return high


def test_the_program_of_nms_in_chunks_keeps_to_its_budget(simulator, kernels):
    scores, boxes = nms_inputs(3, 1, 300)
    op = simulator.op("nms", {"threshold": 0.5, "numDetections": 50}, [scores, boxes])
    tile_bytes = smallest_tile(op, 30)
    *_, keep = op.run(3, 30, tile_bytes)
    assert op.count_vertices("NmsRank") >= 3 * op.count_vertices("NmsFlags")  # three chunks or more
    assert 0.5 * budget(tile_bytes) < op.busiest_tile() <= budget(tile_bytes)  # the plan adds what is not used at once
    np.testing.assert_array_equal(keep, kernels.nms(scores, boxes, 0.5, 50))


def test_the_program_of_roi_align_keeps_to_its_budget(simulator, kernels):
    features, rois = align_inputs(2, channels=24, rois=40)
    op = simulator.op("roiAlign", ALIGN_ATTRS, [features, rois])
    tile_bytes = smallest_tile(op, 12)
    assert 0.8 * budget(tile_bytes) < op.busiest_tile() <= budget(tile_bytes)
    backward = op.gradient(np.ones(op.output_info(0)[1], F))
    tile_bytes = smallest_tile(backward, 12)
    assert 0.8 * budget(tile_bytes) < backward.busiest_tile() <= budget(tile_bytes)
    (found,) = backward.run(1, 12, tile_bytes)
    expected = kernels.roi_align_backward(np.ones((2, 40, 24, 3, 2), F), rois, features.shape, 0.25, 2)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("feature_type, roi_type", [(F, F), (HALF, HALF), (F, HALF), (HALF, F)])
@pytest.mark.parametrize("tiles", [1, 9, 50])
def test_the_program_of_roi_align_gives_what_the_host_library_gives(simulator, kernels, feature_type, roi_type, tiles):
    features, rois = align_inputs(tiles, channels=13, feature_type=feature_type, roi_type=roi_type, columns=5)
    op = simulator.op("roiAlign", ALIGN_ATTRS, [features, rois])
    (found,) = op.run(1, tiles)
    wide = features.astype(F), rois.astype(F)
    np.testing.assert_array_equal(found, kernels.roi_align_forward(*wide, 3, 2, 0.25, 2).astype(feature_type))
    grad = np.random.default_rng(1).standard_normal(found.shape).astype(feature_type)
    backward = op.gradient(grad)
    assert backward.output_info(0) == (features.dtype, features.shape) and backward.gradient_of(0) == 0
    (gradient,) = backward.run(1, tiles)
    expected = kernels.roi_align_backward(grad.astype(F), wide[1], features.shape, 0.25, 2)
    tolerance = 2**-10 if feature_type == HALF else 1e-6
    np.testing.assert_allclose(gradient, expected, rtol=tolerance, atol=tolerance * abs(expected).max())
    groups = op.count_vertices(f"RoiAlignForward<{NAMES[feature_type]},{NAMES[roi_type]}>")
    assert groups >= min(tiles, 2)  # one cell for each image at least, and more where there are tiles for them


def test_no_rois(simulator):
    features, rois = align_inputs(1, rois=0)
    op = simulator.op("roiAlign", ALIGN_ATTRS, [features, rois])
    (found,) = op.run(1)
    assert found.shape == (2, 0, 5, 3, 2)
    (gradient,) = op.gradient(found).run(1)
    np.testing.assert_array_equal(gradient, np.zeros_like(features))


def test_a_map_too_large_for_a_tile_is_refused(simulator):
    op = simulator.op("roiAlign", ALIGN_ATTRS, align_inputs(1))
    with pytest.raises(PopartError, match=r"6 x 7 pixels and 4 RoIs need .* bytes on a tile"):
        op.run(1, 1, 28_000)


def test_nms_has_no_gradient_and_roi_align_one(simulator):
    assert simulator.op("nms", NMS_ATTRS, nms_inputs(0, 1, 2)).count_gradients() == 0
    assert simulator.op("roiAlign", ALIGN_ATTRS, align_inputs(0)).count_gradients() == 1
