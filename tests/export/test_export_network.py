"""The detector as a whole, in torch."""
from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny_network import TINY, random_inputs, tensors

from export.network.backbones.resnet import FrozenNorm
from export.network.detector import (
    INFER_OUTPUTS,
    TRAIN_OUTPUTS,
    build_detector,
    input_signature,
    trainable_names,
)
from runtime.errors import ConfigError


def train_outputs(detector, inputs):
    return dict(zip(TRAIN_OUTPUTS, detector(*tensors(inputs))))


def infer_outputs(detector, image):
    with torch.no_grad():
        return dict(zip(INFER_OUTPUTS, detector(torch.from_numpy(image))))


@pytest.mark.parametrize("backbone", ["tiny", "resnet18", "resnet50", "mobilenet_v2"])
def test_both_graphs_have_the_same_state(backbone):
    config = dataclasses.replace(TINY, backbone=backbone)
    infer, train = (build_detector(config, training).state_dict() for training in (False, True))
    assert list(infer) == list(train)
    assert all(torch.equal(infer[name], train[name]) for name in infer)
    assert {name.split(".")[0] for name in infer} == {"backbone", "rpn", "roi_head", "box_predictor"}


def test_the_seed_decides_the_weights_and_leaves_torchs_own_generator_alone():
    before = torch.random.get_rng_state()
    one, same = (build_detector(TINY, False).state_dict()["rpn.conv.weight"] for _ in range(2))
    other = build_detector(dataclasses.replace(TINY, seed=1), False).state_dict()["rpn.conv.weight"]
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("backbone", ["tiny", "resnet18", "resnet50", "resnet101", "mobilenet_v2"])
def test_random_weights_keep_activations_in_range(backbone):
    detector = build_detector(dataclasses.replace(TINY, backbone=backbone), False)
    image = torch.from_numpy(random_inputs(TINY, False)["image"][:1])
    with torch.no_grad():
        features = detector.backbone(image)
        embedding = detector.roi_head.layer4(features)
    assert features.shape[2:] == (4, 6)  # stride 16
    for activation in (features, embedding):
        assert 0.05 < activation.std().item() < 20


def test_shapes_and_dtypes_are_those_of_the_contract():
    outputs = infer_outputs(build_detector(TINY, False), random_inputs(TINY, False)["image"])
    batch, proposals, detections, anchors = 2, 10, 6, 4 * 6 * 2
    assert {name: (tuple(value.shape), value.dtype) for name, value in outputs.items()} == {
        "boxes": ((batch, detections, 4), torch.float32), "scores": ((batch, detections), torch.float32),
        "classes": ((batch, detections), torch.int32), "count": ((batch,), torch.int32),
        "proposals": ((batch, proposals, 4), torch.float32), "proposal_count": ((batch,), torch.int32),
        "rpn_logits": ((batch, anchors), torch.float32), "rpn_deltas": ((batch, anchors, 4), torch.float32),
        "class_logits": ((batch, proposals, 3), torch.float32), "box_deltas": ((batch, proposals, 8), torch.float32)}
    assert input_signature(TINY, True)["roi_keys"] == (torch.float32, (2, anchors + 4))


def test_detections_are_sorted_inside_the_picture_and_zero_behind_the_count():
    config = dataclasses.replace(TINY, score_threshold=0.34)  # some of the candidates
    outputs = infer_outputs(build_detector(config, False), random_inputs(config, False)["image"])
    for image in range(2):
        count = int(outputs["count"][image])
        scores, found = outputs["scores"][image], outputs["boxes"][image]
        assert 0 < count <= 6
        assert (scores[:count] > 0.34).all()
        assert (scores[:-1] >= scores[1:]).all()
        assert ((outputs["classes"][image, :count] >= 1) & (outputs["classes"][image, :count] <= 2)).all()
        assert (found[:, 2] <= 96).all()
        assert (found[:, 3] <= 64).all()
        assert (found >= 0).all()
        for name in ("boxes", "scores", "classes"):
            assert not outputs[name][image, count:].any()


def test_classes_do_not_suppress_each_other():
    detector = build_detector(dataclasses.replace(TINY, infer_batch=1), False)
    proposals = torch.zeros(1, 10, 4)
    proposals[0, 0] = proposals[0, 1] = torch.tensor([10.0, 10, 40, 40])
    logits = torch.full((1, 10, 3), -9.0)
    logits[0, 0, 1], logits[0, 1, 2] = 5.0, 4.0  # one box, two classes, each seen once
    found = detector.detections(proposals, torch.tensor([2], dtype=torch.int32), logits, torch.zeros(1, 10, 8))
    boxes, _, classes, count = found
    assert count.tolist() == [2]
    assert classes[0, :2].tolist() == [1, 2]
    torch.testing.assert_close(boxes[0, :2], proposals[0, :2])


