"""A two-layer network as an artifact, small enough to run in milliseconds: y = relu(x A) B, loss = mean((y - t)^2)."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from popdet.config import Config, config_from_dict
from runtime.artifact import Artifact, write_manifest
from runtime.weights_file import read_layout, save_tensors

BATCH, WIDTH, HIDDEN, OUT = 2, 6, 5, 3


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    shapes = {"a.weight": (WIDTH, HIDDEN), "b.weight": (HIDDEN, OUT), "unused.buffer": (4,)}
    return {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def config(**compile_values: Any) -> Config:
    values = {"ipus": 2, "executor": "eager", **compile_values}
    return config_from_dict({"name": "tiny", "compile": values})


def external(name: str, shape: tuple, slots: dict) -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape, data_location=TensorProto.EXTERNAL)
    slot = slots[name]
    for key, value in (("location", "weights.safetensors"), ("offset", slot.begin), ("length", slot.end - slot.begin)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def model(kind: str, slots: dict) -> onnx.ModelProto:
    def node(op: str, inputs: list, output: str, stage: int, **attributes: Any) -> onnx.NodeProto:
        made = helper.make_node(op, inputs, [output], name=output, **attributes)
        for key in ("__ipu_number", "__pipeline_stage"):
            made.attribute.append(helper.make_attribute(key, stage))
        return made

    nodes = [node("MatMul", ["image", "a.weight"], "hidden", 0), node("Relu", ["hidden"], "active", 0),
             node("MatMul", ["active", "b.weight"], "y", 1)]
    inputs = [helper.make_tensor_value_info("image", TensorProto.FLOAT, [BATCH, WIDTH])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [BATCH, OUT])]
    if kind == "train":
        nodes += [node("Sub", ["y", "target"], "error", 1), node("Mul", ["error", "error"], "square", 1),
                  node("ReduceMean", ["square"], "loss", 1, keepdims=0)]
        inputs.append(helper.make_tensor_value_info("target", TensorProto.FLOAT, [BATCH, OUT]))
        outputs.insert(0, helper.make_tensor_value_info("loss", TensorProto.FLOAT, []))
    initializers = [external("a.weight", (WIDTH, HIDDEN), slots), external("b.weight", (HIDDEN, OUT), slots)]
    graph = helper.make_graph(nodes, kind, inputs, outputs, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=7)


def make_directory(directory: Path) -> Path:
    """Everything of an artifact but its manifest."""
    directory.mkdir(parents=True)
    save_tensors(directory / "weights.safetensors", weights())
    slots = read_layout(directory / "weights.safetensors").slots
    for kind in ("infer", "train"):
        (directory / f"{kind}.onnx").write_bytes(model(kind, slots).SerializeToString())
    stages = [{"stage": 0, "ipu": 0}, {"stage": 1, "ipu": 1}]
    (directory / "plan.json").write_text(json.dumps({kind: {"stages": stages} for kind in ("infer", "train")}))
    return directory


def make_artifact(directory: Path, **compile_values: Any) -> Artifact:
    return write_manifest(make_directory(directory), config(**compile_values), build_key="key")


def forward(values: dict[str, np.ndarray], image: np.ndarray) -> np.ndarray:
    return np.maximum(image @ values["a.weight"], 0) @ values["b.weight"]


def batch(accumulation: int, seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    shapes = {"image": (accumulation, BATCH, WIDTH), "target": (accumulation, BATCH, OUT)}
    return {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
