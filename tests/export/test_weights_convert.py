"""Published weights of every format become the same network."""
import collections
import dataclasses
import pickle

import numpy as np
import pytest
import torch
from published_weights import (
    PIXEL_STD,
    body_of,
    caffe2_blobs,
    converted,
    naive_resnet,
    python2_pickle,
    random_resnet,
    torch_file,
)
from safetensors.numpy import load_file
from tiny_network import TINY

from export.network.backbones.resnet import build_resnet
from export.network.detector import build_detector
from export.weights_convert import CAFFE_INPUT, DETECTRON_INPUT, TORCHVISION_INPUT, convert
from runtime.errors import BadInputFile, ConfigError


def check_same_network(state, out, name, stride_in_1x1, pixel_std=1.0):
    """The detector's backbone and layer4 on the whole map give what the naive network gives."""
    config = dataclasses.replace(TINY, backbone=name, weights=out, stride_in_1x1=stride_in_1x1)
    detector = build_detector(config, training=False).eval()
    assert detector.weights_report.missing == ()
    x = pixel_std * torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        found = detector.roi_head.layer4(detector.backbone(x))
        expected = naive_resnet(state, name, x, stride_in_1x1)
    assert found.shape == expected.shape == (1, 512 if name == "resnet18" else 2048, 2, 3)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.05
    if name != "resnet18":
        other = naive_resnet(state, name, x, not stride_in_1x1)
        assert (other - expected).abs().max() > 100 * (found - expected).abs().max()


@pytest.mark.parametrize("legacy", [False, True])
def test_torchvision_pth_becomes_the_same_network(tmp_path, torchvision50, legacy):
    source = torch_file(tmp_path / "r.pth", torchvision50, _use_new_zipfile_serialization=not legacy)
    made, out = converted(tmp_path, source)
    assert made.metadata.source_format == f"torch {'legacy' if legacy else 'zip'}, torchvision names"
    assert (made.metadata.backbone, made.metadata.style, made.metadata.stride_in_1x1) == ("resnet50", "torchvision", False)
    assert made.metadata.preprocessing == TORCHVISION_INPUT
    assert set(made.report.unused) == {n for n in torchvision50 if n.startswith("fc") or n.endswith("tracked")}
    assert made.report.missing == ()
    check_same_network(torchvision50, out, "resnet50", False)


def test_caffe_pth_is_told_by_its_first_convolution_and_becomes_the_same_network(tmp_path, caffe50):
    made, out = converted(tmp_path, torch_file(tmp_path / "any.name", collections.OrderedDict(caffe50)))
    assert (made.metadata.style, made.metadata.stride_in_1x1) == ("caffe", True)
    assert made.metadata.preprocessing == CAFFE_INPUT
    assert "pixels 0..255" in made.reasons[1]
    check_same_network(caffe50, out, "resnet50", True, PIXEL_STD)


@pytest.mark.parametrize("wrap", ["model", "blobs", "flat"])
def test_detectron_pkl_becomes_the_same_network(tmp_path, caffe50, wrap):
    blobs = caffe2_blobs(caffe50)
    tree = {"model": {"model": blobs, "__author__": "MSRA", "matching_heuristics": True}, "blobs": {"blobs": blobs},
            "flat": blobs}[wrap]
    (tmp_path / "R-50.pkl").write_bytes(python2_pickle(tree))
    made, out = converted(tmp_path, str(tmp_path / "R-50.pkl"))
    assert made.metadata.source_format == "pickle, caffe2 names"
    assert (made.metadata.backbone, made.metadata.style, made.metadata.stride_in_1x1) == ("resnet50", "caffe", True)
    assert made.metadata.preprocessing == DETECTRON_INPUT
    assert set(made.report.unused) == {"conv1_b", "fc1000_w", "fc1000_b"}
    assert made.notes == ()
    if wrap == "model":
        check_same_network(caffe50, out, "resnet50", True, PIXEL_STD)


def test_folded_norms_of_a_pkl_reach_the_detector_bit_for_bit(tmp_path, caffe50):
    blobs = caffe2_blobs(caffe50)
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps(blobs, 2))
    _, out = converted(tmp_path, str(tmp_path / "R-50.pkl"))
    detector = build_detector(dataclasses.replace(TINY, backbone="resnet50", weights=out, stride_in_1x1=True), False)
    for ours, blob in (("backbone.stem.norm", "res_conv1_bn"), ("backbone.layer2.3.norm2", "res3_3_branch2b_bn"),
                       ("roi_head.layer4.0.downsample.norm", "res5_0_branch1_bn")):
        for leaf, letter in (("scale", "s"), ("shift", "b")):
            assert np.array_equal(detector.state_dict()[f"{ours}.{leaf}"].numpy().ravel(), blobs[f"{blob}_{letter}"])


