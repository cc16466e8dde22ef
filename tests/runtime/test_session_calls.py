"""The calls that reach PopART, recorded by a stand-in for the SDK's module: options, device, anchors, optimizer."""
from __future__ import annotations

import enum
import os
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_artifact as tiny

import custom_ops.popart
from popdet.config import TrainConfig
from runtime.artifact import Artifact
from runtime.errors import ConfigError, EnvironmentProblem, GraphError
from runtime.session import open_inference, open_training


def stand_in() -> Any:
    """A module with the names and conventions of the SDK's popart; its sessions record and compute nothing."""
    fake = types.ModuleType("popart")
    fake.__file__ = "/opt/poplar_sdk/popart/__init__.py"
    fake.calls = []
    for name in ("popart_exception", "poplar_exception", "poplibs_exception"):
        setattr(fake, name, type(name, (Exception,), {}))
    fake.OutOfMemoryException = type("OutOfMemoryException", (fake.popart_exception,), {})
    fake.VirtualGraphMode = enum.Enum("VirtualGraphMode", "Off Manual")
    fake.ReductionType = enum.Enum("ReductionType", "Mean Sum")
    fake.RecomputationType = enum.Enum("RecomputationType", "NoRecompute Standard Pipeline")
    fake.AnchorReturnType = lambda name: name
    fake.DataFlow = lambda steps, anchors, art: {"steps": steps, "anchors": list(anchors), "art": art}
    fake.SGD = lambda values: dict(values)
    fake.PyStepIO = lambda inputs, outputs: (inputs, outputs)
    fake.PyWeightsIO = dict

    class SessionOptions:
        def __init__(self) -> None:
            self.virtualGraphMode, self.engineOptions = fake.VirtualGraphMode.Off, {}
            self.enablePipelining = self.enableGradientAccumulation = False
            self.accumulationFactor, self.constantWeights = 1, True
            self.autoRecomputation = fake.RecomputationType.NoRecompute
            self.accumulationAndReplicationReductionType = fake.ReductionType.Sum

    class DeviceManager:
        def acquireAvailableDevice(self, ipus: int) -> str:
            if ipus > 4:
                raise fake.popart_exception(f"Failed to acquire device with {ipus} IPUs.")
            return f"{ipus} IPUs"

    class Session:
        def __init__(self, **arguments: Any) -> None:
            self.arguments, self.cwd = arguments, os.getcwd()
            fake.calls.append(("session", self))

        def __getattr__(self, name: str) -> Any:
            return lambda *arguments: fake.calls.append((name, *arguments))

        def initAnchorArrays(self) -> dict:
            micro = self.arguments["userOptions"].accumulationFactor * self.arguments["dataFlow"]["steps"]
            prefix = (micro,) if micro > 1 else ()
            return {name: np.zeros(prefix + self._shape(name), np.float32) for name in self.arguments["dataFlow"]["anchors"]}

        def getInfo(self, name: str) -> Any:
            if name.startswith("Accl1___"):
                raise fake.popart_exception("no such tensor")
            return types.SimpleNamespace(shape=lambda: list(self._shape(name)), data_type_lcase=lambda: "float32")

        def getTensorIds(self) -> list:
            return ["image", "a.weight", "b.weight", "y", "loss"]

        getAllTensorIds = getTensorIds

        def _shape(self, name: str) -> tuple:
            shapes = {"loss": (), "y": (2, 3), "a.weight": (6, 5), "b.weight": (5, 3)}
            return shapes[name.split("___")[-1]]

    fake.SessionOptions, fake.DeviceManager = SessionOptions, DeviceManager
    fake.InferenceSession = fake.TrainingSession = Session
    return fake


@pytest.fixture
def sdk(monkeypatch: pytest.MonkeyPatch) -> Any:
    fake = stand_in()
    monkeypatch.setitem(sys.modules, "popart", fake)
    monkeypatch.setattr(custom_ops.popart, "load", lambda: fake.calls.append(("load custom ops",)))
    return fake


def made(sdk: Any) -> Any:
    return next(call[1] for call in sdk.calls if call[0] == "session")


def named(sdk: Any, name: str) -> list:
    return [call[1:] for call in sdk.calls if call[0] == name]


