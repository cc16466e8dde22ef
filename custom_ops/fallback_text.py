"""The custom ops as ONNX FunctionProto text, in standard ops of opset 11 that stock onnxruntime runs.

Everything is specialised for static shapes and attributes, and each arithmetic step is written in the order of
`kernels/*.hpp`, so that results are equal bit for bit in float32. The attributes come complete from
`CustomOpSchema.validate`. RoiAlign of opset 10 is no help: it has no half-pixel mode and stretches small RoIs.
"""

from __future__ import annotations

from typing import Any, Dict, Iterable, List, Sequence, Tuple

import numpy as np

_ONNX_TYPE = {"float32": 1, "float16": 10}
_INT32 = 6
_INT64 = 7

Shape = Tuple[int, ...]


class _Body:
    """Collects the statements of one function; constants are written once, under names of their own."""

    def __init__(self) -> None:
        self.lines: List[str] = []
        self._constants: Dict[str, str] = {}

    def add(self, target: str, op: str, *inputs: str, **attributes: Any) -> str:
        """Append `target = op <attributes> (inputs)` and return `target`."""
        inside = ", ".join(f"{name} = {_literal(value)}" for name, value in attributes.items())
        self.lines.append(f"{target} = {op} {f'<{inside}> ' if inside else ''}({', '.join(inputs)})")
        return target

    def constant(self, value: Any, dtype: str) -> str:
        """Name of a Constant holding `value`; dtype is "float" or "int64"."""
        array = np.asarray(value)
        dims = ",".join(str(dim) for dim in array.shape)
        text = f"{dtype}{f'[{dims}]' if dims else ''} {{{_numbers(array.ravel(), dtype)}}}"
        if text not in self._constants:
            name = f"constant_{len(self._constants)}"
            self._constants[text] = name
            self.lines.append(f"{name} = Constant <value = {text}> ()")
        return self._constants[text]

    def f32(self, value: Any) -> str:
        return self.constant(value, "float")

    def i64(self, value: Any) -> str:
        return self.constant(value, "int64")

    def function(self, name: str, inputs: Sequence[str], outputs: Sequence[str]) -> str:
        body = "\n".join(f"    {line}" for line in self.lines)
        return (
            '<opset_import: ["" : 11], domain: "ai.graphcore">\n'
            f"{name} ({', '.join(inputs)}) => ({', '.join(outputs)})\n{{\n{body}\n}}\n"
        )


def _numbers(values: Iterable[Any], dtype: str) -> str:
    if dtype == "int64":
        return ", ".join(str(int(value)) for value in values)
    return ", ".join(repr(float(np.float32(value))) for value in values)  # the exact float32: no second rounding


def _literal(value: Any) -> str:
    return "[" + ", ".join(str(item) for item in value) + "]" if isinstance(value, (list, tuple)) else str(value)


def nms_function(name: str, attrs: Dict[str, Any], shapes: Sequence[Shape], dtypes: Sequence[np.dtype]) -> str:
    """NMS as one NonMaxSuppression an image, its variable-length answer padded with -1 to the fixed capacity.

    Image by image, because NonMaxSuppression of a batch mixes the images in one list of unknown length.
    """
    (batch, rows), capacity = shapes[0], attrs["numDetections"]
    body = _Body()
    body.add("all_scores", "Cast", "scores", to=1)
    body.add("all_boxes", "Cast", "boxes", to=1)
    # NonMaxSuppression would keep a box with a NaN coordinate: give such rows a score that is absent.
    body.add("nan", "IsNaN", "all_boxes")
    body.add("nan_number", "Cast", "nan", to=1)
    body.add("nan_count", "ReduceSum", "nan_number", axes=[2], keepdims=0)
    body.add("bad", "Greater", "nan_count", body.f32(0.0))
    threshold = body.f32([attrs["score_threshold"]])
    body.add("live_scores", "Where", "bad", threshold, "all_scores")
    body.add("class_scores", "Unsqueeze", "live_scores", axes=[1])
    limit, iou = body.i64([capacity]), body.f32([attrs["threshold"]])
    body.add("padding", "ConstantOfShape", body.i64([capacity, 1]), value="int64[1] {-1}")
    for image in range(batch):
        body.add(f"scores_{image}", "Gather", "class_scores", body.i64([image]), axis=0)
        body.add(f"boxes_{image}", "Gather", "all_boxes", body.i64([image]), axis=0)
        body.add(f"found_{image}", "NonMaxSuppression", f"boxes_{image}", f"scores_{image}", limit, iou, threshold)
        body.add(f"row_{image}", "Gather", f"found_{image}", body.i64([2]), axis=1)
        body.add(f"padded_{image}", "Concat", f"row_{image}", "padding", axis=0)
        body.add(f"kept_{image}", "Slice", f"padded_{image}", body.i64([0]), limit, body.i64([0]))
        body.add(f"keep_{image}", "Reshape", f"kept_{image}", body.i64([1, capacity]))
    body.add("keep_long", "Concat", *[f"keep_{image}" for image in range(batch)], axis=0)
    body.add("keep", "Cast", "keep_long", to=_INT32)

    # Row batch * rows of the table is zero: that is where the padding points.
    body.add("table", "Reshape", "all_boxes", body.i64([-1, 4]))  # -1: Reshape reads 0 as "copy"
    body.add("table_with_zero", "Pad", "table", body.i64([0, 0, 1, 0]))
    body.add("empty", "Less", "keep_long", body.i64(0))
    body.add("kept_row", "Add", "keep_long", body.i64([[image * rows] for image in range(batch)]))
    body.add("table_row", "Where", "empty", body.i64(batch * rows), "kept_row")
    body.add("kept_boxes_float", "Gather", "table_with_zero", "table_row", axis=0)
    body.add("kept_boxes", "Cast", "kept_boxes_float", to=_ONNX_TYPE[dtypes[1].name])
    body.add("scores_column", "Unsqueeze", "scores", axes=[2])
    return body.function(name, ["scores", "boxes"], ["scores_column", "kept_boxes", "keep"])


