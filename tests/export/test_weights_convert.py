"""Published weights of every format become the same network; what a file cannot be, or cannot tell, is refused."""
from __future__ import annotations

import collections
import dataclasses
import json
import os
import pickle
import zipfile

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from published_weights import PIXEL_STD, caffe2_blobs, naive_resnet, python2_pickle, random_resnet
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tiny_network import TINY

from export.network.backbones.resnet import build_resnet
from export.network.detector import build_detector
from export.weights_convert import CAFFE_INPUT, DETECTRON_INPUT, TORCHVISION_INPUT, convert
from export.weights_metadata import preprocessing_warning, weights_metadata
from popdet.commands.weights import command
from popdet.config import DataConfig, load_config
from runtime.errors import BadInputFile, ConfigError


@pytest.fixture(scope="module")
def torchvision50():
    return random_resnet("resnet50", seed=1, tracked=True)


@pytest.fixture(scope="module")
def caffe50():
    return random_resnet("resnet50", seed=2, pixel_std=PIXEL_STD)


@pytest.fixture(scope="module")
def resnet18():
    return random_resnet("resnet18", seed=3)


def torch_file(path, state, **options):
    torch.save(state, path, **options)
    return str(path)


def body_of(state):
    """No layer4 and no classifier: a small resnet18 for tests about other things."""
    return {name: tensor for name, tensor in state.items() if not name.startswith(("layer4", "fc"))}


def converted(tmp_path, source, **options):
    """(the conversion, path of the file it wrote)"""
    made = convert(source, **options)
    out = tmp_path / "converted.safetensors"
    made.save(out)
    return made, str(out)


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


# What a file leaves open, or cannot be.

def with_gain(state, gain):
    """The state with the median gain of its first convolution set."""
    made = body_of(state)
    norms = made["conv1.weight"].flatten(1).norm(dim=1) * made["bn1.weight"] / (made["bn1.running_var"] + 1e-5).sqrt()
    return {**made, "conv1.weight": made["conv1.weight"] * (gain / norms.quantile(0.5))}


def test_an_undecided_first_convolution_needs_style_or_num_batches_tracked(tmp_path, resnet18):
    state = with_gain(resnet18, 0.03)
    path = torch_file(tmp_path / "r.pth", state)
    with pytest.raises(ConfigError, match=r"gains 0\.03.*--style"):
        convert(path)
    assert convert(path, style="caffe").metadata.preprocessing == CAFFE_INPUT
    tracked = {**state, "bn1.num_batches_tracked": torch.tensor(5)}
    assert convert(torch_file(tmp_path / "t.pth", tracked)).metadata.style == "torchvision"
    for gain, style in ((0.01, "caffe"), (0.1, "torchvision")):
        assert convert(torch_file(tmp_path / "g.pth", with_gain(resnet18, gain))).metadata.style == style
    del state["conv1.weight"]
    with pytest.raises(ConfigError, match="is missing"):
        convert(torch_file(tmp_path / "m.pth", state))


def test_style_overrides_the_content_and_says_what_it_looked_like(tmp_path, resnet18):
    made = convert(torch_file(tmp_path / "r.pth", body_of(resnet18)), style="caffe")
    assert made.metadata.style == "caffe"
    assert made.reasons[1].startswith("style caffe: given; but")


def refused(path, match, error=BadInputFile, **options):
    with pytest.raises(error, match=match) as caught:
        convert(str(path), **options)
    assert str(caught.value).startswith(f"{path}: ")
    assert len(str(caught.value)) < 600
    return str(caught.value)


def test_missing_tensors_are_listed_and_an_unknown_backbone_is_asked_for(tmp_path, resnet18):
    made = convert(torch_file(tmp_path / "r.pth", body_of(resnet18)))
    assert made.report.missing
    assert all(name.startswith("roi_head.layer4.") for name in made.report.missing)
    assert "random" in made.notes[0]
    stem = {name: tensor for name, tensor in resnet18.items() if not name.startswith("layer")}
    path = torch_file(tmp_path / "stem.pth", stem)
    refused(path, "none of a ResNet's blocks")
    assert convert(path, backbone="resnet18").report.matched == (
        "backbone.stem.conv.weight", "backbone.stem.norm.scale", "backbone.stem.norm.shift")


