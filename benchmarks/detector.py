"""A detector's training step and inference beside plain torch and onnxruntime: `python benchmarks/detector.py [CASE ...]`.

popdet runs the ahead-of-time compiled program of its artifact. The peers, on the same weights and inputs:
  eager                       the network in plain torch with autograd and torch.optim.SGD
  eager, channels-last        the same in torch's other memory format
  eager ..., popdet's kernels the better of both with popdet's C++ ROI-Align and NMS in place of the readable reference
  torch.compile               with --torch-compile (it compiles for minutes)
  onnxruntime                 reference.infer.onnx on the CPU
Random weights and pictures. Prints a table a case; --json FILE keeps the figures. Artifacts are kept in --out.
"""
from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.interleaved import THREADS, as_json, measure, table
from benchmarks.plain_torch_train import make_optimizer
from export import ops
from export.network.detector import TRAIN_OUTPUTS, build_detector
from export.weights import assign_state, read_safetensors
from popdet import build
from popdet.config import Config, load_config
from runtime.artifact import Artifact
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


def training_sides(artifact: Artifact, config: Config) -> Dict[str, Side]:
    """One weight update with a micro-batch: popdet's compiled program, and plain torch."""
    runner = open_training(artifact, config.train, anchors=["loss"])
    batch = inputs_of({spec.name: spec.shape for spec in runner.graph.inputs}, config.network.num_classes)
    step = {name: array.reshape(*runner.lead, *array.shape) for name, array in batch.items()}
    sides: Dict[str, Side] = {"popdet": lambda: runner.step(step)}
    for label, layout in (("eager", torch.contiguous_format), ("eager, channels-last", torch.channels_last)):
        sides[label] = eager_step(artifact, config, batch, layout)
    return sides


def eager_step(artifact: Artifact, config: Config, batch: Dict[str, np.ndarray], layout: torch.memory_format) -> Side:
    network = plain_network(artifact, config, training=True).to(memory_format=layout).train()
    optimizer = make_optimizer(network, config)
    tensors = [torch.from_numpy(array) for array in batch.values()]
    tensors[0] = tensors[0].to(memory_format=layout)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = network(*tensors)[TRAIN_OUTPUTS.index("loss")]
        loss.backward()
        optimizer.step()
        return float(loss)

    return step


def inference_sides(artifact: Artifact, config: Config) -> Dict[str, Side]:
    """One micro-batch through popdet's compiled program, onnxruntime and plain torch."""
    import onnxruntime

    runner = open_inference(artifact, executor="aot")
    feeds = inputs_of({spec.name: spec.shape for spec in runner.graph.inputs}, config.network.num_classes)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    session = onnxruntime.InferenceSession(str(artifact.directory / "reference.infer.onnx"), options,
                                           providers=["CPUExecutionProvider"])
    network = plain_network(artifact, config, training=False).to(memory_format=torch.channels_last).eval()
    image = torch.from_numpy(feeds["image"]).to(memory_format=torch.channels_last)

    def eager() -> object:
        with torch.inference_mode():
            return network(image)

    return {"popdet": lambda: runner.run(feeds), "onnxruntime": lambda: session.run(None, feeds),
            "eager, channels-last": eager}


def plain_network(artifact: Artifact, config: Config, training: bool) -> Any:
    """The network in plain torch with the artifact's weights."""
    network = build_detector(config.network, training=training)
    path = str(artifact.directory / "weights.safetensors")
    assign_state(network, read_safetensors(path), path)
    return network


def with_popdets_kernels(side: Side) -> Side:
    """`side` with the C++ ROI-Align and NMS of the embedded runtime."""
    import runtime.embedded.popart  # noqa: F401  registers them

    fast = {"roi_align": torch.ops.popdet_embedded.roi_align, "nms": torch.ops.popdet_embedded.nms}

    def call() -> object:
        slow = {name: getattr(ops, name) for name in fast}
        try:
            for name, function in fast.items():
                setattr(ops, name, function)
            return side()
        finally:
            for name, function in slow.items():
                setattr(ops, name, function)

    return call


def run_case(name: str, out: Path, compiled: bool) -> Dict[str, Any]:
    graph, path, overrides, rounds = CASES[name]
    config = load_config(path, [f"name={name}", f"compile.graphs=[{graph}]", *COMMON, *overrides])
    build.export(config, out)
    build.compile(config, out, lambda text: None)
    artifact = Artifact.open(build.artifact_directory(config, out))
    sides = (training_sides if graph == "train" else inference_sides)(artifact, config)
    for label in [label for label in sides if label.startswith("eager")]:
        sides[f"{label}, popdet's kernels"] = with_popdets_kernels(sides[label])
    if compiled and graph == "train":
        sides["torch.compile"] = compiled_step(artifact, config)
    timings = measure(sides, rounds)
    print(table(f"{name}, {THREADS} threads, medians of {rounds} (quartiles)", timings, "popdet"), flush=True)
    return as_json(name, timings)


def compiled_step(artifact: Artifact, config: Config) -> Side:
    """torch.compile of the training network; its graph breaks are its own."""
    config = dataclasses.replace(config)
    network = torch.compile(plain_network(artifact, config, training=True).train())
    optimizer = make_optimizer(network._orig_mod, config)
    shapes = {spec.name: spec.shape for spec in artifact.graph("train").inputs}
    tensors = [torch.from_numpy(array) for array in inputs_of(shapes, config.network.num_classes).values()]

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = network(*tensors)[TRAIN_OUTPUTS.index("loss")]
        loss.backward()
        optimizer.step()
        return float(loss)

    return step


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
    torch.set_num_threads(THREADS)
    report: List[Dict[str, Any]] = [run_case(name, arguments.out, arguments.torch_compile)
                                    for name in arguments.cases or CASES]
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