def roi_align_function(name: str, attrs: Dict[str, Any], shapes: Sequence[Shape], dtypes: Sequence[np.dtype]) -> str:
    """RoI-Align as gathers of feature rows [B*H*W, C], one bilinear corner of one sample at a time.

    Corners are added up, never stacked: peak memory is 5 (sampling_ratio 1) to 8 times the output in onnxruntime.
    """
    (batch, channels, height, width), rois_shape = shapes
    rois, ratio = batch * rois_shape[1], attrs["sampling_ratio"]
    out_height, out_width = attrs["aligned_height"], attrs["aligned_width"]
    body = _Body()
    body.add("features_float", "Cast", "features", to=1)
    body.add("pixels", "Transpose", "features_float", perm=[0, 2, 3, 1])
    body.add("pixel_rows", "Reshape", "pixels", body.i64([batch * height * width, channels]))
    # Samples outside the map point at an extra row of zeros: a weight of 0 would let a NaN feature through.
    body.add("table", "Pad", "pixel_rows", body.i64([0, 0, 1, 0]))
    body.add("rois_float", "Cast", "rois", to=1)
    body.add("roi_rows", "Reshape", "rois_float", body.i64([-1, rois_shape[2]]))  # -1: Reshape reads 0 as "copy"
    _axis_samples(body, "x", (0, 2), width, out_width, attrs)
    _axis_samples(body, "y", (1, 3), height, out_height, attrs)

    base = np.repeat(np.arange(batch) * height * width, rois_shape[1]).reshape(rois, 1, 1)
    total = ""
    for y in range(ratio):
        for x in range(ratio):
            sample = _bilinear_sample(body, f"y{y}", f"x{x}", width, base, batch * height * width)
            total = body.add(f"total_{y}_{x}", "Add", total, sample) if total else sample
    if ratio > 1:
        total = body.add("average", "Div", total, body.f32(ratio * ratio))
    body.add("planes", "Transpose", total, perm=[0, 3, 1, 2])
    body.add("aligned_float", "Reshape", "planes", body.i64([batch, -1, channels, out_height, out_width]))
    body.add("aligned", "Cast", "aligned_float", to=_ONNX_TYPE[dtypes[0].name])
    return body.function(name, ["features", "rois"], ["aligned"])


