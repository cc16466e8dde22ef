"""What popdet's two custom ops are: inputs, attributes, shape rule and a standard-ONNX fallback for each.

One table, `SCHEMAS`, is shared by the export, the graph passes, the embedded PopART and (later) the IPU sources.
Names and signatures are those of Graphcore's published detector example, so its graphs load too.

    from custom_ops.schema import find_schema
    schema = find_schema("ai.graphcore", "nms")
    attrs = schema.validate({"threshold": 0.7, "numDetections": 300}, [(2, 6000), (2, 6000, 4)])
    [(dtype, shape), ...] = schema.infer_shapes(attrs, [(2, 6000), (2, 6000, 4)], ["float32", "float32"])

Boxes are x1, y1, x2, y2 in pixels, edges, half-open. Needs numpy only and runs on Python 3.8.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import numpy as np

from custom_ops import fallback_text as _fallback
from runtime.errors import GraphError

DOMAIN = "ai.graphcore"
NO_SCORE_THRESHOLD = -3.4e38  # about the lowest float32; a finite number, because ONNX text has no infinity
_LARGEST = float(np.finfo(np.float32).max)

Shape = Tuple[int, ...]
Attrs = Dict[str, Any]
FLOATS = ("float16", "float32")
# PopART's placement and provenance attributes ride on every node and are none of the op's business.
_PLACEMENT_PREFIX = "__"


class CustomOpError(GraphError, ValueError):
    """An attribute, shape or dtype that a custom op's schema refuses; the message names the op and the remedy."""


@dataclass(frozen=True)
class InputSpec:
    """One input: `dims` is how documentation writes its shape, `ranks` and `dtypes` what is accepted."""

    name: str
    dtypes: Tuple[str, ...]
    ranks: Tuple[int, ...]
    dims: str


@dataclass(frozen=True)
class AttributeSpec:
    """One attribute. `type` is "int" or "float"; bounds are inclusive; a default of None means "from the shapes"."""

    name: str
    type: str
    doc: str
    default: Union[int, float, None] = None
    required: bool = False
    minimum: float = -math.inf
    maximum: float = math.inf

    def parse(self, value: Any, op: str) -> Union[int, float]:
        """`value` as this attribute's Python type, or CustomOpError."""
        accepted = (int, np.integer) if self.type == "int" else (int, float, np.integer, np.floating)
        if isinstance(value, (bool, np.bool_)) or not isinstance(value, accepted):
            kind = type(value).__name__
            raise CustomOpError(f"{op}: attribute {self.name} must be {self.type}, not {kind} ({value!r})")
        if not self.minimum <= value <= self.maximum:  # also refuses NaN
            raise CustomOpError(f"{op}: attribute {self.name} = {value} is outside [{self.minimum}, {self.maximum}]")
        return int(value) if self.type == "int" else float(value)


ShapeRule = Callable[[Attrs, Sequence[Shape], Sequence[np.dtype]], List[Tuple[np.dtype, Shape]]]
CheckRule = Callable[[Attrs, Sequence[Shape], str], Attrs]
FallbackWriter = Callable[[str, Attrs, Sequence[Shape], Sequence[np.dtype]], str]


