"""Ahead-of-time compiled programs against the eager executor; what is stored, and what is refused."""
from __future__ import annotations

import json
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "runtime" / "embedded"))
from popart._engine import aot, hashes, shapes
from popart._engine.ir import import_model
from popart._engine.program import EagerProgram
from popart.errors import popart_exception

MODEL = """<ir_version: 6, opset_import: ["": 11, "ai.graphcore": 1]>
g (float[2,3,16,16] image, float[2,4,4] rois, float[1] unused) => (float loss, float[2,4,4] same)
<int64[2] rows = {2, -1}, int64[1] k = {3}, int64 first = {0}>
{
  c = Conv<pads = [1, 1, 1, 1]>(image, w, b)
  r = Clip(c)
  a = ai.graphcore.roiAlign<spatial_scale = 1.0, aligned_height = 3, aligned_width = 3, sampling_ratio = 2>(r, rois)
  f = Reshape(a, rows)
  m = ReduceMean<axes = [2], keepdims = 0>(rois)
  s, kept, keep = ai.graphcore.nms<threshold = 0.5, numDetections = 3>(m, rois)
  values, indices = TopK<axis = 1>(f, k)
  one = Gather<axis = 0>(values, first)
  q = ReduceSum<keepdims = 0>(one)
  mean = ReduceMean<keepdims = 0>(f)
  loss = Add(mean, q)
  same = Identity(rois)
}"""
FORWARD = ["r", "same"]  # a small part of the graph: the step covers the rest
STEP = ["loss", "same", "keep", "indices"]
GRADS = ["w", "b", "r"]


@pytest.fixture(scope="module")
def graph():
    model = onnx.parser.parse_model(MODEL)
    rng = np.random.default_rng(0)
    for name, shape in (("w", (8, 3, 3, 3)), ("b", (8,))):
        array = rng.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return shapes.annotate(import_model(model))


@pytest.fixture(scope="module")
def tensors(graph):
    generator = torch.Generator().manual_seed(0)
    rois = torch.rand((2, 4, 4), generator=generator) * 5
    rois[..., 2:] += 5
    inputs = {"image": torch.randn((2, 3, 16, 16), generator=generator), "rois": rois, "unused": torch.zeros(1)}
    return {name: torch.from_numpy(array.copy()) for name, array in graph.initializers.items()}, inputs


@pytest.fixture(scope="module")
def forward(graph):
    program = aot.AotProgram(graph)
    program.compile(FORWARD)
    return program


@pytest.fixture(scope="module")
def stored(forward, tmp_path_factory):
    path = tmp_path_factory.mktemp("aot") / "forward.pt2"
    forward.save(path)
    return path


