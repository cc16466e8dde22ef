"""The exported files: the same numbers in stock onnxruntime, the same bytes every time, and what the passes rely on."""
from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.numpy import load_file
from tiny_network import TINY, random_inputs, tensors
from torch import nn

from export import exporter
from export.exporter import export_reference
from export.network.detector import INFER_OUTPUTS, TRAIN_OUTPUTS, build_detector, input_signature
from export.onnx_graph import module_to_onnx
from runtime.errors import BadInputFile, ConfigError, EnvironmentProblem, GraphError

KINDS = ("infer", "train")
OUTPUTS = {"infer": INFER_OUTPUTS, "train": TRAIN_OUTPUTS}
UNAVAILABLE = {"GatherND", "GatherElements", "ScatterND", "ScatterElements", "NonZero", "Range", "Mod", "Loop", "If"}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    return folder, export_reference(TINY, KINDS, folder)


def load(folder: Path, kind: str) -> onnx.ModelProto:
    return onnx.load(folder / f"reference.{kind}.onnx", load_external_data=False)


def properties(holder) -> dict:
    return {entry.key: entry.value for entry in holder.metadata_props}


def run(folder: Path, kind: str, inputs: dict) -> dict:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(folder / f"reference.{kind}.onnx"), options,
                                           providers=["CPUExecutionProvider"])
    return dict(zip(OUTPUTS[kind], session.run(list(OUTPUTS[kind]), inputs)))


def assert_equals_torch(folder: Path, kind: str, config, inputs: dict, detector=None) -> None:
    detector = detector or build_detector(config, kind == "train")
    with torch.no_grad():
        want = dict(zip(OUTPUTS[kind], detector(*tensors(inputs))))
    for name, value in run(folder, kind, inputs).items():
        assert value.dtype == want[name].numpy().dtype, name
        np.testing.assert_allclose(value, want[name].numpy(), rtol=1e-4, atol=2e-4, err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_onnxruntime_gives_the_numbers_of_torch(exported, kind):
    assert_equals_torch(exported[0], kind, TINY, random_inputs(TINY, kind == "train"))


@pytest.mark.parametrize("objects", [[0, 0], [0, 4], [4, 1]])
def test_training_agrees_for_no_some_and_all_objects(exported, objects):
    inputs = random_inputs(TINY, True, seed=sum(objects))
    inputs["gt_count"][:] = objects
    assert_equals_torch(exported[0], "train", TINY, inputs)


@pytest.mark.parametrize("kind", KINDS)
def test_blank_images_agree_although_logits_tie(exported, kind):
    inputs = random_inputs(TINY, kind == "train")
    inputs["image"][:] = 0
    assert_equals_torch(exported[0], kind, TINY, inputs)


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_and_outputs_are_those_of_the_signature(exported, kind):
    graph = load(exported[0], kind).graph
    wanted = {name: (str(dtype), shape) for name, (dtype, shape) in input_signature(TINY, kind == "train").items()}
    names = {onnx.TensorProto.FLOAT: "torch.float32", onnx.TensorProto.INT32: "torch.int32"}
    assert {value.name: (names[value.type.tensor_type.elem_type],
                         tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim))
            for value in graph.input} == wanted
    assert tuple(value.name for value in graph.output) == OUTPUTS[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_only_standard_operators_that_the_passes_can_lower(exported, kind):
    model = load(exported[0], kind)
    onnx.checker.check_model(str(exported[0] / f"reference.{kind}.onnx"))
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]
    assert not {node.op_type for node in model.graph.node} & UNAVAILABLE
    assert not model.functions


@pytest.mark.parametrize("kind", KINDS)
def test_all_shapes_are_written_and_static_except_around_nms(exported, kind):
    graph = load(exported[0], kind).graph
    shapes = {value.name: [dim.dim_value if dim.HasField("dim_value") else None for dim in value.type.tensor_type.shape.dim]
              for value in [*graph.value_info, *graph.output]}
    dynamic = set()
    for node in graph.node:
        for output in node.output:
            if node.op_type == "NonMaxSuppression" or (dynamic & set(node.input) and node.op_type in ("Gather", "Concat")):
                dynamic.add(output)
            else:
                assert output in shapes, (node.name, output)
                assert None not in shapes[output], (node.name, output)
    assert dynamic


