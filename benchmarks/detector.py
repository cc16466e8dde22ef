"""A detector's training step and inference beside plain torch and onnxruntime: `python benchmarks/detector.py [CASE ...]`.

popdet runs the ahead-of-time compiled program of its artifact. The peers, on the same weights and inputs:
  eager                     the network in plain torch with autograd and torch.optim.SGD
  eager, channels-last      the same in torch's other memory format
  eager, popdet's kernels   channels-last, with popdet's C++ ROI-Align and NMS in place of the readable reference
  eager, popdet's memory    that, with malloc keeping freed memory as popdet has it
  torch.compile             with --torch-compile (it compiles for minutes)
  onnxruntime               reference.infer.onnx on the CPU
Every side has a process of its own; they take turns. Random weights and pictures. Prints a table a case; --json FILE keeps
the figures. Artifacts are kept in --out.
"""
from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.interleaved import THREADS, Remote, as_json, measure, table
from benchmarks.plain_torch_train import make_optimizer
from export import ops
from export.network.detector import TRAIN_OUTPUTS, build_detector
from export.weights import assign_state, read_safetensors
from popdet import build
from popdet.config import Config, load_config
from runtime.artifact import Artifact
from runtime.popart_api import load_popart
from runtime.session import open_inference, open_training

MOBILENET = ("configs/voc-mobilenetv2-320.yaml", ("network.roi_batch=64",))
RESNET = ("configs/voc0712-r50c4-fp32-8ipu.yaml", ("compile.stages=auto",))
CASES: Dict[str, Tuple[str, str, Tuple[str, ...], int]] = {  # name -> graph, config, overrides, rounds
    "train-mobilenetv2": ("train", MOBILENET[0], (*MOBILENET[1], "network.train_batch=4"), 12),
    "train-resnet50": ("train", RESNET[0], (*RESNET[1], "network.image_height=512", "network.image_width=512",
                                            "network.roi_batch=128", "network.train_batch=1"), 8),
    "infer-mobilenetv2": ("infer", MOBILENET[0], (*MOBILENET[1], "network.infer_batch=1"), 30),
    "infer-resnet50": ("infer", RESNET[0], (*RESNET[1], "network.rpn_post_nms_test=300", "network.infer_batch=1"), 8),
}
COMMON = ("compile.ipus=1", "compile.pipelining=false", "compile.executor=eager", "network.weights=null",
          "train.accumulation=1", "train.batches_per_step=1", "train.executor=aot", "train.learning_rate=1.0e-6")
SIDES = {
    "train": ("popdet", "eager", "eager, channels-last", "eager, popdet's kernels", "eager, popdet's memory"),
    "infer": ("popdet", "onnxruntime", "eager, channels-last"),
}
Side = Callable[[], object]


def inputs_of(shapes: Dict[str, Tuple[int, ...]], classes: int, seed: int = 0) -> Dict[str, np.ndarray]:
    """Noise as pictures, a few objects in each, permutations as sampling keys."""
    rng, made = np.random.default_rng(seed), {}
    for name, shape in shapes.items():
        if name == "image":
            height, width = shape[2:]
            made[name] = rng.standard_normal(shape).astype(np.float32)
        elif name.endswith("_keys"):
            made[name] = rng.permuted(np.broadcast_to(np.arange(shape[-1], dtype=np.float32), shape), axis=-1)
        elif name == "gt_boxes":
            corner = rng.uniform(0, 0.5, (*shape[:2], 2))
            size = rng.uniform(0.1, 0.5, corner.shape)
            made[name] = (np.concatenate([corner, corner + size], -1) * [width, height, width, height]).astype(np.float32)
        elif name == "gt_classes":
            made[name] = rng.integers(1, classes, shape).astype(np.int32)
        else:
            made[name] = np.full(shape, 4, np.int32)
    return made


