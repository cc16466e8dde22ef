"""The training loop and its checkpoints, on the embedded runtime."""
from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any, Callable, Iterator

import numpy as np
import pytest
import tiny_artifact as tiny

from popdet.config import Config, TrainConfig
from runtime.artifact import Artifact
from runtime.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from runtime.errors import BadInputFile, ConfigError, MismatchError
from runtime.train import learning_rate, train

RECIPE = TrainConfig(steps=6, accumulation=3, learning_rate=0.05, warmup_steps=2, lr_steps=(4,), log_every=2,
                     checkpoint_every=2)


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    return tiny.make_artifact(tmp_path / "tiny")


def config(**values: Any) -> Config:
    return dataclasses.replace(tiny.config(), train=dataclasses.replace(RECIPE, **values))


def batches(start: int) -> Iterator[dict]:
    """One task throughout, other images every step; the extra key is what loaders add for themselves."""
    teacher, step = tiny.weights(seed=9), start
    while True:
        image = tiny.batch(3, seed=step)["image"]
        yield {"image": image, "target": tiny.forward(teacher, image), "image_ids": np.zeros(3, np.int32)}
        step += 1


def repeated() -> Iterator[dict]:
    while True:
        yield next(batches(0))


def stopping(at: int, action: Callable[[], None]) -> Callable[[int], Iterator[dict]]:
    def source(start: int) -> Iterator[dict]:
        for step, batch in enumerate(batches(start), start):
            if step == at:
                action()
            yield batch

    return source


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def quiet(_: str) -> None:
    pass


def test_a_run_trains_logs_checkpoints_and_installs_the_weights(artifact: Artifact, tmp_path: Path) -> None:
    lines: list[str] = []
    run = tmp_path / "run"
    recipe = config(steps=40, lr_steps=(), momentum=0.5)
    result = train(artifact, recipe, lambda _: repeated(), run, on_message=lines.append, keep_checkpoints=2)
    assert result.steps == 40 and not result.interrupted and result.last_loss < 0.5 * result.first_loss
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [1, *range(2, 41, 2)] and log[-1]["loss"] == result.last_loss
    assert any("step 40/40" in line for line in lines)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-000038", "step-000040"]
    opened = Artifact.open(artifact.directory)
    newest = load_checkpoint(run / "checkpoints" / "step-000040", opened.layout())
    assert opened.trained_steps == 40 and newest.step == 40
    for name, array in opened.weights().items():
        np.testing.assert_array_equal(array, newest.weights[name])
    assert json.loads(json.dumps(result.to_dict()))["steps"] == 40 and "step 40" in result.text()


def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(artifact: Artifact, tmp_path: Path) -> None:
    other = Artifact.open(shutil.copytree(artifact.directory, tmp_path / "other"))
    train(artifact, config(), batches, tmp_path / "whole", on_message=quiet)
    first = train(other, config(), stopping(2, interrupt), tmp_path / "parts", on_message=quiet)
    assert first.interrupted and first.steps == 3 and "interrupted after step 3" in first.text()
    assert Artifact.open(other.directory).trained_steps == 3
    messages: list[str] = []
    second = train(Artifact.open(other.directory), config(), batches, tmp_path / "parts", True, messages.append)
    assert second.steps == 6 and messages[0] == "resuming at step 3"
    for name, array in Artifact.open(artifact.directory).weights().items():
        np.testing.assert_array_equal(Artifact.open(other.directory).weights()[name], array)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_interrupt_stops_at_once(artifact: Artifact, tmp_path: Path) -> None:
    def twice() -> None:
        interrupt()
        interrupt()

    with pytest.raises(KeyboardInterrupt):
        train(artifact, config(), stopping(3, twice), tmp_path / "run", on_message=quiet)
    assert Artifact.open(artifact.directory).trained_steps == 0
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-000002"]


def test_a_loss_that_is_not_finite_stops_with_its_inputs_saved(artifact: Artifact, tmp_path: Path) -> None:
    def source(start: int) -> Iterator[dict]:
        for step, batch in enumerate(batches(start), start):
            if step == 3:
                batch["image"][1, 0, 0] = np.inf
            yield batch

    with pytest.raises(MismatchError, match=r"step 3: loss .*newest good checkpoint is .*step-000002"):
        train(artifact, config(), source, tmp_path / "run", on_message=quiet)
    saved = np.load(tmp_path / "run" / "not-finite-step-000003.npz", allow_pickle=False)
    assert np.isinf(saved["image"][1, 0, 0]) and set(saved) == {"image", "target", "image_ids"}
    assert Artifact.open(artifact.directory).trained_steps == 0


