"""What a published file leaves open is asked for; what it cannot be is refused by name."""
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from published_weights import body_of, caffe2_blobs, torch_file, with_gain

from export.weights_convert import CAFFE_INPUT, convert
from runtime.errors import BadInputFile, ConfigError


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
