"""What a user can get wrong: one clear message, the documented exit code, and nothing half-written on disk."""
from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable

import numpy as np
import pytest
from bad_files import BAD_FILE, ENVIRONMENT, MISMATCH, USAGE, damaged, flipped, noise, untouched
from cli import ROOT, Outcome, environment, refused, run, snapshot
from PIL import Image
from project import Project

from runtime.weights_file import read_weights, save_tensors

# ---- config ----

@pytest.mark.parametrize(("text", "code", "parts"), [
    (None, BAD_FILE, ["bad.yaml: cannot be read", "name an existing YAML config"]),
    ("", BAD_FILE, ["bad.yaml: is empty"]),
    ("network: {backbone: tiny", BAD_FILE, ["bad.yaml: not valid YAML"]),
    ("- a\n- b", BAD_FILE, ["bad.yaml: holds a list", "expected a mapping"]),
    ("network: {bakbone: tiny}", USAGE, ["unknown key 'network.bakbone'", "did you mean 'network.backbone'"]),
    ("train: {steps: many}", USAGE, ["'train.steps' must be int", "'many'"]),
    ("train: {learning_rate: .nan}", USAGE, ["'train.learning_rate' must be a finite number"]),
    ("network: tiny", USAGE, ["'network' must be a mapping"]),
    ("name: ../elsewhere", USAGE, ["'name' is '../elsewhere'", "names a folder"]),
    ("name: ''", USAGE, ["'name' is ''"]),
], ids=["missing", "empty", "cut short", "a list", "unknown key", "wrong type", "not a number", "no section",
        "path as name", "no name"])
def test_bad_config(tmp_path: Path, text: str | None, code: int, parts: list[str]) -> None:
    config, out = tmp_path / "bad.yaml", tmp_path / "out"
    if text is not None:
        config.write_text(text, encoding="utf-8")
    refused(run("compile", "-c", config, "--out", out), code, str(config), *parts)
    assert not out.exists()


def test_config_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_bytes(b"\xff\xfe\x00name")
    refused(run("compile", "-c", tmp_path / "bad.yaml"), BAD_FILE, "bad.yaml: not valid YAML")


# ---- compile ----

@pytest.mark.parametrize(("words", "code", "parts"), [
    (["--ipus", "3"], USAGE, ["'compile.ipus' is 3", "powers of two"]),
    (["--ipus", "0"], USAGE, ["'compile.ipus' is 0", "powers of two"]),
    (["--ipus", "four"], USAGE, ["'four' is not a valid integer"]),
    (["-o", "compile.ipus=1024"], USAGE, ["1024 pipeline stages", "nodes", "use fewer IPUs"]),
    (["-o", 'compile.stages={backbon: "0_0", roi_head: "1_1"}'], USAGE, ["'backbon'", "nearest: 'backbone'"]),
    (["-o", 'compile.stages={backbone: "x"}'], USAGE, ["compile.stages: 'backbone' is 'x'", "IPU_STAGE"]),
    (["-o", "compile.stages=r50c4-mixd-4ipu"], USAGE, ["'r50c4-mixd-4ipu' is no preset", "did you mean 'r50c4-mixed-4ipu'"]),
    (["-o", "compile.stages=r50c4-mixed-4ipu"], USAGE, ["preset r50c4-mixed-4ipu", "no module", "use stages: auto"]),
    (["-o", "compile.stages=7"], USAGE, ["compile.stages is 7", "expected auto, a preset or a map"]),
    (["-o", "network.image_height=100"], USAGE, ["'network.image_height' is 100", "multiple of 16"]),
    (["-o", "network.backbone=mobilenet_v2", "-o", "network.weights=no.safetensors"], BAD_FILE,
     ["no.safetensors: no such weights file"]),
    (["--target", "tpu"], USAGE, ["'tpu' is not one of"]),
], ids=["3 IPUs", "0 IPUs", "four", "more stages than nodes", "unknown module", "bad place", "unknown preset",
        "another network's preset", "a number", "odd size", "no pretrained weights", "unknown target"])
def test_compile_refuses_and_keeps_the_artifact(project: Project, words: list[str], code: int, parts: list[str]) -> None:
    with untouched(project.out):
        refused(run("compile", *project.options, *words), code, *parts)


def test_compile_for_the_ipu_without_the_sdk(project: Project) -> None:
    with untouched(project.out):
        refused(run("compile", *project.options, "--target", "ipu"), ENVIRONMENT, "target 'ipu'", "Poplar SDK",
                "Use target 'embedded' here")