@pytest.mark.slow
def test_the_forward_pass_equals_the_eager_one(graph, tensors, forward):
    compiled = forward.forward(*tensors, FORWARD)
    eager = EagerProgram(graph).forward(*tensors, FORWARD)
    for name in FORWARD:
        assert compiled[name].dtype == eager[name].dtype
        torch.testing.assert_close(compiled[name], eager[name], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_program_takes_the_threads_of_the_process_that_runs_it(graph, tmp_path):
    """Compiled by one thread or by two: the same native code, with loops that are parallel."""
    before, sources = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            program = aot.AotProgram(graph)
            program.compile(FORWARD)
            program.save(tmp_path / f"{threads}.pt2")
            with zipfile.ZipFile(tmp_path / f"{threads}.pt2") as package:
                (name,) = [name for name in package.namelist() if name.endswith(".kernel.cpp")]
                lines = map(str.strip, package.read(name).decode().splitlines())
            sources.append([line for line in lines if line and not line.startswith("//")])  # comments name folders
    finally:
        torch.set_num_threads(before)
    assert sources[0] == sources[1]
    assert "#pragma omp parallel" in "".join(sources[0]) and "num_threads(" not in "".join(sources[0])


@pytest.mark.slow
def test_weights_are_inputs_and_not_baked_in(graph, tensors, forward):
    weights, inputs = tensors
    other = {name: tensor * 2 for name, tensor in weights.items()}
    compiled = forward.forward(other, inputs, ["r"])["r"]
    torch.testing.assert_close(compiled, EagerProgram(graph).forward(other, inputs, ["r"])["r"])
    assert not torch.equal(compiled, forward.forward(weights, inputs, ["r"])["r"])


@pytest.mark.slow
def test_a_result_does_not_share_memory_with_an_input(tensors, forward):
    same = forward.forward(*tensors, ["same"])["same"]
    assert same.data_ptr() != tensors[1]["rois"].data_ptr()


@pytest.mark.slow
def test_a_wrong_shape_is_refused_before_native_code_sees_it(tensors, forward):
    weights, inputs = tensors
    with pytest.raises(popart_exception, match="image"):
        forward.forward(weights, {**inputs, "image": torch.zeros(1, 3, 16, 16)}, ["r"])


@pytest.mark.slow
def test_the_training_step_equals_the_eager_one(graph, tensors, tmp_path):
    seed = torch.tensor(3.0)
    program = aot.AotProgram(graph, "loss")
    outputs, grads = program.step(*tensors, STEP, GRADS, seed)  # compiled on demand
    wanted, expected = EagerProgram(graph, "loss").step(*tensors, STEP, GRADS, seed)
    torch.testing.assert_close(outputs, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grads, expected, rtol=1e-5, atol=1e-5)
    program.save(tmp_path / "step.pt2")
    again = aot.AotProgram.load(tmp_path / "step.pt2", graph, "loss", STEP, GRADS)
    torch.testing.assert_close(again.step(*tensors, ["loss"], ["w"], seed)[1]["w"], grads["w"], rtol=0, atol=0)


@pytest.mark.slow
def test_a_stored_program_runs_after_loading(graph, tensors, forward, stored):
    loaded = aot.AotProgram.load(stored, graph, wanted=FORWARD)
    torch.testing.assert_close(loaded.forward(*tensors, FORWARD), forward.forward(*tensors, FORWARD), rtol=0, atol=0)
    assert aot.read_key(stored)["torch"] == torch.__version__


@pytest.mark.slow
@pytest.mark.parametrize(
    ("field", "value"),
    [("torch", "2.0.0"), ("cpu", "x86_64 avx9"), ("graph", "0" * 64), ("runtime", ""), ("format", 0)],
)
def test_a_program_made_elsewhere_is_refused_and_says_what_differs(graph, stored, tmp_path, field, value):
    path = _with_key(stored, tmp_path, {**aot.read_key(stored), field: value})
    with pytest.raises(aot.StaleProgram) as refused:
        aot.AotProgram.load(path, graph, wanted=FORWARD)
    assert list(refused.value.differences) == [field]
    assert field in str(refused.value)


@pytest.mark.slow
def test_a_program_for_other_results_is_refused(graph, stored):
    with pytest.raises(aot.StaleProgram, match="wanted"):
        aot.AotProgram.load(stored, graph, wanted=["r"])
    with pytest.raises(aot.StaleProgram, match="kind"):
        aot.AotProgram.load(stored, graph, "loss", FORWARD, ["w"])


@pytest.mark.slow
def test_a_damaged_program_is_refused(graph, stored, tmp_path):
    whole = stored.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    for name, content in (("short", whole[: len(whole) // 2]), ("flipped", bytes(flipped)), ("empty", b"")):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(aot.BadProgram, match=name):
            aot.AotProgram.load(path, graph, wanted=FORWARD)


def test_a_missing_file_is_named(graph, tmp_path):
    with pytest.raises(aot.BadProgram, match="nothing here"):
        aot.AotProgram.load(tmp_path / "nothing here", graph, wanted=FORWARD)


def test_a_zip_file_without_a_key_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as package:
        package.writestr("a/b", "c")
    with pytest.raises(aot.BadProgram, match="no compiled program"):
        aot.read_key(tmp_path / "other.zip")


def test_saving_without_a_compiled_function_is_refused(graph, tmp_path):
    with pytest.raises(popart_exception, match="0 functions"):
        aot.AotProgram(graph).save(tmp_path / "x.pt2")
    assert not list(tmp_path.iterdir())


def test_the_hash_sees_constants_and_attributes_but_not_weights(graph):
    model = onnx.parser.parse_model(MODEL.replace("int64[1] k = {3}", "int64[1] k = {2}"))
    for name, shape in (("w", (8, 3, 3, 3)), ("b", (8,))):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(shape, np.float32), name))
    changed = shapes.annotate(import_model(model))
    assert hashes.graph_sha256(changed) != hashes.graph_sha256(graph)
    changed.initializers["w"] = changed.initializers["w"] * 2
    assert hashes.graph_sha256(changed) == hashes.graph_sha256(changed)
    attribute = onnx.parser.parse_model(MODEL.replace("threshold = 0.5", "threshold = 0.6"))
    attribute.graph.initializer.extend(model.graph.initializer[-2:])
    assert hashes.graph_sha256(shapes.annotate(import_model(attribute))) != hashes.graph_sha256(graph)


def test_the_trace_runs_the_custom_ops_by_name(graph):
    module, examples = aot.trace(graph, aot.compile_key("", "step", ["loss", "keep"], GRADS, "loss"))
    called = {str(node.target) for node in module.graph.nodes}
    assert {"popdet_embedded.nms.default", "popdet_embedded.roi_align_backward.default"} <= called
    assert len(examples) == 5  # w, b, image, rois and the seed; the unused input is left out


def _with_key(stored, folder, key):
    """A copy of a program with another key."""
    path = folder / "edited.pt2"
    with zipfile.ZipFile(stored) as old, zipfile.ZipFile(path, "w") as new:
        for item in old.infolist():
            content = json.dumps(key).encode() if item.filename.endswith(aot.KEY_MEMBER) else old.read(item)
            new.writestr(item, content)
    shutil.copymode(stored, path)
    return path