@dataclass(frozen=True)
class CustomOpSchema:
    """One custom op of domain `ai.graphcore`, version 1. Use the four methods; the last three fields serve them."""

    domain: str
    op_type: str
    version: int
    doc: str
    inputs: Tuple[InputSpec, ...]
    outputs: Tuple[str, ...]
    attributes: Tuple[AttributeSpec, ...]
    check_rule: CheckRule
    shape_rule: ShapeRule
    fallback_writer: FallbackWriter

    @property
    def title(self) -> str:
        """The op as messages write it, for example "ai.graphcore.nms"."""
        return f"{self.domain}.{self.op_type}"

    def validate(self, attrs: Mapping[str, Any], shapes: Sequence[Sequence[int]]) -> Attrs:
        """Check attributes and static input shapes; return the attributes complete, defaults filled in.

        Attributes whose name begins with "__" (PopART placement) are dropped. Raises CustomOpError, a ValueError.
        """
        known = {spec.name: spec for spec in self.attributes}
        given = {name: value for name, value in attrs.items() if not name.startswith(_PLACEMENT_PREFIX)}
        for name in given:
            if name not in known:
                nearest = difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)[0]
                raise CustomOpError(f"{self.title} has no attribute {name!r}; the nearest is {nearest!r}")
        full: Attrs = {}
        for spec in self.attributes:
            value = given.get(spec.name)
            if value is None and spec.required:
                raise CustomOpError(f"{self.title}: attribute {spec.name} is missing ({spec.doc})")
            full[spec.name] = spec.default if value is None else spec.parse(value, self.title)
        return self.check_rule(full, self._static_shapes(shapes), self.title)

    def infer_shapes(
        self,
        attrs: Mapping[str, Any],
        input_shapes: Sequence[Sequence[int]],
        input_dtypes: Sequence[Any],
    ) -> List[Tuple[np.dtype, Shape]]:
        """(dtype, shape) of every output. `input_dtypes` is anything numpy.dtype understands. Raises CustomOpError."""
        full = self.validate(attrs, input_shapes)
        return self.shape_rule(full, self._static_shapes(input_shapes), self._dtypes(input_dtypes))

    def fallback_text(
        self,
        attrs: Mapping[str, Any],
        input_shapes: Sequence[Sequence[int]],
        dtype: Any = "float32",
        name: Optional[str] = None,
    ) -> str:
        """The op in standard ONNX ops of opset 11, as FunctionProto text for `onnx.parser.parse_function`.

        The function is specialised for these attributes and shapes and takes no attributes itself, so two nodes that
        differ in either need functions of different `name` (default: the op type). `dtype` is one dtype for all
        inputs, or one per input. Half inputs are computed in float32 and rounded once. Raises CustomOpError.
        """
        single = isinstance(dtype, (str, np.dtype, type))
        dtypes = self._dtypes([dtype] * len(self.inputs) if single else dtype)
        full = self.validate(attrs, input_shapes)
        return self.fallback_writer(name or self.op_type, full, self._static_shapes(input_shapes), dtypes)

    def _static_shapes(self, shapes: Sequence[Sequence[int]]) -> List[Shape]:
        if len(shapes) != len(self.inputs):
            names = ", ".join(spec.name for spec in self.inputs)
            raise CustomOpError(f"{self.title} takes {len(self.inputs)} inputs ({names}), not {len(shapes)}")
        for spec, shape in zip(self.inputs, shapes):
            if shape is None or not all(isinstance(dim, (int, np.integer)) and dim >= 0 for dim in shape):
                raise CustomOpError(f"{self.title}: {spec.name} has no static shape ({shape}); export with fixed sizes")
            if len(shape) not in spec.ranks:
                raise CustomOpError(f"{self.title}: {spec.name} must be {spec.dims}, not of shape {list(shape)}")
        return [tuple(int(dim) for dim in shape) for shape in shapes]

    def _dtypes(self, dtypes: Sequence[Any]) -> List[np.dtype]:
        if len(dtypes) != len(self.inputs):
            raise CustomOpError(f"{self.title} takes {len(self.inputs)} inputs, not {len(dtypes)}")
        result = [np.dtype(dtype) for dtype in dtypes]
        for spec, dtype in zip(self.inputs, result):
            if dtype.name not in spec.dtypes:
                raise CustomOpError(f"{self.title}: {spec.name} must be {' or '.join(spec.dtypes)}, not {dtype.name}")
        return result


def _check_nms(attrs: Attrs, shapes: Sequence[Shape], op: str) -> Attrs:
    scores, boxes = shapes
    if boxes != (*scores, 4):
        raise CustomOpError(f"{op}: scores {list(scores)} need boxes {[*scores, 4]}, not {list(boxes)}")
    if scores[0] < 1:
        raise CustomOpError(f"{op}: the batch of scores {list(scores)} is empty")
    return attrs


def _nms_shapes(attrs: Attrs, shapes: Sequence[Shape], dtypes: Sequence[np.dtype]) -> List[Tuple[np.dtype, Shape]]:
    (batch, rows), keep = shapes[0], attrs["numDetections"]
    return [(dtypes[0], (batch, rows, 1)), (dtypes[1], (batch, keep, 4)), (np.dtype("int32"), (batch, keep))]


def _check_roi_align(attrs: Attrs, shapes: Sequence[Shape], op: str) -> Attrs:
    features, rois = shapes
    if rois[2] not in (4, 5):
        raise CustomOpError(f"{op}: rois must be [B,D,4] or [B,D,5], not {list(rois)}")
    if features[0] != rois[0] or min(features) < 1:
        raise CustomOpError(f"{op}: features {list(features)}, rois {list(rois)} must share a batch, neither empty")
    batch, channels, height, width = features
    found = {"batch_size": batch, "num_rois": rois[1], "height": height, "width": width, "channels": channels}
    for name, actual in found.items():
        if attrs[name] not in (None, actual):
            raise CustomOpError(f"{op}: attribute {name} = {attrs[name]}, but the input shapes say {actual}")
    return {**attrs, **found}