def test_an_earlier_run_is_kept_and_a_finished_one_is_not_repeated(artifact: Artifact, tmp_path: Path) -> None:
    train(artifact, config(steps=2), batches, tmp_path / "run", on_message=quiet)
    train(artifact, config(steps=2), batches, tmp_path / "run", on_message=quiet)
    assert (tmp_path / "run.1" / "checkpoints" / "step-000002").is_dir()
    with pytest.raises(ConfigError, match=r"already trained to step 2; raise train\.steps"):
        train(artifact, config(steps=2), batches, tmp_path / "run", resume=True, on_message=quiet)


def test_data_that_ends_early_is_said_and_kept(artifact: Artifact, tmp_path: Path) -> None:
    messages: list[str] = []
    source = batches(0)
    three = [next(source) for _ in range(3)]
    result = train(artifact, config(), lambda _: iter(three), tmp_path / "run", on_message=messages.append)
    assert result.steps == 3 and "the data ended at step 3 of 6" in messages
    with pytest.raises(ConfigError, match="data ended before the first step"):
        train(artifact, config(), lambda _: iter([]), tmp_path / "empty", on_message=quiet)


def test_the_rate_warms_up_and_drops() -> None:
    recipe = TrainConfig(learning_rate=0.8, warmup_steps=4, warmup_factor=0.5, lr_steps=(6, 8), lr_gamma=0.1)
    rates = [learning_rate(recipe, step) for step in range(10)]
    np.testing.assert_allclose(rates, [0.4, 0.5, 0.6, 0.7, 0.8, 0.8, 0.08, 0.08, 0.008, 0.008])


def save(artifact: Artifact, folder: Path, step: int, keep: int = 3) -> Path:
    state = {"Accl___a.weight": np.full((6, 5), step, np.float32)}
    return save_checkpoint(folder, step, 0.1, artifact.layout(), tiny.weights(seed=step), state, {"note": step}, keep)


def test_a_checkpoint_reads_back_as_it_was_saved(artifact: Artifact, tmp_path: Path) -> None:
    path = save(artifact, tmp_path / "c", 123)
    assert path.name == "step-000123"
    found = latest_checkpoint(tmp_path / "c", artifact.layout())
    assert found is not None and (found.step, found.learning_rate, found.extra) == (123, 0.1, {"note": 123})
    np.testing.assert_array_equal(found.weights["b.weight"], tiny.weights(seed=123)["b.weight"])
    np.testing.assert_array_equal(found.optimizer_state["Accl___a.weight"], np.full((6, 5), 123, np.float32))
    shutil.copyfile(path / "weights.safetensors", artifact.directory / "weights.safetensors")  # the same layout
    assert artifact.layout().names == tuple(found.weights)


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(
    artifact: Artifact, tmp_path: Path, name: str, damage: str
) -> None:
    save(artifact, tmp_path / "c", 1)
    path = save(artifact, tmp_path / "c", 2) / name
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-3])
    else:
        path.unlink()
    messages: list[str] = []
    found = latest_checkpoint(tmp_path / "c", artifact.layout(), messages.append)
    assert found is not None and found.step == 1
    assert len(messages) == 1 and f"step-000002/{name}" in messages[0]


def test_only_the_newest_checkpoints_stay_and_a_half_written_one_is_invisible(artifact: Artifact, tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(artifact, tmp_path / "c", step, keep=2)
    (tmp_path / "c" / ".popdet-step-x").mkdir()
    (tmp_path / "c" / "notes").mkdir()
    assert sorted(path.name for path in (tmp_path / "c").glob("step-*")) == ["step-000003", "step-000004"]
    found = latest_checkpoint(tmp_path / "c", artifact.layout())
    assert found is not None and found.step == 4
    assert latest_checkpoint(tmp_path / "absent", artifact.layout()) is None


def test_a_checkpoint_of_another_network_is_refused(artifact: Artifact, tmp_path: Path) -> None:
    from runtime.weights_file import new_layout

    other = {"c.weight": np.zeros(3, np.float32)}
    path = save_checkpoint(tmp_path / "c", 1, 0.1, new_layout(other), other, {})
    with pytest.raises(BadInputFile, match="belongs to another network"):
        load_checkpoint(path, artifact.layout())
