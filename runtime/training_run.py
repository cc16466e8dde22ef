"""The directory of a training run: where it starts or goes on, what a failed step leaves, and Ctrl-C.

  <artifact>.train/log.jsonl  checkpoints/step-*/  not-finite-step-*.npz
"""
from __future__ import annotations

import contextlib
import signal
import threading
import zipfile
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional

import numpy as np

from popdet.config import Config
from runtime.artifact import Artifact
from runtime.atomic_io import replace_atomic
from runtime.checkpoint import Checkpoint, latest_checkpoint
from runtime.errors import BadInputFile, ConfigError, MismatchError
from runtime.session import open_training
from runtime.weights_file import WeightsLayout

CHECKPOINTS = "checkpoints"
# What decides which pictures, changes and keys a step sees; a run that goes on with other values sees others.
ORDER_KEYS = {
    "train": ("seed", "accumulation", "replicas"),
    "network": ("train_batch", "gt_capacity", "image_height", "image_width"),
    "data": ("kind", "root", "train_split", "resize", "channel_order", "pixel_scale", "pixel_mean", "pixel_std", "flip",
             "scale_jitter", "colour_jitter", "use_difficult"),
}


def starting_point(
    run: Path, resume: bool, config: Config, layout: WeightsLayout, on_message: Callable[[str], None]
) -> Optional[Checkpoint]:
    """The checkpoint to go on from, or None for a run from step 0; an earlier run that is not resumed is set aside.

    Raises ConfigError where the run is already at train.steps.
    """
    if not resume:
        _set_aside(run, on_message)
        return None
    found = latest_checkpoint(run / CHECKPOINTS, layout, on_message)
    if found is None:
        on_message(f"{run}: no checkpoint to resume from, starting at step 0")
        return None
    if found.step >= config.train.steps:
        raise ConfigError(f"{run}: already trained to step {found.step}; raise train.steps above it to go on")
    on_message(f"resuming at step {found.step}")
    for change in _changes(found.state.extra.get("data_order", {}), data_order(config)):
        on_message(f"note: {change} since the checkpoint; from step {found.step} on the data is another than it would "
                   "have been")
    return found


def data_order(config: Config) -> Dict[str, Any]:
    """The values of ORDER_KEYS, as a checkpoint keeps them."""
    tree = config.to_dict()
    return {f"{section}.{key}": tree[section][key] for section, keys in ORDER_KEYS.items() for key in keys}


def not_finite(
    run: Path, step: int, batch: Mapping[str, np.ndarray], losses: Mapping[str, float], saved: Optional[Path]
) -> MismatchError:
    """Save the inputs of a step whose losses are not finite; returns the error to raise."""
    path = run / f"not-finite-step-{step:06d}.npz"
    with replace_atomic(path) as temporary, open(str(temporary), "wb") as stream:
        arrays: Any = dict(batch)
        np.savez(stream, **arrays)
    bad = ", ".join(f"{name} {value}" for name, value in losses.items() if not np.isfinite(value))
    back = f"the newest good checkpoint is {saved}" if saved else "there is no checkpoint yet"
    return MismatchError(f"step {step}: {bad}. Its inputs are in {path} (popdet train --replay runs them again); {back}. "
                         "Lower train.learning_rate or train.loss_scaling, or lengthen train.warmup_steps, and --resume")


@dataclass(frozen=True)
class Replay:
    """What the saved inputs of one step gave: {output: one value a micro-batch}, and the inputs that are not finite."""

    checkpoint: Optional[str]
    outputs: Mapping[str, List[float]]
    bad_inputs: List[str]  # "image of micro-batch 1"

    def to_dict(self) -> Dict[str, Any]:
        """Plain values; numbers that JSON has no word for become strings."""
        shown = {name: [value if np.isfinite(value) else str(value) for value in values]
                 for name, values in self.outputs.items()}
        return {"checkpoint": self.checkpoint, "outputs": shown, "bad_inputs": self.bad_inputs}

    def text(self) -> str:
        """A table, one micro-batch a line."""
        rows = list(zip(*self.outputs.values()))
        lines = [f"weights of {self.checkpoint or 'the artifact'}", "  ".join(["micro-batch", *self.outputs])]
        lines += ["  ".join([f"{index:>11}", *(f"{value:>{len(name)}.4g}" for name, value in zip(self.outputs, row))])
                  for index, row in enumerate(rows)]
        return "\n".join([*lines, *(f"not finite: {name}" for name in self.bad_inputs)])


def replay_step(
    artifact: Artifact, config: Config, run: Path, file: Path, on_message: Callable[[str], None] = print
) -> Replay:
    """Run the inputs that `not_finite` saved once more, from the newest checkpoint, and look at every micro-batch.

    Raises BadInputFile where the file cannot be read or belongs to another program.
    """
    try:
        with np.load(str(file), allow_pickle=False) as saved:
            inputs = {name: saved[name] for name in saved.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise BadInputFile(f"{file}: not the saved inputs of a step ({error}); name a not-finite-step-*.npz") from error
    found = latest_checkpoint(run / CHECKPOINTS, artifact.layout(), on_message)
    runner = open_training(artifact, config.train, on_message=on_message)
    if found is not None:
        runner.load_weights(found.weights, found.optimizer_state)
        runner.set_learning_rate(found.state.learning_rate)
    missing = [spec.name for spec in runner.graph.inputs if spec.name not in inputs]
    if missing:
        raise BadInputFile(f"{file}: has no '{missing[0]}'; it is not the saved inputs of {artifact.directory}")
    outputs = runner.step({spec.name: inputs[spec.name] for spec in runner.graph.inputs})
    axes = len(runner.lead)
    bad = [f"{spec.name} of micro-batch {index}" for spec in runner.graph.inputs
           for index, array in enumerate(inputs[spec.name].reshape((-1, *inputs[spec.name].shape[axes:])))
           if not np.isfinite(array).all()]
    values = {name: [float(value) for value in array.reshape(-1)] for name, array in outputs.items()}
    return Replay(str(found.path) if found is not None else None, values, bad)


@contextlib.contextmanager
def finish_on_interrupt(on_message: Callable[[str], None]) -> Iterator[threading.Event]:
    """An event that Ctrl-C sets; a second Ctrl-C interrupts as usual."""
    event = threading.Event()

    def handler(number: int, frame: Optional[FrameType]) -> None:
        event.set()
        signal.signal(signal.SIGINT, before)
        on_message("interrupted: finishing this step and writing a checkpoint; Ctrl-C again stops at once")

    if threading.current_thread() is not threading.main_thread():  # Python takes signals in the main thread only
        yield event
        return
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, handler)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)


def _set_aside(run: Path, on_message: Callable[[str], None]) -> None:
    if (run / CHECKPOINTS).is_dir() and any((run / CHECKPOINTS).iterdir()):
        number = 1
        while run.with_name(f"{run.name}.{number}").exists():
            number += 1
        run.rename(run.with_name(f"{run.name}.{number}"))
        on_message(f"{run}: the earlier run is kept as {run.name}.{number}; --resume would continue it")


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> List[str]:
    return [f"{key} changed from {before[key]!r} to {value!r}" for key, value in now.items()
            if key in before and before[key] != value]