@pytest.mark.parametrize("kind", KINDS)
def test_every_node_carries_the_path_of_an_existing_module(exported, kind):
    modules = dict(build_detector(TINY, kind == "train").named_modules())
    paths = [properties(node)["popdet.module"] for node in load(exported[0], kind).graph.node]
    assert set(paths) <= set(modules)
    assert {"backbone.stem.0.conv", "rpn.objectness", "proposal_layer", "roi_align", "roi_head.layer4.0.conv",
            "box_predictor.box_deltas"} <= set(paths)
    extra = {"infer": {"detections"}, "train": {"rpn_target", "rpn_loss", "proposal_target", "roi_loss", "total_loss"}}
    assert extra[kind] <= set(paths)


def test_stop_gradients_are_identities_with_their_role(exported):
    for kind in KINDS:
        nodes = load(exported[0], kind).graph.node
        stops = [node for node in nodes if properties(node).get("popdet.role") == "stop_gradient"]
        assert {node.op_type for node in stops} == {"Identity"}
        assert {properties(node)["popdet.module"] for node in stops} >= {"proposal_layer"}
        assert not [node for node in nodes if node.op_type == "Identity" and node not in stops]


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_keeps_its_name_and_lies_in_the_weights_file(exported, kind):
    folder, _ = exported
    state = build_detector(TINY, kind == "train").state_dict()
    content = (folder / "weights.safetensors").read_bytes()
    external = {tensor.name: tensor for tensor in load(folder, kind).graph.initializer if tensor.external_data}
    assert set(external) == set(state)  # biases too, which are zero here
    for name, tensor in external.items():
        place = {entry.key: entry.value for entry in tensor.external_data}
        assert place["location"] == "weights.safetensors"
        raw = content[int(place["offset"]) : int(place["offset"]) + int(place["length"])]
        np.testing.assert_array_equal(np.frombuffer(raw, np.float32).reshape(tensor.dims), state[name].numpy(), name)
    stored = load_file(folder / "weights.safetensors")
    assert set(stored) == set(state)


def test_another_weights_file_of_the_same_layout_is_another_model(exported, tmp_path):
    folder, _ = exported
    other = build_detector(dataclasses.replace(TINY, seed=5), False)
    export_reference(TINY, ("infer",), tmp_path, {name: tensor.numpy() for name, tensor in other.state_dict().items()})
    assert (tmp_path / "reference.infer.onnx").read_bytes() == (folder / "reference.infer.onnx").read_bytes()
    assert (tmp_path / "weights.safetensors").read_bytes() != (folder / "weights.safetensors").read_bytes()
    assert_equals_torch(tmp_path, "infer", TINY, random_inputs(TINY, False), other)


def test_a_state_that_does_not_fit_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(BadInputFile, match=r"rpn\.nothing"):
        export_reference(TINY, ("infer",), tmp_path / "a", {"rpn.nothing": np.zeros(1, np.float32)})
    with pytest.raises(BadInputFile, match=r"rpn\.conv\.bias.*\[3\].*\[8\]"):
        export_reference(TINY, ("infer",), tmp_path / "a", {"rpn.conv.bias": np.zeros(3, np.float32)})
    assert not (tmp_path / "a").exists()


def test_another_process_and_folder_give_the_same_bytes(exported, tmp_path):
    program = ("import sys; sys.path[:0] = sys.argv[2:]; from pathlib import Path; from tiny_network import TINY; "
               "from export.exporter import export_reference; export_reference(TINY, ('train', 'infer'), Path(sys.argv[1]))")
    root, here = Path(__file__).parents[2], Path(__file__).parent
    subprocess.run([sys.executable, "-W", "ignore", "-c", program, str(tmp_path), str(root), str(here)], check=True,
                   cwd=tmp_path, env={**os.environ, "PYTHONHASHSEED": "4711"})
    for name in ("reference.infer.onnx", "reference.train.onnx", "weights.safetensors"):
        assert (tmp_path / name).read_bytes() == (exported[0] / name).read_bytes(), name
    for name in ("reference.infer.onnx", "reference.train.onnx"):
        assert str(root).encode() not in (tmp_path / name).read_bytes()


