"""Pretrained weights: the right tensor in the right place, and files that cannot be used."""
from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from tiny_network import TINY
from torch import nn

from export.network.detector import build_detector
from export.weights import NORM_EPSILON
from runtime.errors import BadInputFile, ConfigError

RESNET = dataclasses.replace(TINY, backbone="resnet18")
MOBILENET = dataclasses.replace(TINY, backbone="mobilenet_v2")


def published_resnet18(seed=0):
    """Random tensors under torchvision's names and shapes."""
    random = np.random.default_rng(seed)
    tensors = {}

    def add(conv, norm, out_channels, in_channels, kernel):
        tensors[f"{conv}.weight"] = random.standard_normal((out_channels, in_channels, kernel, kernel)).astype(np.float32)
        for leaf in ("weight", "bias", "running_mean"):
            tensors[f"{norm}.{leaf}"] = random.standard_normal(out_channels).astype(np.float32)
        tensors[f"{norm}.running_var"] = random.uniform(0.1, 2, out_channels).astype(np.float32)
        tensors[f"{norm}.num_batches_tracked"] = np.asarray(7)

    add("conv1", "bn1", 64, 3, 7)
    channels = 64
    for layer in range(1, 5):
        width = 32 * 2**layer
        for block in range(2):
            name = f"layer{layer}.{block}"
            add(f"{name}.conv1", f"{name}.bn1", width, channels, 3)
            add(f"{name}.conv2", f"{name}.bn2", width, width, 3)
            if channels != width:
                add(f"{name}.downsample.0", f"{name}.downsample.1", width, channels, 1)
            channels = width
    tensors["fc.weight"] = np.zeros((1000, 512), np.float32)
    return tensors


@pytest.fixture(scope="module")
def resnet_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "resnet18.safetensors"
    save_file(published_resnet18(), path)
    return str(path)


def test_torchvision_resnet_fills_every_tensor_of_backbone_and_layer4(resnet_file):
    detector = build_detector(dataclasses.replace(RESNET, weights=resnet_file), False)
    report = detector.weights_report
    assert report.missing == ()
    assert set(report.matched) == {n for n in detector.state_dict() if n.startswith(("backbone.", "roi_head."))}
    assert set(report.unused) == {"fc.weight"} | {n for n in published_resnet18() if n.endswith("num_batches_tracked")}


def test_torchvision_batch_norm_becomes_the_same_function(resnet_file):
    tensors = published_resnet18()
    norm = nn.BatchNorm2d(128, eps=NORM_EPSILON).eval()
    norm.load_state_dict({leaf: torch.from_numpy(np.array(tensors[f"layer2.0.downsample.1.{leaf}"]))
                          for leaf in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")})
    detector = build_detector(dataclasses.replace(RESNET, weights=resnet_file), False)
    x = torch.randn(2, 128, 3, 3)
    torch.testing.assert_close(detector.backbone.layer2[0].downsample.norm(x), norm(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(detector.roi_head.layer4[1].conv2.weight, torch.from_numpy(tensors["layer4.1.conv2.weight"]))


def test_published_mobilenet_fills_every_tensor(real_data):
    path = str(real_data / "weights" / "mobilenet_v2_imagenet.safetensors")
    detector = build_detector(dataclasses.replace(MOBILENET, weights=path), False)
    assert detector.weights_report.missing == ()
    assert set(detector.weights_report.unused) == {"classifier.weight", "classifier.bias"}


def test_published_mobilenet_classifies_like_the_layers_in_one_piece(real_data):
    """backbone then layer4 on the whole map is the published network: a cat of VOC is a cat of ImageNet."""
    tensors = load_file(real_data / "weights" / "mobilenet_v2_imagenet.safetensors")
    path = str(real_data / "weights" / "mobilenet_v2_imagenet.safetensors")
    detector = build_detector(dataclasses.replace(MOBILENET, weights=path), False)
    voc = real_data / "voc2007-part" / "VOC2007"
    found, tried = 0, 0
    from PIL import Image

    names = (voc / "ImageSets" / "Main" / "val.txt").read_text().split()
    for name in names:
        labels = set(re.findall(r"<name>(\w+)</name>", (voc / "Annotations" / f"{name}.xml").read_text()))
        if "cat" not in labels or len(labels) > 1 or tried == 6:
            continue
        tried += 1
        image = np.asarray(Image.open(voc / "JPEGImages" / f"{name}.jpg").convert("RGB").resize((224, 224)), np.float32)
        with torch.no_grad():
            x = torch.from_numpy(image / 127.5 - 1).permute(2, 0, 1)[None]
            embedding = detector.roi_head.layer4(detector.backbone(x)).mean(dim=(2, 3))
            scores = embedding @ torch.from_numpy(tensors["classifier.weight"].astype(np.float32)[:, :, 0, 0]).T
            best = int((scores + torch.from_numpy(tensors["classifier.bias"].astype(np.float32)))[0].argmax())
        found += 282 <= best <= 286  # tabby, tiger cat, Persian, Siamese, Egyptian; class 0 is the background
    assert tried >= 3
    assert found >= tried / 2


def test_another_seed_changes_the_heads_and_not_the_pretrained_backbone(resnet_file):
    one, two = (build_detector(dataclasses.replace(RESNET, weights=resnet_file, seed=seed), False).state_dict()
                for seed in (0, 1))
    assert torch.equal(one["backbone.layer1.0.conv1.weight"], two["backbone.layer1.0.conv1.weight"])
    assert not torch.equal(one["rpn.conv.weight"], two["rpn.conv.weight"])


def refused(tmp_path, tensors, config=RESNET):
    path = tmp_path / "w.safetensors"
    save_file(tensors, path)
    with pytest.raises(BadInputFile) as caught:
        build_detector(dataclasses.replace(config, weights=str(path)), False)
    return str(caught.value)


def test_a_tensor_of_another_shape_is_refused_by_name(tmp_path):
    tensors = published_resnet18()
    tensors["layer1.0.conv1.weight"] = np.zeros((64, 64, 1, 1), np.float32)
    message = refused(tmp_path, tensors)
    assert "backbone.layer1.0.conv1.weight" in message
    assert "[64, 64, 1, 1]" in message


def test_a_batch_norm_without_its_variance_is_refused_by_name(tmp_path):
    tensors = published_resnet18()
    del tensors["bn1.running_var"]
    assert "bn1.running_var" in refused(tmp_path, tensors)


def test_a_file_of_another_network_is_refused(tmp_path):
    assert "none of its 1 tensors fits" in refused(tmp_path, {"encoder.weight": np.zeros(3, np.float32)})


def test_a_missing_a_truncated_and_a_foreign_file_are_refused(tmp_path, resnet_file):
    content = open(resnet_file, "rb").read()
    for name, data in (("cut.safetensors", content[:1000]), ("text.safetensors", b"not weights"), ("empty", b"")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(BadInputFile, match=name):
            build_detector(dataclasses.replace(RESNET, weights=str(tmp_path / name)), False)
    with pytest.raises(BadInputFile, match="no such weights file"):
        build_detector(dataclasses.replace(RESNET, weights=str(tmp_path / "nowhere.safetensors")), False)


def test_weights_for_a_backbone_without_published_ones_are_refused(resnet_file):
    with pytest.raises(ConfigError, match="'tiny' has no published weights"):
        build_detector(dataclasses.replace(TINY, weights=resnet_file), False)
