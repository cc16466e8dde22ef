"""Bring published backbone weights into the detector: which tensor goes where, and what did not fit.

Two layouts are known, both as safetensors:
- mobilenet_v2: features.<block>.<conv|expand|depthwise|project>.{weight, bias}, batch norm folded
- resnet*: torchvision's names (conv1.weight, bn1.running_mean, layer1.0.downsample.0.weight ...), batch norm not folded
"""
from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, Mapping, Optional, Sequence, Tuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file
from torch import nn

from export.network.backbones.mobilenet_v2 import STAGES as MOBILENET_STAGES
from runtime.errors import BadInputFile, ConfigError

NORM_EPSILON = 1e-5  # torchvision's
_RESNET_NORM = re.compile(r"(^|\.)(bn\d|downsample\.1)\.(weight|bias|running_mean|running_var)$")


# Detector name -> (float32 array, names in the file it was made of).
Converted = Dict[str, Tuple[np.ndarray, Tuple[str, ...]]]


@dataclass(frozen=True)
class WeightsReport:
    """What a weights file gave: names of the detector's tensors, and of the file's."""

    matched: Tuple[str, ...]  # tensors of the detector that were set
    missing: Tuple[str, ...]  # backbone and layer4 tensors that the file lacks and that stay random
    unused: Tuple[str, ...]  # tensors of the file that no module wants, such as the classifier's


def load_backbone_weights(detector: nn.Module, backbone: str, path: str) -> WeightsReport:
    """Set the backbone and layer4 of `detector` from a safetensors file.

    Raises BadInputFile where the file cannot be read, a shape is wrong, or nothing of it fits.
    """
    tensors = read_safetensors(path)
    converted = convert_backbone(tensors, backbone, path)
    own = detector.state_dict()
    wanted = {name for name in own if name.startswith(("backbone.", "roi_head."))}
    values = {name: tensor for name, (tensor, _) in converted.items() if name in wanted}
    sources = {source for name in values for source in converted[name][1]}
    if not values:
        raise BadInputFile(f"{path}: none of its {len(tensors)} tensors fits backbone '{backbone}'; the first is "
                           f"'{next(iter(tensors), '(no tensor)')}'. Is it another network's file?")
    assign_state(detector, values, path)
    return WeightsReport(tuple(sorted(values)), tuple(sorted(wanted - set(values))),
                         tuple(sorted(set(tensors) - sources)))


def read_safetensors(path: str) -> Dict[str, np.ndarray]:
    """All tensors of a file; BadInputFile where it is missing or damaged."""
    if not Path(path).is_file():
        raise BadInputFile(f"{path}: no such weights file; name an existing safetensors file or leave network.weights empty")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise BadInputFile(f"{path}: not a readable safetensors file: {' '.join(str(error).split())}") from error


def assign_state(module: nn.Module, values: Mapping[str, np.ndarray], source: str) -> None:
    """Copy named arrays into the module's state; BadInputFile on an unknown name or another shape."""
    own = module.state_dict()
    for name, value in values.items():
        if name not in own:
            raise BadInputFile(f"{source}: holds '{name}', which the network does not have")
        if tuple(value.shape) != tuple(own[name].shape):
            raise BadInputFile(f"{source}: '{name}' has shape {list(value.shape)}, the network needs "
                               f"{list(own[name].shape)}")
        with torch.no_grad():
            own[name].copy_(torch.from_numpy(np.array(value, dtype=np.float32)))


def convert_backbone(tensors: Mapping[str, np.ndarray], backbone: str, path: str) -> Converted:
    """The published tensors under the detector's names; raises ConfigError for a backbone without a known layout."""
    if backbone == "mobilenet_v2":
        return _convert_mobilenet(tensors)
    if backbone.startswith("resnet"):
        return _convert_resnet(tensors, path)
    raise ConfigError(f"network.weights is set, but backbone '{backbone}' has no published weights; leave it empty")


def _convert_mobilenet(tensors: Mapping[str, np.ndarray]) -> Converted:
    converted: Converted = {}
    for name, tensor in tensors.items():
        parts = name.split(".", 2)
        if len(parts) != 3 or parts[0] != "features" or not parts[1].isdigit():
            continue
        block = int(parts[1])
        for stage, numbers in MOBILENET_STAGES.items():
            if block in numbers:
                converted[f"{stage}.{block - numbers.start}.{parts[2]}"] = (tensor.astype(np.float32), (name,))
    return converted


def _convert_resnet(tensors: Mapping[str, np.ndarray], path: str) -> Converted:
    converted: Converted = {}
    for name, tensor in tensors.items():
        norm = _RESNET_NORM.search(name)
        if norm is None:
            own = _resnet_name(name)
            if own is not None:
                converted[own] = (tensor.astype(np.float32), (name,))
        elif norm.group(3) == "weight":
            prefix = name[: -len("weight")]
            sources = tuple(prefix + leaf for leaf in ("weight", "bias", "running_mean", "running_var"))
            lacking = [source for source in sources if source not in tensors]
            if lacking:
                raise BadInputFile(f"{path}: batch norm '{prefix[:-1]}' lacks '{lacking[0]}'")
            scale, shift = _fold_norm([tensors[source] for source in sources], prefix[:-1], path)
            own = _resnet_name(prefix + "scale")
            if own is not None:
                converted[own] = (scale, sources)
                converted[own[: -len("scale")] + "shift"] = (shift, sources)
    return converted


def _fold_norm(norm: Sequence[np.ndarray], name: str, path: str) -> Tuple[np.ndarray, np.ndarray]:
    """(x - mean) / sqrt(variance + eps) * weight + bias as scale and shift, float32 [1, C, 1, 1].

    norm: weight, bias, mean and variance [C]; the arithmetic is in float64 until the end.
    """
    weight, bias, mean, variance = (tensor.astype(np.float64) for tensor in norm)
    if not weight.shape == bias.shape == mean.shape == variance.shape or weight.ndim != 1:
        raise BadInputFile(f"{path}: the four tensors of batch norm '{name}' differ in shape")
    scale = weight / np.sqrt(variance + NORM_EPSILON)
    shift = bias - mean * scale
    return scale.astype(np.float32).reshape(1, -1, 1, 1), shift.astype(np.float32).reshape(1, -1, 1, 1)


def _resnet_name(name: str) -> Optional[str]:
    """torchvision's name -> ours, None for what a detector has no place for (fc, num_batches_tracked)."""
    if name == "conv1.weight":
        return "backbone.stem.conv.weight"
    if name.startswith("bn1."):
        return "backbone.stem.norm." + name[len("bn1."):]
    match = re.fullmatch(r"(layer[1-4]\.\d+)\.(conv\d|bn\d|downsample\.[01])\.(weight|scale)", name)
    if match is None:
        return None
    block, part, leaf = match.groups()
    stage = "roi_head." if block.startswith("layer4") else "backbone."
    part = part.replace("bn", "norm").replace("downsample.0", "downsample.conv").replace("downsample.1", "downsample.norm")
    return f"{stage}{block}.{part}.{leaf}"
