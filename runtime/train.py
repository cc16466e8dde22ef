"""The training loop: an artifact's training program, a recipe and batches -> trained weights in the artifact.

`train` reads top to bottom on one screen. A run directory holds `log.jsonl` (one line per logged step) and
`checkpoints/`; a run that is resumed continues exactly where its newest whole checkpoint was written.
"""
from __future__ import annotations

import contextlib
import json
import signal
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Callable, Dict, Iterator, Mapping, Optional, Union

import numpy as np

from popdet.config import Config, TrainConfig
from runtime.artifact import Artifact
from runtime.atomic_io import replace_atomic
from runtime.checkpoint import latest_checkpoint, save_checkpoint
from runtime.errors import ConfigError, EnvironmentProblem, MismatchError
from runtime.session import LOSS, TrainingRunner, open_training

Batches = Callable[[int], Iterator[Mapping[str, np.ndarray]]]
Message = Callable[[str], None]


@dataclass(frozen=True)
class TrainResult:
    """What a run did. Losses are means over a step's micro-batches, times are seconds of this run."""

    artifact: str
    steps: int  # weight updates in all, with those of the runs that this one continued
    first_loss: float
    last_loss: float
    seconds: float
    images_per_second: float
    interrupted: bool
    checkpoint: str

    def to_dict(self) -> Dict[str, Any]:
        return asdict(self)

    def text(self) -> str:
        """One paragraph for people."""
        state = "interrupted after" if self.interrupted else "trained to"
        return (f"{state} step {self.steps}: loss {self.first_loss:.4f} -> {self.last_loss:.4f}, {self.seconds:.1f} s, "
                f"{self.images_per_second:.2f} images/s\n"
                f"checkpoint {self.checkpoint}\nthe weights are in {self.artifact}")


def train(
    artifact: Artifact, config: Config, batches: Batches, run_directory: Union[str, Path], resume: bool = False,
    on_message: Message = print, keep_checkpoints: int = 3, trust_compiled: bool = False,
) -> TrainResult:
    """Train to `config.train.steps` weight updates and install the weights in the artifact.

    batches(start_step) iterates over dicts of [accumulation, *shape] arrays, one per weight update. Ctrl-C finishes the
    step, writes a checkpoint and installs the weights so far; a second one stops at once.
    Raises MismatchError when the loss is not finite (the step's inputs are saved), ConfigError, what the batches raise.
    """
    recipe, run = config.train, Path(run_directory)
    layout = artifact.layout()
    start = latest_checkpoint(run / "checkpoints", layout, on_message) if resume else None
    step = _first_step(run, resume, start.step if start else 0, recipe, on_message)
    scalars = [spec.name for spec in artifact.outputs("train") if not spec.shape]
    runner = open_training(artifact, recipe, anchors=scalars, trust_compiled=trust_compiled, on_message=on_message)
    if start is not None:
        runner.load_weights(start.weights, start.optimizer_state)
    images = recipe.accumulation * runner.graph.inputs[0].shape[0]
    losses, began, saved = [], time.perf_counter(), start.path if start else None
    source = batches(step)
    with _finish_on_interrupt(on_message) as interrupted, _closing(source), _log(run, fresh=not step) as log:
        for batch in source:
            began_step = time.perf_counter()
            runner.set_learning_rate(learning_rate(recipe, step))
            outputs = runner.step({spec.name: batch[spec.name] for spec in runner.graph.inputs})
            row = _means(outputs)
            losses.append(row[LOSS])
            if not np.isfinite(list(row.values())).all():
                raise _not_finite(run, step, batch, row, saved)
            step += 1
            if step % recipe.log_every == 0 or step == recipe.steps or len(losses) == 1:
                rate = images / (time.perf_counter() - began_step)
                log({"step": step, "learning_rate": runner.learning_rate, "images_per_second": rate, **row})
                on_message(_line(step, recipe.steps, runner.learning_rate, rate, row))
            stop = interrupted.is_set() or step >= recipe.steps
            if stop or step % recipe.checkpoint_every == 0:
                saved = _save(run, step, runner, layout, config, keep_checkpoints)
            if stop:
                break
    if not losses or saved is None:
        raise ConfigError("the data ended before the first step; check the data set and train.steps")
    if step < recipe.steps and not interrupted.is_set():
        saved = _save(run, step, runner, layout, config, keep_checkpoints)
        on_message(f"the data ended at step {step} of {recipe.steps}")
    trained = artifact.replace_weights(runner.weights(), trained_steps=step)
    seconds = time.perf_counter() - began
    return TrainResult(str(trained.directory), step, losses[0], losses[-1], seconds, images * len(losses) / seconds,
                       interrupted.is_set(), str(saved))