def test_another_backbone_than_given_is_refused(tmp_path, resnet18):
    path = torch_file(tmp_path / "r.pth", resnet18)
    for name in ("resnet50", "resnet101"):
        refused(path, rf"\(resnet18\), --backbone is {name}", backbone=name)
    refused(path, r"\(resnet18\), --backbone is mobilenet_v2", backbone="mobilenet_v2")
    foreign = torch_file(tmp_path / "f.pth", {"encoder.weight": torch.zeros(3)})
    refused(foreign, "none of its 1 tensors fits backbone 'resnet18'", backbone="resnet18")
    with pytest.raises(ConfigError, match="tiny"):
        convert(path, backbone="tiny")
    deeper = {**resnet18, "layer3.5.conv1.weight": torch.zeros(256, 256, 3, 3)}
    refused(torch_file(tmp_path / "34.pth", deeper), r"\(2, 2, 6, 2\)")
    refused(torch_file(tmp_path / "34.pth", deeper), r"\(2, 2, 6, 2\)", backbone="resnet18")


def test_a_wrong_shape_is_refused_by_name(tmp_path, resnet18):
    state = {**resnet18, "layer2.0.downsample.0.weight": torch.zeros(128, 64, 3, 3)}
    message = refused(torch_file(tmp_path / "r.pth", state), "backbone.layer2.0.downsample.conv.weight")
    assert "[128, 64, 3, 3], the network needs [128, 64, 1, 1]" in message
    refused(torch_file(tmp_path / "n.pth", {**resnet18, "bn1.weight": torch.zeros(64, 1)}), "'bn1' differ in shape")
    refused(torch_file(tmp_path / "e.pth", {**resnet18, "conv1.weight": torch.zeros(1).expand(1 << 40)}), "larger than any")


def test_norms_that_are_incomplete_double_or_impossible_are_refused(tmp_path, resnet18):
    state = dict(resnet18)
    del state["layer1.0.bn1.weight"]
    refused(torch_file(tmp_path / "r.pth", state), "lacks 'layer1.0.bn1.weight'")
    refused(torch_file(tmp_path / "r.pth", {**resnet18, "bn1.scale": torch.zeros(64)}), "'bn1' is there twice")
    refused(torch_file(tmp_path / "r.pth", {**resnet18, "bn1.running_var": -torch.ones(64)}), r"bn1\.running_var")
    blobs = caffe2_blobs(resnet18)
    del blobs["res2_0_branch2a_bn_b"]
    (tmp_path / "r.pkl").write_bytes(pickle.dumps(blobs, 2))
    refused(tmp_path / "r.pkl", r"lacks 'layer1\.0\.bn1\.shift'")


def test_values_that_are_not_finite_or_not_floats_are_refused(tmp_path, resnet18):
    for value, dtype, match in ((float("nan"), torch.float32, "not finite"), (1e300, torch.float64, "not finite"),
                                (3, torch.int8, "int8, expected floating"), (1j, torch.complex64, "real numbers")):
        state = {**body_of(resnet18), "layer1.0.conv1.weight": torch.full((64, 64, 3, 3), value, dtype=dtype)}
        assert "layer1.0.conv1.weight" in refused(torch_file(tmp_path / "r.pth", state), match)


def test_a_bias_before_a_norm_is_left_out_and_said(tmp_path, resnet18):
    blobs = {**caffe2_blobs(resnet18), "conv1_b": np.full(64, 0.25, np.float32)}
    (tmp_path / "r.pkl").write_bytes(pickle.dumps(blobs, 2))
    made = convert(str(tmp_path / "r.pkl"))
    assert len(made.notes) == 1
    assert "'conv1_b' is not zero (up to 0.25)" in made.notes[0]


