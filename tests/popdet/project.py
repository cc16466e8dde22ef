"""Where the tiny detector that the tests compile lies."""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Project:
    """A config and the `--out` folder that holds its export and its artifact."""

    config: Path
    out: Path

    @property
    def options(self) -> tuple[str, ...]:
        return "-c", str(self.config), "--out", str(self.out)

    @property
    def artifact(self) -> Path:
        return self.out / "small"

    @property
    def reference(self) -> Path:
        return self.out / "small.export" / "reference.infer.onnx"
