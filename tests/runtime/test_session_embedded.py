"""Artifacts through the embedded runtime: the numbers against numpy, and compiled programs end to end."""
from __future__ import annotations

import dataclasses
import importlib
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_artifact as tiny

from popdet.config import TrainConfig
from runtime.artifact import Artifact
from runtime.compiled_cache import CompiledCache
from runtime.errors import ConfigError, GraphError
from runtime.session import compile_ahead, open_inference, open_training

IMAGE = tiny.batch(1)["image"][0]


def reference_step(values: dict, velocity: dict, data: dict, recipe: TrainConfig, rate: float) -> list[float]:
    """torch.optim.SGD written out: g = mean of the micro-batches' gradients + wd * w; v = m v + g; w -= rate v."""
    gradients = {name: np.zeros_like(values[name], np.float64) for name in ("a.weight", "b.weight")}
    losses = []
    for image, target in zip(data["image"].astype(np.float64), data["target"]):
        hidden = image @ values["a.weight"]
        error = np.maximum(hidden, 0) @ values["b.weight"] - target
        losses.append((error ** 2).mean())
        back = 2 * error / error.size
        gradients["b.weight"] += np.maximum(hidden, 0).T @ back / len(data["image"])
        gradients["a.weight"] += image.T @ ((back @ values["b.weight"].T) * (hidden > 0)) / len(data["image"])
    for name, gradient in gradients.items():
        velocity[name] = recipe.momentum * velocity.get(name, 0.0) + gradient + recipe.weight_decay * values[name]
        values[name] = values[name] - rate * velocity[name]
    return losses


def test_inference_gives_the_numbers_of_numpy(tmp_path: Path) -> None:
    runner = open_inference(tiny.make_artifact(tmp_path / "tiny"))
    np.testing.assert_allclose(runner({"image": IMAGE})["y"], tiny.forward(tiny.weights(), IMAGE), rtol=1e-5, atol=1e-6)


def test_a_pipelined_step_gives_every_batch_in_order(tmp_path: Path) -> None:
    runner = open_inference(tiny.make_artifact(tmp_path / "tiny"), batches_per_step=3)
    images = tiny.batch(3)["image"]
    assert runner.pipelined
    np.testing.assert_allclose(runner({"image": images})["y"], tiny.forward(tiny.weights(), images), rtol=1e-5, atol=1e-6)


def test_intermediates_and_other_weights(tmp_path: Path) -> None:
    runner = open_inference(tiny.make_artifact(tmp_path / "tiny"), outputs=["hidden"], weights=tiny.weights(seed=1))
    np.testing.assert_allclose(runner({"image": IMAGE})["hidden"], IMAGE @ tiny.weights(seed=1)["a.weight"], rtol=1e-5)


def test_an_unknown_output_is_refused_in_popart_words(tmp_path: Path) -> None:
    with pytest.raises(GraphError, match=r"infer\.onnx: Anchor tensor `nonsense'"):
        open_inference(tiny.make_artifact(tmp_path / "tiny"), outputs=["nonsense"])


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_training_follows_sgd_with_a_changing_rate(tmp_path: Path, momentum: float) -> None:
    recipe = TrainConfig(accumulation=4, momentum=momentum, weight_decay=0.01, loss_scaling=16.0)
    runner = open_training(tiny.make_artifact(tmp_path / "tiny"), recipe)
    values, velocity = {name: array.astype(np.float64) for name, array in tiny.weights().items()}, {}
    for step, rate in enumerate((0.1, 0.1, 0.02)):
        data = tiny.batch(4, seed=step)
        runner.set_learning_rate(rate)
        losses = runner.step(data)["loss"]
        np.testing.assert_allclose(losses, reference_step(values, velocity, data, recipe, rate), rtol=1e-5)
    trained = runner.weights()
    assert list(trained) == list(tiny.weights())
    for name in trained:
        np.testing.assert_allclose(trained[name], values[name], rtol=1e-5, atol=1e-6)


