"""What a session is built from: options, device, optimizer, and the checks of what goes in.

Written for PopART's API as the SDK has it; only `choose_executor` and `external_data` ask which popart it is.
"""
from __future__ import annotations

import contextlib
import importlib
import os
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any, Dict, Iterator, Mapping, Sequence, Tuple

import numpy as np

from popdet.config import CHOICES, CompileConfig, TrainConfig
from runtime.artifact import Artifact
from runtime.errors import ConfigError, EnvironmentProblem, GraphError
from runtime.manifest import GraphSpec, TensorSpec
from runtime.popart_api import is_embedded_module, load_popart

Arrays = Dict[str, np.ndarray]
EXECUTORS = CHOICES["compile.executor"]  # of the embedded runtime


def register_custom_ops(popart: ModuleType) -> None:
    """Teach the SDK's PopART popdet's own ops, before a session is made; the embedded one knows them.

    The library comes from this user's build of custom_ops/popart and from nowhere else. Raises EnvironmentProblem where it
    cannot be built or loaded.
    """
    if not is_embedded_module(popart):
        importlib.import_module("custom_ops.popart").load()


def placement_options(popart: ModuleType, graph: GraphSpec, config: CompileConfig, pipelining: bool) -> Any:
    """SessionOptions for the graph's IPUs and stages; `pipelining` False keeps the placement but not the overlap."""
    options = popart.SessionOptions()
    if graph.ipus > 1:
        options.virtualGraphMode = popart.VirtualGraphMode.Manual
    options.enablePipelining = bool(pipelining and config.pipelining and graph.is_split)
    if graph.kind == "train" and config.recompute == "pipeline":
        if not options.enablePipelining:
            raise ConfigError("compile.recompute=pipeline needs a pipeline of two IPUs or more; use standard or none")
        options.autoRecomputation = popart.RecomputationType.Pipeline
    elif graph.kind == "train" and config.recompute == "standard" and options.enablePipelining:
        # Without a pipeline the graph says node by node what to recompute, and PopART refuses a mixture of both.
        options.autoRecomputation = popart.RecomputationType.Standard
    return options


def check_accumulation(graph: GraphSpec, config: CompileConfig, train: TrainConfig) -> None:
    """PopART: an accumulating pipeline needs a micro-batch for each forward and backward stage; else ConfigError."""
    if config.pipelining and graph.is_split and train.accumulation < graph.depth:
        raise ConfigError(
            f"train.accumulation is {train.accumulation}; a pipeline of {len(graph.stage_ipus)} stages needs at least "
            f"{graph.depth} micro-batches in a step, one for each forward and backward stage. Set "
            f"train.accumulation={graph.depth} or more, compile for fewer stages, or set compile.pipelining=false"
        )


def training_options(popart: ModuleType, graph: GraphSpec, config: CompileConfig, train: TrainConfig) -> Any:
    """SessionOptions of the training program: placement, accumulation, replicas, rounding, executor."""
    options = placement_options(popart, graph, config, pipelining=True)
    options.enableGradientAccumulation = train.accumulation > 1
    options.accumulationFactor = train.accumulation
    options.accumulationAndReplicationReductionType = popart.ReductionType.Mean
    if train.replicas > 1:
        options.enableReplicatedGraphs, options.replicatedGraphCount = True, train.replicas
    if train.stochastic_rounding:
        options.enableStochasticRounding = options.enableLoadAndOffloadRNGState = True
    choose_executor(popart, options, train.executor)
    return options


def make_optimizer(popart: ModuleType, train: TrainConfig, learning_rate: float, weights: Sequence[str]) -> Any:
    """SGD whose learning rate may change and whose other hyper-parameters are constants of the program.

    weights: the names of all weights that train; those that end in .bias may have a weight decay of their own.
    """
    optimizer = popart.SGD({
        "defaultLearningRate": (learning_rate, False), "defaultMomentum": (train.momentum, True),
        "defaultWeightDecay": (train.weight_decay, True), "lossScaling": (train.loss_scaling, True),
    })
    for name in weights:
        if weight_decay_of(train, name) != train.weight_decay:
            optimizer.insertSpecific(name, {"weightDecay": (weight_decay_of(train, name), True)})
    return optimizer


def weight_decay_of(train: TrainConfig, weight: str) -> float:
    """The recipe's weight decay for one weight; biases may have their own."""
    own = train.bias_weight_decay if weight.endswith(".bias") else None
    return train.weight_decay if own is None else own


def acquire_device(popart: ModuleType, ipus: int) -> Any:
    """A device of `ipus` IPUs; raises EnvironmentProblem when this machine has none free."""
    try:
        return popart.DeviceManager().acquireAvailableDevice(ipus)
    except popart.popart_exception as error:
        raise EnvironmentProblem(f"no device with {ipus} IPUs: {error}") from error


