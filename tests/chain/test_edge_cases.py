"""Empty, full, tied and overflowing inputs through the whole chain: onnxruntime, torch and the compiled artifact agree."""
from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any, Dict, Iterator, Tuple

import numpy as np
import pytest
import torch
from chain_config import random_step, small_config
from PIL import Image

from detection_data.loader import CapacityWarning, batches
from detection_data.records import Record
from export.network.detector import TRAIN_OUTPUTS, build_detector, trainable_names
from popdet import build
from popdet.authoring import rewritten_executor, torch_executor
from popdet.config import CompareConfig, Config
from runtime.artifact import Artifact
from runtime.compare import compare_executors
from runtime.executors import Executor, OnnxRuntimeExecutor
from runtime.session import TrainingRunner, open_inference, open_training

SEED = 4107
HEIGHT, WIDTH, BATCH, CAPACITY = 64, 96, 3, 6
ACCUMULATION = 7  # what fills the pipeline of 4 stages
RELATIVE = 1e-4
Outputs = Dict[str, np.ndarray]


def _artifact(out: Path, **network: Any) -> Artifact:
    config = small_config(4, infer_batch=BATCH, score_threshold=0.0, max_detections=CAPACITY, **network)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, accumulation=ACCUMULATION))
    build.compile(config, out, say=lambda message: None)
    return Artifact.open(out / config.name)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return _artifact(tmp_path_factory.mktemp("usual"))