def _axis_samples(body: _Body, axis: str, columns: Tuple[int, int], size: int, bins: int, attrs: Dict[str, Any]) -> None:
    """Along one axis, for every sample s of a bin: names `{axis}{s}_inside/_low/_high/_low_weight/_high_weight`.

    Each is [rois, bins]; _low and _high are int64 pixel indices, the weights float32.
    """
    scale, ratio = body.f32(attrs["spatial_scale"]), attrs["sampling_ratio"]
    for edge, column in zip(("start", "end"), columns):
        body.add(f"{axis}_{edge}_pixel", "Gather", "roi_rows", body.i64([column]), axis=1)
        body.add(f"{axis}_{edge}_scaled", "Mul", f"{axis}_{edge}_pixel", scale)
        body.add(f"{axis}_{edge}", "Sub", f"{axis}_{edge}_scaled", body.f32(0.5))
    body.add(f"{axis}_extent", "Sub", f"{axis}_end", f"{axis}_start")
    body.add(f"{axis}_bin", "Div", f"{axis}_extent", body.f32(bins))
    body.add(f"{axis}_steps", "Mul", body.f32([list(range(bins))]), f"{axis}_bin")
    body.add(f"{axis}_corner", "Add", f"{axis}_start", f"{axis}_steps")
    # -1 <= p <= size in strict comparisons, the only ones opset 11 has; false for NaN.
    below = body.f32(np.nextafter(np.float32(-1), np.float32(-2)))
    above = body.f32(np.nextafter(np.float32(size), np.float32(size + 1)))
    last, zero, one = body.f32(size - 1), body.f32(0.0), body.f32(1.0)
    for sample in range(ratio):
        at = f"{axis}{sample}"
        body.add(f"{at}_shift", "Mul", f"{axis}_bin", body.f32(sample + 0.5))
        body.add(f"{at}_offset", "Div", f"{at}_shift", body.f32(ratio))
        body.add(f"{at}_raw", "Add", f"{axis}_corner", f"{at}_offset")
        body.add(f"{at}_not_low", "Greater", f"{at}_raw", below)
        body.add(f"{at}_not_high", "Less", f"{at}_raw", above)
        body.add(f"{at}_inside", "And", f"{at}_not_low", f"{at}_not_high")
        body.add(f"{at}_safe", "Where", f"{at}_inside", f"{at}_raw", zero)
        body.add(f"{at}_not_negative", "Max", f"{at}_safe", zero)
        body.add(f"{at}_position", "Min", f"{at}_not_negative", last)
        body.add(f"{at}_floor", "Floor", f"{at}_position")
        body.add(f"{at}_next", "Add", f"{at}_floor", one)
        body.add(f"{at}_ceiling", "Min", f"{at}_next", last)
        body.add(f"{at}_high_weight", "Sub", f"{at}_position", f"{at}_floor")
        body.add(f"{at}_low_weight", "Sub", one, f"{at}_high_weight")
        body.add(f"{at}_low", "Cast", f"{at}_floor", to=_INT64)
        body.add(f"{at}_high", "Cast", f"{at}_ceiling", to=_INT64)


def _bilinear_sample(body: _Body, y: str, x: str, width: int, base: np.ndarray, zero_row: int) -> str:
    """One sample of every bin: [rois, bins_y, bins_x, C], the weighted sum of its four corners."""
    tag = f"{y}{x}"
    body.add(f"{tag}_inside_y", "Unsqueeze", f"{y}_inside", axes=[2])
    body.add(f"{tag}_inside_x", "Unsqueeze", f"{x}_inside", axes=[1])
    body.add(f"{tag}_inside", "And", f"{tag}_inside_y", f"{tag}_inside_x")
    total = ""
    for vertical in ("low", "high"):
        for horizontal in ("low", "high"):
            at = f"{tag}_{vertical}_{horizontal}"
            body.add(f"{at}_line", "Mul", f"{y}_{vertical}", body.i64(width))
            body.add(f"{at}_line3", "Unsqueeze", f"{at}_line", axes=[2])
            body.add(f"{at}_column3", "Unsqueeze", f"{x}_{horizontal}", axes=[1])
            body.add(f"{at}_pixel", "Add", f"{at}_line3", f"{at}_column3")
            body.add(f"{at}_row", "Add", f"{at}_pixel", body.i64(base))
            body.add(f"{at}_index", "Where", f"{tag}_inside", f"{at}_row", body.i64(zero_row))
            body.add(f"{at}_wy", "Unsqueeze", f"{y}_{vertical}_weight", axes=[2, 3])
            body.add(f"{at}_wx", "Unsqueeze", f"{x}_{horizontal}_weight", axes=[1, 3])
            body.add(f"{at}_weight", "Mul", f"{at}_wy", f"{at}_wx")
            body.add(f"{at}_value", "Gather", "table", f"{at}_index", axis=0)
            term = body.add(f"{at}_term", "Mul", f"{at}_value", f"{at}_weight")
            total = body.add(f"{at}_sum", "Add", total, term) if total else term
    return total
