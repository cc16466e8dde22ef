"""Training checkpoints: `<folder>/step-000123/`, each complete or not there.

  weights.safetensors    the layout of the artifact's, so it can be put in its place
  optimizer.safetensors  PopART's optimizer state by tensor id (absent without momentum)
  state.json             step, learning rate, random state, evaluation, whatever the loop adds
  manifest.json          sha256 of the others, written last

A checkpoint is written under a hidden name and renamed when every byte is on the disk; an old one is renamed to a hidden
name before its files go. A writer that is killed at any moment leaves the checkpoints that were there, and the next
writer removes what it left. One writer a folder.
"""
from __future__ import annotations

import os
import re
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import numpy as np

from runtime import manifest as manifests
from runtime.atomic_io import TEMP_PREFIX, fsync_path, write_json_atomic
from runtime.errors import BadInputFile, ConfigError, EnvironmentProblem
from runtime.manifest import MANIFEST, WEIGHTS
from runtime.weights_file import WeightsLayout, read_layout, read_weights, save_tensors, write_weights

FORMAT_VERSION = 1
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
_NAME = re.compile(r"step-(\d{6,})")
_WORK = TEMP_PREFIX + "step-"  # of a checkpoint that is being written or removed


@dataclass(frozen=True)
class Evaluation:
    """What a checkpoint scored on the evaluation split; `value` is a fraction, higher is better."""

    metric: str
    value: float


@dataclass(frozen=True)
class TrainingState:
    """Where a run stands: everything but the tensors."""

    step: int
    learning_rate: float
    random_state: Optional[Sequence[int]] = None  # of the device's generator, where it draws random numbers
    evaluation: Optional[Evaluation] = None
    extra: Mapping[str, Any] = field(default_factory=dict)  # plain JSON values to find again


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as read back; `weights` has every tensor of the artifact's layout."""

    path: Path
    state: TrainingState
    weights: Dict[str, np.ndarray]
    optimizer_state: Dict[str, np.ndarray]

    @property
    def step(self) -> int:
        return self.state.step


def save_checkpoint(
    folder: Union[str, Path], state: TrainingState, layout: WeightsLayout, weights: Mapping[str, np.ndarray],
    optimizer_state: Mapping[str, np.ndarray], keep: int = 3,
) -> Path:
    """Write `<folder>/step-<step>/` in one rename, then remove all but the newest `keep` and the best; returns its path.

    Raises ConfigError (weights that do not fit, keep below 1) and EnvironmentProblem (cannot be written, for example a
    full disk); the checkpoints that were there stay.
    """
    if keep < 1:
        raise ConfigError(f"checkpoints to keep is {keep}; at least one is needed to resume")
    folder = Path(folder)
    target = folder / f"step-{state.step:06d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        work = Path(tempfile.mkdtemp(prefix=_WORK, dir=str(folder)))
        try:
            _write(work, state, layout, weights, optimizer_state)
            if target.exists():  # a run that was resumed from an earlier step comes by again
                _remove(target)
            work.chmod(0o755)
            work.rename(target)
            fsync_path(folder)
        finally:
            shutil.rmtree(str(work), ignore_errors=True)
        best = best_checkpoint(folder)
        for _, old in _existing(folder)[keep:]:
            if best is None or old != best[0]:
                _remove(old)
    except OSError as error:
        raise EnvironmentProblem(f"{target}: checkpoint cannot be written ({error.strerror or error})") from error
    return target


def load_checkpoint(path: Union[str, Path], layout: WeightsLayout) -> Checkpoint:
    """Read one checkpoint; raises BadInputFile when it is damaged or does not have the artifact's `layout`."""
    path = Path(path)
    state = read_state(path)
    if read_layout(path / WEIGHTS).header != layout.header:
        raise BadInputFile(f"{path / WEIGHTS}: its tensors are not the artifact's; it belongs to another network")
    optimizer_state = read_weights(path / OPTIMIZER) if (path / OPTIMIZER).exists() else {}
    return Checkpoint(path, state, read_weights(path / WEIGHTS), optimizer_state)


