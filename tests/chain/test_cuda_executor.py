"""The executor `cuda`, without a GPU: torch's meta device stands for it, so that a tensor made on the wrong device shows."""
from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import Any, Iterator, List

import numpy as np
import pytest
import torch
from chain_config import random_step, small_config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from popdet import build
from runtime import session_setup
from runtime.artifact import Artifact
from runtime.errors import ConfigError, EnvironmentProblem, GraphError
from runtime.popart_api import load_popart
from runtime.session import open_inference, open_training

MOVES = {"aten::lift_fresh", "aten::_to_copy", "aten::detach", "aten::copy_"}  # what may read a tensor of the host


class OneDevice(TorchDispatchMode):
    """Notes ops that compute with tensors of the host, single numbers aside; counts those of the device."""

    def __init__(self) -> None:
        super().__init__()
        self.on_host: List[str] = []
        self.on_device = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        self.on_device += any(tensor.is_meta for tensor in tensors)
        if func._schema.name not in MOVES and any(tensor.dim() and not tensor.is_meta for tensor in tensors):
            self.on_host.append(func._schema.name)
        return result


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    out = tmp_path_factory.mktemp("cuda")
    config = small_config(4)
    build.compile(config, out, say=_silent)
    return Artifact.open(build.artifact_directory(config, out))


@pytest.fixture
def meta_for_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[OneDevice]:
    engine = f"{load_popart().__name__}._engine"
    monkeypatch.setitem(importlib.import_module(f"{engine}.session_checks").DEVICES, "cuda", "meta")
    monkeypatch.setattr(importlib.import_module(f"{engine}.anchors"), "_numpy", _zeros)
    monkeypatch.setattr(session_setup, "_sees_cuda", lambda: True)
    yield OneDevice()


def _zeros(tensor: torch.Tensor) -> np.ndarray:
    assert tensor.is_meta
    return np.zeros(tuple(tensor.shape), str(tensor.dtype).split(".")[1])


def _silent(message: str) -> None:
    pass


def _batch(artifact: Artifact) -> Any:
    config = artifact.config
    shapes = {spec.name: spec.shape for spec in artifact.inputs("train")}
    return random_step(shapes, config.train.accumulation, config.network.num_classes, 1)


def test_inference_computes_on_the_device(artifact: Artifact, meta_for_cuda: OneDevice) -> None:
    runner = open_inference(artifact, executor="cuda", on_message=_silent)
    shape = artifact.inputs("infer")[0].shape
    with meta_for_cuda:
        found = runner({"image": np.zeros(shape, np.float32)})
    assert not meta_for_cuda.on_host and meta_for_cuda.on_device > 100
    assert found["boxes"].shape[-1] == 4


@pytest.mark.parametrize("scaling", [1.0, 128.0])
def test_a_step_of_training_and_its_update_compute_on_the_device(
    artifact: Artifact, meta_for_cuda: OneDevice, scaling: float
) -> None:
    runner = open_training(artifact, dataclasses.replace(artifact.config.train, executor="cuda", loss_scaling=scaling),
                           on_message=_silent)
    with meta_for_cuda:
        runner.step(_batch(artifact))
        runner.set_learning_rate(0.5)
        runner.step(_batch(artifact))
    assert not meta_for_cuda.on_host and meta_for_cuda.on_device > 1000


def test_without_a_device_it_is_refused(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EnvironmentProblem, match="torch sees no CUDA device here; use aot or eager"):
        open_inference(artifact, executor="cuda", on_message=_silent)
    monkeypatch.setattr(session_setup, "_sees_cuda", lambda: True)
    with pytest.raises(GraphError, match="torch sees no CUDA device"):
        open_inference(artifact, executor="cuda", on_message=_silent)


def test_ipus_are_no_cuda_device() -> None:
    with pytest.raises(ConfigError, match="the Poplar SDK runs on IPUs"):
        session_setup.choose_executor(importlib.import_module("types").ModuleType("popart"), None, "cuda")


def test_nothing_is_compiled_ahead_for_it(tmp_path: Path) -> None:
    config = small_config(4)
    config = dataclasses.replace(config, compile=dataclasses.replace(config.compile, executor="cuda"),
                                 train=dataclasses.replace(config.train, executor="cuda"))
    build.compile(config, tmp_path, say=_silent)
    assert not Artifact.open(build.artifact_directory(config, tmp_path)).compiled
