"""Every example program runs as its README says and finds its own numbers right."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "docs" / "examples" / "popart"
LINES = {
    "adam_loss_scaling": "after 6 updates",
    "checkpoint_resume": "resumed and reset runs are bit-equal",
    "cnn": "step  59: loss",
    "custom_op": "kept boxes [[0, 2]], pooled features [4.5, 40.5]",
    "inference_all_anchors": "Final  [2]: [10.0, 110.0]",
    "mlp": "answers [0, 1, 1, 0]",
    "pipelined_cnn_accumulation": "refused: For pipelining, depth",
    "recompute": "all: loss 0.501027, same numbers: True",
    "replicated": "losses [step, replica]:",
    "rng": "the seed and the stored state repeat their steps",
}


def test_every_program_is_listed():
    programs = {path.stem for path in FOLDER.glob("*.py")}
    assert programs == set(LINES)
    assert all(f"`{name}.py`" in (FOLDER / "README.md").read_text() for name in programs)


@pytest.mark.parametrize("name", sorted(LINES))
def test_the_program_runs(name):
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "runtime" / "embedded"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(FOLDER / f"{name}.py")], env=environment, capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert LINES[name] in done.stdout
