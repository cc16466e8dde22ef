"""`popdet eval` and `popdet predict` on an artifact and on a checkpoint, through every executor."""
from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli import Outcome, refused, run
from PIL import Image
from project import Project

from popdet.config import load_config
from popdet.data import evaluation_records
from runtime.artifact import Artifact
from runtime.checkpoint import TrainingState, save_checkpoint
from runtime.coco_metric import image_ids
from runtime.errors import BadInputFile

COUNTS = {"images", "objects", "difficult", "detections", "metric", "ap50", "per_class"}


def checkpoint_of(project: Project, name: Any = "small", scale: float = 1.1) -> Path:
    """A checkpoint whose weights differ from the artifact's."""
    artifact = Artifact.open(project.artifact)
    weights = {key: (value * scale).astype(value.dtype) if key.endswith("weight") else value
               for key, value in artifact.weights().items()}
    return save_checkpoint(project.out / "small.train" / "checkpoints", TrainingState(123, 0.1, extra={"artifact": name}),
                           artifact.layout(), weights, {})


def predict(*words: Any) -> Outcome:
    return run("predict", *words)


def rows(path: Path) -> list[tuple]:
    return [(row["image_id"], row["category_id"], row["score"], row["bbox"]) for row in json.loads(path.read_text())]


def assert_same_detections(first: Path, second: Path) -> None:
    a, b = rows(first), rows(second)
    assert [row[:2] for row in a] == [row[:2] for row in b] and a
    np.testing.assert_allclose([row[2] for row in a], [row[2] for row in b], atol=1e-4)
    np.testing.assert_allclose([row[3] for row in a], [row[3] for row in b], atol=0.05)


def test_a_config_and_its_artifact_are_the_same_detector(built: Project) -> None:
    by_config = run("eval", *built.options, "--json").report
    by_target = run("eval", built.artifact, "--json").report
    assert by_config == by_target and COUNTS <= by_config.keys() and by_config["metric"] == "voc"
    assert by_config["executors"] == {"artifact": {"voc": {key: by_config[key] for key in COUNTS}}}
    assert (by_config["target"], by_config["trained_steps"], by_config["clip"]) == (str(built.artifact), 0, "image")


def test_several_metrics_of_both_executors_from_one_target(built: Project) -> None:
    report = run("eval", built.artifact, "--metric", "voc07,coco", "--executor", "both", "--json").report
    assert report["metric"] == "voc07" and list(report["executors"]) == ["artifact", "onnxruntime"]
    assert [list(found) for found in report["executors"].values()] == [["voc07", "coco"]] * 2
    assert report["difference"]["coco"]["ap"] == pytest.approx(0, abs=1e-3)
    text = run("eval", built.artifact, "--metric", "voc07,coco", "--executor", "both").out
    assert "artifact minus onnxruntime:\nvoc07: AP50 +0.0000 points" in text and text.count("mean AP50") == 2