def test_detectron2s_own_names_are_read(tmp_path, resnet18):
    renamed = {}
    for name, tensor in resnet18.items():
        name = name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
        for number in "12":
            name = name.replace(f"bn{number}.", f"conv{number}.norm.")
        stem = "" if name.startswith("layer") or name.startswith("fc") else "stem."
        layer = f"res{int(name[5]) + 1}{name[6:]}" if name.startswith("layer") else stem + name
        renamed[layer] = tensor.numpy()
    assert {"stem.conv1.norm.weight", "res3.0.shortcut.norm.bias", "res2.1.conv2.weight"} <= set(renamed)
    (tmp_path / "r.pkl").write_bytes(pickle.dumps({"model": renamed, "__author__": "torchvision"}, 4))
    made, out = converted(tmp_path, str(tmp_path / "r.pkl"))
    assert (made.metadata.source_format, made.metadata.style) == ("pickle, detectron2 names", "torchvision")
    check_same_network(resnet18, out, "resnet18", False)


def test_resnet18_has_no_choice_of_stride(tmp_path, resnet18):
    made, out = converted(tmp_path, torch_file(tmp_path / "r.pth", resnet18))
    assert made.metadata.stride_in_1x1 is None
    check_same_network(resnet18, out, "resnet18", False)
    with pytest.raises(ConfigError, match="resnet18 have no 1x1"):
        build_resnet("resnet18", stride_in_1x1=True)
    with pytest.raises(ConfigError, match="stride_in_1x1"):
        build_detector(dataclasses.replace(TINY, stride_in_1x1=True), False)


def test_resnet101_is_told_by_its_blocks(tmp_path):
    state = {name: torch.full((1,), 0.5).expand(tensor.shape) for name, tensor in random_resnet("resnet101").items()}
    made = convert(torch_file(tmp_path / "r.pth", state), style="caffe")
    assert made.metadata.backbone == "resnet101"
    assert made.report.missing == ()
    assert "looks like torchvision" in made.reasons[1]


def test_a_converted_file_converts_again_to_the_same(tmp_path, caffe50):
    first, out = converted(tmp_path, torch_file(tmp_path / "r.pth", caffe50))
    again = convert(out)
    assert again.metadata.source_format == "safetensors, torchvision names"
    assert again.metadata.source_sha256 != first.metadata.source_sha256
    assert (again.metadata.style, again.metadata.stride_in_1x1, again.metadata.preprocessing) == ("caffe", True, CAFFE_INPUT)
    assert again.report.unused == ()
    tensors = load_file(out)
    assert tensors.keys() == again.tensors.keys()
    assert all(np.array_equal(tensors[name], again.tensors[name]) for name in tensors)


def test_half_double_and_bfloat16_sources_become_float32(tmp_path, resnet18):
    for dtype in (torch.float16, torch.float64, torch.bfloat16):
        state = {name: tensor.to(dtype) for name, tensor in body_of(resnet18).items()}
        made = convert(torch_file(tmp_path / "r.pth", state), backbone="resnet18")
        assert {tensor.dtype for tensor in made.tensors.values()} == {np.dtype(np.float32)}
        assert np.array_equal(made.tensors["conv1.weight"], state["conv1.weight"].float().numpy())


def test_wrapped_and_parallel_state_dicts_are_found(tmp_path, resnet18):
    state = {f"module.{name}": tensor for name, tensor in body_of(resnet18).items()}
    made = convert(torch_file(tmp_path / "r.pth", {"state_dict": state, "epoch": 90}))
    assert "backbone.stem.conv.weight" in made.report.matched


def test_published_mobilenet_keeps_its_tensors(real_data, tmp_path):
    source = str(real_data / "weights" / "mobilenet_v2_imagenet.safetensors")
    made, out = converted(tmp_path, source)
    assert made.metadata.backbone == "mobilenet_v2"
    assert made.metadata.preprocessing is None
    assert "the file does not say" in made.reasons[1]
    assert set(made.report.unused) == {"classifier.weight", "classifier.bias"}
    one, two = (build_detector(dataclasses.replace(TINY, backbone="mobilenet_v2", weights=path), False).state_dict()
                for path in (source, out))
    assert all(torch.equal(one[name], two[name]) for name in one)
    with pytest.raises(ConfigError, match="--style"):
        convert(source, style="caffe")
    with pytest.raises(BadInputFile, match="mobilenet_v2, --backbone is resnet50"):
        convert(source, backbone="resnet50")