def test_inference_of_one_batch_keeps_the_placement_without_a_pipeline(sdk: Any, tmp_path: Path) -> None:
    artifact = tiny.make_artifact(tmp_path / "tiny", executor="aot")
    runner = open_inference(artifact)
    session = made(sdk)
    options = session.arguments["userOptions"]
    assert options.virtualGraphMode is sdk.VirtualGraphMode.Manual and not options.enablePipelining
    assert options.constantWeights and options.engineOptions == {}  # the SDK knows no popdet.executor
    assert session.arguments["dataFlow"] == {"steps": 1, "anchors": ["y"], "art": "All"}
    assert session.arguments["deviceInfo"] == "2 IPUs"
    assert session.arguments["fnModel"] == str(artifact.directory / "infer.onnx")
    assert session.cwd == str(artifact.directory) != os.getcwd()  # where the SDK looks for weights.safetensors
    assert [call[0] for call in sdk.calls] == ["load custom ops", "session", "prepareDevice", "weightsFromHost"]
    assert runner.batch == 2 and not runner.pipelined


def test_enough_batches_per_step_pipeline_the_stages(sdk: Any, tmp_path: Path) -> None:
    artifact = tiny.make_artifact(tmp_path / "tiny")
    runner = open_inference(artifact, batches_per_step=2)
    assert made(sdk).arguments["userOptions"].enablePipelining and runner.pipelined
    assert runner.run({"image": np.zeros((2, 2, 6), np.float32)})["y"].shape == (2, 2, 3)
    assert not open_inference(tiny.make_artifact(tmp_path / "off", pipelining=False), batches_per_step=2).pipelined


def test_one_ipu_needs_no_virtual_graph(sdk: Any, tmp_path: Path) -> None:
    open_inference(tiny.make_artifact(tmp_path / "tiny", ipus=1))
    assert made(sdk).arguments["userOptions"].virtualGraphMode is sdk.VirtualGraphMode.Off


def test_other_weights_are_written_before_they_are_sent(sdk: Any, tmp_path: Path) -> None:
    artifact = tiny.make_artifact(tmp_path / "tiny")
    open_inference(artifact, weights=tiny.weights(seed=1))
    assert made(sdk).arguments["userOptions"].constantWeights is False
    names = [call[0] for call in sdk.calls]
    assert names.index("prepareDevice") < names.index("writeWeights") < names.index("weightsFromHost")
    (written,) = named(sdk, "writeWeights")[0]
    assert set(written) == {"a.weight", "b.weight"}
    np.testing.assert_array_equal(written["a.weight"], tiny.weights(seed=1)["a.weight"])
    with pytest.raises(ConfigError, match=r"'b\.weight' is missing"):
        open_inference(artifact, weights={"a.weight": tiny.weights()["a.weight"]})


def test_training_options_optimizer_and_anchors(sdk: Any, tmp_path: Path) -> None:
    recipe = TrainConfig(accumulation=4, learning_rate=0.5, momentum=0.9, weight_decay=0.01, loss_scaling=8.0)
    artifact = tiny.make_artifact(tmp_path / "tiny", recompute="pipeline")
    runner = open_training(artifact, recipe, anchors=["loss", "Gradient___a.weight"])
    arguments = made(sdk).arguments
    options = arguments["userOptions"]
    assert options.enablePipelining and options.enableGradientAccumulation and options.accumulationFactor == 4
    assert options.accumulationAndReplicationReductionType is sdk.ReductionType.Mean
    assert options.autoRecomputation is sdk.RecomputationType.Pipeline
    assert arguments["loss"] == "loss" and arguments["dataFlow"]["anchors"] == ["loss", "Gradient___a.weight"]
    assert arguments["optimizer"] == {"defaultLearningRate": (0.5, False), "defaultMomentum": (0.9, True),
                                      "defaultWeightDecay": (0.01, True), "lossScaling": (8.0, True)}
    outputs = runner.step(tiny.batch(4))
    assert outputs["loss"].shape == (4,) and outputs["Gradient___a.weight"].shape == (4, 6, 5)
    runner.set_learning_rate(0.25)
    assert named(sdk, "updateOptimizerFromHost")[0][0]["defaultLearningRate"] == (0.25, False)
    assert runner.learning_rate == 0.25


