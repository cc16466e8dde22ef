"""Bring published backbone weights into the detector: which tensor goes where, and what did not fit.

Two layouts are known, both as safetensors (`popdet weights convert` makes them of the published formats):
- mobilenet_v2: features.<block>.<conv|expand|depthwise|project>.{weight, bias}, batch norm folded
- resnet*: torchvision's names (conv1.weight, bn1.running_mean, layer1.0.downsample.0.weight ...); a norm is either the four
  tensors of a batch norm or, where the published file has it so, <norm>.scale and <norm>.shift [C]
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
from torch import Tensor, nn

from export.network.backbones.mobilenet_v2 import STAGES as MOBILENET_STAGES
from export.weights_metadata import check_network, weights_metadata
from runtime.errors import BadInputFile, ConfigError

NORM_EPSILON = 1e-5  # torchvision's
BATCH_NORM = ("weight", "bias", "running_mean", "running_var")
AFFINE = ("scale", "shift")
_RESNET_NORM = re.compile(rf"(.*\.)?(bn\d|downsample\.1)\.({'|'.join(BATCH_NORM + AFFINE)})")


# Detector name -> (float32 array, names in the file it was made of).
Converted = Dict[str, Tuple[np.ndarray, Tuple[str, ...]]]


@dataclass(frozen=True)
class WeightsReport:
    """What a weights file gave: names of the detector's tensors, and of the file's."""

    matched: Tuple[str, ...]  # tensors of the detector that were set
    missing: Tuple[str, ...]  # backbone and layer4 tensors that the file lacks and that stay random
    unused: Tuple[str, ...]  # tensors of the file that no module wants, such as the classifier's


def load_backbone_weights(detector: nn.Module, backbone: str, path: str, stride_in_1x1: bool = False) -> WeightsReport:
    """Set the backbone and layer4 of `detector` from a safetensors file.

    Raises BadInputFile where the file cannot be read, a shape is wrong, or nothing of it fits; ConfigError where the file
    says that it belongs to another backbone, or that its stride is in another convolution than `stride_in_1x1` says.
    """
    check_network(weights_metadata(path), backbone, stride_in_1x1, path)
    values, report = match_backbone(read_safetensors(path), backbone, detector.state_dict(), path)
    assign_state(detector, {name: tensor for name, (tensor, _) in values.items()}, path)
    return report


def match_backbone(tensors: Mapping[str, np.ndarray], backbone: str, own: Mapping[str, Tensor],
                   path: str) -> Tuple[Converted, WeightsReport]:
    """The tensors of a file that the backbone and layer4 of a network take, and what stays over on both sides.

    own: the network's state; only names and shapes count. Raises BadInputFile on a wrong shape, or if nothing fits.
    """
    wanted = {name for name in own if name.startswith(("backbone.", "roi_head."))}
    values = {name: item for name, item in convert_backbone(tensors, backbone, path).items() if name in wanted}
    if not values:
        raise BadInputFile(f"{path}: none of its {len(tensors)} tensors fits backbone '{backbone}'; the first is "
                           f"'{next(iter(tensors), '(no tensor)')}'. Is it another network's file?")
    check_shapes({name: tensor for name, (tensor, _) in values.items()}, own, path)
    sources = {source for _, names in values.values() for source in names}
    return values, WeightsReport(tuple(sorted(values)), tuple(sorted(wanted - set(values))),
                                 tuple(sorted(set(tensors) - sources)))


def read_safetensors(path: str) -> Dict[str, np.ndarray]:
    """All tensors of a file; BadInputFile where it is missing or damaged."""
    if not Path(path).is_file():
        raise BadInputFile(f"{path}: no such weights file; name an existing safetensors file or leave network.weights empty")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:  # TypeError: a dtype that numpy lacks
        raise BadInputFile(f"{path}: not a readable safetensors file: {' '.join(str(error).split())}") from error


def assign_state(module: nn.Module, values: Mapping[str, np.ndarray], source: str) -> None:
    """Copy named arrays into the module's state; BadInputFile on an unknown name or another shape."""
    own = module.state_dict()
    check_shapes(values, own, source)
    for name, value in values.items():
        with torch.no_grad():
            own[name].copy_(torch.from_numpy(np.array(value, dtype=np.float32)))


def check_shapes(values: Mapping[str, np.ndarray], own: Mapping[str, Tensor], source: str) -> None:
    """Raise BadInputFile where `values` has a name that the state `own` lacks, or another shape."""
    for name, value in values.items():
        if name not in own:
            raise BadInputFile(f"{source}: holds '{name}', which the network does not have")
        if tuple(value.shape) != tuple(own[name].shape):
            raise BadInputFile(f"{source}: '{name}' has shape {list(value.shape)}, the network needs "
                               f"{list(own[name].shape)}")