def _roi_align_shapes(attrs: Attrs, shapes: Sequence[Shape], dtypes: Sequence[np.dtype]) -> List[Tuple[np.dtype, Shape]]:
    batch, channels = shapes[0][:2]
    return [(dtypes[0], (batch, shapes[1][1], channels, attrs["aligned_height"], attrs["aligned_width"]))]


NMS = CustomOpSchema(
    domain=DOMAIN,
    op_type="nms",
    version=1,
    doc="""Greedy non-maximum suppression per image, class-agnostic, of fixed capacity K.

    Rows are visited by falling score, ties by rising index; a row is kept unless its IoU with a kept row exceeds
    `threshold`; the search ends at K kept rows. A row is absent if its score is <= score_threshold or NaN, or if a
    coordinate is NaN. IoU is ONNX NonMaxSuppression's: corners in either order, 0 where an area is zero.
    No gradient.""",
    inputs=(InputSpec("scores", FLOATS, (2,), "[B,N]"), InputSpec("boxes", FLOATS, (3,), "[B,N,4]")),
    outputs=("scores [B,N,1]: the input", "boxes [B,K,4]: kept, zero-padded", "keep int32 [B,K]: rows, -1-padded"),
    attributes=(
        AttributeSpec("threshold", "float", "IoU above which a box is suppressed", required=True, minimum=0, maximum=1),
        AttributeSpec("numDetections", "int", "K, capacity of the result", required=True, minimum=1, maximum=2**31 - 1),
        AttributeSpec(
            "score_threshold",
            "float",
            "rows at or below are absent",
            NO_SCORE_THRESHOLD,
            minimum=-_LARGEST,
            maximum=_LARGEST,
        ),
    ),
    check_rule=_check_nms,
    shape_rule=_nms_shapes,
    fallback_writer=_fallback.nms_function,
)


def _from_shapes(name: str, doc: str) -> AttributeSpec:
    """An attribute that repeats a dimension: optional, but refused if it disagrees with the input shapes."""
    return AttributeSpec(name, "int", doc, minimum=0, maximum=2**31 - 1)


ROI_ALIGN = CustomOpSchema(
    domain=DOMAIN,
    op_type="roiAlign",
    version=1,
    doc="""Average bilinear samples of a feature map in a grid over each RoI (Mask R-CNN; half-pixel, "aligned").

    Equals ONNX RoiAlign-16 (half_pixel, avg) and torchvision's roi_align(aligned=True) for every finite RoI. A sample
    outside [-1, size], or at a coordinate that is not finite, adds 0. RoI d of image b reads image b; a fifth column
    of rois is not read. Gradient to features only.""",
    inputs=(
        InputSpec("features", FLOATS, (4,), "[B,C,H,W]"),
        InputSpec("rois", FLOATS, (3,), "[B,D,4] or [B,D,5]"),
    ),
    outputs=("aligned [B,D,C,aligned_height,aligned_width]",),
    attributes=(
        AttributeSpec("spatial_scale", "float", "feature pixels per input pixel", None, True, minimum=1e-6, maximum=1e6),
        AttributeSpec("aligned_height", "int", "output rows", required=True, minimum=1, maximum=4096),
        AttributeSpec("aligned_width", "int", "output columns", required=True, minimum=1, maximum=4096),
        _from_shapes("batch_size", "B; must agree with the shapes, as the four below"),
        _from_shapes("num_rois", "D, RoIs per image"),
        _from_shapes("height", "H of features"),
        _from_shapes("width", "W of features"),
        _from_shapes("channels", "C of features"),
        AttributeSpec("sampling_ratio", "int", "samples per bin and axis (ours)", 1, False, 1, 64),
    ),
    check_rule=_check_roi_align,
    shape_rule=_roi_align_shapes,
    fallback_writer=_fallback.roi_align_function,
)

# `roi_align` is the name of Graphcore's source folder and Python function; some of their graphs use it as the op type.
SCHEMAS: Dict[Tuple[str, str], CustomOpSchema] = {
    (DOMAIN, "nms"): NMS,
    (DOMAIN, "roiAlign"): ROI_ALIGN,
    (DOMAIN, "roi_align"): ROI_ALIGN,
}


def find_schema(domain: str, op_type: str) -> Optional[CustomOpSchema]:
    """The schema of `domain.op_type`, or None if it is not one of popdet's custom ops."""
    return SCHEMAS.get((domain, op_type))
