"""Small placed and unplaced graphs for the placement tests: nodes with module paths, external weights without bytes."""
from __future__ import annotations

import json
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
import onnx
from onnx import TensorProto, helper

from graph_passes.graph import Graph
from graph_passes.graph_io import load_graph
from graph_passes.pass_manager import PassContext
from popdet.config import CompileConfig


class Builder:
    """Collects nodes in execution order; every tensor is declared with dtype and shape."""

    def __init__(self) -> None:
        self.nodes: List[onnx.NodeProto] = []
        self.weights: List[onnx.TensorProto] = []
        self.infos: Dict[str, onnx.ValueInfoProto] = {}
        self.inputs: List[onnx.ValueInfoProto] = []
        self.outputs: List[str] = []

    def input(self, name: str, shape: Sequence[Any], dtype: int = TensorProto.FLOAT) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def weight(self, name: str, shape: Sequence[int], dtype: int = TensorProto.FLOAT) -> str:
        """An external initializer."""
        tensor = TensorProto(name=name, data_type=dtype, dims=shape, data_location=TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value="weights.safetensors")
        self.weights.append(tensor)
        return name

    def inline(self, name: str, value: Any, dtype: Any) -> str:
        """An inline initializer."""
        self.weights.append(onnx.numpy_helper.from_array(np.array(value, dtype=dtype), name))
        return name

    def constant(self, name: str, value: Any, dtype: Any, module: str = "") -> str:
        """A Constant node."""
        array = np.array(value, dtype=dtype)
        return self.node("Constant", [], name, array.shape, module, value=onnx.numpy_helper.from_array(array),
                         dtype=helper.np_dtype_to_tensor_dtype(array.dtype))

    def node(self, op: str, inputs: Sequence[str], output: str, shape: Optional[Sequence[Any]], module: str = "",
             domain: str = "", dtype: int = TensorProto.FLOAT, **attrs: Any) -> str:
        proto = helper.make_node(op, inputs, [output], name=f"node_{output}", domain=domain, **attrs)
        if module:
            proto.metadata_props.add(key="popdet.module", value=module)
        self.nodes.append(proto)
        self.infos[output] = helper.make_tensor_value_info(output, dtype, shape)
        return output

    def output(self, name: str) -> None:
        self.outputs.append(name)

    def graph(self, kind: str = "infer", trainable: Sequence[str] = (), opset: int = 11) -> Graph:
        """The graph with the model metadata that the exporter writes."""
        proto = helper.make_graph(self.nodes, "test", self.inputs, [self.infos[name] for name in self.outputs],
                                  self.weights, value_info=[i for n, i in self.infos.items() if n not in self.outputs])
        model = helper.make_model(proto, opset_imports=[helper.make_opsetid("", opset),
                                                        helper.make_opsetid("ai.graphcore", 1)])
        helper.set_model_props(model, {"popdet.kind": kind, "popdet.trainable": json.dumps(list(trainable)),
                                       "popdet.loss": "loss"})
        return load_graph(model)


def chain(length: int, channels: int = 4, kind: str = "infer") -> Graph:
    """Convolutions block.0, block.1, ... on [1, channels, 8, 8]; training ends in a mean called loss."""
    b, names = Builder(), []
    x = b.input("image", [1, channels, 8, 8])
    for i in range(length):
        names.append(b.weight(f"block.{i}.weight", [channels, channels, 3, 3]))
        x = b.node("Conv", [x, names[-1]], f"x{i}", [1, channels, 8, 8], f"block.{i}", pads=[1, 1, 1, 1])
    if kind == "train":
        x = b.node("ReduceMean", [x], "loss", [], "total_loss", keepdims=0)
    b.output(x)
    return b.graph(kind, names if kind == "train" else ())


