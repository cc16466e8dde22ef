"""A detector-like ONNX graph of any number of nodes, written as the exporter writes one, for the scaling measurements.

Residual blocks (Conv with a norm as Mul and Add, Clip, Conv, Add, Relu, constants to fold, Slice, Concat and Reshape) on a
[1, 8, 4, 4] map; behind every second a small head (TopK, RoiAlign with a 1x1 Conv, NonMaxSuppression padded to a capacity)
whose mean is added to the scalar output. Opset 18, static shapes, module paths of the C4 detector in their order, weights
outside the file, constants shared by their readers.
"""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Dict, List, Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper

from graph_passes.presets import BLOCKS

CHANNELS, SIDE, ROIS, KEPT = 8, 4, 4, 5
PIXELS = SIDE * SIDE
BLOCKS_A_HEAD = 2
FROZEN_SHARE = 0.3  # of the blocks, from the input on
WEIGHTS_FILE = "weights.safetensors"
LOSS = "loss"
MODULES = tuple(prefix for block in BLOCKS for prefix in (*block.required, *block.optional[:1]) if "norm" not in prefix)


class _Writer:
    """Collects nodes, weights and constants; a node's module follows from how far the graph has got."""

    def __init__(self, nodes: int) -> None:
        self.wanted = nodes
        self.nodes: List[onnx.NodeProto] = []
        self.weights: Dict[str, np.ndarray] = {}
        self.trainable: List[str] = []
        self.infos: List[onnx.ValueInfoProto] = []
        self._constants: Dict[bytes, onnx.TensorProto] = {}
        self._random = np.random.default_rng(0)
        self.block = 0

    @property
    def share(self) -> float:
        """How much of the graph is written, 0 to 1."""
        return min(len(self.nodes) / self.wanted, 0.999)

    @property
    def module(self) -> str:
        """Dotted module path of the next node."""
        return f"{MODULES[int(self.share * len(MODULES))]}.{self.block}"

    def op(self, op_type: str, *inputs: str, role: str = "", outputs: int = 1, **attributes: Any) -> str:
        """Append a node; the name of its (last) output."""
        name = f"{op_type.lower()}_{len(self.nodes)}"
        names = [name] if outputs == 1 else [f"{name}_{index}" for index in range(outputs)]
        node = helper.make_node(op_type, list(inputs), names, name=f"node_{name}", **attributes)
        node.metadata_props.add(key="popdet.module", value=self.module)
        if role:
            node.metadata_props.add(key="popdet.role", value=role)
        self.nodes.append(node)
        return names[-1]

    def weight(self, *shape: int, trains: bool = True) -> str:
        """A float32 weight outside the file."""
        name = f"{self.module}.w{len(self.weights)}"
        self.weights[name] = (self._random.standard_normal(shape) * 0.1).astype(np.float32)
        if trains and self.share >= FROZEN_SHARE:
            self.trainable.append(name)
        return name

    def constant(self, value: Any, dtype: Any = np.int64) -> str:
        """An initializer inside the file, one for all that read this value."""
        array = np.asarray(value, dtype)
        key = f"{array.dtype}{array.shape}".encode() + array.tobytes()
        if key not in self._constants:
            self._constants[key] = onnx.numpy_helper.from_array(array, f"val_{len(self._constants)}")
        return self._constants[key].name

    def initializers(self) -> List[onnx.TensorProto]:
        """The constants, and the weights as references into WEIGHTS_FILE."""
        made, offset = list(self._constants.values()), 0
        for name, array in self.weights.items():
            tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=array.shape,
                                 data_location=TensorProto.EXTERNAL)
            for key, value in (("location", WEIGHTS_FILE), ("offset", offset), ("length", array.nbytes)):
                tensor.external_data.add(key=key, value=str(value))
            offset += array.nbytes
            made.append(tensor)
        return made


