"""Fakes of published weights: random ResNets under torchvision's names, the same in other formats, and a naive forward."""
from __future__ import annotations

import struct
from typing import Dict, Mapping

import numpy as np
import torch
from torch.nn import functional

from export.weights_convert import convert

DEPTHS = {"resnet18": (2, 2, 2, 2), "resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}
PIXEL_STD = 58.0  # of caffe's inputs; torchvision's have 1


def random_resnet(name: str, seed: int = 0, pixel_std: float = 1.0, tracked: bool = False) -> Dict[str, torch.Tensor]:
    """The state_dict of torchvision's `name`, random, with activations of about 1 for inputs of deviation pixel_std."""
    print(f"random_resnet seed {seed}")
    generator = torch.Generator().manual_seed(seed)
    state: Dict[str, torch.Tensor] = {}

    def add(conv: str, norm: str, out_channels: int, in_channels: int, kernel: int, deviation: float, gain: float) -> None:
        shape = (out_channels, in_channels, kernel, kernel)
        state[f"{conv}.weight"] = torch.randn(shape, generator=generator) / (in_channels * kernel * kernel) ** 0.5
        uniform = torch.rand(4, out_channels, generator=generator)
        state[f"{norm}.weight"] = gain * (0.5 + uniform[0])
        state[f"{norm}.bias"] = 0.2 * (uniform[1] - 0.5)
        state[f"{norm}.running_mean"] = deviation * 0.2 * (uniform[2] - 0.5)
        state[f"{norm}.running_var"] = deviation**2 * (0.5 + uniform[3])
        if tracked:
            state[f"{norm}.num_batches_tracked"] = torch.tensor(1000)

    add("conv1", "bn1", 64, 3, 7, pixel_std, 0.3)
    convolutions = ((3, 1), (3, 1)) if name == "resnet18" else ((1, 1), (3, 1), (1, 4))
    channels = 64
    for stage, depth in enumerate(DEPTHS[name]):
        width = 64 * 2**stage
        for block in range(depth):
            prefix, inside = f"layer{stage + 1}.{block}", channels
            for number, (kernel, factor) in enumerate(convolutions, 1):
                gain = 0.3 if number == len(convolutions) else 1.0
                add(f"{prefix}.conv{number}", f"{prefix}.bn{number}", width * factor, inside, kernel, 1.0, gain)
                inside = width * factor
            if block == 0 and channels != inside:
                add(f"{prefix}.downsample.0", f"{prefix}.downsample.1", inside, channels, 1, 1.0, 1.0)
            channels = inside
    state["fc.weight"], state["fc.bias"] = torch.zeros(1000, channels), torch.zeros(1000)
    return state


def naive_resnet(state: Mapping[str, torch.Tensor], name: str, x: torch.Tensor, stride_in_1x1: bool) -> torch.Tensor:
    """x [B, 3, H, W] -> the last stage's map [B, C, H/32, W/32], by the paper, with torch's own batch norm."""

    def conv_norm(x: torch.Tensor, conv: str, norm: str, stride: int, padding: int) -> torch.Tensor:
        x = functional.conv2d(x, state[f"{conv}.weight"], stride=stride, padding=padding)
        return functional.batch_norm(x, *(state[f"{norm}.{leaf}"] for leaf in
                                          ("running_mean", "running_var", "weight", "bias")), eps=1e-5)

    x = functional.max_pool2d(conv_norm(x, "conv1", "bn1", 2, 3).relu(), 3, 2, 1)
    for stage, depth in enumerate(DEPTHS[name]):
        for block in range(depth):
            prefix, stride = f"layer{stage + 1}.{block}", 2 if stage and not block else 1
            if name == "resnet18":
                plan = ((stride, 1), (1, 1))
            else:
                plan = ((stride, 0), (1, 1), (1, 0)) if stride_in_1x1 else ((1, 0), (stride, 1), (1, 0))
            branch = x
            for number, (step, padding) in enumerate(plan, 1):
                branch = conv_norm(branch, f"{prefix}.conv{number}", f"{prefix}.bn{number}", step, padding)
                branch = branch.relu() if number < len(plan) else branch
            if f"{prefix}.downsample.0.weight" in state:
                x = conv_norm(x, f"{prefix}.downsample.0", f"{prefix}.downsample.1", stride, 0)
            x = (x + branch).relu()
    return x


def caffe2_blobs(state: Mapping[str, torch.Tensor]) -> Dict[str, np.ndarray]:
    """The same network as Detectron's R-50.pkl has it: its names, every norm folded to scale (_s) and shift (_b)."""
    blobs: Dict[str, np.ndarray] = {"conv1_b": np.zeros(64, np.float32), "fc1000_w": np.zeros((1000, 8), np.float32),
                                    "fc1000_b": np.zeros(1000, np.float32)}
    for name, tensor in state.items():
        parts = name.split(".")
        if parts[0] == "fc" or parts[-1] not in ("weight",):
            continue
        if parts[0] in ("conv1", "bn1"):
            blob = "conv1" if parts[0] == "conv1" else "res_conv1_bn"
        else:
            branch = "branch1" if parts[2] == "downsample" else "branch2" + "abc"[int(parts[2][-1]) - 1]
            blob = f"res{int(parts[0][-1]) + 1}_{parts[1]}_{branch}"
            if parts[2].startswith("bn") or parts[2:4] == ["downsample", "1"]:
                blob += "_bn"
        if not blob.endswith("_bn"):
            blobs[f"{blob}_w"] = tensor.numpy()
            continue
        norm = name[: -len("weight")]
        scale = tensor.double() / (state[f"{norm}running_var"].double() + 1e-5).sqrt()
        blobs[f"{blob}_s"] = scale.float().numpy()
        blobs[f"{blob}_b"] = (state[f"{norm}bias"].double() - state[f"{norm}running_mean"].double() * scale).float().numpy()
    return blobs


def python2_pickle(tree: object) -> bytes:
    """What Python 2's cPickle and numpy write at protocol 2: byte strings, numpy.core, no memo. dict, str, bool, float32."""
    return b"\x80\x02" + _python2(tree) + b"."


def _python2(value: object) -> bytes:
    if isinstance(value, bool):
        return b"\x88" if value else b"\x89"
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    if isinstance(value, str):
        return b"T" + struct.pack("<i", len(value)) + value.encode("latin-1")
    if value is None:
        return b"N"
    if isinstance(value, tuple):
        return b"(" + b"".join(map(_python2, value)) + b"t"
    if isinstance(value, dict):
        return b"}(" + b"".join(_python2(key) + _python2(item) for key, item in value.items()) + b"u"
    assert isinstance(value, np.ndarray) and value.dtype == np.float32
    dtype = b"cnumpy\ndtype\n" + _python2(("f4", 0, 1)) + b"R" + _python2((3, "<", None, None, None, -1, -1, 0)) + b"b"
    made = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n" + _python2((0,)) + _python2("b") + b"tR"
    data = _python2(value.tobytes().decode("latin-1"))
    return made + b"(" + _python2(1) + _python2(value.shape) + dtype + b"\x89" + data + b"tb"


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


def with_gain(state, gain):
    """The state with the median gain of its first convolution set."""
    made = body_of(state)
    norms = made["conv1.weight"].flatten(1).norm(dim=1) * made["bn1.weight"] / (made["bn1.running_var"] + 1e-5).sqrt()
    return {**made, "conv1.weight": made["conv1.weight"] * (gain / norms.quantile(0.5))}
