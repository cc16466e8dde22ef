"""How far the gradients of a training step are from float64's: `python benchmarks/gradient_error.py [CASE ...]`.

The cases are the training cases of benchmarks/detector.py. The same network, weights and micro-batch four times: plain torch in
float64, from which the others are measured; the compiled program; the interpreted one; plain torch in float32. Of each weight
the error is |g - g64| / |g64|, both 2-norms. An activation within rounding of a ReLU's bend passes a gradient on one side and
not on the other, and a single one shows: float32 itself is 1e-4 to 1e-3 away.
"""
from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
from pathlib import Path
from typing import Any, Dict, List, Tuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import detector
from benchmarks.interleaved import THREADS
from export.network.detector import TRAIN_OUTPUTS, build_detector, trainable_names
from export.weights import assign_state
from popdet import build
from popdet.config import Config
from runtime.artifact import Artifact
from runtime.popart_api import load_popart
from runtime.session import open_training

CASES = [case for case, (graph, *_) in detector.CASES.items() if graph == "train"]
LOSS = TRAIN_OUTPUTS[0]
Gradients = Dict[str, torch.Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; default: all")
    parser.add_argument("--out", type=Path, default=Path("artifacts/benchmarks"))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    unknown = [case for case in arguments.cases if case not in CASES]
    if unknown:
        parser.error(f"unknown case '{unknown[0]}'; known: {', '.join(CASES)}")
    torch.set_num_threads(THREADS)
    reports = {}
    for case in arguments.cases or CASES:
        reports[case] = measure_errors(detector.case_config(case), arguments.out)
        print(format_report(case, reports[case]), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(reports, indent=1) + "\n", encoding="utf-8")


def measure_errors(config: Config, out: Path) -> Dict[str, Dict[str, float]]:
    """{side: {weight: relative error}}; builds the artifact where it is not there."""
    build.compile(config, out, lambda text: None)
    artifact = Artifact.open(build.artifact_directory(config, out), verify=False)
    specs = artifact.graph("train").inputs
    batch = detector.inputs_of({spec.name: spec.shape for spec in specs}, config.network.num_classes)
    inputs = {spec.name: torch.from_numpy(batch[spec.name]) for spec in specs}
    exact = in_torch(artifact, inputs, torch.float64)
    compiled, interpreted = programs(artifact, inputs)
    sides = {"compiled": compiled, "interpreted": interpreted, "torch, float32": in_torch(artifact, inputs, torch.float32)}
    return {side: {name: float((found[name].double() - g).norm() / g.norm()) for name, g in exact.items()}
            for side, found in sides.items()}


def programs(artifact: Artifact, inputs: Gradients) -> Tuple[Gradients, Gradients]:
    """Of the compiled program, of the same graph interpreted."""
    core = open_training(artifact, artifact.config.train).session._core
    program = importlib.import_module(f"{load_popart().__name__}._engine.program")
    asked: Tuple[Any, ...] = core.variables.device[0], inputs, core.wanted, core.grads_of, torch.tensor(1.0)
    return core.program.step(*asked)[1], program.EagerProgram(core.graph, core.loss).step(*asked)[1]


def in_torch(artifact: Artifact, inputs: Gradients, dtype: torch.dtype) -> Gradients:
    """Of the network as it is written, by autograd."""
    network = build_detector(artifact.config.network, training=True)
    assign_state(network, artifact.weights(), str(artifact.directory))
    network.to(dtype)
    names = trainable_names(artifact.config.network, network)
    given = [tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in inputs.values()]
    loss = dict(zip(TRAIN_OUTPUTS, network(*given)))[LOSS]
    return dict(zip(names, torch.autograd.grad(loss, [network.get_parameter(name) for name in names])))


def format_report(case: str, errors: Dict[str, Dict[str, float]]) -> str:
    lines: List[str] = [f"{case}: relative error of gradients, from float64", f"  {'':16s}{'median':>9}{'worst':>9}"]
    for side, found in errors.items():
        worst = max(found, key=lambda name: found[name])
        lines.append(f"  {side:16s}{statistics.median(found.values()):9.1e}{found[worst]:9.1e}  {worst}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
