"""Checkpoints: what is saved comes back, what is damaged is skipped, and a killed writer loses the newest at most."""
from __future__ import annotations

import builtins
import os
import random
import shutil
from pathlib import Path
from typing import Any, Callable

import numpy as np
import pytest
import tiny_artifact as tiny

from runtime.artifact import Artifact
from runtime.checkpoint import (
    Evaluation,
    TrainingState,
    best_checkpoint,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from runtime.errors import BadInputFile, EnvironmentProblem
from runtime.weights_file import new_layout

KILLED = 9
FILES = ["weights.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    return tiny.make_artifact(tmp_path / "tiny")


def save(artifact: Artifact, folder: Path, step: int, keep: int = 3, score: float | None = None) -> Path:
    evaluation = None if score is None else Evaluation("voc07", score)
    state = TrainingState(step, 0.1, [1, 2, step], evaluation, {"note": step})
    momentum = {"Accl___a.weight": np.full((6, 5), step, np.float32)}
    return save_checkpoint(folder, state, artifact.layout(), tiny.weights(seed=step), momentum, keep)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_reads_back_as_it_was_saved(artifact: Artifact, tmp_path: Path) -> None:
    path = save(artifact, tmp_path / "c", 123, score=0.5)
    assert path.name == "step-000123" and sorted(os.listdir(path)) == sorted(FILES)
    found = latest_checkpoint(tmp_path / "c", artifact.layout())
    assert found is not None and found.state == TrainingState(123, 0.1, [1, 2, 123], Evaluation("voc07", 0.5), {"note": 123})
    np.testing.assert_array_equal(found.weights["b.weight"], tiny.weights(seed=123)["b.weight"])
    np.testing.assert_array_equal(found.optimizer_state["Accl___a.weight"], np.full((6, 5), 123, np.float32))
    shutil.copyfile(path / "weights.safetensors", artifact.directory / "weights.safetensors")  # the same layout
    assert artifact.layout().names == tuple(found.weights)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["cut", "gone", "flipped"])
def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(
    artifact: Artifact, tmp_path: Path, name: str, damage: str
) -> None:
    save(artifact, tmp_path / "c", 1)
    path = save(artifact, tmp_path / "c", 2) / name
    data = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(data[:-3])
    elif damage == "flipped":
        data[len(data) // 2] ^= 0x10
        path.write_bytes(data)
    else:
        path.unlink()
    messages: list[str] = []
    found = latest_checkpoint(tmp_path / "c", artifact.layout(), messages.append)
    assert found is not None and found.step == 1
    assert len(messages) == 1 and "step-000002" in messages[0]


def test_only_the_newest_and_the_best_stay_and_a_half_written_one_is_invisible(artifact: Artifact, tmp_path: Path) -> None:
    for step, score in ((1, 0.3), (2, 0.8), (3, 0.5), (4, 0.6), (5, None)):
        save(artifact, tmp_path / "c", step, keep=2, score=score)
    (tmp_path / "c" / ".popdet-step-x").mkdir()
    (tmp_path / "c" / "notes").mkdir()
    assert [name for name in names(tmp_path / "c") if name.startswith("step")] == ["step-000002", "step-000004", "step-000005"]
    assert best_checkpoint(tmp_path / "c") == (tmp_path / "c" / "step-000002", Evaluation("voc07", 0.8))
    found = latest_checkpoint(tmp_path / "c", artifact.layout())
    assert found is not None and found.step == 5
    assert latest_checkpoint(tmp_path / "absent", artifact.layout()) is None


def test_a_checkpoint_of_another_network_is_refused(artifact: Artifact, tmp_path: Path) -> None:
    other = {"c.weight": np.zeros(3, np.float32)}
    path = save_checkpoint(tmp_path / "c", TrainingState(1, 0.1), new_layout(other), other, {})
    with pytest.raises(BadInputFile, match="belongs to another network"):
        load_checkpoint(path, artifact.layout())


def test_a_folder_that_cannot_be_written_is_said_and_keeps_what_it_had(
    artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(artifact, tmp_path / "c", 1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EnvironmentProblem, match=r"step-000002: checkpoint cannot be written \(No space left"):
        save(artifact, tmp_path / "c", 2)
    monkeypatch.undo()
    assert names(tmp_path / "c") == ["step-000001"]
    found = latest_checkpoint(tmp_path / "c", artifact.layout())
    assert found is not None and found.step == 1


CALLS: list[tuple[Any, str]] = [
    (os, "fsync"), (os, "replace"), (os, "rename"), (os, "unlink"), (os, "rmdir"), (os, "chmod"), (os, "mkdir"),
    (builtins, "open"),
]


def in_child(action: Callable[[], None], fatal: int, cut: bool) -> int | None:
    """Run `action` in a forked process that dies at its system call number `fatal`; the number of calls if it lives.

    cut: an `open` for writing writes half of what it is given before the process dies.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        count = 0

        def counted(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **named: Any) -> Any:
                nonlocal count
                count += 1
                if count == fatal:
                    if cut and real is real_open and "w" in str(arguments[1:2]):
                        with real(*arguments, **named) as stream:
                            stream.write(b"half" if "b" in arguments[1] else "half")
                    os._exit(KILLED)
                return real(*arguments, **named)

            return call

        real_open = builtins.open
        for module, name in CALLS:
            setattr(module, name, counted(getattr(module, name)))
        action()
        os.write(writer, str(count).encode())
        os._exit(0)
    os.close(writer)
    status = os.waitpid(child, 0)[1]
    text = os.read(reader, 20)
    os.close(reader)
    assert os.waitstatus_to_exitcode(status) in (0, KILLED)
    return int(text) if text else None


def test_a_writer_killed_at_any_system_call_loses_the_newest_checkpoint_at_most(artifact: Artifact, tmp_path: Path) -> None:
    """keep=2 with three there already: writing, renaming and removing are all among the calls."""
    pristine = tmp_path / "pristine"
    for step, score in ((1, 0.9), (2, 0.1), (3, 0.2)):
        save(artifact, pristine, step, score=score)
    shutil.copytree(pristine, tmp_path / "dry")
    total = in_child(lambda: save(artifact, tmp_path / "dry", 4, 2) and None, 10**9, False)
    assert total is not None and total > 25
    survived = 0
    for fatal in range(1, total + 1):
        folder = tmp_path / f"killed-{fatal}"
        shutil.copytree(pristine, folder)
        assert in_child(lambda folder=folder: save(artifact, folder, 4, 2) and None, fatal, cut=fatal % 2 == 0) is None
        messages: list[str] = []
        found = latest_checkpoint(folder, artifact.layout(), messages.append)
        assert found is not None and found.step in (3, 4) and not messages, f"killed at call {fatal}"
        survived += found.step == 4
        np.testing.assert_array_equal(found.weights["b.weight"], tiny.weights(seed=found.step)["b.weight"])
        assert best_checkpoint(folder) == (folder / "step-000001", Evaluation("voc07", 0.9))
        save(artifact, folder, 5, 2)  # the next writer clears up
        assert names(folder) == sorted({"step-000001", f"step-{found.step:06d}", "step-000005"})
    assert 0 < survived < total


def test_random_damage_never_crashes_the_reader(artifact: Artifact, tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    generator = random.Random(seed)
    save(artifact, tmp_path / "c", 1)
    for _ in range(60):
        path = save(artifact, tmp_path / "c", 2) / generator.choice(FILES)
        data = bytearray(path.read_bytes())
        for _ in range(generator.randint(1, 4)):
            data[generator.randrange(len(data))] = generator.randrange(256)
        path.write_bytes(data)
        found = latest_checkpoint(tmp_path / "c", artifact.layout(), lambda _: None)
        assert found is not None
        if found.step == 2:  # the bytes happened to be the same
            np.testing.assert_array_equal(found.weights["b.weight"], tiny.weights(seed=2)["b.weight"])