def test_compile_refuses_an_out_that_is_a_file(project: Project, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with untouched(tmp_path):
        refused(run("compile", "-c", project.config, "--out", tmp_path / "file"), USAGE, "choose another folder with --out")
    shutil.rmtree(project.artifact)
    project.artifact.write_text("mine")
    with untouched(tmp_path):
        refused(run("compile", *project.options), USAGE, f"{project.artifact}: is a file, not a folder")


def test_compile_refuses_an_out_that_cannot_be_written(project: Project) -> None:
    refused(run("compile", "-c", project.config, "--out", "/proc/nowhere"), USAGE, "/proc/nowhere", "--out")


def test_compile_never_replaces_a_folder_that_no_build_made(project: Project) -> None:
    shutil.rmtree(project.artifact)
    project.artifact.mkdir()
    (project.artifact / "thesis.tex").write_text("years of work")
    with untouched(project.out):
        refused(run("compile", *project.options), USAGE, str(project.artifact), "which a build would replace")


def test_compile_repairs_a_damaged_artifact(project: Project) -> None:
    whole = snapshot(project.artifact)
    damaged(project.artifact / "infer.onnx", lambda data: data[:100])
    assert run("compile", *project.options).code == 0
    assert snapshot(project.artifact).keys() == whole.keys()
    assert run("inspect", project.artifact).code == 0
    assert not [name for name in snapshot(project.out) if name.split("/")[-1].startswith(".")]


def test_failure_while_building_leaves_the_old_artifact(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("popdet.build.write_manifest", fail)
    with untouched(project.out):
        outcome = run("compile", *project.options, "-o", "compile.ipus=2")
        refused(outcome, USAGE, str(project.artifact), "No space left on device", "--out")


@pytest.mark.parametrize("content", [noise(300), b"", (1 << 40).to_bytes(8, "little") + b"{}"],
                         ids=["random", "empty", "huge header"])
def test_export_refuses_corrupt_pretrained_weights(project: Project, tmp_path: Path, content: bytes) -> None:
    weights = tmp_path / "published.safetensors"
    weights.write_bytes(content)
    with untouched(project.out):
        refused(run("export", *project.options, "-o", "network.backbone=mobilenet_v2", "-o", f"network.weights={weights}"),
                BAD_FILE, str(weights), "not a readable safetensors file")


def test_export_refuses_pretrained_weights_of_a_wrong_shape(project: Project, tmp_path: Path) -> None:
    weights = tmp_path / "published.safetensors"
    save_tensors(weights, {"features.0.conv.weight": np.zeros((32, 3, 5, 5), np.float32)})
    with untouched(project.out):
        refused(run("export", *project.options, "-o", "network.backbone=mobilenet_v2", "-o", f"network.weights={weights}"),
                BAD_FILE, str(weights), "shape [32, 3, 5, 5], the network needs [32, 3, 3, 3]")


# ---- artifact ----

def _manifest(artifact: Path, change: Callable[[dict], Any]) -> None:
    tree = json.loads((artifact / "manifest.json").read_text())
    change(tree)
    (artifact / "manifest.json").write_text(json.dumps(tree))


def _escape(tree: dict) -> None:
    tree["files"]["../outside"] = {"sha256": "0" * 64, "bytes": 1}


@pytest.mark.parametrize(("damage", "parts"), [
    (lambda artifact: shutil.rmtree(artifact), ["small: no such artifact", "popdet compile"]),
    (lambda artifact: (artifact / "manifest.json").unlink(), ["manifest.json: cannot be read"]),
    (lambda artifact: damaged(artifact / "manifest.json", lambda data: data[:500]), ["manifest.json: not valid JSON"]),
    (lambda artifact: damaged(artifact / "manifest.json", lambda data: noise(500)), ["manifest.json: not valid JSON"]),
    (lambda artifact: _manifest(artifact, lambda tree: tree.update(format_version=99)), ["format_version is 99"]),
    (lambda artifact: _manifest(artifact, lambda tree: tree.pop("classes")), ["'classes' is missing"]),
    (lambda artifact: _manifest(artifact, _escape), ["'../outside'", "not inside the artifact"]),
    (lambda artifact: (artifact / "infer.onnx").unlink(), ["infer.onnx: missing"]),
    (lambda artifact: damaged(artifact / "train.onnx", lambda data: data[:-1]), ["train.onnx: truncated"]),
    (lambda artifact: damaged(artifact / "weights.safetensors", flipped), ["weights.safetensors: its content was changed"]),
    (lambda artifact: damaged(artifact / "infer.onnx", flipped), ["infer.onnx: its content was changed"]),
    (lambda artifact: (artifact / "extra.pkl").write_bytes(b"x"), ["extra.pkl: unknown file"]),
], ids=["no folder", "no manifest", "manifest cut", "manifest noise", "format", "key gone", "path outside", "file gone",
        "file cut", "weights flipped", "graph flipped", "file added"])
def test_damaged_artifact(project: Project, tmp_path: Path, damage: Callable[[Path], Any], parts: list[str]) -> None:
    damage(project.artifact)
    picture = tmp_path / "a.png"
    Image.new("RGB", (50, 40)).save(picture)
    with untouched(tmp_path):
        refused(run("run", project.artifact, picture), BAD_FILE, *parts)
        refused(run("compare", *project.options, "--input", "random"), BAD_FILE, *parts)
        refused(run("train", *project.options), BAD_FILE, *parts)
        assert run("inspect", project.artifact).code == BAD_FILE


# ---- run ----

def _pictures(folder: Path) -> dict[str, Path]:
    noisy = Image.effect_noise((200, 150), 60).convert("RGB")
    paths = {name: folder / name for name in ("good.jpg", "text.jpg", "cut.jpg", "zero.jpg", "missing.jpg", "folder.jpg")}
    noisy.save(paths["good.jpg"])
    paths["text.jpg"].write_text("not a picture at all")
    paths["cut.jpg"].write_bytes(paths["good.jpg"].read_bytes()[:1500])
    paths["zero.jpg"].write_bytes(b"")
    paths["folder.jpg"].mkdir()
    return paths


@pytest.mark.parametrize(("name", "part"), [
    ("missing.jpg", "no such image"), ("text.jpg", "not an image that can be read"), ("cut.jpg", "truncated or damaged"),
    ("zero.jpg", "not an image that can be read"), ("folder.jpg", "is a folder"),
])
def test_run_names_the_picture_and_writes_none(built: Project, tmp_path: Path, name: str, part: str) -> None:
    paths = _pictures(tmp_path)
    with untouched(tmp_path):
        outcome = run("run", built.artifact, paths["good.jpg"], paths[name], "--out", tmp_path / "pictures")
        refused(outcome, BAD_FILE, str(paths[name]), part)


def test_run_refuses_an_out_that_is_a_file(built: Project, tmp_path: Path) -> None:
    paths = _pictures(tmp_path)
    with untouched(tmp_path):
        refused(run("run", built.artifact, paths["good.jpg"], "--out", paths["text.jpg"]), ENVIRONMENT,
                str(paths["text.jpg"]), "choose another output folder")


# ---- compare, train, eval ----

def _perturbed(project: Project, path: Path, name: str) -> Path:
    weights = read_weights(project.artifact / "weights.safetensors")
    save_tensors(path, {**weights, name: weights[name] + np.float32(0.05)})
    return path


@pytest.mark.parametrize("executor", ["artifact", "rewritten", "torch"])
@pytest.mark.parametrize(("name", "first"), [
    ("backbone.layer1.0.conv1.weight", "rpn_logits"), ("box_predictor.box_deltas.weight", "box_deltas"),
])
def test_a_perturbed_weight_is_a_mismatch_that_names_the_first_output(
    built: Project, tmp_path: Path, name: str, first: str, executor: str
) -> None:
    weights = _perturbed(built, tmp_path / "perturbed.safetensors", name)
    outcome = run("compare", *built.options, "--input", "random", "--images", 1, "--executor", executor,
                  "--weights", weights, "--json")
    refused(outcome, MISMATCH, f"first difference in {executor}: {first}")
    assert outcome.report["passed"] is False and outcome.report["first_difference"] == f"{executor}: {first}"


@pytest.mark.parametrize("executor", ["artifact", "rewritten", "torch"])
def test_compare_refuses_weights_of_another_layout(built: Project, tmp_path: Path, executor: str) -> None:
    weights, path = read_weights(built.artifact / "weights.safetensors"), tmp_path / "other.safetensors"
    name = "backbone.layer1.0.conv1.weight"
    cases = [({key: value for key, value in weights.items() if key != name}, f"lacks '{name}'"),
             ({**weights, "more": weights[name]}, "holds 'more'"),
             ({**weights, name: weights[name].reshape(-1)}, f"'{name}' has shape")]
    for tensors, part in cases:
        save_tensors(path, tensors)
        refused(run("compare", *built.options, "--input", "random", "--executor", executor, "--weights", path), BAD_FILE,
                str(path), part)


@pytest.mark.parametrize(("content", "part"), [(None, "cannot be read"), (noise(300), "not a safetensors file")],
                         ids=["missing", "random"])
def test_compare_refuses_unreadable_weights(built: Project, tmp_path: Path, content: bytes | None, part: str) -> None:
    path = tmp_path / "weights.safetensors"
    if content is not None:
        path.write_bytes(content)
    refused(run("compare", *built.options, "--input", "random", "--weights", path), BAD_FILE, str(path), part)


@pytest.mark.parametrize("words", [["compare", "--input", "data"], ["train"], ["eval"]], ids=lambda words: words[0])
def test_missing_data_set(project: Project, tmp_path: Path, words: list[str]) -> None:
    data = tmp_path / "nodata"
    with untouched(tmp_path):
        refused(run(words[0], *project.options, *words[1:], "-o", "data.kind=voc", "-o", f"data.root={data}"), BAD_FILE,
                str(data), "set data.root")


def test_training_refuses_too_few_micro_batches_for_the_pipeline(project: Project, tmp_path: Path) -> None:
    with untouched(tmp_path):
        refused(run("train", *project.options, "-o", "train.accumulation=3"), USAGE, "train.accumulation is 3",
                "pipeline of 4 stages", "Set train.accumulation=7 or more")


@pytest.mark.parametrize("command", ["compare", "train", "eval"])
@pytest.mark.parametrize("override", ["network.image_height=96", "data.resize=pad"])
def test_artifact_of_another_config_is_refused(project: Project, tmp_path: Path, command: str, override: str) -> None:
    with untouched(tmp_path):
        refused(run(command, *project.options, "-o", override), USAGE, str(project.artifact), override.split("=")[0],
                "run 'popdet compile' again")


# ---- no g++ ----

def _without_compiler(tmp_path: Path, *words: Any) -> Outcome:
    """A fresh process whose PATH has no g++, and a cache without built kernels."""
    (tmp_path / "bin").mkdir(exist_ok=True)
    command = [sys.executable, "-m", "popdet", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=str(ROOT), check=False,
                          env=environment(PATH=str(tmp_path / "bin"), XDG_CACHE_HOME=str(tmp_path / "cache")))
    return Outcome(done.returncode, done.stdout, done.stderr)


def test_without_a_compiler_the_detections_are_the_same_and_one_warning_says_why(built: Project, tmp_path: Path) -> None:
    picture = _pictures(tmp_path)["good.jpg"]
    slow = _without_compiler(tmp_path, "run", built.artifact, picture, "--out", tmp_path / "slow")
    fast = run("run", built.artifact, picture, "--out", tmp_path / "fast")
    assert (slow.code, fast.code) == (0, 0), slow.err
    assert slow.err.count("g++ is not on PATH") == 1 and slow.err.startswith("warning: popdet's C++ host kernels")
    rows = [json.loads((tmp_path / kind / "detections.json").read_text()) for kind in ("slow", "fast")]
    assert len(rows[0]) == len(rows[1]) > 0
    for mine, theirs in zip(*rows):
        assert mine["category_id"] == theirs["category_id"]
        np.testing.assert_allclose([*mine["bbox"], mine["score"]], [*theirs["bbox"], theirs["score"]], rtol=1e-4, atol=1e-3)


def test_without_a_compiler_nothing_is_compiled_ahead(project: Project, tmp_path: Path) -> None:
    before = snapshot(project.out)
    outcome = _without_compiler(tmp_path, "compile", *project.options, "-o", "compile.executor=aot")
    refused(outcome, ENVIRONMENT, "g++ is not on PATH", "compile.executor=eager")
    picture = _pictures(tmp_path)["good.jpg"]
    outcome = _without_compiler(tmp_path, "run", project.artifact, picture, "--executor", "aot", "--out", tmp_path / "pictures")
    refused(outcome, ENVIRONMENT, "infer.onnx", "g++ is not on PATH", "--executor eager")
    assert snapshot(project.out) == before and not (tmp_path / "pictures").exists()