def test_a_batch_of_different_images_equals_each_image_alone():
    alone = dataclasses.replace(TINY, infer_batch=1, train_batch=1)
    image = random_inputs(TINY, False)["image"]
    together = infer_outputs(build_detector(TINY, False), image)
    single = build_detector(alone, False)
    for row in range(2):
        for name, value in infer_outputs(single, image[row : row + 1]).items():
            torch.testing.assert_close(value[0], together[name][row], rtol=1e-4, atol=1e-4, msg=name)

    inputs = random_inputs(TINY, True)
    detector = build_detector(TINY, True)
    losses = train_outputs(detector, inputs)
    singles = [train_outputs(build_detector(alone, True), {n: a[row : row + 1] for n, a in inputs.items()})
               for row in range(2)]
    for name in TRAIN_OUTPUTS[:5]:
        want = sum(outputs[name] for outputs in singles) / 2
        torch.testing.assert_close(losses[name], want, rtol=1e-5, atol=1e-6)
    for name in TRAIN_OUTPUTS[5:]:
        torch.testing.assert_close(losses[name], torch.cat([outputs[name] for outputs in singles]), rtol=1e-4, atol=1e-4)


def gradients(detector, inputs):
    detector.zero_grad()
    outputs = train_outputs(detector, inputs)
    outputs["loss"].backward()
    return outputs, {name: p.grad for name, p in detector.named_parameters() if p.requires_grad}


def test_the_loss_is_the_sum_of_the_four_and_reaches_every_weight():
    outputs, grads = gradients(build_detector(TINY, True), random_inputs(TINY, True))
    torch.testing.assert_close(outputs["loss"], sum(outputs[name] for name in TRAIN_OUTPUTS[1:5]))
    assert all(outputs[name] > 0 for name in TRAIN_OUTPUTS[1:5])
    without = [name for name, grad in grads.items() if grad is None or not torch.isfinite(grad).all()]
    assert not without
    # the residual branches start at zero, so only their last convolution moves in the first step
    still = [name for name, grad in grads.items() if not grad.any()]
    assert all(".conv1." in name for name in still), still


def test_an_image_without_objects_has_finite_losses_and_trains_on_background():
    inputs = random_inputs(TINY, True)
    inputs["gt_count"][:] = 0
    outputs, grads = gradients(build_detector(TINY, True), inputs)
    assert outputs["loss_rpn_box"] == outputs["loss_roi_box"] == 0
    assert outputs["num_foreground"].tolist() == [0, 0]
    assert outputs["loss_rpn_class"] > 0
    assert outputs["loss_roi_class"] > 0
    assert all(torch.isfinite(grad).all() for grad in grads.values())


@pytest.mark.parametrize("objects", [0, 1])
def test_no_surviving_proposal_gives_finite_losses(objects):
    config = dataclasses.replace(TINY, rpn_min_size=1e6)
    inputs = random_inputs(config, True)
    inputs["gt_count"][:] = objects
    outputs, grads = gradients(build_detector(config, True), inputs)
    assert outputs["proposal_count"].tolist() == [0, 0]
    assert not outputs["proposals"].any()
    assert outputs["num_foreground"].tolist() == [objects, objects]  # the objects themselves are candidates
    assert torch.isfinite(outputs["loss"])
    assert all(torch.isfinite(grad).all() for grad in grads.values())


def test_no_surviving_proposal_gives_no_detection():
    config = dataclasses.replace(TINY, rpn_min_size=1e6, score_threshold=0.0)
    outputs = infer_outputs(build_detector(config, False), random_inputs(config, False)["image"])
    assert outputs["count"].tolist() == outputs["proposal_count"].tolist() == [0, 0]
    assert not outputs["boxes"].any()


def test_the_same_keys_replay_a_step_and_others_change_it():
    detector, inputs = build_detector(TINY, True), random_inputs(TINY, True)
    first, again = (train_outputs(detector, inputs)["loss"] for _ in range(2))
    inputs["rpn_keys"] = inputs["rpn_keys"][:, ::-1].copy()
    assert first == again != train_outputs(detector, inputs)["loss"]


@pytest.mark.parametrize(("frozen", "stages"), [(0, []), (1, ["stem"]), (2, ["stem", "layer1"]),
                                                (4, ["stem", "layer1", "layer2", "layer3"])])
def test_frozen_stages_and_norms_do_not_train(frozen, stages):
    config = dataclasses.replace(TINY, backbone="resnet18", frozen_stages=frozen)
    detector = build_detector(config, True)
    names = trainable_names(config, detector)
    assert names == [name for name, p in detector.named_parameters() if p.requires_grad]
    assert not [name for name in names if name.endswith((".scale", ".shift"))]
    untrained = {name.split(".")[1] for name, _ in detector.named_parameters() if name not in names}
    assert sorted(untrained) == sorted(stages)
    assert {name.split(".")[0] for name in names} >= {"rpn", "roi_head", "box_predictor"}


def test_frozen_norm_is_scale_then_shift():
    norm = FrozenNorm(2)
    norm.scale.copy_(torch.tensor([2.0, 3]).reshape(1, 2, 1, 1))
    norm.shift.copy_(torch.tensor([1.0, -1]).reshape(1, 2, 1, 1))
    assert norm(torch.ones(1, 2, 1, 1)).flatten().tolist() == [3, 2]
    assert not list(norm.parameters())


@pytest.mark.parametrize(("key", "value"), [
    ("frozen_stages", 5), ("backbone", "vgg16"), ("anchor_sizes", ()), ("anchor_ratios", (0.0,)),
    ("roi_positive_fraction", 1.5), ("box_stds", (0.1, 0.1, 0.2, 0.0)), ("max_detections", 0)])
def test_a_value_that_cannot_be_built_is_refused_by_its_key(key, value):
    with pytest.raises(ConfigError, match=f"network.{key}"):
        build_detector(dataclasses.replace(TINY, **{key: value}), False)
