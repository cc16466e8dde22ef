"""The artifact directory: sealed, verified, refused when anything in it is not as it was."""
from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import tiny_artifact as tiny

from runtime.artifact import Artifact, write_manifest
from runtime.errors import BadInputFile, ConfigError
from runtime.weights_file import save_tensors


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    return tiny.make_artifact(tmp_path / "tiny")


def edit_manifest(artifact: Artifact, **values: object) -> None:
    path = artifact.directory / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_open_reads_back_what_was_sealed(artifact: Artifact) -> None:
    opened = Artifact.open(artifact.directory)
    assert opened.name == "tiny" and opened.ipus == 2 and opened.config == tiny.config()
    graph = opened.graph("train")
    assert [(spec.name, spec.shape, spec.dtype) for spec in graph.inputs] == [
        ("image", (2, 6), "float32"), ("target", (2, 3), "float32")]
    assert graph.output_names == ("loss", "y") and graph.outputs[0].shape == ()
    assert graph.stage_ipus == (0, 1) and graph.depth == 3
    assert opened.graph("infer").depth == 2
    np.testing.assert_array_equal(opened.weights()["a.weight"], tiny.weights()["a.weight"])
    assert set(opened.manifest["files"]) == {"infer.onnx", "train.onnx", "plan.json", "weights.safetensors"}


def test_the_summary_is_json_and_counts_the_weights(artifact: Artifact) -> None:
    summary = json.loads(json.dumps(artifact.summary()))
    assert summary["weights"]["values"] == 6 * 5 + 5 * 3 + 4
    assert summary["graphs"]["infer"]["outputs"][0]["shape"] == [2, 3]


@pytest.mark.parametrize("name", ["infer.onnx", "train.onnx", "plan.json", "weights.safetensors"])
def test_a_changed_truncated_or_missing_file_is_named(artifact: Artifact, name: str) -> None:
    path = artifact.directory / name
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(BadInputFile, match=f"{name}: its content was changed"):
        Artifact.open(artifact.directory)
    path.write_bytes(data[:-1])
    with pytest.raises(BadInputFile, match=f"{name}: truncated"):
        Artifact.open(artifact.directory, verify=False)
    path.unlink()
    with pytest.raises(BadInputFile, match=f"{name}: missing"):
        Artifact.open(artifact.directory)


def test_an_unknown_file_is_refused_and_a_leftover_temporary_is_not(artifact: Artifact) -> None:
    (artifact.directory / ".popdet-abc.tmp").write_bytes(b"half")
    Artifact.open(artifact.directory)
    (artifact.directory / "embedded").mkdir()
    (artifact.directory / "embedded" / "evil.pt2").write_bytes(b"code")
    with pytest.raises(BadInputFile, match=r"evil\.pt2: unknown file"):
        Artifact.open(artifact.directory)


def test_a_symbolic_link_is_refused(artifact: Artifact, tmp_path: Path) -> None:
    outside = tmp_path / "plan.json"
    (artifact.directory / "plan.json").rename(outside)
    os.symlink(str(outside), str(artifact.directory / "plan.json"))
    with pytest.raises(BadInputFile, match="symbolic link"):
        Artifact.open(artifact.directory)


@pytest.mark.parametrize("name", ["../weights.safetensors", "/etc/passwd", "a/../../b", "a\\b", ".", "a/./b"])
def test_a_manifest_cannot_name_files_outside(artifact: Artifact, name: str) -> None:
    files = {**artifact.manifest["files"], name: {"sha256": "0" * 64, "bytes": 1}}
    edit_manifest(artifact, files=files)
    with pytest.raises(BadInputFile, match="not inside the artifact"):
        Artifact.open(artifact.directory)


