"""The schema table: shapes, defaults, and refusals that name what is wrong."""

from __future__ import annotations

import numpy as np
import pytest

from custom_ops.schema import NMS, ROI_ALIGN, SCHEMAS, CustomOpError, find_schema
from runtime.errors import GraphError

NMS_ATTRS = {"threshold": 0.5, "numDetections": 3}
ALIGN_ATTRS = {"spatial_scale": 0.0625, "aligned_height": 7, "aligned_width": 5}
FEATURES, ROIS = (2, 8, 10, 12), (2, 6, 4)


def test_nms_shapes():
    assert NMS.infer_shapes(NMS_ATTRS, [(2, 9), (2, 9, 4)], ["float16", "float32"]) == [
        (np.dtype("float16"), (2, 9, 1)),
        (np.dtype("float32"), (2, 3, 4)),
        (np.dtype("int32"), (2, 3)),
    ]


@pytest.mark.parametrize("columns", [4, 5])
def test_roi_align_shape(columns):
    found = ROI_ALIGN.infer_shapes(ALIGN_ATTRS, [FEATURES, (2, 6, columns)], ["float16", "float32"])
    assert found == [(np.dtype("float16"), (2, 6, 8, 7, 5))]


def test_defaults_are_filled_in_from_the_schema_and_the_shapes():
    assert NMS.validate(NMS_ATTRS, [(1, 4), (1, 4, 4)])["score_threshold"] == -3.4e38
    full = ROI_ALIGN.validate(ALIGN_ATTRS, [FEATURES, ROIS])
    assert full == {
        **ALIGN_ATTRS,
        "batch_size": 2,
        "num_rois": 6,
        "height": 10,
        "width": 12,
        "channels": 8,
        "sampling_ratio": 1,
    }
    assert ROI_ALIGN.validate(full, [FEATURES, ROIS]) == full


def test_placement_attributes_are_not_the_ops():
    assert NMS.validate({**NMS_ATTRS, "__ipu_number": 1}, [(1, 4), (1, 4, 4)]).keys() == {
        "threshold",
        "numDetections",
        "score_threshold",
    }


def test_numpy_scalars_become_python_numbers():
    attrs = NMS.validate({"threshold": np.float32(0.5), "numDetections": np.int64(3)}, [(1, 4), (1, 4, 4)])
    assert type(attrs["threshold"]) is float and type(attrs["numDetections"]) is int


def test_the_table_finds_both_spellings_and_nothing_else():
    assert find_schema("ai.graphcore", "roi_align") is find_schema("ai.graphcore", "roiAlign") is ROI_ALIGN
    assert find_schema("", "nms") is None and find_schema("ai.graphcore", "Nms") is None
    assert {schema.op_type for schema in SCHEMAS.values()} == {NMS.op_type, ROI_ALIGN.op_type}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"treshold": 0.5}, "no attribute 'treshold'; the nearest is 'threshold'"),
        ({"threshold": None}, "attribute threshold is missing"),
        ({"threshold": 1.5}, r"threshold = 1.5 is outside \[0, 1\]"),
        ({"threshold": float("nan")}, "threshold = nan is outside"),
        ({"threshold": "0.5"}, "threshold must be float, not str"),
        ({"numDetections": 0}, "numDetections = 0 is outside"),
        ({"numDetections": 3.0}, "numDetections must be int, not float"),
        ({"numDetections": True}, "numDetections must be int, not bool"),
        ({"score_threshold": float("-inf")}, "score_threshold = -inf is outside"),
    ],
)
def test_a_wrong_nms_attribute_is_refused_by_name(changes, message):
    with pytest.raises(CustomOpError, match=message):
        NMS.validate({**NMS_ATTRS, **changes}, [(1, 4), (1, 4, 4)])


@pytest.mark.parametrize(
    "shapes, message",
    [
        ([(2, 9)], "takes 2 inputs"),
        ([(9,), (9, 4)], r"scores must be \[B,N\]"),
        ([(2, 9), (2, 8, 4)], r"need boxes \[2, 9, 4\]"),
        ([(2, None), (2, None, 4)], "no static shape"),
        ([(2, "N"), (2, 9, 4)], "no static shape"),
        ([(0, 9), (0, 9, 4)], "is empty"),
    ],
)
def test_a_wrong_nms_shape_is_refused(shapes, message):
    with pytest.raises(CustomOpError, match=message):
        NMS.infer_shapes(NMS_ATTRS, shapes, ["float32", "float32"])


@pytest.mark.parametrize(
    "changes, shapes, message",
    [
        ({"channels": 9}, [FEATURES, ROIS], "channels = 9, but the input shapes say 8"),
        ({"sampling_ratio": 0}, [FEATURES, ROIS], "sampling_ratio = 0"),
        ({"spatial_scale": 0.0}, [FEATURES, ROIS], "spatial_scale = 0.0"),
        ({}, [FEATURES, (2, 6, 3)], "rois must be"),
        ({}, [FEATURES, (3, 6, 4)], "share a batch"),
        ({}, [(2, 8, 0, 12), ROIS], "share a batch, neither empty"),
    ],
)
def test_a_wrong_roi_align_is_refused(changes, shapes, message):
    with pytest.raises(CustomOpError, match=message):
        ROI_ALIGN.validate({**ALIGN_ATTRS, **changes}, shapes)


def test_an_unsupported_dtype_is_refused():
    with pytest.raises(CustomOpError, match="boxes must be float16 or float32, not float64"):
        NMS.infer_shapes(NMS_ATTRS, [(1, 4), (1, 4, 4)], ["float32", "float64"])
    with pytest.raises(CustomOpError, match="float64"):
        NMS.fallback_text(NMS_ATTRS, [(1, 4), (1, 4, 4)], "float64")


def test_the_error_is_a_value_error_and_has_an_exit_code():
    assert issubclass(CustomOpError, ValueError) and issubclass(CustomOpError, GraphError)
