"""Write the reference graphs: reference.infer.onnx, reference.train.onnx, and the weights both point into.

    report = export_reference(config.network, ("infer", "train"), Path("artifacts/demo"))

Standard operators of opset 18 only, every shape static, the same bytes for the same config and weights. The float state
of the network is external data inside weights.safetensors, by byte offset, so one file serves both graphs.
"""
from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

import numpy as np
import onnx_ir as ir
from safetensors.numpy import save
from torch import nn

from export.network.detector import (
    INFER_OUTPUTS,
    TRAIN_OUTPUTS,
    build_detector,
    input_signature,
    trainable_names,
)
from export.onnx_graph import module_to_onnx
from export.weights import WeightsReport, assign_state
from popdet.config import NetworkConfig
from runtime.errors import ConfigError, EnvironmentProblem, GraphError

WEIGHTS_FILE = "weights.safetensors"
KINDS = ("infer", "train")


@dataclass(frozen=True)
class ExportedGraph:
    """One file written: where, how large, and how long it took."""

    kind: str  # infer | train
    path: Path
    sha256: str
    bytes: int
    nodes: int
    opset: int
    trainable: Tuple[str, ...]  # names of the initializers that train; empty for infer
    seconds: float


@dataclass(frozen=True)
class ExportReport:
    """What export_reference wrote."""

    graphs: Tuple[ExportedGraph, ...]
    weights: Path
    weights_sha256: str
    weights_bytes: int
    parameters: int  # numbers in the weights file
    pretrained: Optional[WeightsReport]  # what network.weights gave; None without
    seconds: float

    def to_dict(self) -> Dict[str, object]:
        """Plain values for JSON."""
        tree = dataclasses.asdict(self)
        tree["weights"] = str(self.weights)
        tree["graphs"] = [{**dataclasses.asdict(graph), "path": str(graph.path), "trainable": list(graph.trainable)}
                          for graph in self.graphs]
        return tree


def export_reference(config: NetworkConfig, kinds: Sequence[str], directory: Path,
                     state: Optional[Mapping[str, np.ndarray]] = None) -> ExportReport:
    """Export the graphs of `kinds` (infer, train) and weights.safetensors into `directory`, which is created.

    `state` replaces weights by name (a checkpoint). All files are written aside and renamed together at the end, so a
    failure leaves what was there before. Raises ConfigError, GraphError, BadInputFile.
    """
    started = time.perf_counter()
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise ConfigError(f"graphs to export: found {list(kinds)}, expected some of {', '.join(KINDS)}")
    directory = Path(directory)
    contents: Dict[str, bytes] = {}
    layout: Dict[str, Tuple[int, int]] = {}
    parameters, pretrained = 0, None
    graphs: List[ExportedGraph] = []
    for kind in dict.fromkeys(kinds):
        kind_started = time.perf_counter()
        detector = build_detector(config, training=kind == "train").eval()
        if state is not None:
            assign_state(detector, state, "the given weights")
        if not contents:
            arrays = {name: tensor.detach().numpy() for name, tensor in detector.state_dict().items()}
            contents[WEIGHTS_FILE] = save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
            layout = byte_ranges(contents[WEIGHTS_FILE])
            pretrained = detector.weights_report
            parameters = sum(array.size for array in arrays.values())
        model = _export_graph(config, kind, detector, layout)
        data = ir.to_proto(model).SerializeToString(deterministic=True)
        name = f"reference.{kind}.onnx"
        contents[name] = data
        graphs.append(ExportedGraph(
            kind, directory / name, hashlib.sha256(data).hexdigest(), len(data), len(model.graph),
            model.opset_imports[""], tuple(trainable_names(config, detector)) if kind == "train" else (),
            time.perf_counter() - kind_started))
    weights = contents[WEIGHTS_FILE]
    write_together(directory, contents)
    return ExportReport(tuple(graphs), directory / WEIGHTS_FILE, hashlib.sha256(weights).hexdigest(), len(weights),
                        parameters, pretrained, time.perf_counter() - started)


def _export_graph(config: NetworkConfig, kind: str, detector: nn.Module, layout: Dict[str, Tuple[int, int]]) -> ir.Model:
    """The finished graph of one kind, its state as references into the weights file."""
    training = kind == "train"
    model = module_to_onnx(detector, input_signature(config, training), TRAIN_OUTPUTS if training else INFER_OUTPUTS)
    model.metadata_props["popdet.kind"] = kind
    model.metadata_props["popdet.network"] = json.dumps(dataclasses.asdict(config), sort_keys=True)
    if training:
        model.metadata_props["popdet.loss"] = TRAIN_OUTPUTS[0]
        model.metadata_props["popdet.trainable"] = json.dumps(trainable_names(config, detector))
    for name, tensor in detector.state_dict().items():
        value = model.graph.initializers.get(name)
        if value is None:
            raise GraphError(f"{kind} graph: '{name}' of the network's state is not an initializer of the graph; is its "
                             f"module unused, or did the exporter merge it?")
        if value.shape != ir.Shape(tensor.shape) or value.dtype != ir.DataType.FLOAT:
            raise GraphError(f"{kind} graph: initializer '{name}' is {value.dtype} {value.shape}, the state has float32 "
                             f"{list(tensor.shape)}")
        offset, length = layout[name]
        value.const_value = ir.ExternalTensor(WEIGHTS_FILE, offset, length, ir.DataType.FLOAT, shape=value.shape, name=name)
    return model


def byte_ranges(content: bytes) -> Dict[str, Tuple[int, int]]:
    """Name -> (offset, length) in bytes of every tensor of a safetensors file, counted from the start of the file."""
    header_bytes = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + header_bytes])
    data_start = 8 + header_bytes
    return {name: (data_start + entry["data_offsets"][0], entry["data_offsets"][1] - entry["data_offsets"][0])
            for name, entry in header.items() if name != "__metadata__"}


def write_together(directory: Path, contents: Mapping[str, bytes]) -> None:
    """Write every file aside, flush to disk, then rename all: readers see the old files or the new ones, none cut short.

    Raises EnvironmentProblem where the folder cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _cleaned_up([directory / f".{name}.{os.getpid()}.tmp" for name in contents]) as aside:
            for path, content in zip(aside, contents.values()):
                with open(path, "wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
            for path, name in zip(aside, contents):
                os.replace(path, directory / name)
    except OSError as error:
        raise EnvironmentProblem(f"{directory}: the exported files cannot be written ({error.strerror or error}); free "
                                 f"some space or choose another folder") from error


@contextlib.contextmanager
def _cleaned_up(paths: List[Path]) -> Iterator[List[Path]]:
    try:
        yield paths
    finally:
        for path in paths:
            path.unlink(missing_ok=True)
