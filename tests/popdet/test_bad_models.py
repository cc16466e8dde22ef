"""What a user can hand to `popdet rewrite` that it cannot take: one clear message, the documented exit code, no output file."""
from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Callable

import onnx
import pytest
from bad_files import BAD_FILE, USAGE, damaged, noise, untouched
from cli import refused, run, snapshot
from onnx import TensorProto, helper
from project import Project


def _beside_weights(built: Project, tmp_path: Path, data: bytes) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    shutil.copy(built.reference.parent / "weights.safetensors", folder)
    (folder / "model.onnx").write_bytes(data)
    return folder / "model.onnx"


@pytest.mark.parametrize(("change", "part"), [
    (lambda data: noise(5000), "not an ONNX file, or truncated (5000 bytes)"),
    (lambda data: data[: len(data) // 2], "not an ONNX file, or truncated"),
    (lambda data: b"", "an incomplete ONNX file (0 bytes"),
    (lambda data: data.replace(b"weights.safetensors", b"weights.safetensor\xff"), "not UTF-8"),
    (lambda data: data.replace(b"weights.safetensors", b"elsewhere.tensors.."), "cannot be read"),
], ids=["random bytes", "half", "empty", "undecodable name", "no weights"])
def test_rewrite_refuses_a_damaged_model(built: Project, tmp_path: Path, change: Callable[[bytes], bytes], part: str) -> None:
    model = _beside_weights(built, tmp_path, change(built.reference.read_bytes()))
    refused(run("rewrite", model, tmp_path / "out" / "new.onnx"), BAD_FILE, str(model), part)
    assert not (tmp_path / "out").exists()


def test_rewrite_never_fails_internally_on_flipped_bytes(built: Project, tmp_path: Path) -> None:
    data, generator = built.reference.read_bytes(), random.Random(11)
    model = _beside_weights(built, tmp_path, data)
    for trial in range(40):
        changed = bytearray(data)
        for _ in range(generator.choice([1, 2, 8])):
            changed[generator.randrange(len(changed))] = generator.randrange(256)
        model.write_bytes(bytes(changed))
        outcome = run("rewrite", model, tmp_path / "out" / "new.onnx")
        if outcome.code:  # a flipped bit in a doc string or a constant is a legal model
            assert outcome.code in (USAGE, BAD_FILE), f"trial {trial}: {outcome.err}"
            refused(outcome, outcome.code)


def test_rewrite_refuses_a_missing_model(tmp_path: Path) -> None:
    refused(run("rewrite", tmp_path / "no.onnx", tmp_path / "new.onnx"), BAD_FILE, "no.onnx: cannot be read")
    assert not snapshot(tmp_path)


def test_rewrite_refuses_truncated_weights(built: Project, tmp_path: Path) -> None:
    model = _beside_weights(built, tmp_path, built.reference.read_bytes())
    weights = damaged(model.parent / "weights.safetensors", lambda data: data[: len(data) // 2])
    refused(run("rewrite", model, tmp_path / "out" / "new.onnx"), BAD_FILE, f"{weights}: truncated")
    assert not (tmp_path / "out").exists()


def _model(path: Path, node: onnx.NodeProto, shapes: dict[str, list], output: list, kind: int = TensorProto.FLOAT) -> Path:
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    graph = helper.make_graph([node], "g", inputs, [helper.make_tensor_value_info("y", kind, output)])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


@pytest.mark.parametrize(("node", "shapes", "output", "code", "parts"), [
    (helper.make_node("Einsum", ["a", "b"], ["y"], name="attend", equation="ij,jk->ik"), {"a": [2, 3], "b": [3, 4]}, [2, 4],
     USAGE, ["Einsum 'attend'", "opset 11", "write it as Transpose, Reshape and MatMul"]),
    (helper.make_node("Frobnicate", ["a"], ["y"], name="mystery"), {"a": [2]}, [2], USAGE,
     ["Frobnicate 'mystery'", "ai.onnx 18 has no such op"]),
    (helper.make_node("Relu", ["a"], ["y"], name="act"), {"a": ["batch", 3]}, ["batch", 3], USAGE,
     ["graph input 'a'", "fixed sizes"]),
    (helper.make_node("MatMul", ["a", "b"], ["y"], name="product"), {"a": [1, 3], "b": [4, 5]}, [1, 5], BAD_FILE,
     ["model.onnx", "contradict each other", "product"]),
    (helper.make_node("Relu", ["a"], ["y"], name="act"), {"a": [1, 3]}, [1, 5], BAD_FILE,
     ["model.onnx", "contradict each other", "act"]),
], ids=["Einsum", "unknown op", "dynamic input", "wrong shapes", "wrong declared shape"])
def test_rewrite_names_what_it_cannot_accept(tmp_path: Path, node: onnx.NodeProto, shapes: dict, output: list, code: int,
                                             parts: list[str]) -> None:
    model = _model(tmp_path / "model.onnx", node, shapes, output)
    refused(run("rewrite", model, tmp_path / "out" / "new.onnx"), code, *parts)
    assert not (tmp_path / "out").exists()


def test_rewrite_refuses_a_shape_that_depends_on_values(tmp_path: Path) -> None:
    node = helper.make_node("NonZero", ["a"], ["y"], name="where")
    model = _model(tmp_path / "model.onnx", node, {"a": [2, 3]}, [2, "found"], TensorProto.INT64)
    refused(run("rewrite", model, tmp_path / "new.onnx"), USAGE, "NonZero 'where'", "dynamic shape",
            "use a fixed capacity plus a count")
    assert list(snapshot(tmp_path)) == ["model.onnx"]


def test_rewrite_of_a_plain_graph_needs_no_custom_op(tmp_path: Path) -> None:
    model = _model(tmp_path / "model.onnx", helper.make_node("Relu", ["a"], ["y"], name="act"), {"a": [1, 3]}, [1, 3])
    assert run("rewrite", model, tmp_path / "new.onnx").code == 0
    imports = {entry.domain: entry.version for entry in onnx.load(tmp_path / "new.onnx").opset_import}
    assert imports == {"": 11, "ai.graphcore": 1}


@pytest.mark.parametrize(("words", "code", "parts"), [
    (["--only", "swap_nm"], USAGE, ["unknown pass 'swap_nm'", "did you mean 'swap_nms'"]),
    (["--skip", "zzz"], USAGE, ["unknown pass 'zzz'", "known passes: check_static"]),
    (["--kind", "train"], BAD_FILE, ["reference.infer.onnx", "'infer', not 'train'"]),
    (["-o", "compile.ipus=1024", "-o", "compile.pipelining=true"], USAGE, ["1024 pipeline stages", "use fewer IPUs"]),
], ids=["only", "skip", "kind", "stages"])
def test_rewrite_refuses_bad_options(built: Project, tmp_path: Path, words: list[str], code: int, parts: list[str]) -> None:
    refused(run("rewrite", built.reference, tmp_path / "new.onnx", *words), code, *parts)
    assert not snapshot(tmp_path)


def test_rewrite_refuses_output_that_cannot_be_a_file(built: Project, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with untouched(tmp_path):
        refused(run("rewrite", built.reference, tmp_path), USAGE, f"{tmp_path}: is a folder")
        refused(run("rewrite", built.reference, tmp_path / "file" / "new.onnx"), USAGE, f"{tmp_path / 'file'}: cannot be made")
    refused(run("rewrite", built.reference), USAGE, "name a MODEL and an OUTPUT")
