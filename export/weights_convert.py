"""Turn published backbone weights into the safetensors file that a config's network.weights names.

The file's tensors are kept as they are (float32, torchvision's names), less those that a detector has no place for. What
the tensors cannot say goes into the metadata: the backbone, the stride's place and the input they were trained on.

Two styles of ResNet exist. torchvision: RGB, mean and std of ImageNet, stride in the 3x3 convolution. caffe: BGR, pixels
0..255 less their mean, stride in the first 1x1. Where names do not tell, the first convolution does: made for inputs about
58 times larger, its filters times the norm's scale are about 58 times smaller.
"""
from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Tuple

import numpy as np
import torch
from safetensors.numpy import save
from torch import Tensor, nn

from export.network.backbones.mobilenet_v2 import build_mobilenet_v2
from export.network.backbones.parts import Backbone
from export.network.backbones.resnet import BASIC, DEPTHS, build_resnet
from export.network.roi_head import RoiHead
from export.weights import Converted, WeightsReport, as_float32, match_backbone
from export.weights_formats import Source, read_source
from export.weights_metadata import Preprocessing, WeightsMetadata, preprocessing_overrides
from runtime.errors import BadInputFile, ConfigError

BACKBONES = (*DEPTHS, "mobilenet_v2")
STYLES = ("torchvision", "caffe")
TORCHVISION_INPUT = Preprocessing("rgb", 1 / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
DETECTRON_INPUT = Preprocessing("bgr", 1.0, (103.53, 116.28, 123.675), (1.0, 1.0, 1.0))  # Detectron2's defaults
CAFFE_INPUT = Preprocessing("bgr", 1.0, (102.9801, 115.9465, 122.7717), (1.0, 1.0, 1.0))  # py-faster-rcnn's means
# Median over the first convolution's filters of |scale| * L2 norm. A norm's weight is 0.1 to 0.5 and natural pictures give a
# filter of norm 1 about their own deviation: 1 after ImageNet's std, 58 in pixels. Between the two, nothing is claimed.
CAFFE_GAIN, TORCHVISION_GAIN = 0.02, 0.05


@dataclass(frozen=True)
class Conversion:
    """What becomes of one source file."""

    tensors: Mapping[str, np.ndarray]  # float32, contiguous, ready to write
    metadata: WeightsMetadata
    report: WeightsReport
    reasons: Tuple[str, ...]  # what was decided, and why
    notes: Tuple[str, ...]  # what the user should know

    def save(self, path: Path) -> None:
        """Write the safetensors file, the same bytes for the same tensors; raises OSError."""
        data = save(dict(self.tensors), metadata=self.metadata.to_strings())
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])  # the library writes the metadata in random order
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with open(path, "wb") as stream:
            stream.writelines((len(text).to_bytes(8, "little"), text, memoryview(data)[8 + length :]))

    def overrides(self, out: str) -> List[str]:
        """`key=value` of every config key that these weights decide."""
        made = [f"network.backbone={self.metadata.backbone}", f"network.weights={out}"]
        if self.metadata.stride_in_1x1 is not None:
            made.append(f"network.stride_in_1x1={'true' if self.metadata.stride_in_1x1 else 'false'}")
        expected = self.metadata.preprocessing
        return made + (preprocessing_overrides(expected) if expected else [])

    def to_dict(self, out: str) -> Dict[str, Any]:
        """Plain values for --json."""
        return {"out": out, "metadata": self.metadata.to_strings(), "reasons": list(self.reasons), "notes": list(self.notes),
                "matched": list(self.report.matched), "missing": list(self.report.missing),
                "unused": list(self.report.unused), "overrides": self.overrides(out)}


def convert(path: str, backbone: Optional[str] = None, style: Optional[str] = None) -> Conversion:
    """Read a published file and match it to a backbone. backbone, style: None to tell them from the content.

    Raises BadInputFile (unreadable, another network, a wrong shape, nothing fits, not finite) and ConfigError (a choice
    that the content leaves open, or one that does not exist for this backbone).
    """
    if backbone is not None and backbone not in BACKBONES:
        raise ConfigError(f"--backbone {backbone}: no published weights are known for it; one of {', '.join(BACKBONES)}")
    if style is not None and style not in STYLES:
        raise ConfigError(f"--style {style}: expected one of {', '.join(STYLES)}")
    source = read_source(path)
    name, why_backbone = _backbone(source, backbone)
    values, found = match_backbone(source.tensors, name, expected_state(name), path)
    tensors = _float32(source, values)
    metadata, why_style = _described(source, name, style, values)
    report = WeightsReport(found.matched, found.missing, tuple(sorted(source.original_names[item] for item in found.unused)))
    return Conversion(tensors, metadata, report, (why_backbone, why_style), tuple(_notes(source, found, metadata)))


def expected_state(backbone: str) -> Mapping[str, Tensor]:
    """Names and shapes of a detector's backbone and layer4, without memory."""
    with torch.device("meta"):
        parts = build_mobilenet_v2() if backbone == "mobilenet_v2" else build_resnet(backbone)
        return nn.ModuleDict({"backbone": Backbone(parts), "roi_head": RoiHead(parts.layer4)}).state_dict()


