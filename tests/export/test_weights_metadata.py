"""What a converted file says of itself, what the export makes of it, and the command."""
import dataclasses
import json
import os

import click
import pytest
from click.testing import CliRunner
from published_weights import body_of, converted, torch_file, with_gain
from safetensors import safe_open
from safetensors.numpy import save_file
from tiny_network import TINY

from export.network.detector import build_detector
from export.weights_convert import CAFFE_INPUT, convert
from export.weights_metadata import preprocessing_warning, weights_metadata
from popdet.commands.weights import command
from popdet.config import DataConfig, load_config
from runtime.errors import BadInputFile, ConfigError


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
