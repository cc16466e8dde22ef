"""The training loop: an artifact's training program, a recipe and batches -> trained weights in the artifact.

`train` reads top to bottom on one screen. A run directory holds `log.jsonl` and `checkpoints/`; a run that is resumed
continues exactly where its newest whole checkpoint was written.
"""
from __future__ import annotations

import contextlib
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Tuple, Union

import numpy as np

from popdet.config import Config, TrainConfig
from runtime.artifact import Artifact
from runtime.checkpoint import Checkpoint, Evaluation, TrainingState, best_checkpoint, save_checkpoint
from runtime.errors import ConfigError
from runtime.session import LOSS, TrainingRunner, open_training
from runtime.train_log import TrainLog
from runtime.training_run import CHECKPOINTS, data_order, finish_on_interrupt, not_finite, starting_point

Batches = Callable[[int], Iterator[Mapping[str, np.ndarray]]]
Evaluate = Callable[[Mapping[str, np.ndarray]], Evaluation]  # of weights, on the evaluation split
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
    wait: float  # fraction of the time spent waiting for data
    left_out: Mapping[str, int] = field(default_factory=dict)  # what the loader could not use, by kind
    best_checkpoint: Optional[str] = None
    best: Optional[float] = None  # its evaluation

    def to_dict(self) -> Dict[str, Any]:
        return asdict(self)

    def text(self) -> str:
        """One paragraph for people."""
        state = "interrupted after" if self.interrupted else "trained to"
        lines = [f"{state} step {self.steps}: loss {self.first_loss:.4f} -> {self.last_loss:.4f}, {self.seconds:.1f} s, "
                 f"{self.images_per_second:.2f} images/s, {self.wait:.1%} of it waiting for data"]
        lines += [f"left out: {count} {kind.replace('_', ' ')}" for kind, count in self.left_out.items() if count]
        lines += [f"checkpoint {self.checkpoint}", f"the weights are in {self.artifact}"]
        if self.best is not None:
            lines.append(f"best evaluation {100 * self.best:.1f}: {self.best_checkpoint}")
        return "\n".join(lines)


def train(
    artifact: Artifact, config: Config, batches: Batches, run_directory: Union[str, Path], resume: bool = False,
    on_message: Message = print, evaluate: Optional[Evaluate] = None, trust_compiled: bool = False, bar: bool = False,
) -> TrainResult:
    """Train to `config.train.steps` weight updates and install the weights in the artifact.

    batches(start_step) iterates over dicts of [accumulation, (replicas,) *shape] arrays, one per weight update; where it
    has `wait_seconds` and `counts()` they are reported. evaluate: called every train.eval_every steps. bar: a progress
    bar on standard error instead of lines. Ctrl-C finishes the step, writes a checkpoint and installs the weights so
    far; a second one stops at once.
    Raises MismatchError when a loss is not finite (the step's inputs are saved), ConfigError, what the batches raise.
    """
    recipe, run, layout = config.train, Path(run_directory), artifact.layout()
    _check_step_counts(recipe)
    start = starting_point(run, resume, config, layout, on_message)
    runner = open_training(artifact, recipe, trust_compiled=trust_compiled, on_message=on_message)
    step, saved = _restore(runner, start)
    losses: List[float] = []
    began, source = time.perf_counter(), batches(step)
    calls = device_calls(source, recipe.batches_per_step)
    with _closing(source), TrainLog(run, recipe, runner.images, step, on_message, bar) as log, \
            finish_on_interrupt(log.message) as interrupted:
        for batch in calls:
            runner.set_learning_rate(learning_rate(recipe, step))
            rows = _means(runner.step({spec.name: batch[spec.name] for spec in runner.graph.inputs}), recipe)
            for row in rows:
                if not np.isfinite(list(row.values())).all():
                    raise not_finite(run, step, batch, row, saved)
                losses.append(row[LOSS])
                step += 1
                log.step(step, runner.learning_rate, row, getattr(source, "wait_seconds", 0.0))
            stop = interrupted.is_set() or step >= recipe.steps
            judged = bool(recipe.eval_every) and not interrupted.is_set() and _due(step, recipe, recipe.eval_every)
            if stop or judged or _due(step, recipe, recipe.checkpoint_every):
                saved = _save(run, step, runner, config, log, evaluate if judged else None)
            if stop:
                break
        else:
            if not losses:
                raise ConfigError("the data ended before the first step; check the data set and train.steps")
            saved = _save(run, step, runner, config, log, None)
            log.message(f"the data ended at step {step} of {recipe.steps}")
        seconds = time.perf_counter() - began
    trained = artifact.replace_weights(runner.weights(), trained_steps=step)
    best = best_checkpoint(run / CHECKPOINTS)
    return TrainResult(
        str(trained.directory), step, losses[0], losses[-1], seconds, runner.images * len(losses) / seconds,
        interrupted.is_set(), str(saved), getattr(source, "wait_seconds", 0.0) / seconds,
        source.counts() if hasattr(source, "counts") else {}, *((str(best[0]), best[1].value) if best else ()))


