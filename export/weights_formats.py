"""Read published weights files, whatever their suffix: torch's `.pth`, pickles of numpy arrays, safetensors.

Nothing of a file is executed: torch reads with weights_only, pickles go through restricted_pickle. Three naming schemes
come out under torchvision's names:
- torchvision: conv1.weight, bn1.running_mean, layer1.0.downsample.0.weight; also the caffe `.pth` files
- caffe2 (Detectron and Detectron2's MSRA/R-50.pkl): conv1_w, res_conv1_bn_s, res2_0_branch2a_w, res2_0_branch1_bn_b
- detectron2 (its torchvision/R-50.pkl): stem.conv1.norm.weight, res2.0.conv1.weight, res2.0.shortcut.norm.bias
"""
from __future__ import annotations

import hashlib
import re
import stat
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Mapping, Optional

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from export.restricted_pickle import load_arrays
from export.weights_metadata import WeightsMetadata, parse_metadata
from runtime.errors import BadInputFile

MAX_BYTES = 4 << 30  # of a source file and of what a zip of it unpacks to; the largest published backbone has 0.5 GB
TORCH_LEGACY = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # pickle of the magic number that begins torch's format before 1.6
PICKLE_TEXT = (b"(d", b"(l", b"ccollections\nOrderedDict")  # how protocol 0 begins
ACCEPTED = "torch's .pth (zip or legacy), a pickle of numpy arrays (Detectron2's .pkl) or safetensors"


@dataclass(frozen=True)
class Source:
    """A published file: its tensors under torchvision's names, as they lie in the file (any dtype)."""

    path: str
    container: str  # torch zip | torch legacy | pickle | safetensors
    naming: str  # torchvision | caffe2 | detectron2 | mobilenet
    sha256: str
    tensors: Mapping[str, np.ndarray]
    original_names: Mapping[str, str]  # name in `tensors` -> name in the file
    metadata: Optional[WeightsMetadata]  # of a file that was converted before

    @property
    def format(self) -> str:
        """Container and naming, for reports."""
        return f"{self.container}, {self.naming} names"


def read_source(path: str) -> Source:
    """Read a weights file, its format told by its content. Raises BadInputFile: missing, damaged, hostile, no tensors."""
    data_hash = _digest(path)
    container = _container(path)
    metadata: Optional[WeightsMetadata] = None
    if container == "safetensors":
        found, metadata = _read_safetensors(path)
    elif container == "pickle":
        found = _tensor_table(load_arrays(Path(path).read_bytes(), path), path)
    else:
        found = _tensor_table(_torch_load(path, container), path)
    tensors = {name: _as_numpy(value, name, path) for name, value in found.items()
               if isinstance(value, (np.ndarray, torch.Tensor))}
    if sum(tensor.nbytes for tensor in tensors.values()) > MAX_BYTES:  # one storage under many names
        raise BadInputFile(f"{path}: its tensors have more than {MAX_BYTES} bytes together, more than any backbone")
    if not tensors:
        raise BadInputFile(f"{path}: holds no tensors; expected {ACCEPTED} with a network's state")
    naming = _naming(tensors)
    rename = {"caffe2": from_caffe2, "detectron2": from_detectron2}.get(naming, lambda name: name)
    renamed: Dict[str, np.ndarray] = {}
    original: Dict[str, str] = {}
    for name, tensor in tensors.items():
        new = rename(name)
        if new in renamed:
            raise BadInputFile(f"{path}: '{original[new]}' and '{name}' both mean '{new}'")
        renamed[new], original[new] = tensor, name
    return Source(path, container, naming, data_hash, renamed, original, metadata)


def from_caffe2(name: str) -> str:
    """Detectron's blob name -> torchvision's, with norms as `.scale` and `.shift`; other names stay as they are.

    res2_1_branch2a_w -> layer1.1.conv1.weight, res_conv1_bn_s -> bn1.scale, res2_0_branch1_bn_b -> layer1.0.downsample.1.shift
    """
    leaf = {"s": "scale", "b": "shift"}
    if name in ("conv1_w", "conv1_b"):
        return f"conv1.{'weight' if name.endswith('w') else 'bias'}"
    stem = re.fullmatch(r"(?:res_)?conv1_bn_([sb])", name)
    if stem:
        return f"bn1.{leaf[stem.group(1)]}"
    match = re.fullmatch(r"res([2-5])_(\d+)_branch(1|2[abc])_(w|b|bn_s|bn_b)", name)
    if match is None:
        return name
    stage, block, branch, what = match.groups()
    prefix = f"layer{int(stage) - 1}.{int(block)}"
    position = 0 if branch == "1" else "abc".index(branch[1]) + 1
    if what in ("w", "b"):
        conv = "downsample.0" if position == 0 else f"conv{position}"
        return f"{prefix}.{conv}.{'weight' if what == 'w' else 'bias'}"
    norm = "downsample.1" if position == 0 else f"bn{position}"
    return f"{prefix}.{norm}.{leaf[what[-1]]}"


def from_detectron2(name: str) -> str:
    """Detectron2's own name -> torchvision's; other names stay. res2.0.shortcut.norm.bias -> layer1.0.downsample.1.bias."""
    short = re.sub(r"^(backbone\.)?(bottom_up\.)?", "", name)
    if short.startswith("stem.conv1."):
        return short[len("stem."):].replace("conv1.norm.", "bn1.")
    match = re.fullmatch(r"(?:roi_heads\.)?res([2-5])\.(\d+)\.(conv(\d)|shortcut)\.(norm\.)?(\w+)", short)
    if match is None:
        return name
    stage, block, _, number, norm, leaf = match.groups()
    if number is None:
        part = "downsample.1" if norm else "downsample.0"
    else:
        part = f"bn{number}" if norm else f"conv{number}"
    return f"layer{int(stage) - 1}.{int(block)}.{part}.{leaf}"


