"""What `compile` leaves behind: rules of PopART on both graphs, build keys, compiled programs, precision, trained weights."""
from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
from pathlib import Path
from typing import Any, Dict, List

import numpy as np
import onnx
import pytest
from chain_config import random_step, small_config

from custom_ops.schema import find_schema
from graph_passes.popart_rule import popart_ops
from popdet import build
from popdet.config import CompareConfig, Config
from runtime.artifact import Artifact
from runtime.compare import compare_executors
from runtime.errors import ConfigError
from runtime.executors import OnnxRuntimeExecutor
from runtime.session import InferenceRunner, open_inference, open_training

SEED = 911
STAGES = 4
Outputs = Dict[str, np.ndarray]


def _config(**changes: Any) -> Config:
    """The small detector; changes: {section: {key: value}}."""
    config = small_config(STAGES, infer_batch=2)
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)
                                          for section, values in changes.items()})


def _compile(config: Config, out: Path) -> build.BuildReport:
    return build.compile(config, out, say=_silent)


def _silent(message: str) -> None:
    pass


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the small detector's export and artifact. Read only: `_copy_of` gives a test its own."""
    out = tmp_path_factory.mktemp("built")
    _compile(_config(), out)
    return out


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "copy"))


def _open(out: Path) -> Artifact:
    return Artifact.open(build.artifact_directory(_config(), out))


def _digests(folder: Path) -> Dict[str, str]:
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file()}


def _stamps(folder: Path) -> Dict[str, int]:
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


def _image(artifact: Artifact, *leading: int) -> Outputs:
    shape = artifact.inputs("infer")[0].shape
    return {"image": np.random.default_rng(SEED).standard_normal((*leading, *shape), dtype=np.float32)}


def _assert_same(found: Outputs, wanted: Outputs, relative: float = 1e-5) -> None:
    for name, value in wanted.items():
        error = np.abs(found[name].astype(np.float64) - value).max() / max(np.abs(value).max(), 1e-6)
        assert error <= relative, f"{name}: relative error {error:.2e} (seed {SEED})"


# The graphs


@pytest.mark.parametrize("kind", ["infer", "train"])
def test_every_node_has_an_ipu_and_a_stage_and_is_an_op_that_popart_has(built: Path, kind: str) -> None:
    artifact = _open(built)
    model = onnx.load(str(artifact.directory / f"{kind}.onnx"), load_external_data=False)
    assert {item.domain: item.version for item in model.opset_import} == {"": 11, "ai.graphcore": 1}
    table, custom = popart_ops(), set()
    places = set()
    for node in model.graph.node:
        attributes = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
        places.add((attributes["__ipu_number"], attributes["__pipeline_stage"]))
        if node.domain:
            assert node.domain == "ai.graphcore"
            if node.op_type not in table["ai.graphcore"]:
                assert find_schema(node.domain, node.op_type), node.op_type
                custom.add(node.op_type)
        else:
            assert node.op_type in table["supported"] or node.op_type in table["canonicalised"], node.op_type
    assert custom == set(table["custom"]) == {"nms", "roiAlign"}
    assert sorted(places) == [(stage, stage) for stage in range(STAGES)]
    assert [row["stage"] for row in artifact.plan[kind]["stages"]] == list(range(STAGES))
    assert not model.functions


