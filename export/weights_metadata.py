"""What a converted weights file says of itself, in its safetensors metadata: where it comes from and what it expects.

Pretrained weights are right only with the input they were trained on and the stride where they had it. Neither can be
seen in the tensors' shapes, so `popdet weights convert` writes both down, and the export checks them.
"""
from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Tuple

from safetensors import SafetensorError, safe_open

from popdet.config import DataConfig
from runtime.errors import BadInputFile, ConfigError

FORMAT = "popdet.weights"  # the key that marks a converted file; its value is the version of these keys
VERSION = "1"
REMEDY = "convert the published file again with 'popdet weights convert'"


@dataclass(frozen=True)
class Preprocessing:
    """The input that the weights expect: (pixel * pixel_scale - mean) / std, mean and std in the order of the channels."""

    channel_order: str  # rgb | bgr
    pixel_scale: float
    pixel_mean: Tuple[float, ...]
    pixel_std: Tuple[float, ...]

    def in_pixels(self) -> Tuple[float, ...]:
        """The same in another unit, for comparison: means, then stds, in pixel values 0..255, red first."""
        step = 1 if self.channel_order == "rgb" else -1
        return tuple(value / self.pixel_scale for value in self.pixel_mean[::step] + self.pixel_std[::step])


@dataclass(frozen=True)
class WeightsMetadata:
    """The metadata of one converted file. None where the source does not tell."""

    backbone: str
    style: str  # torchvision | caffe | as found
    source_format: str
    source_sha256: str
    stride_in_1x1: Optional[bool]  # None: the backbone has no such choice
    preprocessing: Optional[Preprocessing]

    def to_strings(self) -> Dict[str, str]:
        """As safetensors keeps it: strings only; absent values have no key."""
        made = {FORMAT: VERSION, "backbone": self.backbone, "style": self.style, "source_format": self.source_format,
                "source_sha256": self.source_sha256}
        if self.stride_in_1x1 is not None:
            made["stride_in_1x1"] = json.dumps(self.stride_in_1x1)
        if self.preprocessing is not None:
            expected = self.preprocessing
            made["channel_order"] = expected.channel_order
            made["pixel_scale"] = json.dumps(expected.pixel_scale)
            made["pixel_mean"] = json.dumps(list(expected.pixel_mean))
            made["pixel_std"] = json.dumps(list(expected.pixel_std))
        return made


def weights_metadata(path: str) -> Optional[WeightsMetadata]:
    """The metadata of a safetensors file, None where no conversion wrote any. Raises BadInputFile (unreadable, nonsense)."""
    if not Path(path).is_file():
        raise BadInputFile(f"{path}: no such weights file; name an existing safetensors file or leave network.weights empty")
    try:
        with safe_open(path, framework="numpy") as stream:
            found = stream.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise BadInputFile(f"{path}: not a readable safetensors file: {' '.join(str(error).split())}; a .pth or .pkl "
                           "becomes one with 'popdet weights convert'") from error
    return parse_metadata(found, path)


def parse_metadata(found: Mapping[str, str], path: str) -> Optional[WeightsMetadata]:
    """The strings of a safetensors file as values; None without the mark. Raises BadInputFile naming the key."""
    if FORMAT not in found:
        return None
    if found[FORMAT] != VERSION:
        raise BadInputFile(f"{path}: its metadata has version {found[FORMAT]!r}, this popdet reads {VERSION}; {REMEDY}")
    texts = {}
    for key in ("backbone", "style", "source_format", "source_sha256"):
        if key not in found:
            raise BadInputFile(f"{path}: its metadata lacks '{key}'; {REMEDY}")
        texts[key] = found[key]
    stride = _json(found, "stride_in_1x1", path) if "stride_in_1x1" in found else None
    if not isinstance(stride, (bool, type(None))):
        raise BadInputFile(f"{path}: its metadata has stride_in_1x1 {stride!r}, expected true or false; {REMEDY}")
    return WeightsMetadata(**texts, stride_in_1x1=stride,
                           preprocessing=_preprocessing(found, path) if "channel_order" in found else None)


def check_network(metadata: Optional[WeightsMetadata], backbone: str, stride_in_1x1: bool, path: str) -> None:
    """Raise ConfigError where the weights belong to another backbone or stride than the config's."""
    if metadata is None:
        return
    if metadata.backbone != backbone:
        raise ConfigError(f"{path}: holds weights of {metadata.backbone}, network.backbone is '{backbone}'; set "
                          f"-o network.backbone={metadata.backbone} or name another file")
    if metadata.stride_in_1x1 is not None and metadata.stride_in_1x1 != stride_in_1x1:
        where = "first 1x1" if metadata.stride_in_1x1 else "3x3"
        raise ConfigError(f"{path}: its weights were trained with the stride in the {where} convolution, and "
                          f"network.stride_in_1x1 is {json.dumps(stride_in_1x1)}; set "
                          f"-o network.stride_in_1x1={json.dumps(metadata.stride_in_1x1)}")


def preprocessing_overrides(expected: Preprocessing) -> List[str]:
    """The `key=value` of every -o that makes a config's input the expected one."""
    return [f"data.channel_order={expected.channel_order}", f"data.pixel_scale={expected.pixel_scale!r}",
            f"data.pixel_mean={json.dumps(list(expected.pixel_mean))}",
            f"data.pixel_std={json.dumps(list(expected.pixel_std))}"]


def preprocessing_warning(path: str, data: DataConfig) -> Optional[str]:
    """One line where the config's input is not what the weights file expects, with the overrides to set; else None.

    Equal in another unit (0..1 against 0..255) is equal: the two are compared in pixel values.
    """
    metadata = weights_metadata(path)
    if metadata is None or metadata.preprocessing is None:
        return None
    expected = metadata.preprocessing
    given = Preprocessing(data.channel_order, data.pixel_scale, data.pixel_mean, data.pixel_std)
    same = given.channel_order == expected.channel_order and given.pixel_scale > 0 and all(
        math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-2) for a, b in zip(given.in_pixels(), expected.in_pixels()))
    if same:
        return None
    options = " ".join(f"-o '{item}'" for item in preprocessing_overrides(expected))
    return (f"{path}: its weights expect another input than the config's data section gives, so features will be wrong; "
            f"set {options}")


def _preprocessing(found: Mapping[str, str], path: str) -> Preprocessing:
    order = found["channel_order"]
    if order not in ("rgb", "bgr"):
        raise BadInputFile(f"{path}: its metadata has channel_order {order!r}, expected rgb or bgr; {REMEDY}")
    scale = _json(found, "pixel_scale", path)
    if not _is_positive(scale):
        raise BadInputFile(f"{path}: its metadata has pixel_scale {scale!r}, expected a positive number; {REMEDY}")
    mean, std = (_json(found, key, path) for key in ("pixel_mean", "pixel_std"))
    for key, values in (("pixel_mean", mean), ("pixel_std", std)):
        if not isinstance(values, list) or len(values) != 3 or not all(
                _is_positive(value) or (key == "pixel_mean" and _is_number(value)) for value in values):
            raise BadInputFile(f"{path}: its metadata has {key} {values!r}, expected three numbers; {REMEDY}")
    return Preprocessing(order, float(scale), tuple(map(float, mean)), tuple(map(float, std)))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e9  # False for NaN too


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _json(found: Mapping[str, str], key: str, path: str) -> Any:
    try:
        return json.loads(found[key])
    except (KeyError, ValueError, RecursionError) as error:
        raise BadInputFile(f"{path}: its metadata has no readable '{key}'; {REMEDY}") from error