def make_side(case: str, label: str, out: Path) -> Side:
    """What one process measures; the artifact is there already."""
    torch.set_num_threads(THREADS)
    config = case_config(case)
    artifact = Artifact.open(build.artifact_directory(config, out), verify=False)
    graph = CASES[case][0]
    specs = artifact.graph(graph).inputs
    batch = inputs_of({spec.name: spec.shape for spec in specs}, config.network.num_classes)
    if label == "popdet":
        return popdet_side(artifact, config, graph, batch)
    if label == "onnxruntime":
        return onnxruntime_side(artifact, batch)
    layout = torch.contiguous_format if label == "eager" else torch.channels_last
    if label in ("eager, popdet's kernels", "eager, popdet's memory"):
        engine = f"{load_popart().__name__}._engine"
        importlib.import_module(f"{engine}.custom")  # registers popdet's kernels with torch
        if label == "eager, popdet's memory":
            importlib.import_module(f"{engine}.host_memory").keep_freed_memory()
        ops.roi_align, ops.nms = torch.ops.popdet_embedded.roi_align, torch.ops.popdet_embedded.nms
    network = build_detector(config.network, training=graph == "train")
    path = str(artifact.directory / "weights.safetensors")
    assign_state(network, read_safetensors(path), path)
    network.to(memory_format=layout).train(graph == "train")
    tensors = [torch.from_numpy(array) for array in batch.values()]
    tensors[0] = tensors[0].to(memory_format=layout)
    if graph == "infer":
        return lambda: infer_eagerly(network, tensors)
    optimizer = make_optimizer(network, config)
    called = torch.compile(network) if label == "torch.compile" else network
    return lambda: train_eagerly(called, optimizer, tensors)


def popdet_side(artifact: Artifact, config: Config, graph: str, batch: Dict[str, np.ndarray]) -> Side:
    if graph == "infer":
        runner = open_inference(artifact, executor="aot")
        return lambda: runner.run(batch)
    trainer = open_training(artifact, config.train)
    step = {name: array.reshape(*trainer.lead, *array.shape) for name, array in batch.items()}
    return lambda: trainer.step(step)


def onnxruntime_side(artifact: Artifact, batch: Dict[str, np.ndarray]) -> Side:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    session = onnxruntime.InferenceSession(str(artifact.directory / "reference.infer.onnx"), options,
                                           providers=["CPUExecutionProvider"])
    return lambda: session.run(None, batch)


def train_eagerly(network: Any, optimizer: torch.optim.Optimizer, tensors: List[torch.Tensor]) -> float:
    """One weight update; returns the loss."""
    optimizer.zero_grad(set_to_none=True)
    loss = network(*tensors)[TRAIN_OUTPUTS.index("loss")]
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def infer_eagerly(network: Any, tensors: List[torch.Tensor]) -> object:
    with torch.inference_mode():
        return network(*tensors)


def case_config(case: str) -> Config:
    graph, path, overrides, _ = CASES[case]
    return load_config(path, [f"name={case}", f"compile.graphs=[{graph}]", *COMMON, *overrides])


def run_case(case: str, out: Path, compiled: bool) -> Dict[str, Any]:
    config, (graph, _, _, rounds) = case_config(case), CASES[case]
    build.export(config, out)
    build.compile(config, out, lambda text: None)
    Remote(make_side, case, "popdet", out).close()  # compiles, which takes memory that a step does not
    labels = [*SIDES[graph], *(["torch.compile"] if compiled and graph == "train" else [])]
    sides = {label: Remote(make_side, case, label, out) for label in labels}
    timings = measure(sides, rounds)
    for side in sides.values():
        side.close()
    print(table(f"{case}, {THREADS} threads, medians of {rounds} (quartiles)", timings, "popdet"), flush=True)
    return as_json(case, timings)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cases", nargs="*", default=[], metavar="CASE", help=f"of {', '.join(CASES)}; default: all")
    parser.add_argument("--torch-compile", action="store_true", help="torch.compile as one more peer in training")
    parser.add_argument("--out", type=Path, default=Path("artifacts/benchmarks"))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    unknown = [name for name in arguments.cases if name not in CASES]
    if unknown:
        parser.error(f"unknown case '{unknown[0]}'; known: {', '.join(CASES)}")
    report: List[Dict[str, Any]] = [run_case(name, arguments.out, arguments.torch_compile)
                                    for name in arguments.cases or CASES]
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