def learning_rate(recipe: TrainConfig, step: int) -> float:
    """Of weight update `step` (from 0): linear warm-up from warmup_factor, then times lr_gamma at each of lr_steps."""
    rate = recipe.learning_rate * recipe.lr_gamma ** sum(step >= drop for drop in recipe.lr_steps)
    if step < recipe.warmup_steps:
        done = step / recipe.warmup_steps
        rate *= recipe.warmup_factor * (1 - done) + done
    return rate


def _restore(runner: TrainingRunner, start: Optional[Checkpoint]) -> Tuple[int, Optional[Path]]:
    """(step, path of the checkpoint) after loading it into the program; (0, None) without one."""
    if start is None:
        return 0, None
    runner.load_weights(start.weights, start.optimizer_state)
    if start.state.random_state is not None and runner.train.stochastic_rounding:
        runner.set_random_state(start.state.random_state)
    return start.step, start.path


def _save(
    run: Path, step: int, runner: TrainingRunner, config: Config, log: TrainLog, evaluate: Optional[Evaluate]
) -> Path:
    go_on, (weights, momentum) = log.pause(), runner.read()
    evaluation = evaluate(weights) if evaluate is not None else None
    if evaluation is not None:
        log.event(step, {f"eval_{evaluation.metric}_ap50": evaluation.value})
        log.message(f"step {step}: {evaluation.metric} AP50 {100 * evaluation.value:.1f}")
    state = TrainingState(
        step, runner.learning_rate, runner.random_state(), evaluation,
        {"artifact": config.name, "train": asdict(config.train), "data_order": data_order(config)})
    path = save_checkpoint(run / CHECKPOINTS, state, runner.artifact.layout(), weights, momentum,
                           config.train.keep_checkpoints)
    go_on()
    return path


def _check_step_counts(recipe: TrainConfig) -> None:
    if recipe.steps % recipe.batches_per_step:
        raise ConfigError(f"train.steps is {recipe.steps}, no multiple of train.batches_per_step {recipe.batches_per_step}")


def _due(step: int, recipe: TrainConfig, every: int) -> bool:
    """Whether the last call of the device reached a multiple of `every`, or the end."""
    return step >= recipe.steps or step // every > (step - recipe.batches_per_step) // every


def device_calls(source: Iterator[Mapping[str, np.ndarray]], updates: int) -> Iterator[Mapping[str, np.ndarray]]:
    """What one call of the device takes: the batches of `updates` weight updates, stacked where there are several."""
    if updates == 1:
        yield from source
        return
    waiting: List[Mapping[str, np.ndarray]] = []
    for batch in source:
        waiting.append(batch)
        if len(waiting) == updates:
            yield {name: np.stack([item[name] for item in waiting]) for name in batch}
            waiting = []


def _means(outputs: Mapping[str, np.ndarray], recipe: TrainConfig) -> List[Dict[str, float]]:
    """The scalar float outputs (the losses) of each weight update, means over its micro-batches and replicas."""
    rows = {name: array.reshape(recipe.batches_per_step, -1).mean(axis=1, dtype=np.float64)
            for name, array in outputs.items() if array.dtype.kind == "f"}
    return [{name: float(values[update]) for name, values in rows.items()} for update in range(recipe.batches_per_step)]


@contextlib.contextmanager
def _closing(source: Any) -> Iterator[None]:
    try:
        yield
    finally:
        getattr(source, "close", lambda: None)()  # a loader's processes
