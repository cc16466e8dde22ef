"""`popdet train`, `throughput` and the ONNX form of trained weights, from a config to a checkpoint and back."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from cli import refused, run, snapshot
from project import Project

from runtime.artifact import Artifact
from runtime.checkpoint import load_checkpoint, read_state


def checkpoints(project: Project) -> Path:
    return project.out / "small.train" / "checkpoints"


def test_training_with_evaluations_leaves_a_best_checkpoint_and_resumes(project: Project) -> None:
    options = [*project.options, "-o", "train.eval_every=2", "-o", "train.tensorboard=true", "-o", "train.log_every=1"]
    report = run("train", *options, "--steps", "4", "--json").report
    assert (report["steps"], report["interrupted"]) == (4, False) and 0 <= report["wait"] < 1
    assert set(report["left_out"]) == {"damaged_images", "objects_over_capacity", "cropped_objects"}
    assert report["best_checkpoint"] in [str(path) for path in checkpoints(project).glob("step-*")]
    assert read_state(report["best_checkpoint"]).evaluation.value == report["best"]
    log = [json.loads(line) for line in (checkpoints(project).parent / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log if "loss" in row] == [1, 2, 3, 4]
    assert [row["step"] for row in log if "eval_voc07_ap50" in row] == [2, 4]
    assert list((checkpoints(project).parent / "tensorboard").iterdir())
    report = run("train", *project.options, "--steps", "5", "--resume", "--json").report
    assert report["steps"] == 5 and report["left_out"]["damaged_images"] == 0


def test_another_number_of_ipus_compiles_and_replicas_train(project: Project) -> None:
    outcome = run("train", *project.options, "--ipus", "2", "--replicas", "2", "-o", "train.accumulation=3", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.report["steps"] == 2 and "compiled for 4 IPUs" in outcome.err
    assert Artifact.open(project.artifact).ipus == 2 and Artifact.open(project.artifact).trained_steps == 2


def test_the_device_must_have_the_ipus_of_every_replica(project: Project) -> None:
    before = snapshot(project.out)
    refused(run("train", *project.options, "--replicas", "5"), 3, "no device with 20 IPUs")
    assert snapshot(project.out) == before


@pytest.mark.parametrize("words", [[], ["--synthetic"], ["--graph", "infer"]], ids=["loader", "synthetic", "infer"])
def test_throughput_reports_and_changes_nothing(project: Project, words: list[str]) -> None:
    before = snapshot(project.out)
    report = run("throughput", *project.options, "--steps", "2", "--warmup", "1", *words, "--json").report
    assert report["steps"] == 2 and report["images_per_second"] > 0
    assert report["data"] == ("loader" if not words else "synthetic")
    assert report["graph"] == ("infer" if "infer" in words else "train")
    assert snapshot(project.out) == before


def test_trained_weights_go_to_onnx_and_back_into_a_checkpoint_with_the_momentum(project: Project, tmp_path: Path) -> None:
    run("train", *project.options)
    trained = load_checkpoint(checkpoints(project) / "step-000002", Artifact.open(project.artifact).layout())
    file = tmp_path / "trained.onnx"
    assert run("weights", "to-onnx", trained.path, file, "--json").report["step"] == 2
    run("train", *project.options, "--steps", "3", "--resume")
    assert Artifact.open(project.artifact).trained_steps == 3
    report = run("weights", "from-onnx", file, project.artifact, "--step", "7", "--json").report
    back = load_checkpoint(report["checkpoint"], Artifact.open(project.artifact).layout())
    assert back.step == 7 == Artifact.open(project.artifact).trained_steps
    for name, array in trained.weights.items():
        np.testing.assert_array_equal(back.weights[name], array)
        np.testing.assert_array_equal(Artifact.open(project.artifact).weights()[name], array)
    assert back.optimizer_state.keys() == trained.optimizer_state.keys() != set()
    assert all(np.array_equal(back.optimizer_state[name], array) for name, array in trained.optimizer_state.items())
    assert run("train", *project.options, "--steps", "8", "--resume", "--json").report["steps"] == 8


def test_a_file_that_holds_no_such_weights_changes_nothing(project: Project, tmp_path: Path) -> None:
    (tmp_path / "no.onnx").write_bytes(b"nothing")
    before = snapshot(project.out)
    refused(run("weights", "from-onnx", tmp_path / "absent.onnx", project.artifact), 4, "absent.onnx: no such ONNX file")
    refused(run("weights", "from-onnx", tmp_path / "no.onnx", project.artifact), 2, "no.onnx")
    assert snapshot(project.out) == before