@pytest.mark.parametrize(("values", "message"), [
    ({"format_version": 2}, "format_version is 2"), ({"ipus": "2"}, "'ipus' is missing or not a int"),
    ({"surprise": 1}, "unknown key 'surprise'"), ({"graphs": {}}, "'graphs' must hold"),
    ({"graphs": {"infer": {"file": "infer.onnx"}}}, "malformed graphs"),
    ({"compiled": [{"file": "x.pt2", "graph": "infer", "key": {}}]}, "refers to 'x.pt2'"),
])
def test_a_bad_manifest_is_refused_by_key(artifact: Artifact, values: dict, message: str) -> None:
    edit_manifest(artifact, **values)
    with pytest.raises(BadInputFile, match=message):
        Artifact.open(artifact.directory)


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff"])
def test_a_corrupt_manifest_is_refused(artifact: Artifact, text: str) -> None:
    (artifact.directory / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(BadInputFile, match=r"manifest\.json"):
        Artifact.open(artifact.directory)


def test_no_directory_and_no_manifest_are_clear(tmp_path: Path) -> None:
    with pytest.raises(BadInputFile, match="no such artifact"):
        Artifact.open(tmp_path / "absent")
    with pytest.raises(BadInputFile, match=r"manifest\.json: cannot be read"):
        Artifact.open(tmp_path)


@pytest.mark.parametrize(("old", "new", "message"), [
    (b"weights.safetensors", b"../eights.safetenso", "may read weights.safetensors only"),
    (b"weights.safetensors", b"weights.safetensorz", "may read weights.safetensors only"),
])
def test_external_data_must_lie_in_the_weights(tmp_path: Path, old: bytes, new: bytes, message: str) -> None:
    directory = tiny.make_directory(tmp_path / "tiny")
    path = directory / "infer.onnx"
    path.write_bytes(path.read_bytes().replace(old, new))
    write_manifest(directory, tiny.config())
    with pytest.raises(BadInputFile, match=message):
        Artifact.open(directory)


def test_external_data_must_lie_on_a_tensor(tmp_path: Path) -> None:
    directory = tiny.make_directory(tmp_path / "tiny")
    save_tensors(directory / "weights.safetensors", {"other": np.zeros(49, np.float32)})
    write_manifest(directory, tiny.config())
    with pytest.raises(BadInputFile, match="which is no tensor of it"):
        Artifact.open(directory)


def test_new_weights_keep_the_layout_and_seal_again(artifact: Artifact) -> None:
    before = (artifact.directory / "weights.safetensors").read_bytes()
    updated = artifact.replace_weights(tiny.weights(seed=1), trained_steps=7)
    opened = Artifact.open(artifact.directory)
    assert opened.manifest == updated.manifest and opened.trained_steps == 7
    np.testing.assert_array_equal(opened.weights()["b.weight"], tiny.weights(seed=1)["b.weight"])
    assert opened.layout().header == before[: len(opened.layout().header)]


def test_weights_of_another_shape_change_nothing(artifact: Artifact) -> None:
    with pytest.raises(ConfigError, match=r"'a\.weight' has shape"):
        artifact.replace_weights({**tiny.weights(), "a.weight": np.zeros((5, 6), np.float32)}, trained_steps=1)
    with pytest.raises(ConfigError, match=r"missing \['b\.weight'\]"):
        artifact.replace_weights({"a.weight": np.zeros((6, 5), np.float32), "unused.buffer": np.zeros(4)}, 1)
    assert Artifact.open(artifact.directory).trained_steps == 0


@pytest.mark.parametrize("crash_after", [1, 2])
def test_a_crash_while_weights_are_replaced_leaves_a_whole_artifact(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch, crash_after: int
) -> None:
    """1: the new manifest is there, the weights are not; 2: both, the manifest under its temporary name."""
    real_write, calls = Artifact.replace_weights.__globals__["write_json_atomic"], []

    def write(path: Path, value: object) -> None:
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real_write(path, value)

    monkeypatch.setattr("runtime.artifact.write_json_atomic", write)
    if crash_after == 1:
        monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        artifact.replace_weights(tiny.weights(seed=1), trained_steps=7)
    monkeypatch.undo()
    opened = Artifact.open(artifact.directory)
    assert opened.trained_steps == (0 if crash_after == 1 else 7)
    np.testing.assert_array_equal(opened.weights()["a.weight"], tiny.weights(seed=0 if crash_after == 1 else 1)["a.weight"])
    again = opened.replace_weights(tiny.weights(seed=2), trained_steps=8)
    assert Artifact.open(artifact.directory).manifest == again.manifest


def test_an_absent_graph_is_refused_by_name(tmp_path: Path) -> None:
    artifact = tiny.make_artifact(tmp_path / "tiny", graphs=["infer"])
    with pytest.raises(ConfigError, match="compiled without a graph 'train'"):
        artifact.graph("train")


def test_a_truncated_graph_cannot_be_sealed(tmp_path: Path) -> None:
    directory = tiny.make_directory(tmp_path / "tiny")
    path = directory / "infer.onnx"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(BadInputFile, match=r"infer\.onnx: not an ONNX model"):
        write_manifest(directory, tiny.config())
    assert not (directory / "manifest.json").exists()