def learning_rate(recipe: TrainConfig, step: int) -> float:
    """Of weight update `step` (from 0): linear warm-up from warmup_factor, then times lr_gamma at each of lr_steps."""
    rate = recipe.learning_rate * recipe.lr_gamma ** sum(step >= drop for drop in recipe.lr_steps)
    if step < recipe.warmup_steps:
        done = step / recipe.warmup_steps
        rate *= recipe.warmup_factor * (1 - done) + done
    return rate


def _first_step(run: Path, resume: bool, found: int, recipe: TrainConfig, on_message: Message) -> int:
    if found >= recipe.steps:
        raise ConfigError(f"{run}: already trained to step {found}; raise train.steps above it to go on")
    if resume:
        on_message(f"resuming at step {found}" if found else f"{run}: no checkpoint to resume from, starting at step 0")
    elif (run / "checkpoints").is_dir() and any((run / "checkpoints").iterdir()):
        number = 1
        while run.with_name(f"{run.name}.{number}").exists():
            number += 1
        run.rename(run.with_name(f"{run.name}.{number}"))
        on_message(f"{run}: the earlier run is kept as {run.name}.{number}; --resume would continue it")
    return found


def _means(outputs: Mapping[str, np.ndarray]) -> Dict[str, float]:
    """The scalar float outputs (the losses), each the mean over the micro-batches."""
    return {name: float(array.mean(dtype=np.float64)) for name, array in outputs.items()
            if array.ndim == 1 and array.dtype.kind == "f"}


def _line(step: int, steps: int, rate: float, speed: float, row: Mapping[str, float]) -> str:
    losses = "  ".join(f"{name} {value:.4f}" for name, value in row.items())
    return f"step {step:>{len(str(steps))}}/{steps}  lr {rate:.2e}  {speed:6.2f} images/s  {losses}"


def _save(run: Path, step: int, runner: TrainingRunner, layout: Any, config: Config, keep: int) -> Path:
    extra = {"artifact": config.name, "train": asdict(config.train)}
    return save_checkpoint(run / "checkpoints", step, runner.learning_rate, layout, runner.weights(),
                           runner.optimizer_state(), extra, keep)


def _not_finite(
    run: Path, step: int, batch: Mapping[str, np.ndarray], row: Mapping[str, float], saved: Optional[Path]
) -> MismatchError:
    path = run / f"not-finite-step-{step:06d}.npz"
    with replace_atomic(path) as temporary, open(str(temporary), "wb") as stream:
        arrays: Any = dict(batch)
        np.savez(stream, **arrays)
    bad = ", ".join(f"{name} {value}" for name, value in row.items() if not np.isfinite(value))
    back = f"the newest good checkpoint is {saved}" if saved else "there is no checkpoint yet"
    return MismatchError(f"step {step}: {bad}. Its inputs are in {path}; {back}. Lower train.learning_rate or "
                         "train.loss_scaling, or lengthen train.warmup_steps, and --resume")


@contextlib.contextmanager
def _log(run: Path, fresh: bool) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A function that appends one JSON line to log.jsonl."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        stream = open(str(run / "log.jsonl"), "w" if fresh else "a", encoding="utf-8")
    except OSError as error:
        raise EnvironmentProblem(f"{run}: cannot be written ({error.strerror})") from error
    with stream:
        def write(row: Mapping[str, Any]) -> None:
            stream.write(json.dumps(row) + "\n")
            stream.flush()

        yield write


@contextlib.contextmanager
def _closing(source: Any) -> Iterator[None]:
    try:
        yield
    finally:
        getattr(source, "close", lambda: None)()  # a loader's thread


@contextlib.contextmanager
def _finish_on_interrupt(on_message: Message) -> Iterator[threading.Event]:
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