def test_report_and_model_properties_say_what_was_exported(exported):
    folder, report = exported
    assert [graph.kind for graph in report.graphs] == list(KINDS)
    assert report.parameters == sum(array.size for array in load_file(folder / "weights.safetensors").values())
    json.dumps(report.to_dict())
    infer, train = (properties(load(folder, kind)) for kind in KINDS)
    assert (infer["popdet.kind"], train["popdet.kind"]) == KINDS
    assert train["popdet.loss"] == "loss"
    assert json.loads(train["popdet.network"])["image_width"] == 96
    assert tuple(json.loads(train["popdet.trainable"])) == report.graphs[1].trainable
    assert set(report.graphs[1].trainable) == set(load_file(folder / "weights.safetensors"))  # frozen_stages is 0


def test_a_frozen_norm_is_a_multiplication_and_an_addition_of_named_initializers(tmp_path):
    config = dataclasses.replace(TINY, backbone="resnet18", frozen_stages=2, infer_batch=1, train_batch=1)
    report = export_reference(config, ("train",), tmp_path)
    assert_equals_torch(tmp_path, "train", config, random_inputs(config, True))
    nodes = {node.output[0]: node for node in load(tmp_path, "train").graph.node}
    shift = next(node for node in nodes.values() if "backbone.layer2.0.norm1.shift" in node.input)
    scale = nodes[shift.input[0]]
    assert (shift.op_type, scale.op_type, nodes[scale.input[0]].op_type) == ("Add", "Mul", "Conv")
    assert "backbone.layer2.0.norm1.scale" in scale.input
    trainable = report.graphs[0].trainable
    assert "backbone.layer2.0.conv1.weight" in trainable
    assert not [name for name in trainable if name.startswith(("backbone.stem", "backbone.layer1")) or "norm" in name]


class KeepsPositive(nn.Module):
    def forward(self, x):
        return x[x > 0]


class Branches(nn.Module):
    def forward(self, x):
        return x * 2 if x.sum() > 0 else x


class Outer(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.filter = inner

    def forward(self, x):
        return self.filter(x * 2) + 1


@pytest.mark.parametrize("inner", [KeepsPositive(), Branches()])
def test_a_module_with_a_dynamic_shape_or_branch_is_named(inner):
    with pytest.raises(GraphError, match=r"module 'filter'.*capacity"):
        module_to_onnx(Outer(inner), {"x": (torch.float32, (4,))}, ["y"])


def test_an_op_without_a_standard_translation_is_named():
    class Holder(nn.Module):
        def forward(self, x):
            return torch.ops.popdet.roi_align_backward(x, x[..., 0, 0, :1].expand(1, 1, 4), 4, 4, 1.0, 1)

    with pytest.raises(GraphError, match="roi_align_backward"):
        module_to_onnx(Outer(Holder()), {"x": (torch.float32, (1, 1, 1, 2, 2))}, ["y"])


def test_an_unknown_kind_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="test"):
        export_reference(TINY, ("infer", "test"), tmp_path)


def test_a_failure_while_writing_leaves_the_old_files(tmp_path, monkeypatch):
    (tmp_path / "weights.safetensors").write_bytes(b"old")

    def no_space(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporter.os, "fsync", no_space)
    with pytest.raises(EnvironmentProblem, match="No space"):
        exporter.write_together(tmp_path, {"weights.safetensors": b"new", "reference.infer.onnx": b"graph"})
    assert [path.name for path in tmp_path.iterdir()] == ["weights.safetensors"]
    assert (tmp_path / "weights.safetensors").read_bytes() == b"old"
