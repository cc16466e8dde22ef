"""The training loop and its checkpoints, on the embedded runtime."""
from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import sys
import types
from pathlib import Path
from typing import Any, Callable, Iterator

import numpy as np
import pytest
import tiny_artifact as tiny

from popdet.config import Config, TrainConfig
from runtime.artifact import Artifact
from runtime.checkpoint import Evaluation, load_checkpoint
from runtime.errors import BadInputFile, ConfigError, EnvironmentProblem, MismatchError
from runtime.session import open_training
from runtime.train import learning_rate, train
from runtime.training_run import replay_step

RECIPE = TrainConfig(steps=6, accumulation=3, learning_rate=0.05, warmup_steps=2, lr_steps=(4,), log_every=2,
                     checkpoint_every=2)


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    return tiny.make_artifact(tmp_path / "tiny")


@pytest.fixture(autouse=True)
def _usual_interrupts() -> Iterator[None]:
    """A shell that starts the suite in the background has it ignore Ctrl-C; the tests are about the usual handler."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


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
    recipe = config(steps=40, lr_steps=(), momentum=0.5, keep_checkpoints=2)
    result = train(artifact, recipe, lambda _: repeated(), run, on_message=lines.append)
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


def test_a_resumed_log_has_every_step_once(artifact: Artifact, tmp_path: Path) -> None:
    """A killed run has logged steps after its checkpoint, the last perhaps in part; its successor makes them again."""
    run, recipe = tmp_path / "run", config(log_every=1)
    train(artifact, config(log_every=1, steps=4, lr_steps=()), batches, run, on_message=quiet)
    shutil.rmtree(run / "checkpoints" / "step-000004")
    with open(run / "log.jsonl", "a") as stream:
        stream.write('{"step": 1, "lo')
    train(Artifact.open(artifact.directory), recipe, batches, run, True, quiet)
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [1, 2, 3, 4, 5, 6]


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


def test_a_saved_step_is_replayed_from_the_newest_checkpoint(artifact: Artifact, tmp_path: Path) -> None:
    def source(start: int) -> Iterator[dict]:
        for step, batch in enumerate(batches(start), start):
            if step == 3:
                batch["image"][1, 0, 0] = np.inf
            yield batch

    run = tmp_path / "run"
    with pytest.raises(MismatchError, match="--replay"):
        train(artifact, config(), source, run, on_message=quiet)
    report = replay_step(artifact, config(), run, run / "not-finite-step-000003.npz", quiet)
    assert report.checkpoint == str(run / "checkpoints" / "step-000002")
    assert np.isfinite(report.outputs["loss"]).tolist() == [True, False, True]
    assert report.bad_inputs == ["image of micro-batch 1"] and "image of micro-batch 1" in report.text()
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["outputs"]["loss"][1] in ("inf", "nan")
    (tmp_path / "other.npz").write_bytes(b"nothing")
    with pytest.raises(BadInputFile, match=r"other\.npz: not the saved inputs"):
        replay_step(artifact, config(), run, tmp_path / "other.npz", quiet)


def test_replicas_train_as_a_longer_accumulation_does(tmp_path: Path) -> None:
    ends = []
    for replicas, accumulation in ((2, 3), (1, 6)):
        made = tiny.make_artifact(tmp_path / f"of-{replicas}")

        def source(start: int, lead: tuple = (accumulation,) if replicas == 1 else (3, 2)) -> Iterator[dict]:
            for step in range(start, 6):
                yield {name: array.reshape(*lead, *array.shape[1:]) for name, array in tiny.batch(6, seed=step).items()}

        result = train(made, config(replicas=replicas, accumulation=accumulation), source, tmp_path / f"run-{replicas}",
                       on_message=quiet)
        ends.append((result.last_loss, Artifact.open(made.directory).weights()["a.weight"]))
    assert ends[0][0] == pytest.approx(ends[1][0], rel=1e-5)
    np.testing.assert_allclose(ends[0][1], ends[1][1], rtol=1e-4, atol=1e-6)


def test_several_updates_a_call_give_the_same_run_where_the_rate_is_constant(tmp_path: Path) -> None:
    rows = []
    for updates in (1, 3):
        made = tiny.make_artifact(tmp_path / f"of-{updates}")
        run = tmp_path / f"run-{updates}"
        train(made, config(batches_per_step=updates, warmup_steps=0, lr_steps=(), log_every=1), batches, run, on_message=quiet)
        log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        rows.append(([(row["step"], row["loss"]) for row in log], Artifact.open(made.directory).weights()))
    assert rows[0][0] == rows[1][0] and len(rows[0][0]) == 6
    assert all(np.array_equal(array, rows[1][1][name]) for name, array in rows[0][1].items())
    with pytest.raises(ConfigError, match=r"train\.steps is 6, no multiple of train\.batches_per_step 4"):
        train(tiny.make_artifact(tmp_path / "odd"), config(batches_per_step=4), batches, tmp_path / "odd-run", on_message=quiet)


def test_evaluations_are_logged_and_the_best_checkpoint_stays(artifact: Artifact, tmp_path: Path) -> None:
    scores = iter([0.2, 0.9, 0.4])
    seen: list[np.ndarray] = []

    def evaluate(weights: Any) -> Evaluation:
        seen.append(weights["a.weight"])
        return Evaluation("voc07", next(scores))

    run = tmp_path / "run"
    recipe = config(steps=6, eval_every=2, checkpoint_every=1, keep_checkpoints=1)
    result = train(artifact, recipe, batches, run, on_message=quiet, evaluate=evaluate)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-000004", "step-000006"]
    assert result.best == 0.9 and result.best_checkpoint == str(run / "checkpoints" / "step-000004")
    best = load_checkpoint(result.best_checkpoint, artifact.layout())
    np.testing.assert_array_equal(best.weights["a.weight"], seen[1])
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [row["eval_voc07_ap50"] for row in log if "eval_voc07_ap50" in row] == [0.2, 0.9, 0.4]
    assert "best evaluation 90.0" in result.text()


def test_tensorboard_events_hold_what_the_log_holds(artifact: Artifact, tmp_path: Path) -> None:
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    run = tmp_path / "run"
    train(artifact, config(tensorboard=True, log_every=1), batches, run, on_message=quiet)
    data, values = next((run / "tensorboard").iterdir()).read_bytes(), {}
    while data:
        length = int.from_bytes(data[:8], "little")
        body = data[12:12 + length]
        assert int.from_bytes(data[12 + length:16 + length], "little") == masked_crc32c(body)
        event = Event.FromString(body)
        values.update({(item.tag, event.step): item.simple_value for item in event.summary.value})
        data = data[16 + length:]
    for line in (run / "log.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert values[("loss", row["step"])] == pytest.approx(row["loss"], rel=1e-6)


def test_logging_that_cannot_be_had_is_said_before_training(
    artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, key, value in (("tensorboardX", "tensorboard", True), ("wandb", "wandb", "project")):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(EnvironmentProblem, match=rf"train\.{key} needs {name}"):
            train(artifact, config(**{key: value}), batches, tmp_path / name, on_message=quiet)


def test_wandb_gets_every_row(artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[tuple] = []
    run = types.SimpleNamespace(log=lambda values, step: rows.append((step, values["loss"])), finish=lambda: rows.append(()))
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **named: rows.append(named["project"]) or run))
    train(artifact, config(wandb="cells", log_every=3), batches, tmp_path / "run", on_message=quiet)
    assert rows[0] == "cells" and [row[0] for row in rows[1:-1]] == [1, 3, 6] and rows[-1] == ()


def test_a_run_that_goes_on_with_another_order_says_so(artifact: Artifact, tmp_path: Path) -> None:
    train(artifact, config(steps=2), batches, tmp_path / "run", on_message=quiet)
    other = dataclasses.replace(config(seed=5), data=dataclasses.replace(config().data, flip=False))
    messages: list[str] = []
    train(artifact, other, batches, tmp_path / "run", resume=True, on_message=messages.append)
    notes = [text for text in messages if text.startswith("note:")]
    assert len(notes) == 2 and "train.seed changed from 0 to 5" in notes[0] and "data.flip changed from True" in notes[1]


def test_the_bar_shows_the_run(artifact: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(artifact, config(), batches, tmp_path / "run", on_message=quiet, bar=True)
    shown = capsys.readouterr().err
    assert "6/6" in shown and "images/s" in shown and "wait" in shown


def test_trained_weights_go_to_popart_onnx_and_back_with_their_momentum(artifact: Artifact, tmp_path: Path) -> None:
    """The file is self-contained: onnx reads it, and another session trains on from it as the first one would."""
    import onnx

    recipe = config().train
    first = open_training(artifact, recipe, on_message=quiet)
    for step in range(3):
        first.step(tiny.batch(3, seed=step))
    first.save_onnx(tmp_path / "trained.onnx")  # above the artifact, whose own weights must stay as they were
    assert Artifact.open(artifact.directory).trained_steps == 0
    model = onnx.load(str(tmp_path / "trained.onnx"))
    found = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    wanted = {**first.weights(), **first.optimizer_state()}
    del wanted["unused.buffer"]
    assert set(found) == set(wanted) == {"a.weight", "b.weight", "Accl___a.weight", "Accl___b.weight"}
    assert all(np.array_equal(found[name], array) for name, array in wanted.items())
    second = open_training(artifact, recipe, on_message=quiet)
    second.load_onnx(tmp_path / "trained.onnx")
    for runner in (first, second):
        runner.step(tiny.batch(3, seed=7))
    assert all(np.array_equal(array, second.weights()[name]) for name, array in first.weights().items())
    with pytest.raises(BadInputFile, match="no such ONNX file"):
        second.load_onnx(tmp_path / "absent.onnx")


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
