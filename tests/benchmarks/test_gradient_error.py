"""benchmarks/gradient_error.py on the tiny detector: as near to float64 as float32 gets, and a wrong gradient shows."""
from pathlib import Path

import pytest
import torch

from benchmarks import gradient_error
from popdet.config import load_config

SIDES = ["compiled", "interpreted", "torch, float32"]
TINY = load_config("configs/shapes-tiny.yaml", ["compile.graphs=[train]"])


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gradients")


def test_the_errors_of_every_side_are_those_of_float32(out: Path) -> None:
    errors = gradient_error.measure_errors(TINY, out)
    assert list(errors) == SIDES
    for found in errors.values():
        assert found.keys() == errors[SIDES[0]].keys() and all(0 < error < 1e-3 for error in found.values())
    report = gradient_error.format_report("tiny", errors).splitlines()
    assert [line[2:18].strip() for line in report[2:]] == SIDES


def test_a_wrong_gradient_shows(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def scaled(artifact, inputs):
        right = gradient_error.in_torch(artifact, inputs, torch.float32)
        return {name: 1.01 * g for name, g in right.items()}, right

    monkeypatch.setattr(gradient_error, "programs", scaled)
    errors = gradient_error.measure_errors(TINY, out)
    assert min(errors["compiled"].values()) > 0.009 and max(errors["interpreted"].values()) < 1e-3