def test_a_truncated_pth_is_refused(tmp_path, resnet18):
    for legacy in (False, True):
        path = torch_file(tmp_path / "r.pth", body_of(resnet18), _use_new_zipfile_serialization=not legacy)
        content = open(path, "rb").read()
        for length in (len(content) - 100, len(content) // 2, 1000, 40):
            cut = tmp_path / "cut.pth"
            cut.write_bytes(content[:length])
            refused(cut, "damaged|Python objects")


class Evil:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pth_that_runs_code_is_refused_and_does_not_run(tmp_path, legacy):
    mark = tmp_path / "ran"
    torch.save({"conv1.weight": Evil(f"touch {mark}")}, tmp_path / "e.pth", _use_new_zipfile_serialization=not legacy)
    refused(tmp_path / "e.pth", "posix.system")
    torch.save(torch.nn.Conv2d(1, 1, 1), tmp_path / "m.pth", _use_new_zipfile_serialization=not legacy)
    refused(tmp_path / "m.pth", "torch.nn.modules.conv.Conv2d")
    (tmp_path / "e.pkl").write_bytes(pickle.dumps({"conv1_w": Evil(f"touch {mark}")}, 2))
    refused(tmp_path / "e.pkl", "posix.system")
    assert not mark.exists()


def test_many_names_of_one_large_tensor_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("export.weights_formats.MAX_BYTES", 10_000_000)
    array = np.zeros(1_000_000, np.float32)
    (tmp_path / "r.pkl").write_bytes(pickle.dumps({f"w{i}": array for i in range(10)}, 2))
    assert (tmp_path / "r.pkl").stat().st_size < 10_000_000
    refused(tmp_path / "r.pkl", "together")


def test_a_zip_that_unpacks_to_more_than_any_backbone_is_refused(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(20_000_000))
    monkeypatch.setattr("export.weights_formats.MAX_BYTES", 10_000_000)
    assert (tmp_path / "bomb.pth").stat().st_size < 100_000
    refused(tmp_path / "bomb.pth", "unpacks to 20000000 bytes")


def test_what_is_no_weights_file_is_refused(tmp_path):
    for name, data, match in (("empty.pth", b"", "is empty"), ("page.pth", b"<html>404 Not Found</html>", "no weights file"),
                              ("a.zip", b"PK\x03\x04" + bytes(50), "damaged"), ("short.pkl", b"\x80", "damaged pickle"),
                              ("none.pkl", pickle.dumps(None, 2), "holds a NoneType"),
                              ("e.pkl", pickle.dumps({}, 2), "no tensors"),
                              ("old.tar", bytes(257) + b"ustar\x0000" + bytes(300), "tar file"),
                              ("bad.safetensors", b"\x02\x00\x00\x00\x00\x00\x00\x00{]" + bytes(9), "safetensors")):
        (tmp_path / name).write_bytes(data)
        refused(tmp_path / name, match)
    refused(tmp_path, "is not a file")
    refused(tmp_path / "nowhere.pth", "No such file")
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "is not a file")
    refused(torch_file(tmp_path / "t.pth", torch.zeros(3)), "holds a Tensor")
    refused(torch_file(tmp_path / "f.pth", {"encoder.weight": torch.zeros(3)}), "'encoder.weight'")


# What the file says of itself, and what the export makes of it.

def test_metadata_is_read_by_safetensors_itself(tmp_path, caffe50):
    _, out = converted(tmp_path, torch_file(tmp_path / "r.pth", caffe50))
    with safe_open(out, framework="numpy") as stream:
        found = stream.metadata()
    assert found["source_format"] == "torch zip, torchvision names"
    assert len(found["source_sha256"]) == 64
    assert (found["channel_order"], found["stride_in_1x1"], found["backbone"]) == ("bgr", "true", "resnet50")
    assert (json.loads(found["pixel_mean"]), json.loads(found["pixel_std"])) == ([102.9801, 115.9465, 122.7717], [1.0] * 3)
    assert json.loads(found["pixel_scale"]) == 1.0


def test_the_export_refuses_another_stride_and_another_backbone(tmp_path, caffe50):
    _, out = converted(tmp_path, torch_file(tmp_path / "r.pth", caffe50))
    with pytest.raises(ConfigError, match=r"-o network\.stride_in_1x1=true"):
        build_detector(dataclasses.replace(TINY, backbone="resnet50", weights=out), False)
    with pytest.raises(ConfigError, match=r"-o network\.backbone=resnet50"):
        build_detector(dataclasses.replace(TINY, backbone="resnet101", weights=out), False)


def test_another_input_is_warned_of_with_overrides_that_cure_it(tmp_path, caffe50, torchvision50):
    made, out = converted(tmp_path, torch_file(tmp_path / "r.pth", caffe50))
    message = preprocessing_warning(out, DataConfig())
    assert "-o 'data.channel_order=bgr'" in message
    overrides = [part.split("'")[0] for part in message.split("-o '")[1:]]
    cured = load_config(None, overrides)
    assert preprocessing_warning(out, cured.data) is None
    assert cured.data.pixel_mean == CAFFE_INPUT.pixel_mean
    for key, value in (("channel_order", "rgb"), ("pixel_scale", 1 / 255), ("pixel_mean", (103.53, 116.28, 123.675)),
                       ("pixel_std", (1.0, 1.0, 2.0))):
        assert preprocessing_warning(out, dataclasses.replace(cured.data, **{key: value})) is not None, key
    config = load_config(None, made.overrides(out))
    assert (config.network.weights, config.network.stride_in_1x1) == (out, True)
    _, out = converted(tmp_path, torch_file(tmp_path / "r.pth", torchvision50))
    assert preprocessing_warning(out, DataConfig()) is None
    in_pixels = DataConfig(pixel_scale=1.0, pixel_mean=(123.675, 116.28, 103.53), pixel_std=(58.395, 57.12, 57.375))
    assert preprocessing_warning(out, in_pixels) is None


