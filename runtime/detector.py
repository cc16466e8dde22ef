"""A detector on disk, an artifact or a checkpoint of its training, and the programs that run it.

  <name>/                                      the artifact
  <name>.train/checkpoints/step-000123/        weights for it; state.json names <name> as extra.artifact
"""
from __future__ import annotations

import contextlib
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping, Optional, Union

import numpy as np

from runtime.artifact import Artifact
from runtime.checkpoint import STATE, load_checkpoint, read_state
from runtime.errors import BadInputFile
from runtime.manifest import WEIGHTS
from runtime.weights_file import write_weights

REFERENCE = "reference.infer.onnx"
OUTPUTS = ("boxes", "scores", "classes", "count")


@dataclass(frozen=True, eq=False)
class Detector:
    """An opened artifact and the weights to run it with."""

    artifact: Artifact
    weights: Optional[Mapping[str, np.ndarray]] = None  # a checkpoint's; None: the artifact's own
    checkpoint: Optional[Path] = None
    trained_steps: int = 0  # weight updates behind the weights

    @property
    def label(self) -> str:
        """What the user calls it."""
        return str(self.checkpoint or self.artifact.directory)

    @property
    def pictures(self) -> Path:
        """Where results go when no folder is named: beside the artifact."""
        directory = self.artifact.directory.resolve()
        step = f".{self.checkpoint.name}" if self.checkpoint else ""
        return directory.with_name(f"{directory.name}{step}.pictures")


def of_artifact(artifact: Artifact) -> Detector:
    """The artifact with its own weights."""
    return Detector(artifact, trained_steps=artifact.trained_steps)


def open_detector(path: Union[str, Path]) -> Detector:
    """Open an artifact directory or a checkpoint directory, every checksum verified.

    Raises BadInputFile when it is neither, is damaged, or the artifact of the checkpoint is not in its place.
    """
    path = Path(path)
    if not (path / STATE).is_file():
        inside = sorted(found.parent for folder in (path, path / "checkpoints") for found in folder.glob(f"step-*/{STATE}"))
        if inside:
            raise BadInputFile(f"{path}: holds checkpoints; name one of them, the last is {inside[-1]}")
        return of_artifact(Artifact.open(path))
    directory = _artifact_of(path)
    if not directory.is_dir():
        raise BadInputFile(f"{path}: its artifact is not at {directory}; copy it there, beside the training run's folder")
    artifact = Artifact.open(directory)
    found = load_checkpoint(path, artifact.layout())
    return Detector(artifact, found.weights, path, found.step)


def _artifact_of(checkpoint: Path) -> Path:
    name = read_state(checkpoint).extra.get("artifact")
    if not isinstance(name, str) or not name or Path(name).name != name:
        raise BadInputFile(f"{checkpoint / STATE}: extra.artifact is {name!r}, expected the name of the artifact's folder")
    run = checkpoint.resolve().parent.parent
    return run.parent / name


@contextlib.contextmanager
def detector_runner(
    detector: Detector, executor: Optional[str] = None, trust_compiled: bool = False, on_message: Callable[[str], None] = print
) -> Iterator[Any]:
    """The inference program as a callable {"image": array} -> OUTPUTS, usable inside the `with` block.

    executor: aot, eager or cuda on the embedded runtime, None: as the artifact was compiled; onnxruntime: the reference graph
    with the same weights. Raises what `open_inference` and `OnnxRuntimeExecutor` raise.
    """
    if executor != "onnxruntime":
        from runtime.session import open_inference

        yield open_inference(detector.artifact, outputs=OUTPUTS, executor=executor, trust_compiled=trust_compiled,
                             on_message=on_message, weights=detector.weights)
        return
    from runtime.executors import OnnxRuntimeExecutor

    if detector.weights is None:
        yield OnnxRuntimeExecutor(detector.artifact.directory / REFERENCE, outputs=OUTPUTS)
        return
    with tempfile.TemporaryDirectory() as name:  # onnxruntime looks for external data beside the file, in no other folder
        folder = Path(name)
        shutil.copyfile(str(detector.artifact.file(REFERENCE)), str(folder / REFERENCE))
        write_weights(folder / WEIGHTS, detector.artifact.layout(), detector.weights)
        yield OnnxRuntimeExecutor(folder / REFERENCE, outputs=OUTPUTS)