def convert_backbone(tensors: Mapping[str, np.ndarray], backbone: str, path: str) -> Converted:
    """The published tensors under the detector's names; raises ConfigError for a backbone without a known layout."""
    if backbone == "mobilenet_v2":
        return _convert_mobilenet(tensors, path)
    if backbone.startswith("resnet"):
        return _convert_resnet(tensors, path)
    raise ConfigError(f"network.weights is set, but backbone '{backbone}' has no published weights; leave it empty")


def as_float32(tensor: np.ndarray, name: str, path: str) -> np.ndarray:
    """The tensor in float32; BadInputFile where it holds other things than floating-point numbers, or not finite ones."""
    if tensor.dtype.kind != "f":
        raise BadInputFile(f"{path}: '{name}' is of {tensor.dtype}, expected floating-point numbers; a quantised file cannot "
                           "be used")
    with np.errstate(over="ignore"):
        made = tensor.astype(np.float32)
    if not np.isfinite(made).all():
        raise BadInputFile(f"{path}: '{name}' has values that are not finite in float32")
    return made


def _convert_mobilenet(tensors: Mapping[str, np.ndarray], path: str) -> Converted:
    converted: Converted = {}
    for name, tensor in tensors.items():
        parts = name.split(".", 2)
        if len(parts) != 3 or parts[0] != "features" or not parts[1].isdigit():
            continue
        block = int(parts[1])
        for stage, numbers in MOBILENET_STAGES.items():
            if block in numbers:
                converted[f"{stage}.{block - numbers.start}.{parts[2]}"] = (as_float32(tensor, name, path), (name,))
    return converted


def _convert_resnet(tensors: Mapping[str, np.ndarray], path: str) -> Converted:
    converted: Converted = {}
    norms: Dict[str, str] = {}  # prefix in the file -> ours
    for name, tensor in tensors.items():
        norm = _RESNET_NORM.fullmatch(name)
        prefix = name[: norm.start(3)] if norm else name
        own = _resnet_name(prefix + "scale" if norm else name)
        if own is None:
            continue
        if norm:
            norms[prefix] = own[: -len("scale")]
        else:
            converted[own] = (as_float32(tensor, name, path), (name,))
    for prefix, own in norms.items():
        scale, shift, sources = _norm_of(tensors, prefix, path)
        converted[own + "scale"] = (scale, sources)
        converted[own + "shift"] = (shift, sources)
    return converted


def _norm_of(tensors: Mapping[str, np.ndarray], prefix: str, path: str) -> Tuple[np.ndarray, np.ndarray, Tuple[str, ...]]:
    """Scale and shift of one norm, and the names that gave them."""
    affine = any(prefix + leaf in tensors for leaf in AFFINE)
    if affine and any(prefix + leaf in tensors for leaf in BATCH_NORM):
        raise BadInputFile(f"{path}: norm '{prefix[:-1]}' is there twice, as a batch norm and as scale and shift")
    sources = tuple(prefix + leaf for leaf in (AFFINE if affine else BATCH_NORM))
    lacking = [source for source in sources if source not in tensors]
    if lacking:
        raise BadInputFile(f"{path}: batch norm '{prefix[:-1]}' lacks '{lacking[0]}'")
    parts = [as_float32(tensors[source], source, path) for source in sources]
    if parts[0].ndim != 1 or any(part.shape != parts[0].shape for part in parts):
        raise BadInputFile(f"{path}: the tensors of norm '{prefix[:-1]}' differ in shape, or are not vectors")
    scale, shift = parts if affine else _fold_norm(parts, prefix[:-1], path)
    return scale.astype(np.float32).reshape(1, -1, 1, 1), shift.astype(np.float32).reshape(1, -1, 1, 1), sources


def _fold_norm(norm: Sequence[np.ndarray], name: str, path: str) -> Tuple[np.ndarray, np.ndarray]:
    """(x - mean) / sqrt(variance + eps) * weight + bias as scale and shift, float64 [C]; norm: the four tensors [C]."""
    weight, bias, mean, variance = (tensor.astype(np.float64) for tensor in norm)
    if not (variance >= 0).all():
        raise BadInputFile(f"{path}: '{name}.running_var' has negative values or NaN")
    scale = weight / np.sqrt(variance + NORM_EPSILON)
    return scale, bias - mean * scale


def _resnet_name(name: str) -> Optional[str]:
    """torchvision's name, a norm's as `.scale` -> ours, None for what a detector has no place for (fc, num_batches_tracked)."""
    if name == "conv1.weight":
        return "backbone.stem.conv.weight"
    if name == "bn1.scale":
        return "backbone.stem.norm.scale"
    match = re.fullmatch(r"(layer[1-4]\.\d+)\.(conv\d|bn\d|downsample\.[01])\.(weight|scale)", name)
    if match is None:
        return None
    block, part, leaf = match.groups()
    stage = "roi_head." if block.startswith("layer4") else "backbone."
    part = part.replace("bn", "norm").replace("downsample.0", "downsample.conv").replace("downsample.1", "downsample.norm")
    return f"{stage}{block}.{part}.{leaf}"
