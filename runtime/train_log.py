"""Where a training run reports: `log.jsonl`, TensorBoard events, Weights & Biases, and the terminal.

  log.jsonl     one JSON object a logged step: step, learning_rate, images_per_second, wait, loss_median, the losses
  tensorboard/  the same values as scalars (train.tensorboard)
"""
from __future__ import annotations

import collections
import json
import math
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Deque, Dict, List, Mapping, Optional

from popdet.config import TrainConfig
from runtime.atomic_io import write_bytes_atomic
from runtime.errors import EnvironmentProblem
from runtime.session import LOSS

Message = Callable[[str], None]
LOG = "log.jsonl"
WINDOW = 20  # steps that the printed loss is the median of


@dataclass(frozen=True)
class Row:
    """What is known after a logged step."""

    step: int
    learning_rate: float
    images_per_second: float  # since the row before, waiting included
    wait: float  # fraction of that time spent waiting for data
    loss_median: float  # of the last WINDOW steps
    losses: Mapping[str, float]  # of this step, means over its micro-batches

    def values(self) -> Dict[str, float]:
        """Everything but the step, by the names of log.jsonl."""
        return {"learning_rate": self.learning_rate, "images_per_second": self.images_per_second, "wait": self.wait,
                "loss_median": self.loss_median, **self.losses}


class TrainLog:
    """Collects every step, writes a row where one is due, and shows progress. Use with `with`."""

    def __init__(self, run: Path, recipe: TrainConfig, images: int, first_step: int, on_message: Message, bar: bool) -> None:
        self.recipe, self.images, self.first_step = recipe, images, first_step
        self._losses: Deque[float] = collections.deque(maxlen=WINDOW)
        self._since, self._steps, self._wait, self._waited = time.perf_counter(), 0, 0.0, 0.0
        self._sinks: List[Any] = [_JsonLines(run / LOG, first_step)]
        if recipe.tensorboard:
            self._sinks.append(_TensorBoard(run / "tensorboard", first_step))
        if recipe.wandb is not None:
            self._sinks.append(_Wandb(recipe.wandb, run))
        self._screen: Any = _Bar(recipe.steps, first_step) if bar else _Lines(recipe.steps, on_message)

    def __enter__(self) -> TrainLog:
        return self

    def __exit__(self, *_: object) -> None:
        self._screen.close()
        for sink in self._sinks:
            sink.close()

    def step(self, step: int, learning_rate: float, losses: Mapping[str, float], waited: float) -> None:
        """After weight update `step` (from 1). waited: seconds spent waiting for data since the run began."""
        self._losses.append(losses[LOSS])
        self._steps += 1
        before, self._waited = self._waited, waited
        self._wait += waited - before
        due = step % self.recipe.log_every == 0 or step == self.recipe.steps or step == self.first_step + 1
        row = self._row(step, learning_rate, losses)
        if due:
            for sink in self._sinks:
                sink.write(row.step, row.values())
            self._since, self._steps, self._wait = time.perf_counter(), 0, 0.0
        self._screen.show(row, due)

    def event(self, step: int, values: Mapping[str, float]) -> None:
        """Figures that belong to a step but not to its losses, such as an evaluation's."""
        for sink in self._sinks:
            sink.write(step, values)

    def message(self, text: str) -> None:
        """A line for people."""
        self._screen.message(text)

    def pause(self) -> Callable[[], None]:
        """What happens until the returned function is called (a checkpoint, an evaluation) is no training time."""
        began = time.perf_counter()

        def go_on() -> None:
            self._since += time.perf_counter() - began

        return go_on

    def _row(self, step: int, learning_rate: float, losses: Mapping[str, float]) -> Row:
        seconds = max(time.perf_counter() - self._since, 1e-9)
        return Row(step, learning_rate, self.images * self._steps / seconds, self._wait / seconds,
                   statistics.median(self._losses), losses)


class _JsonLines:
    """Rows after `first_step` are dropped first: a run that was killed logged steps that its successor makes again."""

    def __init__(self, path: Path, first_step: int) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            before = path.read_bytes().splitlines(keepends=True) if first_step and path.exists() else []
            kept = [line for line in before if _step_of(line) <= first_step]
            if kept != before or not first_step:
                write_bytes_atomic(path, kept)
            self._stream = open(str(path), "a", encoding="utf-8")
        except OSError as error:
            raise EnvironmentProblem(f"{path}: cannot be written ({error.strerror})") from error

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._stream.write(json.dumps({"step": step, **values}) + "\n")
        self._stream.flush()

    def close(self) -> None:
        self._stream.close()


def _step_of(line: bytes) -> float:
    """The step of a row; infinity for one that a crash cut off."""
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    step = row.get("step") if isinstance(row, dict) and line.endswith(b"\n") else None
    return step if isinstance(step, int) else math.inf


class _TensorBoard:
    def __init__(self, folder: Path, first_step: int) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise EnvironmentProblem(f"train.tensorboard needs tensorboardX ({error}): pip install tensorboardX") from error
        self._writer = SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else None)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, project: str, run: Path) -> None:
        try:
            import wandb
        except ImportError as error:
            raise EnvironmentProblem(f"train.wandb needs wandb ({error}): pip install wandb") from error
        self._run = wandb.init(project=project, name=run.name, dir=str(run), resume="allow")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class _Lines:
    """Plain lines, one a logged step."""

    def __init__(self, steps: int, on_message: Message) -> None:
        self.steps, self.message = steps, on_message
        self._began: Optional[float] = None
        self._first = 0

    def show(self, row: Row, due: bool) -> None:
        now = time.perf_counter()
        if self._began is None:
            self._began, self._first = now, row.step
        if due:
            left = (now - self._began) / max(row.step - self._first, 1) * (self.steps - row.step)
            losses = "  ".join(f"{name} {value:.4f}" for name, value in row.losses.items())
            eta = f"  {_clock(left)} left" if row.step > self._first else ""
            self.message(f"step {row.step:>{len(str(self.steps))}}/{self.steps}  lr {row.learning_rate:.2e}  "
                         f"{row.images_per_second:6.2f} images/s  wait {row.wait:4.1%}{eta}  {losses}")

    def close(self) -> None:
        pass


class _Bar:
    """A progress bar on the terminal's standard error."""

    def __init__(self, steps: int, first_step: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (MofNCompleteColumn(), BarColumn(None), TextColumn("{task.fields[text]}"), TimeRemainingColumn())
        self._progress = Progress(*columns, console=Console(file=sys.stderr))
        self._progress.start()
        self._task = self._progress.add_task("training", total=steps, completed=first_step, text="starting")

    def show(self, row: Row, due: bool) -> None:
        text = (f"loss {row.loss_median:.4f}  lr {row.learning_rate:.1e}  {row.images_per_second:.2f} images/s  "
                f"wait {row.wait:.0%}")
        self._progress.update(self._task, completed=row.step, text=text)

    def message(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        self._progress.stop()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