def _naming(tensors: Mapping[str, Any]) -> str:
    if "conv1_w" in tensors or any(re.match(r"res[2-5]_\d+_branch", name) for name in tensors):
        return "caffe2"
    if any(re.match(r"(backbone\.)?(bottom_up\.)?(stem\.conv1|res[2-5]\.\d+)\.", name) for name in tensors):
        return "detectron2"
    if any(re.match(r"features\.\d+\.(conv|expand|depthwise|project)\.", name) for name in tensors):
        return "mobilenet"
    return "torchvision"


def _digest(path: str) -> str:
    """sha256 of a regular file of a sane size; BadInputFile otherwise."""
    try:
        status = Path(path).stat()
        if not stat.S_ISREG(status.st_mode):
            raise BadInputFile(f"{path}: is not a file; name the weights file itself: {ACCEPTED}")
        if status.st_size > MAX_BYTES:
            raise BadInputFile(f"{path}: has {status.st_size} bytes, more than any backbone ({MAX_BYTES})")
        digest = hashlib.sha256()
        with open(path, "rb") as stream:
            for block in iter(lambda: stream.read(1 << 20), b""):
                digest.update(block)
        return digest.hexdigest()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BadInputFile(f"{path}: cannot be read ({reason}); name an existing weights file") from error


def _container(path: str) -> str:
    with open(path, "rb") as stream:
        head = stream.read(512)
        size = stream.seek(0, 2)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8:
        return "safetensors"
    if head.startswith(b"PK\x03\x04"):
        return "torch zip"
    if head[2 : 2 + len(TORCH_LEGACY)] == TORCH_LEGACY:
        return "torch legacy"
    if (head[:1] == b"\x80" and head[1:2] <= b"\x05") or head.startswith(PICKLE_TEXT):
        return "pickle"
    if head[257:262] == b"ustar":
        raise BadInputFile(f"{path}: is a tar file; torch's own format of 2016 cannot be read safely, "
                           "load it in that torch and save it again")
    what = "is empty" if not head else f"begins with {head[:8]!r}"
    raise BadInputFile(f"{path}: {what}, which is no weights file; expected {ACCEPTED}")


def _read_safetensors(path: str) -> Any:
    try:
        with safe_open(path, framework="pt") as stream:  # torch, for it knows bfloat16
            metadata = parse_metadata(stream.metadata() or {}, path)
            return {name: stream.get_tensor(name) for name in stream.keys()}, metadata
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise BadInputFile(f"{path}: not a readable safetensors file: {' '.join(str(error).split())}") from error


def _torch_load(path: str, container: str) -> Any:
    """torch.load with weights_only. Whatever its parser raises is a property of the file."""
    try:
        if container == "torch zip":
            with zipfile.ZipFile(path) as archive:
                unpacked = sum(item.file_size for item in archive.infolist())
            if unpacked > MAX_BYTES:
                raise BadInputFile(f"{path}: unpacks to {unpacked} bytes, more than any backbone ({MAX_BYTES})")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about storage classes of old files
            return torch.load(path, map_location="cpu", weights_only=True)
    except BadInputFile:
        raise
    except Exception as error:  # torch.load raises whatever a damaged file makes its parsers raise
        reason = " ".join(str(error).split())
        named = re.search(r"GLOBAL ([\w.]{1,80})", reason)
        if named:
            raise BadInputFile(f"{path}: refused: it is no file of tensors alone, it wants to run '{named.group(1)}'; if you "
                               "trust it, load it in torch yourself and save its state_dict()") from error
        reason = reason.rsplit("following error message.", 1)[-1].strip()  # torch's own advice to trust the file
        raise BadInputFile(f"{path}: a damaged {container} file: {reason[:200]}; download it again") from error


def _tensor_table(found: Any, path: str) -> Dict[str, Any]:
    """The dict of tensors in what a file holds: itself, or below model, state_dict or blobs; 'module.' prefixes removed."""
    for key in ("model", "state_dict", "blobs"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
            break
    if not isinstance(found, dict):
        raise BadInputFile(f"{path}: holds a {type(found).__name__}, expected a dict of tensors by name")
    table = {name.decode("latin-1") if isinstance(name, bytes) else str(name): value for name, value in found.items()}
    if table and all(name.startswith("module.") for name in table):  # DataParallel
        table = {name[len("module."):]: value for name, value in table.items()}
    return table


def _as_numpy(value: Any, name: str, path: str) -> np.ndarray:
    """A tensor as an array that shares its memory; floating formats that numpy lacks become float32."""
    if isinstance(value, np.ndarray):
        return value
    if value.layout is not torch.strided or value.is_quantized or value.is_complex() or value.device.type != "cpu":
        raise BadInputFile(f"{path}: '{name}' is a {value.layout} {value.dtype} tensor on {value.device}; expected a plain "
                           "one of real numbers")
    if value.numel() * value.element_size() > MAX_BYTES:  # a view that repeats a small storage
        raise BadInputFile(f"{path}: '{name}' has shape {list(value.shape)}, larger than any backbone")
    value = value.detach()
    known = value.dtype in (torch.float16, torch.float32, torch.float64) or not value.is_floating_point()
    return (value if known else value.float()).numpy()