def test_a_checkpoint_runs_with_its_own_weights_in_every_executor(project: Project, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(project)
    before = sorted(path.name for path in checkpoint.iterdir())
    report = run("eval", checkpoint, "--executor", "both", "--save-detections", tmp_path / "new.json", "--json").report
    assert (report["target"], report["trained_steps"]) == (str(checkpoint), 123)
    assert_same_detections(tmp_path / "new.json", tmp_path / "new.onnxruntime.json")
    run("eval", project.artifact, "--save-detections", tmp_path / "old.json")
    assert rows(tmp_path / "old.json") != rows(tmp_path / "new.json")
    assert sorted(path.name for path in checkpoint.iterdir()) == before, "nothing is left in the checkpoint"


def test_saved_files_hold_the_detections_and_the_ground_truth(built: Project, tmp_path: Path) -> None:
    report = run("eval", built.artifact, "--save-detections", tmp_path / "found.json", "--json").report
    truth = json.loads((tmp_path / "found.truth.json").read_text())
    records = evaluation_records(load_config(str(built.config)))
    assert [image["id"] for image in truth["images"]] == image_ids(records)
    assert len(truth["annotations"]) == report["objects"] and len(rows(tmp_path / "found.json")) == report["detections"]
    assert [category["name"] for category in truth["categories"]] == ["circle", "square", "triangle"]


def test_the_report_is_written(built: Project, tmp_path: Path) -> None:
    outcome = run("eval", built.artifact, "--metric", "voc07,voc", "--report", tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert outcome.out.splitlines()[-1] == f"report: {tmp_path / 'r.html'}"
    assert "<h1>Evaluation of small</h1>" in text and text.count("<svg") == 4 and str(built.artifact) in text


def test_another_data_set_is_named_by_folder_and_split(built: Project) -> None:
    root = load_config(str(built.config)).data.root
    report = run("eval", built.artifact, "--data", f"{root}:train", "--json").report
    assert report["images"] == 4 and report["data"] == f"{root}:train"
    assert run("eval", built.artifact, "--data", f"{root}:train", "--images", 3, "--json").report["images"] == 3


def large_pictures(folder: Path) -> Path:
    """A data set in COCO layout of two pictures twice as large as the network's input, with ids that are not 1 and 2."""
    (folder / "val").mkdir(parents=True)
    (folder / "annotations").mkdir()
    for number in (70, 30):
        Image.effect_noise((192, 128), 60).convert("RGB").save(folder / "val" / f"{number:06d}.png")
    (folder / "annotations" / "instances_val.json").write_text(json.dumps({
        "images": [{"id": number, "file_name": f"{number:06d}.png", "width": 192, "height": 128} for number in (70, 30)],
        "annotations": [{"id": 1, "image_id": 30, "category_id": 5, "bbox": [10, 20, 100, 90], "area": 9000, "iscrowd": 0}],
        "categories": [{"id": 5, "name": "square"}],
    }))
    return folder


def test_clipping_to_the_input_size_reaches_the_boxes(built: Project, tmp_path: Path) -> None:
    folder = large_pictures(tmp_path / "large")
    for clip in ("image", "input"):
        report = run("eval", built.artifact, "--data", f"{folder}:val", "--clip", clip, "--save-detections",
                     tmp_path / f"{clip}.json", "--json").report
        assert (report["objects"], report["clip"]) == (1, clip)
    by_image, by_input = rows(tmp_path / "image.json"), rows(tmp_path / "input.json")
    assert [row[:3] for row in by_image] == [row[:3] for row in by_input] and {row[0] for row in by_image} <= {70, 30}
    cut = 0
    for (*_, (x, y, w, h)), (*_, other) in zip(by_image, by_input):
        assert x + w <= 192 and y + h <= 128
        edges = [min(x, 96), min(y, 64), min(x + w, 96), min(y + h, 64)]
        assert other == pytest.approx([edges[0], edges[1], edges[2] - edges[0], edges[3] - edges[1]], abs=1e-4)
        cut += edges[2] < x + w
    assert cut


def test_overrides_change_the_data_but_not_the_network(built: Project) -> None:
    root = load_config(str(built.config)).data.root
    changed = run("eval", built.artifact, "-o", "data.kind=voc", "-o", "data.eval_split=train", "--json").report
    assert changed["images"] == 4 and changed["data"] == f"{root}:train"
    refused(run("eval", built.artifact, "-o", "network.score_threshold=0.9"), 2, "network.score_threshold = 0.05")
    refused(run("eval", built.artifact, "-c", built.config, "-o", "data.resize=pad"), 2, "data.resize = squash")
    refused(run("eval", built.artifact, "-o", "data.rot=x"), 2, "unknown key 'data.rot'", "did you mean 'data.root'")


def test_the_gate_holds_for_every_metric(built: Project) -> None:
    outcome = run("eval", built.artifact, "--metric", "voc,coco", "--executor", "both", "--min-ap50", "1.01")
    refused(outcome, 1, "AP50 (voc, artifact) is", "the gate is 1.01")
    assert run("eval", built.artifact, "--min-ap50", "0").code == 0


def test_what_is_no_detector_is_named(project: Project, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(project)
    refused(run("eval", checkpoint.parent), 4, "holds checkpoints", str(checkpoint))
    refused(run("eval", checkpoint.parent.parent), 4, "holds checkpoints", str(checkpoint))
    refused(run("eval", tmp_path / "none"), 4, "none: no such artifact directory")
    shutil.move(str(project.artifact), str(project.out / "elsewhere"))
    refused(run("eval", checkpoint), 4, "its artifact is not at", str(project.artifact))
    for words in ([], ["--metric", "map"], ["--metric", ""], ["--images", 0]):
        outcome = run("eval", *([project.out / "elsewhere"] if words else []), *words)
        assert outcome.code == 2 and "Usage: popdet eval" in outcome.err


@pytest.mark.parametrize("name", [None, "", "../small", 7])
def test_a_checkpoint_that_does_not_name_its_artifact_is_refused(project: Project, name: Any) -> None:
    refused(run("eval", checkpoint_of(project, name)), 4, "extra.artifact is", repr(name))


def test_predict_takes_checkpoints_folders_and_onnxruntime(project: Project, tmp_path: Path) -> None:
    checkpoint, pictures = checkpoint_of(project), tmp_path / "pictures"
    pictures.mkdir()
    for number in (2, 1):
        Image.effect_noise((120, 90), 60).convert("RGB").save(pictures / f"{number}.png")
    (pictures / "3.png").write_bytes(b"broken")
    refused(predict(checkpoint, pictures, "-o", tmp_path / "a"), BadInputFile.exit_code, "3.png")
    assert not (tmp_path / "a").exists()
    done = predict(checkpoint, pictures, "-o", tmp_path / "a", "--skip-damaged")
    assert done.code == 0 and "left out: " in done.err and "1 of 3 pictures were damaged and left out" in done.out
    report = predict(checkpoint, pictures, "-o", tmp_path / "b", "--skip-damaged", "--executor", "onnxruntime", "--json").report
    assert [Path(entry["image"]).name for entry in report["images"]] == ["1.png", "2.png"] and len(report["damaged"]) == 1
    assert_same_detections(tmp_path / "a" / "detections.json", tmp_path / "b" / "detections.json")


def test_predict_and_run_give_the_same_of_an_artifact(project: Project, tmp_path: Path) -> None:
    Image.effect_noise((120, 90), 60).convert("RGB").save(tmp_path / "1.png")
    assert run("run", project.artifact, tmp_path / "1.png").code == 0
    first = rows(project.out / "small.pictures" / "detections.json")
    shutil.rmtree(project.out / "small.pictures")
    assert predict(project.artifact, tmp_path / "1.png").code == 0
    assert rows(project.out / "small.pictures" / "detections.json") == first
    assert predict(checkpoint_of(project), tmp_path / "1.png").code == 0
    assert rows(project.out / "small.step-000123.pictures" / "detections.json") != first