def write_graph(folder: Path, nodes: int, kind: str) -> Path:
    """Write `<folder>/reference.<kind>.onnx` with about `nodes` nodes, and its weights; the path. kind: infer | train."""
    writer = _Writer(nodes)
    hidden = writer.op("Relu", "image")
    total = writer.op("ReduceMean", hidden, keepdims=0)
    while len(writer.nodes) < nodes - 2:
        hidden = _block(writer, hidden)
        writer.block += 1
        if writer.block % BLOCKS_A_HEAD == 0:
            total = writer.op("Add", total, _head(writer, hidden))
    writer.op("Add", total, writer.op("ReduceMean", hidden, keepdims=0))
    writer.nodes[-1].output[0] = LOSS
    inputs = [("image", (1, CHANNELS, SIDE, SIDE)), ("rois", (ROIS, 4)), ("boxes", (1, PIXELS, 4))]
    graph = helper.make_graph(
        writer.nodes, "synthetic", [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs],
        [helper.make_tensor_value_info(LOSS, TensorProto.FLOAT, [])], writer.initializers(), value_info=writer.infos)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    metadata = {"popdet.kind": kind, "popdet.loss": LOSS, "popdet.trainable": json.dumps(writer.trainable)}
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=value)
    model = onnx.shape_inference.infer_shapes(model, data_prop=True)  # exporters write the shapes of all tensors
    (folder / WEIGHTS_FILE).write_bytes(b"".join(array.tobytes() for array in writer.weights.values()))
    path = folder / f"reference.{kind}.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def _block(writer: _Writer, hidden: str) -> str:
    """[1, C, S, S] -> the same shape."""
    line = writer.op("Conv", hidden, writer.weight(CHANNELS, CHANNELS, 3, 3), kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    line = writer.op("Mul", line, writer.weight(1, CHANNELS, 1, 1, trains=False))
    line = writer.op("Add", line, writer.weight(1, CHANNELS, 1, 1, trains=False))
    line = writer.op("Clip", line, writer.constant(0.0, np.float32), writer.constant(6.0, np.float32))
    line = writer.op("Conv", line, writer.weight(CHANNELS, CHANNELS, 1, 1), writer.weight(CHANNELS), kernel_shape=[1, 1])
    line = writer.op("Relu", writer.op("Add", line, hidden))
    value = onnx.numpy_helper.from_array(np.full((1, CHANNELS, 1, 1), 0.5, np.float32))
    known = writer.op("Sqrt", writer.op("Constant", value=value))
    line = writer.op("Identity", writer.op("Add", line, known))
    rows = writer.op("Reshape", line, writer.constant([CHANNELS, PIXELS]))
    halves = [writer.op("Slice", rows, *(writer.constant([edge]) for edge in (start, start + CHANNELS // 2, 0)))
              for start in (0, CHANNELS // 2)]
    return writer.op("Reshape", writer.op("Concat", *halves, axis=0), writer.constant([1, CHANNELS, SIDE, SIDE]))


def _head(writer: _Writer, hidden: str) -> str:
    """[1, C, S, S] -> a scalar that depends on it."""
    rois = writer.op("Identity", "rois", role="stop_gradient")
    images = writer.constant([0] * ROIS)
    pooled = writer.op("RoiAlign", hidden, rois, images, coordinate_transformation_mode="half_pixel", mode="avg",
                       output_height=SIDE, output_width=SIDE, sampling_ratio=1, spatial_scale=1.0)
    stride = 1 + writer.block // BLOCKS_A_HEAD % 2
    score = writer.op("Conv", pooled, writer.weight(CHANNELS // 2, CHANNELS, 1, 1), writer.weight(CHANNELS // 2),
                      kernel_shape=[1, 1], strides=[stride, stride])
    best = writer.op("ReduceMax", hidden, writer.constant([1]), keepdims=0)  # [1, S, S]
    flat = writer.op("Reshape", best, writer.constant([1, PIXELS]))
    found = writer.op("TopK", flat, writer.constant([KEPT]), outputs=2)  # the indices
    taken = writer.op("Gather", "boxes", writer.op("Squeeze", found, writer.constant([0])), axis=1)
    kept = writer.op("Gather", "boxes", _kept(writer, writer.op("Unsqueeze", flat, writer.constant([1]))), axis=1)
    return _sum_of_means(writer, (score, taken, kept))


def _kept(writer: _Writer, scores: str) -> str:
    """scores [1, 1, N] -> int32 [KEPT], as the exporter writes the network's NMS."""
    selected = writer.op("NonMaxSuppression", "boxes", scores, writer.constant([KEPT]),
                         writer.constant([0.7], np.float32), writer.constant([-1e30], np.float32))
    column = writer.op("Gather", selected, writer.constant(2), axis=1)
    padded = writer.op("Concat", column, writer.constant([-1] * KEPT), axis=0)
    first = writer.op("Slice", padded, *(writer.constant([edge]) for edge in (0, KEPT, 0)))
    writer.infos.append(helper.make_tensor_value_info(first, TensorProto.INT64, [KEPT]))
    return writer.op("Cast", first, to=TensorProto.INT32)


def _sum_of_means(writer: _Writer, tensors: Sequence[str]) -> str:
    means = [writer.op("ReduceMean", tensor, keepdims=0) for tensor in tensors]
    return writer.op("Add", writer.op("Add", means[0], means[1]), means[2])