def test_two_exports_are_the_same_bytes(built: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(_config(), name="another-name")
    again = build.export(config, tmp_path / "elsewhere").directory
    assert _digests(again) == _digests(build.export_directory(_config(), built))


# Build keys


def test_a_second_compile_finds_everything_and_writes_nothing(copy: Path) -> None:
    before = _stamps(copy)
    assert _compile(_config(), copy).cached
    assert {name: stamp for name, stamp in _stamps(copy).items() if name != "."} == before


@pytest.mark.parametrize("changes", [
    {"train": {"learning_rate": 0.5}}, {"train": {"steps": 9, "accumulation": 7}}, {"data": {"pixel_mean": (0.5, 0.5, 0.5)}},
    {"data": {"root": "elsewhere"}}, {"compare": {"rtol": 0.5}},
], ids=["learning_rate", "accumulation", "pixel_mean", "data.root", "compare"])
def test_settings_that_do_not_shape_the_graphs_are_recorded_without_a_rebuild(copy: Path, changes: Dict[str, Any]) -> None:
    before = _stamps(copy)
    config = _config(**changes)
    report = _compile(config, copy)
    manifest = "small-4/manifest.json"
    assert report.cached and report.plan == _open(copy).plan
    changed = {name for name, stamp in _stamps(copy).items() if stamp != before.get(name)}
    assert changed <= {manifest, "small-4"}
    assert _open(copy).config == config
    assert _open(copy).preprocessing["mean"] == list(config.data.pixel_mean)


def test_an_accumulation_that_cannot_fill_the_pipeline_is_refused_by_a_cache_hit_too(copy: Path) -> None:
    before = _digests(copy)
    with pytest.raises(ConfigError, match=r"train\.accumulation is 3"):
        _compile(_config(train={"accumulation": 3}), copy)
    assert _digests(copy) == before


def test_settings_that_shape_the_graphs_rebuild_the_artifact_and_keep_the_export(copy: Path) -> None:
    exported = _stamps(build.export_directory(_config(), copy))
    report = _compile(_config(compile={"pipelining": False}), copy)
    assert not report.cached
    assert _stamps(build.export_directory(_config(), copy)) == exported


def test_trained_weights_survive_a_setting_a_rebuild_and_a_forced_rebuild(copy: Path) -> None:
    artifact = _open(copy)
    runner = open_training(artifact, artifact.config.train, on_message=_silent)
    shapes = {spec.name: spec.shape for spec in artifact.inputs("train")}
    runner.step(random_step(shapes, artifact.config.train.accumulation, 4, SEED))
    trained = runner.weights()
    assert any(not np.array_equal(value, artifact.weights()[name]) for name, value in trained.items())
    artifact.replace_weights(trained, trained_steps=1)
    for changes, cached, force in (({"train": {"learning_rate": 0.5}}, True, False), ({"compile": {"ipus": 2}}, False, False),
                                   ({}, False, True)):
        report = build.compile(_config(**changes), copy, _silent, force=force)
        kept = _open(copy)
        assert report.cached == cached and kept.trained_steps == 1
        assert all(np.array_equal(value, trained[name]) for name, value in kept.weights().items())


# Programs


def test_a_moved_artifact_runs_where_it_is(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = _image(_open(built))
    wanted = open_inference(_open(built), on_message=_silent)(image)
    moved = Artifact.open(shutil.copytree(build.artifact_directory(_config(), built), tmp_path / "far" / "away"))
    monkeypatch.chdir(tmp_path)
    _assert_same(open_inference(moved, on_message=_silent)(image), wanted, relative=0)


def test_a_full_pipeline_gives_what_single_micro_batches_give(built: Path) -> None:
    artifact, count = _open(built), STAGES + 1
    images = _image(artifact, count)
    single, many = open_inference(artifact, on_message=_silent), open_inference(artifact, batches_per_step=count,
                                                                                 on_message=_silent)
    assert many.pipelined and not single.pipelined
    together = many(images)
    for micro in range(count):
        _assert_same({name: value[micro] for name, value in together.items()}, single({"image": images["image"][micro]}))


# |a - b| / max |float32|: measured at most 2.1e-3 (rpn_logits) over six seeds; a rounding to half precision is 4.9e-4.
MIXED = CompareConfig(rtol=5e-3, match_iou=0.9, min_matched=0.9)


def test_mixed_precision_runs_close_to_float32(copy: Path) -> None:
    image = _image(_open(copy))
    exact = open_inference(_open(copy), on_message=_silent)
    assert not _compile(_config(compile={"precision": "mixed"}), copy).cached
    model = onnx.load(str(_open(copy).directory / "infer.onnx"), load_external_data=False)
    halves = [info.name for info in model.graph.value_info if info.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16]
    assert len(halves) > 10, "the graph is not in half precision"
    mixed = open_inference(_open(copy), on_message=_silent)
    report = compare_executors(("float32", exact), {"mixed": mixed}, [image], MIXED)
    assert report.passed, f"seed {SEED}\n{report.text()}"
    assert report.comparisons[0].rows["class_logits"].max_rel > 1e-5, "the heads are not in half precision"
    assert all(np.isfinite(value).all() for value in mixed(image).values())
    runner = open_training(_open(copy), _config().train, on_message=_silent)
    shapes = {spec.name: spec.shape for spec in _open(copy).inputs("train")}
    losses = runner.step(random_step(shapes, _config().train.accumulation, 4, SEED))
    assert all(np.isfinite(value).all() for value in [*losses.values(), *runner.weights().values()])


@pytest.fixture(scope="module")
def ahead(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same artifact with ahead-of-time compiled programs; only the executors of the config changed."""
    out = Path(shutil.copytree(built, tmp_path_factory.mktemp("ahead") / "out"))
    before = _digests(out)
    report = _compile(_config(compile={"executor": "aot"}, train={"executor": "aot"}), out)
    assert report.cached, "the graphs did not change"
    after = _digests(out)
    written = {name for name in after if after[name] != before.get(name)}
    assert written == {"small-4/embedded/infer.pt2", "small-4/embedded/train.pt2", "small-4/manifest.json"}
    return out


def _compiling(artifact: Artifact, **options: Any) -> tuple[InferenceRunner, List[str]]:
    messages: List[str] = []
    return open_inference(artifact, on_message=messages.append, **options), messages


@pytest.mark.slow
def test_the_program_compiled_ahead_gives_the_interpreters_numbers(ahead: Path) -> None:
    artifact = _open(ahead)
    assert [entry["file"] for entry in artifact.compiled] == ["embedded/infer.pt2", "embedded/train.pt2"]
    image = _image(artifact)
    runner, messages = _compiling(artifact)
    assert runner.compiled is not None and not messages, "the artifact's own program runs"
    _assert_same(runner(image), _compiling(artifact, executor="eager")[0](image))
    reference = OnnxRuntimeExecutor(artifact.directory / "reference.infer.onnx", threads=1)
    report = compare_executors(("onnxruntime", reference), {"aot": runner}, [image], artifact.config.compare)
    assert report.passed, f"seed {SEED}\n{report.text()}"


@pytest.mark.slow
def test_the_training_program_compiled_ahead_gives_the_interpreters_losses(ahead: Path) -> None:
    artifact, messages = _open(ahead), []
    recipe = artifact.config.train
    compiled = open_training(artifact, recipe, on_message=messages.append)
    assert recipe.executor == "aot" and compiled.compiled is not None and not messages, "the artifact's own program runs"
    plain = open_training(artifact, dataclasses.replace(recipe, executor="eager"))
    shapes = {spec.name: spec.shape for spec in artifact.inputs("train")}
    step = random_step(shapes, recipe.accumulation, 4, SEED)
    found, expected = compiled.step(step), plain.step(step)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-4, err_msg=f"{name}, seed {SEED}")


@pytest.mark.slow
def test_the_pipeline_runs_the_program_compiled_ahead(ahead: Path) -> None:
    artifact = _open(ahead)
    images = _image(artifact, STAGES)
    many, messages = _compiling(artifact, batches_per_step=STAGES)
    single = _compiling(artifact)[0]
    assert many.pipelined and many.compiled == single.compiled and not messages
    together = many(images)
    for micro in range(STAGES):
        _assert_same({name: value[micro] for name, value in together.items()}, single({"image": images["image"][micro]}))


@pytest.mark.slow
def test_the_program_of_a_copied_artifact_is_compiled_again_unless_trusted(
        ahead: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = _open(ahead)
    image = _image(artifact)
    wanted = _compiling(artifact)[0](image)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another-users-cache"))
    copied = Artifact.open(shutil.copytree(artifact.directory, tmp_path / "copied"))
    trusting, messages = _compiling(copied, trust_compiled=True)
    assert not messages
    _assert_same(trusting(image), wanted, relative=0)
    careful, messages = _compiling(copied)
    assert len(messages) == 1 and "did not compile on this machine" in messages[0] and "--trust-compiled" in messages[0]
    assert "compiling it again from ONNX" in messages[0]
    _assert_same(careful(image), wanted)
    assert not _compiling(copied)[1], "the second time this user has a record of it"
    assert os.environ["XDG_CACHE_HOME"] in str(careful.compiled)