def test_gradients_come_back_per_micro_batch(tmp_path: Path) -> None:
    recipe = TrainConfig(accumulation=3, momentum=0.0, weight_decay=0.0)
    runner = open_training(tiny.make_artifact(tmp_path / "tiny"), recipe, anchors=["Gradient___b.weight"])
    data = tiny.batch(3)
    before = tiny.weights()
    runner.set_learning_rate(1.0)
    gradient = runner.step(data)["Gradient___b.weight"]
    assert gradient.shape == (3, 5, 3)
    np.testing.assert_allclose(before["b.weight"] - runner.weights()["b.weight"], gradient.mean(0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("with_state", [True, False])
def test_training_goes_on_from_saved_weights_and_momentum(tmp_path: Path, with_state: bool) -> None:
    recipe = TrainConfig(accumulation=3, learning_rate=0.05, weight_decay=0.1)
    artifact = tiny.make_artifact(tmp_path / "tiny")
    first = open_training(artifact, recipe)
    first.step(tiny.batch(3, seed=0))
    weights, state = first.weights(), first.optimizer_state()
    assert set(state) == {"Accl___a.weight", "Accl___b.weight"}
    second = open_training(artifact, recipe)
    second.load_weights(weights, state if with_state else None)
    second.step(tiny.batch(3, seed=1))
    if with_state:
        first.step(tiny.batch(3, seed=1))
        expected = first.weights()
    else:
        expected, velocity = {name: array.astype(np.float64) for name, array in weights.items()}, {}
        reference_step(expected, velocity, tiny.batch(3, seed=1), recipe, 0.05)
    for name, array in second.weights().items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-5, atol=1e-6)


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    runner = open_training(tiny.make_artifact(tmp_path / "tiny"), TrainConfig(accumulation=3))
    with pytest.raises(ConfigError, match=r"'a\.weight' has shape \(1,\)"):
        runner.load_weights({**tiny.weights(), "a.weight": np.zeros(1, np.float32)})


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """An artifact with a compiled program, and the cache of the user who compiled it."""
    root = tmp_path_factory.mktemp("aot")
    artifact = tiny.make_artifact(root / "tiny", executor="aot")
    cache = CompiledCache(root / "cache")
    return compile_ahead(artifact, "infer", cache=cache), cache


def test_a_compiled_program_is_sealed_and_runs_without_a_word(compiled: tuple) -> None:
    artifact, cache = compiled
    opened, messages = Artifact.open(artifact.directory), []
    assert [entry["file"] for entry in opened.compiled] == ["embedded/infer.pt2"]
    runner = open_inference(opened, on_message=messages.append, cache=cache)
    np.testing.assert_allclose(runner({"image": IMAGE})["y"], tiny.forward(tiny.weights(), IMAGE), rtol=1e-5, atol=1e-6)
    assert messages == []


@pytest.mark.slow
def test_a_training_program_is_sealed_and_runs_without_a_word(tmp_path: Path) -> None:
    cache, recipe = CompiledCache(tmp_path / "cache"), TrainConfig(accumulation=3, executor="aot")
    artifact = compile_ahead(tiny.make_artifact(tmp_path / "tiny", executor="eager"), "train", cache=cache)
    opened, messages = Artifact.open(artifact.directory), []
    assert [(entry["file"], entry["graph"]) for entry in opened.compiled] == [("embedded/train.pt2", "train")]
    runner = open_training(opened, recipe, on_message=messages.append, cache=cache)
    assert messages == [] and runner.compiled is not None
    copied = open_training(opened, recipe, trust_compiled=True, on_message=messages.append, cache=CompiledCache(tmp_path / "b"))
    assert messages == []
    plain = open_training(opened, dataclasses.replace(recipe, executor="eager"))
    for data in (tiny.batch(3, seed=1), tiny.batch(3, seed=2)):
        losses = [program.step(data)["loss"] for program in (plain, runner, copied)]
        np.testing.assert_allclose(losses[1:], [losses[0]] * 2, rtol=1e-5)
    for name, array in plain.weights().items():
        np.testing.assert_allclose(runner.weights()[name], array, rtol=1e-5, atol=1e-6)


@pytest.fixture
def compilations(compiled: tuple, monkeypatch: pytest.MonkeyPatch) -> list:
    """Counts compilations; each takes the program of `compiled` instead of the compiler's twenty seconds."""
    from runtime.popart_api import load_popart

    load_popart()
    module, done = importlib.import_module("popart._engine.aot"), []

    def compile_quickly(program, wanted, grads_of=None) -> None:
        done.append(list(wanted))
        path = compiled[0].file("embedded/infer.pt2")
        program._compiled.append(module._Compiled(path, module.read_key(path), program.graph))

    monkeypatch.setattr(module.AotProgram, "compile", compile_quickly)
    return done


def test_another_user_compiles_again_unless_the_program_is_trusted(
    compiled: tuple, compilations: list, tmp_path: Path
) -> None:
    artifact, _ = compiled
    copied = Artifact.open(shutil.copytree(artifact.directory, tmp_path / "copied"))
    messages: list[str] = []
    open_inference(copied, trust_compiled=True, on_message=messages.append, cache=CompiledCache(tmp_path / "trusting"))
    assert messages == [] and compilations == []
    other = CompiledCache(tmp_path / "other")
    runner = open_inference(copied, on_message=messages.append, cache=other)
    assert len(messages) == 1 and "--trust-compiled" in messages[0] and "compiling it again" in messages[0]
    np.testing.assert_allclose(runner({"image": IMAGE})["y"], tiny.forward(tiny.weights(), IMAGE), rtol=1e-5, atol=1e-6)
    open_inference(copied, on_message=messages.append, cache=other)
    assert len(messages) == 1 and compilations == [["y"]]  # the second time the program comes from the user's own cache
    assert Artifact.open(copied.directory).manifest == artifact.manifest  # a copied artifact is not written to


def test_trained_weights_reach_the_compiled_program(compiled: tuple, tmp_path: Path) -> None:
    artifact, cache = compiled
    copied = Artifact.open(shutil.copytree(artifact.directory, tmp_path / "copied"))
    copied = copied.replace_weights(tiny.weights(seed=5), trained_steps=1)
    messages: list[str] = []
    runner = open_inference(copied, on_message=messages.append, cache=cache)
    assert messages == []
    expected = tiny.forward(tiny.weights(seed=5), IMAGE)
    np.testing.assert_allclose(runner({"image": IMAGE})["y"], expected, rtol=1e-5, atol=1e-6)


def test_a_program_that_does_not_load_is_compiled_again(compiled: tuple, compilations: list, tmp_path: Path) -> None:
    artifact, _ = compiled
    cache = CompiledCache(tmp_path / "cache")
    (tmp_path / "garbage.pt2").write_bytes(b"no program")
    cache.store(artifact.compiled[0]["key"], tmp_path / "garbage.pt2")
    messages: list[str] = []
    runner = open_inference(artifact, on_message=messages.append, cache=cache)
    assert "does not load here" in messages[0] and compilations == [["y"]]
    np.testing.assert_allclose(runner({"image": IMAGE})["y"], tiny.forward(tiny.weights(), IMAGE), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_compiled_training_step_gives_the_weights_of_the_interpreted_one(tmp_path: Path) -> None:
    artifact, cache = tiny.make_artifact(tmp_path / "tiny"), CompiledCache(tmp_path / "cache")
    eager = open_training(artifact, TrainConfig(accumulation=3), anchors=["loss"])
    eager.step(tiny.batch(3))
    for _ in range(2):  # compiled, then loaded from the cache
        messages: list[str] = []
        runner = open_training(artifact, TrainConfig(accumulation=3, executor="aot"), anchors=["loss"],
                               on_message=messages.append, cache=cache)
        runner.step(tiny.batch(3))
        assert messages == [] and len(list(cache.root.glob("*.pt2"))) == 1
        for name, array in runner.weights().items():
            np.testing.assert_allclose(array, eager.weights()[name], rtol=1e-5, atol=1e-6)