def test_loaded_weights_restart_the_momentum_from_their_decay(sdk: Any, tmp_path: Path) -> None:
    runner = open_training(tiny.make_artifact(tmp_path / "tiny"), TrainConfig(accumulation=3, weight_decay=0.5))
    runner.load_weights(tiny.weights(seed=1))
    (written,) = named(sdk, "writeWeights")[0]
    np.testing.assert_allclose(written["Accl___a.weight"], 0.5 * tiny.weights(seed=1)["a.weight"])
    assert set(written) == {"a.weight", "b.weight", "Accl___a.weight", "Accl___b.weight"}


@pytest.mark.parametrize(("accumulation", "pipelining", "fits"), [(2, True, False), (3, True, True), (1, False, True)])
def test_the_pipeline_must_be_filled(sdk: Any, tmp_path: Path, accumulation: int, pipelining: bool, fits: bool) -> None:
    artifact = tiny.make_artifact(tmp_path / "tiny", pipelining=pipelining)
    if fits:
        open_training(artifact, TrainConfig(accumulation=accumulation))
        return
    with pytest.raises(ConfigError, match=r"a pipeline of 2 stages needs at least 3 .* Set train\.accumulation=3"):
        open_training(artifact, TrainConfig(accumulation=accumulation))
    assert sdk.calls == []


def test_pipeline_recompute_without_a_pipeline_is_refused(sdk: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="recompute=pipeline needs a pipeline"):
        open_training(tiny.make_artifact(tmp_path / "tiny", pipelining=False, recompute="pipeline"), TrainConfig())


@pytest.mark.parametrize(("pipelining", "recomputation"), [(True, "Standard"), (False, "NoRecompute")])
def test_standard_recompute_is_left_to_the_graph_without_a_pipeline(
    sdk: Any, tmp_path: Path, pipelining: bool, recomputation: str
) -> None:
    open_training(tiny.make_artifact(tmp_path / "tiny", pipelining=pipelining, recompute="standard"), TrainConfig())
    assert made(sdk).arguments["userOptions"].autoRecomputation is sdk.RecomputationType[recomputation]


def test_no_device_is_a_problem_of_the_environment(sdk: Any, tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match="no device with 8 IPUs"):
        open_inference(tiny.make_artifact(tmp_path / "tiny", ipus=8))


@pytest.mark.parametrize(("kind", "words"), [("popart_exception", "Ops .* bad"), ("OutOfMemoryException", "does not fit")])
def test_a_refusal_keeps_the_words_of_popart(sdk: Any, tmp_path: Path, kind: str, words: str) -> None:
    def refuse(**_: Any) -> None:
        raise getattr(sdk, kind)("Ops of one stage are bad")

    sdk.InferenceSession = refuse
    with pytest.raises(GraphError, match=rf"infer\.onnx: .*{words}"):
        open_inference(tiny.make_artifact(tmp_path / "tiny"))


@pytest.mark.parametrize(("inputs", "words"), [
    ({}, "'image' is missing"), ({"image": np.zeros((2, 6), np.float32), "x": np.zeros(1)}, "unknown input 'x'"),
    ({"image": np.zeros((1, 6), np.float32)}, r"shape \(1, 6\), expected \(2, 6\)"),
    ({"image": np.zeros((2, 6), np.complex64)}, "is complex64, expected float32"),
])
def test_inputs_are_checked_by_name(sdk: Any, tmp_path: Path, inputs: dict, words: str) -> None:
    runner = open_inference(tiny.make_artifact(tmp_path / "tiny"))
    with pytest.raises(ConfigError, match=words):
        runner.run(inputs)
    assert not named(sdk, "run")


def test_inputs_arrive_contiguous_and_of_the_graph_dtype(sdk: Any, tmp_path: Path) -> None:
    runner = open_inference(tiny.make_artifact(tmp_path / "tiny"))
    runner({"image": np.zeros((6, 2), np.float64).T})
    ((inputs, _),) = named(sdk, "run")[0]
    assert inputs["image"].flags["C_CONTIGUOUS"] and inputs["image"].dtype == np.float32


def test_an_unknown_executor_is_refused(sdk: Any, tmp_path: Path) -> None:
    artifact: Artifact = tiny.make_artifact(tmp_path / "tiny")
    with pytest.raises(ConfigError, match="executor 'fast'"):
        open_inference(artifact, executor="fast")