def test_a_file_without_our_metadata_has_none_and_warns_of_nothing(tmp_path, resnet18):
    save_file({"conv1.weight": resnet18["conv1.weight"].numpy()}, tmp_path / "w.safetensors", metadata={"backbone": "x"})
    assert weights_metadata(str(tmp_path / "w.safetensors")) is None
    assert preprocessing_warning(str(tmp_path / "w.safetensors"), DataConfig()) is None


@pytest.mark.parametrize("key, value", [
    ("popdet.weights", "2"), ("backbone", None), ("stride_in_1x1", "1"), ("stride_in_1x1", "yes"), ("channel_order", "grb"),
    ("pixel_scale", "0"), ("pixel_scale", "NaN"), ("pixel_scale", None), ("pixel_mean", "[1, 2]"),
    ("pixel_mean", "[1, 2, true]"),
    ("pixel_std", "[1, 1, 0]"), ("pixel_std", "[" * 100_000), ("pixel_mean", "[1e999, 0, 0]"),
    ("pixel_mean", "[1" + "0" * 400 + ", 0, 0]")])
def test_nonsense_in_the_metadata_is_refused_by_key(tmp_path, resnet18, key, value):
    made = convert(torch_file(tmp_path / "r.pth", with_gain(resnet18, 0.1)))
    strings = {"stride_in_1x1": "false", **made.metadata.to_strings(), key: value}
    strings = {name: text for name, text in strings.items() if text is not None}
    save_file(dict(made.tensors), tmp_path / "w.safetensors", metadata=strings)
    with pytest.raises(BadInputFile, match="its metadata") as caught:
        weights_metadata(str(tmp_path / "w.safetensors"))
    assert key in str(caught.value) or key == "popdet.weights"


# The command.

def run(*arguments):
    return CliRunner().invoke(command, ["convert", *map(str, arguments)])


def test_the_command_writes_the_file_and_reports_it(tmp_path, resnet18):
    source = torch_file(tmp_path / "r.pth", body_of(resnet18))
    result = run(source, tmp_path / "w.safetensors")
    assert result.exit_code == 0, result.output
    assert "backbone resnet18" in result.output
    assert "-o 'data.channel_order=rgb'" in result.output
    assert "of them not in the file: roi_head.layer4.0.conv1.weight" in result.output
    report = json.loads(run(source, tmp_path / "w2.safetensors", "--json").output)
    assert report["metadata"]["style"] == "torchvision"
    assert report["unused"] == []
    assert (tmp_path / "w.safetensors").read_bytes() == (tmp_path / "w2.safetensors").read_bytes()


def test_a_failed_conversion_leaves_the_old_file_and_no_other(tmp_path, resnet18):
    out = tmp_path / "out" / "w.safetensors"
    assert run(torch_file(tmp_path / "r.pth", body_of(resnet18)), out).exit_code == 0
    before = out.read_bytes()
    (tmp_path / "bad.pth").write_bytes(b"nothing")
    assert isinstance(run(tmp_path / "bad.pth", out).exception, BadInputFile)
    assert out.read_bytes() == before
    assert os.listdir(out.parent) == ["w.safetensors"]


def test_an_out_that_cannot_be_is_refused(tmp_path, resnet18):
    source = torch_file(tmp_path / "r.pth", body_of(resnet18))
    (tmp_path / "d.safetensors").mkdir()
    (tmp_path / "file").write_bytes(b"")
    for out, match in ((tmp_path / "w.pth", "OUT.safetensors"), (tmp_path / "d.safetensors", "folder"),
                       (tmp_path / "file" / "w.safetensors", "cannot be written")):
        error = run(source, out).exception
        assert isinstance(error, ConfigError)
        assert match in str(error)
    assert isinstance(command, click.Group)
