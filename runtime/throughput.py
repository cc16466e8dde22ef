"""How many images a second an artifact trains or detects on this machine, and where the time goes."""
from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional

import numpy as np

from popdet.config import Config
from runtime.artifact import Artifact
from runtime.manifest import GraphSpec
from runtime.session import open_inference, open_training
from runtime.train import device_calls

Source = Iterator[Mapping[str, np.ndarray]]
KEYS = ("rpn_keys", "roi_keys")


@dataclass(frozen=True)
class Throughput:
    """Seconds are wall time. A step is one weight update (train) or one call (infer); warm-up steps are not counted."""

    graph: str
    data: str  # loader | synthetic
    steps: int
    images_per_step: int
    seconds: float
    images_per_second: float
    step_median: float
    step_p90: float  # nine of ten steps took less
    wait: float  # fraction of the time spent waiting for data
    start_seconds: float  # opening the program, compiling it where that is needed, and the warm-up steps

    def to_dict(self) -> Dict[str, Any]:
        return asdict(self)

    def text(self) -> str:
        """Three lines for people."""
        return (f"{self.graph}: {self.images_per_second:.2f} images/s over {self.steps} steps of {self.images_per_step} "
                f"images, {self.data} data\n"
                f"a step takes {self.step_median:.3f} s (median), {self.step_p90:.3f} s (90th percentile); "
                f"{self.wait:.1%} of the time waits for data\n"
                f"{self.start_seconds:.1f} s before the first counted step")


def training_throughput(
    artifact: Artifact, config: Config, steps: int, warmup: int = 2, batches: Optional[Callable[[int], Source]] = None,
    trust_compiled: bool = False, on_message: Callable[[str], None] = print,
) -> Throughput:
    """Time `steps` weight updates of the recipe; nothing is saved.

    batches: as runtime.train takes them; None: random pictures without objects, the same every step.
    """
    began = time.perf_counter()
    runner = open_training(artifact, config.train, trust_compiled=trust_compiled, on_message=on_message)
    source = batches(0) if batches is not None else _repeat(_random_inputs(runner.graph, config.train.update_axes))
    calls = device_calls(source, config.train.batches_per_step)
    marks: List[float] = []

    def step() -> None:
        batch = next(calls)
        marks.append(time.perf_counter())
        runner.step({spec.name: batch[spec.name] for spec in runner.graph.inputs})

    try:
        return _measure("train", "loader" if batches is not None else "synthetic", step, marks, steps, warmup,
                        runner.images * config.train.batches_per_step, began)
    finally:
        getattr(source, "close", lambda: None)()


def inference_throughput(
    artifact: Artifact, steps: int, warmup: int = 2, trust_compiled: bool = False, on_message: Callable[[str], None] = print,
) -> Throughput:
    """Time `steps` calls of the inference program on random pictures."""
    began = time.perf_counter()
    runner = open_inference(artifact, trust_compiled=trust_compiled, on_message=on_message)
    inputs = _random_inputs(runner.graph, ())
    marks: List[float] = []

    def step() -> None:
        marks.append(time.perf_counter())
        runner.run(inputs)

    return _measure("infer", "synthetic", step, marks, steps, warmup, runner.batch, began)


def _measure(graph: str, data: str, step: Callable[[], None], marks: List[float], steps: int, warmup: int, images: int,
             began: float) -> Throughput:
    """`step` appends to `marks` the moment when its data was there."""
    for _ in range(warmup):
        step()
    start = time.perf_counter()
    durations, waited, last = [], 0.0, start
    for _ in range(steps):
        step()
        now = time.perf_counter()
        durations.append(now - last)
        waited += marks[-1] - last
        last = now
    seconds = last - start
    return Throughput(graph, data, steps, images, seconds, images * steps / seconds, float(np.median(durations)),
                      float(np.quantile(durations, 0.9)), waited / seconds, start - began)


def _random_inputs(graph: GraphSpec, lead: Any) -> Dict[str, np.ndarray]:
    """Pictures of noise, no objects, permutations as keys."""
    generator = np.random.default_rng(0)
    made: Dict[str, np.ndarray] = {}
    for spec in graph.inputs:
        shape = (*lead, *spec.shape)
        if spec.name in KEYS:
            row = np.arange(shape[-1], dtype=spec.dtype)
            made[spec.name] = generator.permuted(np.broadcast_to(row, shape), axis=-1)
        elif spec.name == "image":
            made[spec.name] = generator.standard_normal(shape).astype(spec.dtype)
        else:
            made[spec.name] = np.zeros(shape, spec.dtype)
    return made


def _repeat(batch: Mapping[str, np.ndarray]) -> Source:
    while True:
        yield batch