def _backbone(source: Source, given: Optional[str]) -> Tuple[str, str]:
    """The backbone's name and why; BadInputFile where the file's blocks are not those of the given one."""
    if source.naming == "mobilenet":
        if given not in (None, "mobilenet_v2"):
            raise BadInputFile(f"{source.path}: its names are those of mobilenet_v2, --backbone is {given}")
        return "mobilenet_v2", "backbone mobilenet_v2: its names"
    counts, basic = _blocks(source.tensors)
    shown = f"blocks {tuple(counts.values())} of {'two 3x3' if basic else '1x1, 3x3, 1x1'} convolutions"
    fitting = [name for name, depths in DEPTHS.items() if counts and (name in BASIC) == basic and
               all(depths[layer - 1] == count for layer, count in counts.items())]
    if given is None:
        if len(fitting) != 1:
            first = next(iter(source.tensors))
            what = f"has {shown}" if counts else f"has none of a ResNet's blocks, the first tensor is '{first}'"
            raise BadInputFile(f"{source.path}: {what}, so its backbone is not known (of {', '.join(BACKBONES)}); name it "
                               "with --backbone if it is one of them")
        return fitting[0], f"backbone {fitting[0]}: {shown}"
    wrong_kind = given in DEPTHS and counts and (given in BASIC) != basic
    too_deep = given in DEPTHS and any(count > DEPTHS[given][layer - 1] for layer, count in counts.items())
    if wrong_kind or too_deep or (fitting and given not in fitting):
        raise BadInputFile(f"{source.path}: has {shown}{' (' + fitting[0] + ')' if fitting else ''}, --backbone is {given}")
    return given, f"backbone {given}: given"


def _blocks(tensors: Mapping[str, np.ndarray]) -> Tuple[Dict[int, int], bool]:
    """Layer 1..4 -> number of its blocks (layers that are there), and whether the blocks have no third convolution."""
    counts: Dict[int, int] = {}
    basic = True
    for name in tensors:
        match = re.match(r"layer([1-4])\.(\d{1,4})\.(conv\d)?", name)
        if match:
            layer = int(match.group(1))
            counts[layer] = max(counts.get(layer, 0), int(match.group(2)) + 1)
            basic = basic and match.group(3) != "conv3"
    return dict(sorted(counts.items())), basic


def _float32(source: Source, values: Converted) -> Dict[str, np.ndarray]:
    """The tensors to write: those of the source that found a place."""
    names = sorted({name for _, names in values.values() for name in names})
    return {name: np.ascontiguousarray(as_float32(source.tensors[name], name, source.path)) for name in names}


def _described(source: Source, backbone: str, given: Optional[str], values: Converted) -> Tuple[WeightsMetadata, str]:
    """The metadata of the result, and why it says so."""
    before = source.metadata
    if backbone == "mobilenet_v2":
        if given is not None:
            raise ConfigError(f"--style is a choice between published ResNets; {source.path} is a mobilenet_v2, leave it out")
        expected = before.preprocessing if before else None
        return (WeightsMetadata(backbone, "mobilenet_v2", source.format, source.sha256, None, expected),
                "input: as its metadata says" if expected else "input: the file does not say; see where it was published")
    style, why = _style(source, given, values)
    if before is not None and before.style == style:
        expected = before.preprocessing
    elif style == "torchvision":
        expected = TORCHVISION_INPUT
    else:
        expected = CAFFE_INPUT if source.naming == "torchvision" else DETECTRON_INPUT
    stride = None if backbone in BASIC else style == "caffe"
    return WeightsMetadata(backbone, style, source.format, source.sha256, stride, expected), f"style {style}: {why}"


def _style(source: Source, given: Optional[str], values: Converted) -> Tuple[str, str]:
    """torchvision or caffe, and why; ConfigError where the file leaves it open."""
    gain = _first_gain(values)
    measured = None
    if gain is not None:
        measured = "caffe" if gain < CAFFE_GAIN else "torchvision" if gain > TORCHVISION_GAIN else None
    looks = f"its first convolution gains {gain:.2g}" if gain is not None else "its first convolution is missing"
    doubt = f"; but {looks}, which looks like {measured}"
    if given is not None:
        return given, "given" + (doubt if measured not in (None, given) else "")
    if source.metadata is not None and source.metadata.style in STYLES:
        return source.metadata.style, "as its metadata says"
    if source.naming == "caffe2":
        return "caffe", "the names are caffe2's" + (doubt if measured == "torchvision" else "")
    if measured is not None:
        inputs = "pixels 0..255" if measured == "caffe" else "inputs of deviation 1"
        return measured, f"{looks}, made for {inputs}"
    if any(name.endswith("num_batches_tracked") for name in source.tensors):
        return "torchvision", "num_batches_tracked is there, which caffe's conversions lack"
    raise ConfigError(f"{source.path}: {looks}, so it is not clear whether it is torchvision's (RGB, stride in the 3x3) or "
                      "caffe's (BGR 0..255, stride in the 1x1); say so with --style")


def _first_gain(values: Converted) -> Optional[float]:
    """Median over the filters of conv1 of |scale| * L2 norm; None where conv1 or its norm is missing."""
    if "backbone.stem.conv.weight" not in values or "backbone.stem.norm.scale" not in values:
        return None
    weight, scale = values["backbone.stem.conv.weight"][0], values["backbone.stem.norm.scale"][0]
    norms = np.sqrt((weight.astype(np.float64) ** 2).sum(axis=(1, 2, 3)))
    return float(np.median(norms * np.abs(scale.reshape(-1).astype(np.float64))))


def _notes(source: Source, found: WeightsReport, metadata: WeightsMetadata) -> List[str]:
    notes = []
    if found.missing:
        notes.append(f"{len(found.missing)} tensors of {metadata.backbone} are not in the file; the export leaves them random")
    for name in found.unused:
        if re.fullmatch(r"(layer\d\.\d+\.)?(conv\d|downsample\.0)\.bias", name) and np.any(source.tensors[name]):
            notes.append(f"'{source.original_names[name]}' is not zero (up to {np.abs(source.tensors[name]).max():.2g}) and is "
                         "left out, as Detectron2 does: a convolution before a norm has no bias here")
    return notes