def choose_executor(popart: ModuleType, options: Any, executor: str) -> None:
    """The embedded runtime's executor; the SDK compiles for the IPU and has no such choice.

    Raises ConfigError for an unknown one, and for cuda, on IPUs; EnvironmentProblem for cuda where torch sees no such device.
    """
    if executor not in EXECUTORS:
        raise ConfigError(f"executor '{executor}' is unknown; it is {', '.join(EXECUTORS[:-1])} or {EXECUTORS[-1]}")
    if executor == "cuda" and not is_embedded_module(popart):
        raise ConfigError("executor cuda is the embedded runtime's; the Poplar SDK runs on IPUs")
    if executor == "cuda" and not _sees_cuda():
        raise EnvironmentProblem("executor cuda: torch sees no CUDA device here; use aot or eager, or another build of torch")
    if is_embedded_module(popart):
        options.engineOptions = {**dict(options.engineOptions), "popdet.executor": executor}


def _sees_cuda() -> bool:
    return bool(importlib.import_module("torch").cuda.is_available())  # the embedded runtime is on torch, this package is not


def require_compiler(file: str) -> None:
    """torch compiles ahead of time through C++; raises EnvironmentProblem where there is no g++."""
    if shutil.which("g++") is None:
        raise EnvironmentProblem(f"{file}: cannot be compiled ahead of time, g++ is not on PATH; install it (apt install g++), "
                                 "or interpret the program: --executor eager, or -o compile.executor=eager (in training "
                                 "train.executor)")


@contextlib.contextmanager
def compiler_errors(file: str) -> Iterator[None]:
    """Turn what torch's ahead-of-time compiler raises about this machine's C++ compiler into EnvironmentProblem."""
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith("torch._inductor"):
            raise
        text = " ".join(str(error).split())
        raise EnvironmentProblem(f"{file}: cannot be compiled ahead of time ({text[:400]}); repair g++, or interpret the "
                                 "program: --executor eager, or -o compile.executor=eager") from error


@contextlib.contextmanager
def popart_errors(doing: str) -> Iterator[None]:
    """Turn PopART's exceptions into popdet's, keeping PopART's words."""
    popart = load_popart()
    try:
        yield
    except popart.OutOfMemoryException as error:
        raise GraphError(
            f"{doing}: does not fit into the IPUs' memory: {error}. Use more IPUs, recompute, or mixed precision"
        ) from error
    except (popart.popart_exception, popart.poplar_exception, popart.poplibs_exception) as error:
        raise GraphError(f"{doing}: {error}") from error


@contextlib.contextmanager
def external_data(popart: ModuleType, artifact: Artifact) -> Iterator[None]:
    """The SDK opens an external tensor's location as it is written, so relative to the working directory."""
    if is_embedded_module(popart):
        yield
        return
    before = Path.cwd()
    os.chdir(str(artifact.directory))
    try:
        yield
    finally:
        os.chdir(str(before))


def check_inputs(graph: GraphSpec, inputs: Mapping[str, np.ndarray], prefix: Tuple[int, ...]) -> Arrays:
    """The inputs, C-contiguous and in the graph's dtypes, each of the graph's shape behind the axes `prefix`.

    Raises ConfigError naming an input that is missing, unknown, misshapen or of a dtype that would lose values.
    """
    specs = {spec.name: spec for spec in graph.inputs}
    for name in inputs:
        if name not in specs:
            raise ConfigError(f"{graph.file}: unknown input '{name}'; it has {', '.join(specs)}")
    return {name: _check_input(graph.file, spec, prefix, inputs) for name, spec in specs.items()}


def _check_input(file: str, spec: TensorSpec, prefix: Any, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    if spec.name not in inputs:
        raise ConfigError(f"{file}: input '{spec.name}' is missing")
    array = np.asarray(inputs[spec.name])
    if array.shape != prefix + spec.shape:
        raise ConfigError(f"{file}: input '{spec.name}' has shape {array.shape}, expected {prefix + spec.shape}")
    if not np.can_cast(array.dtype, spec.dtype, "same_kind"):
        raise ConfigError(f"{file}: input '{spec.name}' is {array.dtype}, expected {spec.dtype}")
    return np.ascontiguousarray(array, dtype=spec.dtype)


def fitting(label: str, name: str, source: Mapping[str, np.ndarray], shape: Tuple[int, ...], dtype: str) -> np.ndarray:
    """`source[name]` as PopART takes it, C-contiguous and of this dtype; ConfigError if absent or misshapen."""
    if name not in source:
        raise ConfigError(f"{label}: '{name}' is missing among the weights")
    if tuple(source[name].shape) != shape:
        raise ConfigError(f"{label}: '{name}' has shape {tuple(source[name].shape)}, expected {shape}")
    return np.ascontiguousarray(source[name], dtype=dtype)