@pytest.fixture(scope="module")
def proposing_nothing(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """No proposal is as wide as this asks for, so none survives."""
    return _artifact(tmp_path_factory.mktemp("none"), rpn_min_size=2.0 * WIDTH)


def _silent(message: str) -> None:
    pass


def _executors(artifact: Artifact, folder: Path) -> Tuple[Executor, Dict[str, Executor]]:
    others = {"artifact": open_inference(artifact, on_message=_silent),
              "rewritten": rewritten_executor(artifact, None, folder), "torch": torch_executor(artifact, None)}
    return OnnxRuntimeExecutor(artifact.directory / "reference.infer.onnx", threads=1), others


@pytest.fixture(scope="module")
def executors(artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Tuple[Executor, Dict[str, Executor]]:
    return _executors(artifact, tmp_path_factory.mktemp("rewritten"))


def _pictures(name: str) -> np.ndarray:
    """[BATCH, 3, HEIGHT, WIDTH] of one kind; "mixed" has one of each in a row."""
    rng = np.random.default_rng(SEED)
    shape = (BATCH, 3, HEIGHT, WIDTH)
    made = {"blank": np.zeros(shape), "noise": rng.standard_normal(shape), "huge": np.full(shape, 1e4),
            "hugely negative": np.full(shape, -1e4), "ramp": np.broadcast_to(np.linspace(-2, 2, WIDTH), shape)}
    if name == "mixed":
        return np.concatenate([_pictures(kind)[:1] for kind in ("noise", "blank", "ramp")])
    return made[name].astype(np.float32)


def _check_invariants(outputs: Outputs, classes: int = 3) -> None:
    """What the artifact's documentation promises of every output, whatever the picture."""
    assert all(np.isfinite(value).all() for value in outputs.values())
    for rows, count in (("boxes", "count"), ("scores", "count"), ("classes", "count"), ("proposals", "proposal_count")):
        for image, number in enumerate(outputs[count]):
            assert 0 <= number <= outputs[rows].shape[1]
            assert not outputs[rows][image, number:].any(), f"{rows} behind {count} are not zero"
    for name in ("boxes", "proposals"):
        boxes = outputs[name]
        assert (boxes >= 0).all() and (boxes <= [WIDTH, HEIGHT, WIDTH, HEIGHT]).all(), f"{name} leave the picture"
        assert (boxes[..., 2:] >= boxes[..., :2]).all()
    for image, number in enumerate(outputs["count"]):
        assert (np.diff(outputs["scores"][image, :number]) <= 0).all()
        assert np.isin(outputs["classes"][image, :number], np.arange(1, classes + 1)).all()


@pytest.mark.parametrize("kind", ["blank", "noise", "huge", "hugely negative", "ramp", "mixed"])
def test_every_executor_agrees_with_onnxruntime(executors: Tuple[Executor, Dict[str, Executor]], kind: str) -> None:
    reference, others = executors
    image = {"image": _pictures(kind)}
    report = compare_executors(("onnxruntime", reference), others, [image], CompareConfig(min_matched=1.0))
    assert report.passed, f"seed {SEED}\n{report.text()}"
    for executor in others.values():
        _check_invariants(dict(executor(image)))


def test_the_anchors_of_a_blank_picture_tie_and_still_give_one_answer(executors: Tuple[Executor, Dict[str, Executor]]) -> None:
    reference, others = executors
    image = {"image": _pictures("blank")}
    expected = reference(image)
    logits = expected["rpn_logits"][0]
    assert len(np.unique(logits)) < len(logits) / 2, "the picture has few ties, so it tests nothing"
    for name, executor in others.items():
        found = executor(image)
        np.testing.assert_array_equal(found["proposal_count"], expected["proposal_count"], name)
        np.testing.assert_allclose(found["proposals"], expected["proposals"], atol=1e-3, err_msg=name)


def test_images_of_a_batch_do_not_touch_each_other(artifact: Artifact, executors: Tuple[Executor, Dict[str, Executor]]) -> None:
    runner, mixed = executors[1]["artifact"], _pictures("mixed")
    together = runner({"image": mixed})
    moved = runner({"image": mixed[[2, 0, 1]]})
    alone = [torch_executor(artifact, None)({"image": mixed[row : row + 1]}) for row in range(BATCH)]
    for name, value in together.items():
        np.testing.assert_allclose(moved[name], value[[2, 0, 1]], rtol=1e-5, atol=1e-5, err_msg=name)
        for row in range(BATCH):
            np.testing.assert_allclose(value[row], alone[row][name][0], rtol=1e-4, atol=1e-3, err_msg=f"{name}, image {row}")
    assert not np.array_equal(together["proposals"][0], together["proposals"][1])


def test_one_image_with_nan_leaves_its_neighbours_alone(executors: Tuple[Executor, Dict[str, Executor]]) -> None:
    images = _pictures("noise")
    clean = executors[1]["artifact"]({"image": images})
    spoiled = images.copy()
    spoiled[1] = np.nan
    found = executors[1]["artifact"]({"image": spoiled})
    assert found["proposal_count"][1] == 0 and found["count"][1] == 0
    for name, value in clean.items():
        np.testing.assert_allclose(found[name][[0, 2]], value[[0, 2]], rtol=1e-5, atol=1e-6, err_msg=name)


def test_a_threshold_of_zero_fills_the_capacity_exactly(executors: Tuple[Executor, Dict[str, Executor]]) -> None:
    outputs = executors[1]["artifact"]({"image": _pictures("noise")})
    assert outputs["count"].tolist() == [CAPACITY] * BATCH and outputs["boxes"].shape == (BATCH, CAPACITY, 4)
    assert (outputs["scores"] > 0).all() and (outputs["classes"] > 0).all()


def test_a_certain_background_leaves_proposals_but_no_detection(artifact: Artifact, tmp_path: Path) -> None:
    weights = artifact.weights()
    weights["box_predictor.class_logits.bias"] = np.array([1e4, 0, 0, 0], np.float32)
    executors = [open_inference(artifact, weights=weights, on_message=_silent), rewritten_executor(artifact, weights, tmp_path),
                 torch_executor(artifact, weights)]
    for outputs in (executor({"image": _pictures("noise")}) for executor in executors):
        _check_invariants(dict(outputs))
        assert outputs["count"].tolist() == [0] * BATCH and outputs["proposal_count"].min() > 0


def test_no_surviving_proposal_gives_no_detection_and_no_nan(proposing_nothing: Artifact, tmp_path: Path) -> None:
    reference, others = _executors(proposing_nothing, tmp_path)
    for kind in ("blank", "noise"):
        image = {"image": _pictures(kind)}
        report = compare_executors(("onnxruntime", reference), others, [image], CompareConfig())
        assert report.passed, f"seed {SEED}\n{report.text()}"
        for executor in (reference, *others.values()):
            outputs = dict(executor(image))
            _check_invariants(outputs)
            assert not outputs["proposal_count"].any() and not outputs["count"].any()


def _edge_step(artifact: Artifact) -> Dict[str, np.ndarray]:
    """One weight update whose micro-batches are the edge cases of EDGES, in order."""
    batch = random_step({spec.name: spec.shape for spec in artifact.inputs("train")}, ACCUMULATION, 4, SEED)
    capacity = batch["gt_boxes"].shape[2]
    batch["gt_count"][:] = 2
    batch["gt_count"][0] = 0
    batch["gt_count"][1] = capacity
    batch["gt_count"][2] = [0, capacity]
    batch["image"][3] = 0
    batch["gt_boxes"][4] = [0, 0, WIDTH, HEIGHT]
    batch["gt_boxes"][5] = [8, 8, 24, 24]
    batch["gt_boxes"][6, :, :, 2:] = batch["gt_boxes"][6, :, :, :2] + 0.5
    beyond = np.arange(capacity) >= batch["gt_count"][..., None]
    batch["gt_boxes"][beyond], batch["gt_classes"][beyond] = 0, 0
    return batch


EDGES = ("no object on any image", "as many objects as the capacity", "an empty and a full image", "objects on a blank picture",
         "boxes of the whole picture", "equal boxes of different classes", "boxes smaller than a pixel")
Step = Tuple[Artifact, Dict[str, np.ndarray], Outputs]


def _trained(artifact: Artifact) -> Tuple[TrainingRunner, Outputs]:
    names = trainable_names(artifact.config.network, build_detector(artifact.config.network, training=True))
    runner = open_training(artifact, artifact.config.train, on_message=_silent,
                           anchors=[*TRAIN_OUTPUTS, *[f"Gradient___{name}" for name in names]])
    return runner, runner.step(_edge_step(artifact))


@pytest.fixture(scope="module")
def edge_steps(artifact: Artifact, proposing_nothing: Artifact) -> Dict[str, Step]:
    return {name: (found, _edge_step(found), _trained(found)[1])
            for name, found in (("usual", artifact), ("no proposals", proposing_nothing))}


@pytest.mark.parametrize("micro", range(len(EDGES)), ids=EDGES)
@pytest.mark.parametrize("proposals", ["usual", "no proposals"])
def test_losses_and_gradients_equal_autograd(edge_steps: Dict[str, Step], proposals: str, micro: int) -> None:
    artifact, batch, outputs = edge_steps[proposals]
    network = build_detector(artifact.config.network, training=True)
    names = trainable_names(artifact.config.network, network)
    inputs = [torch.from_numpy(batch[spec.name][micro]) for spec in artifact.inputs("train")]
    wanted = dict(zip(TRAIN_OUTPUTS, network(*inputs)))
    gradients = torch.autograd.grad(wanted["loss"], [network.get_parameter(name) for name in names], allow_unused=True)
    pairs = {name: (outputs[name][micro], value.detach().numpy()) for name, value in wanted.items()}
    pairs.update((name, (outputs[f"Gradient___{name}"][micro], gradient.numpy())) for name, gradient in zip(names, gradients))
    for name, (found, value) in pairs.items():
        assert np.isfinite(found).all(), f"{name} is not finite (seed {SEED})"
        error = np.abs(found.astype(np.float64) - value).max() / max(np.abs(value).max(), 1e-6)
        assert error <= RELATIVE, f"{name}: relative error {error:.2e} (seed {SEED})"
    assert (outputs["proposal_count"][micro] == 0).all() == (proposals == "no proposals")
    if EDGES[micro].startswith("no object"):
        assert outputs["num_foreground"][micro].tolist() == [0, 0]
        assert outputs["loss_rpn_box"][micro] == 0 and outputs["loss_roi_box"][micro] == 0
        assert (outputs["loss_roi_class"][micro] > 0) == (proposals == "usual")
    if EDGES[micro].startswith("as many"):
        assert (outputs["num_foreground"][micro] > 0).all(), "the ground truth itself is foreground"


def test_the_weights_stay_finite_after_a_step_of_edge_cases(proposing_nothing: Artifact) -> None:
    runner, _ = _trained(proposing_nothing)
    assert all(np.isfinite(value).all() for value in runner.weights().values())


def _crowded(folder: Path, objects: Tuple[int, ...]) -> Iterator[Record]:
    for number, count in enumerate(objects):
        path = folder / f"crowd{number}.png"
        Image.new("RGB", (WIDTH, HEIGHT), (40 * number, 120, 200)).save(path)
        corners = np.array([[4 * i, 2 * i, 4 * i + 10 + i, 2 * i + 12] for i in range(count)], np.float32).reshape(-1, 4)
        yield Record(f"crowd{number}", path, WIDTH, HEIGHT, corners, np.full(count, 1, np.int32), np.zeros(count, np.bool_))


def test_more_objects_than_the_capacity_are_counted_warned_of_and_trained_on(artifact: Artifact, tmp_path: Path) -> None:
    config: Config = artifact.config
    keys = {spec.name: spec.shape[-1] for spec in artifact.inputs("train")}
    records = list(_crowded(tmp_path, (9, 4, 0, 6)))
    runner = open_training(artifact, config.train, anchors=TRAIN_OUTPUTS, on_message=_silent)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with batches(records, config, keys["rpn_keys"], keys["roi_keys"], steps=2, seed=0) as stream:
            steps = [runner.step(batch) for batch in stream]
            assert stream.over_capacity == {"crowd0": 5, "crowd3": 2}
    texts = [str(item.message) for item in caught if issubclass(item.category, CapacityWarning)]
    assert len(texts) == 2, "once an image"
    assert any("crowd0 has 9 objects, network.gt_capacity is 4" in text for text in texts)
    assert all(np.isfinite(step[name]).all() for step in steps for name in TRAIN_OUTPUTS)
