"""onnxruntime on the CPU as an executor: called with {input: array}, it returns {output: array}.

It is the reference for every number. The artifact's own program is the other executor: `session.open_inference`.
"""
from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Dict, Mapping, Optional, Sequence, Union

import numpy as np

from runtime.errors import BadInputFile, ConfigError, EnvironmentProblem

Executor = Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]


class OnnxRuntimeExecutor:
    """Runs an ONNX file of standard ops with onnxruntime's CPU provider; external data lies beside the file.

    outputs: the tensors to return; None: all. threads: 0 leaves the number to onnxruntime.
    Raises BadInputFile (missing or unusable file), ConfigError (unknown output), EnvironmentProblem (no onnxruntime).
    """

    def __init__(self, path: Union[str, Path], outputs: Optional[Sequence[str]] = None, threads: int = 0) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise EnvironmentProblem(f"onnxruntime cannot be imported ({error}); `make setup` installs it") from error
        if not Path(path).is_file():
            raise BadInputFile(f"{path}: no such ONNX file")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3  # errors only; the models keep initializers that constant folding leaves over
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions have no common base
            raise BadInputFile(f"{path}: onnxruntime refuses it: {_first_line(error)}") from error
        self.path = Path(path)
        known = [value.name for value in self.session.get_outputs()]
        self.outputs = list(known if outputs is None else outputs)
        unknown = [name for name in self.outputs if name not in known]
        if unknown:
            raise ConfigError(f"{path}: no output '{unknown[0]}'; it has {', '.join(known)}")
        self.batch = self._batch()

    def run(self, inputs: Mapping[str, np.ndarray]) -> Dict[str, np.ndarray]:
        """Raises ConfigError when onnxruntime refuses the inputs (missing, wrong shape or dtype)."""
        try:
            return dict(zip(self.outputs, self.session.run(self.outputs, dict(inputs))))
        except Exception as error:
            raise ConfigError(f"{self.path}: onnxruntime refuses to run: {_first_line(error)}") from error

    __call__ = run

    def _batch(self) -> int:
        inputs: Any = self.session.get_inputs()
        shape = inputs[0].shape if inputs else []
        return shape[0] if shape and isinstance(shape[0], int) else 1


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
