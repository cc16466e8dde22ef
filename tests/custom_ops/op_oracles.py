"""Dumb and obviously right: the two custom ops as plain Python loops, and onnxruntime's own ops as a second opinion."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import onnx
import onnxruntime
from onnx import helper, inliner, parser

from custom_ops.schema import CustomOpSchema

F = np.float32


def nms_by_loops(scores, boxes, iou_threshold, max_keep, score_threshold):
    """scores [N], boxes [N,4] float32 -> list of kept rows."""
    live = [i for i in range(len(scores)) if scores[i] > F(score_threshold) and not np.isnan(boxes[i]).any()]
    kept = []
    for i in sorted(live, key=lambda i: (-scores[i], i)):
        if len(kept) < max_keep and all(not iou_above(boxes[i], boxes[j], F(iou_threshold)) for j in kept):
            kept.append(i)
    return kept


@np.errstate(all="ignore")
def iou_above(a, b, threshold):
    """onnxruntime's test, comparisons in its order."""
    a = [min(a[0], a[2]), min(a[1], a[3]), max(a[0], a[2]), max(a[1], a[3])]
    b = [min(b[0], b[2]), min(b[1], b[3]), max(b[0], b[2]), max(b[1], b[3])]
    left, top, right, bottom = max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])
    if right <= left or bottom <= top:
        return False
    inter = F((right - left) * (bottom - top))
    area_a, area_b = F((a[2] - a[0]) * (a[3] - a[1])), F((b[2] - b[0]) * (b[3] - b[1]))
    union = area_a + area_b - inter
    if inter <= 0 or area_a <= 0 or area_b <= 0 or union <= 0:
        return False
    return bool(inter / union > threshold)


def roi_align_by_loops(features, rois, height, width, scale, ratio):
    """features [B,C,H,W], rois [B,D,4 or 5] -> [B,D,C,height,width], in float64."""
    out = np.zeros((*rois.shape[:2], features.shape[1], height, width))
    for b, d, i, j in np.ndindex(*rois.shape[:2], height, width):
        x1, y1, x2, y2 = (float(v) * scale - 0.5 for v in rois[b, d, :4])
        for s, t in np.ndindex(ratio, ratio):
            y = y1 + (y2 - y1) / height * (i + (s + 0.5) / ratio)
            x = x1 + (x2 - x1) / width * (j + (t + 0.5) / ratio)
            out[b, d, :, i, j] += bilinear(features[b], y, x) / ratio**2
    return out


def bilinear(image, y, x):
    """image [C,H,W] at one position; 0 if that is further than a pixel outside, or not a number."""
    _, height, width = image.shape
    if not (-1 <= y <= height and -1 <= x <= width):
        return 0.0
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    top, left = math.floor(y), math.floor(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    above = image[:, top, left] * (1 - (x - left)) + image[:, top, right] * (x - left)
    below = image[:, bottom, left] * (1 - (x - left)) + image[:, bottom, right] * (x - left)
    return above * (1 - (y - top)) + below * (y - top)


def onnx_nms(scores, boxes, iou_threshold, max_keep, score_threshold):
    """NonMaxSuppression-11 of one image: scores [N], boxes [N,4] -> kept rows."""
    feed = {
        "boxes": boxes[None],
        "scores": scores[None, None],
        "k": np.array([max_keep], np.int64),
        "iou": np.array([iou_threshold], F),
        "low": np.array([score_threshold], F),
    }
    return _session(
        '<ir_version: 8, opset_import: ["" : 11]> g (float[1,N,4] boxes, float[1,1,N] scores, int64[1] k,'
        "float[1] iou, float[1] low) => (int64[M,3] y) { y = NonMaxSuppression (boxes, scores, k, iou, low) }"
    ).run(None, feed)[0][:, 2]


def onnx_roi_align(features, rois, height, width, scale, ratio):
    """RoiAlign-16, half_pixel, avg: the same shapes as roi_align_by_loops."""
    batch, count = rois.shape[:2]
    text = (
        '<ir_version: 8, opset_import: ["" : 16]> g (float[B,C,H,W] x, float[R,4] rois, int64[R] images)'
        '=> (float[R,C,h,w] y) { y = RoiAlign <coordinate_transformation_mode = "half_pixel", mode = "avg",'
        f"output_height = {height}, output_width = {width}, sampling_ratio = {ratio},"
        f"spatial_scale = {float(scale)!r}> (x, rois, images) }}"
    )
    feed = {
        "x": features,
        "rois": np.ascontiguousarray(rois[..., :4]).reshape(-1, 4),
        "images": np.repeat(np.arange(batch), count),
    }
    return _session(text).run(None, feed)[0].reshape(batch, count, features.shape[1], height, width)


def run_fallback(schema: CustomOpSchema, attrs, arrays):
    """The op's standard-ONNX fallback, inlined, checked and run in onnxruntime: a list of arrays."""
    shapes, dtypes = [a.shape for a in arrays], [a.dtype for a in arrays]
    function = parser.parse_function(schema.fallback_text(attrs, shapes, dtypes))
    outputs = schema.infer_shapes(attrs, shapes, dtypes)
    inputs = [_value(spec.name, a.dtype, a.shape) for spec, a in zip(schema.inputs, arrays)]
    results = [_value(f"result_{i}", dtype, shape) for i, (dtype, shape) in enumerate(outputs)]
    node = helper.make_node(
        schema.op_type, [v.name for v in inputs], [v.name for v in results], domain=schema.domain
    )  # no attributes: the function is specialised
    model = helper.make_model(
        helper.make_graph([node], "fallback", inputs, results),
        opset_imports=[helper.make_opsetid("", 11), helper.make_opsetid(schema.domain, 1)],
        functions=[function],
        ir_version=8,
    )
    model = inliner.inline_local_functions(model)
    assert {node.domain for node in model.graph.node} == {""}
    onnx.checker.check_model(model, full_check=True)  # standard ops of opset 11, shapes as infer_shapes says
    session = onnxruntime.InferenceSession(model.SerializeToString(), _options())
    return session.run(None, {spec.name: array for spec, array in zip(schema.inputs, arrays)})


def _value(name, dtype, shape):
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)


def _options():
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return options


@lru_cache(maxsize=None)
def _session(text):
    return onnxruntime.InferenceSession(parser.parse_model(text).SerializeToString(), _options())


def roi_align_problem(seed, batch=2, channels=5, height=6, width=9, rois=4, columns=4, dtype=np.float32):
    """Features, and RoIs at stride 4: inside, partly or wholly outside, inverted, of zero area."""
    random = np.random.default_rng(seed)
    boxes = random.uniform(-20, 60, (batch, rois, columns)).astype(dtype)
    if rois > 1:
        boxes[:, 0, 2:4] = boxes[:, 0, :2]
        boxes[:, 1, :4] = [0, 0, width * 4, height * 4]
    return random.standard_normal((batch, channels, height, width)).astype(dtype), boxes