def bottleneck(b: Builder, x: str, path: str, channels: int, trained: list) -> str:
    """conv1, relu, conv2, relu, conv3, sum with the shortcut, relu, named like the residual blocks of res5."""
    shape, y = [2, channels, 4, 4], x
    for i in (1, 2, 3):
        trained.append(b.weight(f"{path}.conv{i}.weight", [channels, channels, 1, 1]))
        y = b.node("Conv", [y, trained[-1]], f"{path}.c{i}", shape, f"{path}.conv{i}")
        y = b.node("Relu", [y], f"{path}.r{i}", shape, path) if i < 3 else y
    trained.append(b.weight(f"{path}.downsample.conv.weight", [channels, channels, 1, 1]))
    shortcut = b.node("Conv", [x, trained[-1]], f"{path}.d", shape, f"{path}.downsample.conv")
    y = b.node("Add", [y, shortcut], f"{path}.sum", shape, path)
    return b.node("Relu", [y], f"{path}.out", shape, path)


def detector(kind: str = "train", blocks: int = 3, head_first: bool = False) -> Graph:
    """A detector's skeleton with the module names of the real one: enough for the published presets.

    With `head_first` the RPN also reads an output of the box head: an edge back in the published placement.
    """
    b, trained, c = Builder(), [], 4
    x = b.input("image", [2, c, 8, 8])

    def conv(y: str, module: str, side: int = 8) -> str:
        trained.append(b.weight(f"{module}.weight", [c, c, 1, 1]))
        return b.node("Conv", [y, trained[-1]], f"{module}.out", [2, c, side, side], module)

    for module in ("backbone.stem.conv", "backbone.layer1.0.conv1", "backbone.layer2.0.conv1", "backbone.layer3.0.conv1"):
        x = conv(x, module)
    rpn = conv(x, "rpn.conv")
    logits = conv(rpn, "rpn.objectness")
    if kind == "train":
        b.node("ReduceMean", [logits], "rpn_loss.out", [], "rpn_loss", keepdims=0)
    scores = b.node("Relu", [logits], "proposals", [2, c, 8, 8], "proposal_layer")
    rois = b.node("Relu", [scores], "targets", [2, c, 8, 8], "proposal_target") if kind == "train" else scores
    scale = b.constant("scale", 0.5, np.float32, "roi_align")
    x = b.node("Mul", [x, scale], "scaled", [2, c, 8, 8], "roi_align")
    y = b.node("Mul", [x, rois], "pooled.full", [2, c, 8, 8], "roi_align")
    y = b.node("MaxPool", [y], "pooled", [2, c, 4, 4], "roi_align", kernel_shape=[2, 2], strides=[2, 2])
    for i in range(blocks):
        y = bottleneck(b, y, f"roi_head.layer4.{i}", c, trained)
    y = b.node("ReduceMean", [y], "pool", [2, c, 1, 1], "roi_head", axes=[2, 3], keepdims=1)
    y = conv(y, "box_predictor.class_logits", 1)
    if head_first:
        late = b.node("Relu", [y], "late", [2, c, 1, 1], "proposal_layer")
        y = b.node("Add", [y, late], "y.late", [2, c, 1, 1], "box_predictor.box_deltas")
    if kind == "train":
        roi_loss = b.node("ReduceMean", [y], "roi_loss.out", [], "roi_loss", keepdims=0)
        b.node("Add", ["rpn_loss.out", roi_loss], "loss", [], "total_loss")
        b.output("loss")
    else:
        b.output(b.node("Sigmoid", [y], "scores", [2, c, 1, 1], "detections"))
    return b.graph(kind, trained if kind == "train" else ())


def context(kind: str = "infer", graph: Optional[Graph] = None, **compile_options: Any) -> PassContext:
    """A PassContext; what trains is read from the graph."""
    options: Dict[str, Any] = {"ipus": 4, "stages": "auto", **compile_options}
    names = json.loads(graph.metadata["popdet.trainable"]) if graph is not None else ()
    return PassContext(kind=kind, compile=CompileConfig(**options), trainable=frozenset(names))


def places(graph: Graph) -> Dict[str, Tuple[int, int]]:
    """Output tensor name -> (ipu, stage) of the node that makes it; stage -1 where none is written."""
    return {node.outputs[0].name: (node.attrs["__ipu_number"], node.attrs.get("__pipeline_stage", -1))
            for node in graph.nodes}
