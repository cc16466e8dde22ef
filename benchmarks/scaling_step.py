"""Milliseconds of popdet's compiled step against micro-batch, RoIs a picture and pixels, one of them varied at a time.

Every size has an artifact and a process of its own; all sizes of a part take turns. A part's line is t = a + b * n with n in
pictures, RoIs a picture, or pixels of a picture.
"""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List, Sequence, Tuple

import torch

from benchmarks.detector import COMMON, MOBILENET, inputs_of, popdet_side
from benchmarks.fits import fit_line
from benchmarks.interleaved import THREADS, Remote, measure
from popdet import build
from popdet.config import Config, load_config
from runtime.artifact import Artifact
from runtime.session import open_inference

TINY = ("configs/shapes-tiny.yaml", ())


@dataclass(frozen=True)
class Part:
    """What is varied: {size n: its config overrides}, of which graph, and what n counts."""

    graph: str  # train | infer
    counts: str
    sizes: Dict[int, Tuple[str, ...]]


@dataclass(frozen=True)
class Plan:
    """A config with the overrides that all sizes share, and the parts by name."""

    config: Tuple[str, Tuple[str, ...]]
    parts: Dict[str, Part]


def _numbers(key: str, sizes: Sequence[int]) -> Dict[int, Tuple[str, ...]]:
    return {size: (f"network.{key}={size}",) for size in sizes}


def _squares(sides: Sequence[int]) -> Dict[int, Tuple[str, ...]]:
    return {side * side: (f"network.image_height={side}", f"network.image_width={side}") for side in sides}


def _plan(config: Tuple[str, Tuple[str, ...]], batches: Sequence[int], rois: Sequence[int], sides: Sequence[int]) -> Plan:
    return Plan(config, {
        "train-batch": Part("train", "pictures", _numbers("train_batch", batches)),
        "train-rois": Part("train", "RoIs", _numbers("roi_batch", rois)),
        "train-pixels": Part("train", "pixels", _squares(sides)),
        "infer-rois": Part("infer", "RoIs", _numbers("rpn_post_nms_test", rois)),
        "infer-pixels": Part("infer", "pixels", _squares(sides)),
    })


PLANS: Dict[str, Plan] = {
    # MobileNetV2-C4 at 320x320, 4 pictures, 64 RoIs, as the detector benchmark's
    "full": _plan((MOBILENET[0], (*MOBILENET[1], "network.train_batch=4", "network.rpn_post_nms_test=64",
                                  "network.infer_batch=1")), (1, 2, 4, 8), (16, 32, 64, 128), (192, 256, 320, 448)),
    # the demo's tiny network at 128x128, one picture, 32 RoIs: to try the script
    "small": _plan(TINY, (1, 2, 3), (16, 32, 48), (96, 128, 160)),
}


def size_config(plan: Plan, part: Part, size: int, executor: str) -> Config:
    """The config of one size; sizes of several parts that are the same share its artifact."""
    path, shared = plan.config
    values = [f"compile.graphs=[{part.graph}]", *COMMON, f"train.executor={executor}", *shared, *part.sizes[size]]
    network = load_config(path, values).network
    name = (f"scaling-{part.graph}-{network.backbone}-{network.image_height}-b{network.train_batch}"
            f"-r{network.roi_batch}-p{network.rpn_post_nms_test}")
    return load_config(path, [f"name={name}", *values])


def make_step(config: Config, graph: str, executor: str, out: Path) -> Callable[[], object]:
    """What the process of one size calls; its artifact is there."""
    torch.set_num_threads(THREADS)
    artifact = Artifact.open(build.artifact_directory(config, out), verify=False)
    specs = artifact.graph(graph).inputs
    batch = inputs_of({spec.name: spec.shape for spec in specs}, config.network.num_classes)
    if graph == "infer" and executor != "aot":
        runner = open_inference(artifact, executor=executor)
        return lambda: runner.run(batch)
    return popdet_side(artifact, config, graph, batch)


def measure_part(plan: Plan, name: str, rounds: int, executor: str, out: Path) -> Dict[str, Any]:
    """{"part", "graph", "counts", "sizes", "milliseconds" (medians), "low", "high" (quartiles), and the line's fields}.

    The fields of the line: intercept (ms), slope (ms for one of `counts`), r_squared, residual (largest, of the time).
    """
    part, sides = plan.parts[name], {}
    for size in part.sizes:
        config = size_config(plan, part, size, executor)
        build.export(config, out)
        build.compile(config, out, lambda text: None)
        sides[str(size)] = Remote(make_step, config, part.graph, executor, out)
    timings = measure(sides, rounds)
    for side in sides.values():
        side.close()
    sizes, medians = list(part.sizes), [timing.median for timing in timings]
    return {"part": name, "graph": part.graph, "counts": part.counts, "sizes": sizes, "milliseconds": medians,
            "low": [timing.low for timing in timings], "high": [timing.high for timing in timings],
            "peak_mib": [timing.peak_mib for timing in timings], **vars(fit_line(sizes, medians))}


def part_text(row: Dict[str, Any]) -> str:
    """A part as text: a line a size, then the fit."""
    lines = [row["part"]]
    for size, median, low, high, peak in zip(row["sizes"], row["milliseconds"], row["low"], row["high"], row["peak_mib"]):
        fitted = row["intercept"] + row["slope"] * size
        lines.append(f"  {size:>9,} {row['counts']:9s}{median:10.1f} ms  ({low:.1f} to {high:.1f})  fit {fitted:10.1f}"
                     f"  peak {peak:6,.0f} MiB")
    lines.append(f"  t = {row['intercept']:.1f} ms + {row['slope']:.6g} ms x {row['counts']}, R2 {row['r_squared']:.4f}, "
                 f"largest residual {row['residual']:.1%} of the time")
    return "\n".join(lines)


def measure_steps(plan: Plan, names: List[str], rounds: int, executor: str, out: Path) -> List[Dict[str, Any]]:
    """The parts one after the other, each printed as it is done."""
    rows = []
    for name in names:
        rows.append(measure_part(plan, name, rounds, executor, out))
        print(part_text(rows[-1]), flush=True)
    return rows