def read_state(path: Union[str, Path]) -> TrainingState:
    """Check every file of a checkpoint against its manifest and read where the run stood; BadInputFile if damaged."""
    path = Path(path)
    manifest = manifests.read_json(path / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("format_version") != FORMAT_VERSION:
        raise BadInputFile(f"{path / MANIFEST}: not a checkpoint of format {FORMAT_VERSION}")
    files = manifest.get("files")
    if not isinstance(files, dict) or not {WEIGHTS, STATE} <= set(files) <= {WEIGHTS, STATE, OPTIMIZER}:
        raise BadInputFile(f"{path / MANIFEST}: it must list {WEIGHTS} and {STATE}")
    manifests.check_files(path, manifest, digests=True)
    return _state(path / STATE)


def latest_checkpoint(
    folder: Union[str, Path], layout: WeightsLayout, on_message: Callable[[str], None] = print
) -> Optional[Checkpoint]:
    """The newest checkpoint that is whole, or None; damaged ones are reported and skipped."""
    for _, path in _existing(Path(folder)):
        try:
            return load_checkpoint(path, layout)
        except BadInputFile as error:
            on_message(f"checkpoint skipped: {error}")
    return None


def best_checkpoint(folder: Union[str, Path]) -> Optional[Tuple[Path, Evaluation]]:
    """The checkpoint with the highest evaluation, and that; the newest among equal ones; None where none was evaluated.

    Only checkpoints with the metric of the newest evaluated one are compared.
    """
    found: List[Tuple[Path, Evaluation]] = []
    for _, path in _existing(Path(folder)):
        try:
            evaluation = _state(path / STATE).evaluation
        except BadInputFile:
            continue
        if evaluation is not None and (not found or evaluation.metric == found[0][1].metric):
            found.append((path, evaluation))
    return max(found, key=lambda item: item[1].value) if found else None


def _state(path: Path) -> TrainingState:
    tree = manifests.read_json(path)
    try:
        evaluation, random_state = tree.get("evaluation"), tree.get("random_state")
        return TrainingState(
            int(tree["step"]), float(tree["learning_rate"]),
            None if random_state is None else [int(word) for word in random_state],
            None if evaluation is None else Evaluation(str(evaluation["metric"]), float(evaluation["value"])),
            dict(tree["extra"]),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BadInputFile(f"{path}: lacks step, learning_rate or extra ({error})") from error


def _write(
    work: Path, state: TrainingState, layout: WeightsLayout, weights: Mapping[str, np.ndarray],
    optimizer_state: Mapping[str, np.ndarray],
) -> None:
    write_weights(work / WEIGHTS, layout, weights)
    if optimizer_state:
        save_tensors(work / OPTIMIZER, optimizer_state)
    write_json_atomic(work / STATE, {
        "step": state.step, "learning_rate": state.learning_rate, "extra": dict(state.extra),
        "random_state": None if state.random_state is None else list(state.random_state),
        "evaluation": None if state.evaluation is None else
        {"metric": state.evaluation.metric, "value": state.evaluation.value},
    })
    files = manifests.digest_files(work, manifests.list_files(work))
    write_json_atomic(work / MANIFEST, {"format_version": FORMAT_VERSION, "files": files})


def _remove(path: Path) -> None:
    """Take a checkpoint away in one step, then delete its files."""
    hidden = Path(tempfile.mkdtemp(prefix=_WORK, dir=str(path.parent)))
    os.replace(str(path), str(hidden))  # over the empty folder
    shutil.rmtree(str(hidden))


def _remove_leftovers(folder: Path) -> None:
    """Delete what a killed writer left."""
    for path in folder.glob(_WORK + "*"):
        shutil.rmtree(str(path), ignore_errors=True)


def _existing(folder: Path) -> List[Tuple[int, Path]]:
    """(step, path) of the checkpoint folders, newest first."""
    if not folder.is_dir():
        return []
    matches = [(_NAME.fullmatch(path.name), path) for path in folder.iterdir() if path.is_dir()]
    return sorted(((int(match.group(1)), path) for match, path in matches if match), reverse=True)
