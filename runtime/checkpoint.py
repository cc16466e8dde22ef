"""Training checkpoints: `<folder>/step-000123/`, each complete or not there.

  weights.safetensors    the layout of the artifact's, so it can be put in its place
  optimizer.safetensors  PopART's optimizer state by tensor id (absent without momentum)
  state.json             step, learning rate, the artifact's name, whatever the loop adds
  manifest.json          sha256 of the others, written last
"""
from __future__ import annotations

import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple, Union

import numpy as np

from runtime import manifest as manifests
from runtime.atomic_io import TEMP_PREFIX, write_json_atomic
from runtime.errors import BadInputFile, ConfigError, EnvironmentProblem
from runtime.manifest import MANIFEST, WEIGHTS
from runtime.weights_file import WeightsLayout, read_layout, read_weights, save_tensors, write_weights

FORMAT_VERSION = 1
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
_NAME = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as read back; `weights` has every tensor of the artifact's layout."""

    path: Path
    step: int
    learning_rate: float
    weights: Dict[str, np.ndarray]
    optimizer_state: Dict[str, np.ndarray]
    extra: Mapping[str, Any]


def save_checkpoint(
    folder: Union[str, Path], step: int, learning_rate: float, layout: WeightsLayout,
    weights: Mapping[str, np.ndarray], optimizer_state: Mapping[str, np.ndarray],
    extra: Optional[Mapping[str, Any]] = None, keep: int = 3,
) -> Path:
    """Write `<folder>/step-<step>/` in one rename, then remove all but the newest `keep`; returns its path.

    extra: plain JSON values to find again on load. Raises ConfigError (weights that do not fit, keep below 1) and
    EnvironmentProblem (cannot be written, for example a full disk).
    """
    if keep < 1:
        raise ConfigError(f"checkpoints to keep is {keep}; at least one is needed to resume")
    folder = Path(folder)
    target = folder / f"step-{step:06d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f"{TEMP_PREFIX}step-", dir=str(folder)))
        try:
            _write(work, step, learning_rate, layout, weights, optimizer_state, extra or {})
            if target.exists():  # a run that was resumed from an earlier step comes by again
                shutil.rmtree(str(target))
            work.chmod(0o755)
            work.rename(target)
        finally:
            shutil.rmtree(str(work), ignore_errors=True)
        for _, old in _existing(folder)[keep:]:
            shutil.rmtree(str(old))
    except OSError as error:
        raise EnvironmentProblem(f"{target}: checkpoint cannot be written ({error.strerror or error})") from error
    return target


def load_checkpoint(path: Union[str, Path], layout: WeightsLayout) -> Checkpoint:
    """Read one checkpoint; raises BadInputFile when it is damaged or does not have the artifact's `layout`."""
    path = Path(path)
    manifest = manifests.read_json(path / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("format_version") != FORMAT_VERSION:
        raise BadInputFile(f"{path / MANIFEST}: not a checkpoint of format {FORMAT_VERSION}")
    files = manifest.get("files")
    if not isinstance(files, dict) or not {WEIGHTS, STATE} <= set(files) <= {WEIGHTS, STATE, OPTIMIZER}:
        raise BadInputFile(f"{path / MANIFEST}: it must list {WEIGHTS} and {STATE}")
    manifests.check_files(path, manifest, digests=True)
    if read_layout(path / WEIGHTS).header != layout.header:
        raise BadInputFile(f"{path / WEIGHTS}: its tensors are not the artifact's; it belongs to another network")
    state = manifests.read_json(path / STATE)
    try:
        step, learning_rate, extra = int(state["step"]), float(state["learning_rate"]), dict(state["extra"])
    except (KeyError, TypeError, ValueError) as error:
        raise BadInputFile(f"{path / STATE}: lacks step, learning_rate or extra ({error})") from error
    optimizer_state = read_weights(path / OPTIMIZER) if OPTIMIZER in files else {}
    return Checkpoint(path, step, learning_rate, read_weights(path / WEIGHTS), optimizer_state, extra)


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


def _write(
    work: Path, step: int, learning_rate: float, layout: WeightsLayout, weights: Mapping[str, np.ndarray],
    optimizer_state: Mapping[str, np.ndarray], extra: Mapping[str, Any],
) -> None:
    write_weights(work / WEIGHTS, layout, weights)
    if optimizer_state:
        save_tensors(work / OPTIMIZER, optimizer_state)
    write_json_atomic(work / STATE, {"step": step, "learning_rate": learning_rate, "extra": dict(extra)})
    files = manifests.digest_files(work, manifests.list_files(work))
    write_json_atomic(work / MANIFEST, {"format_version": FORMAT_VERSION, "files": files})


def _existing(folder: Path) -> List[Tuple[int, Path]]:
    """(step, path) of the checkpoint folders, newest first."""
    if not folder.is_dir():
        return []
    matches = [(_NAME.fullmatch(path.name), path) for path in folder.iterdir() if path.is_dir()]
    return sorted(((int(match.group(1)), path) for match, path in matches if match), reverse=True)
