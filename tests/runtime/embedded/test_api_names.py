"""Patterns, input settings, debug contexts, loggers, reserved prefixes, op lists, numerics reports, settings structs."""
from __future__ import annotations

import logging
import subprocess
import sys

import numpy as np
import pytest
from popart_models import model, popart

Level = popart.PatternsLevel


def refused(message):
    return pytest.raises(popart.popart_exception, match=message)


def test_levels_are_nested():
    on = [
        {name for name in popart.patterns.NAMES if popart.Patterns(level).isPatternEnabled(name)}
        for level in (Level.NoPatterns, Level.Minimal, Level.Default, Level.All)
    ]
    assert on[0] == set() and on[0] < on[1] < on[2] < on[3] == set(popart.patterns.NAMES)


def test_patterns_chain_and_have_properties():
    found = popart.Patterns(Level.NoPatterns).enableRuntimeAsserts(False).enablePattern("PreUniRepl", True)
    assert found.PreUniRepl and not found.PostNRepl
    found.NlllWithSoftMaxGradDirect = True
    assert found.isPatternEnabled("NlllWithSoftmaxGradDirect")
    assert popart.Patterns(["PadSum", "OpToIdentity"]).isPatternEnabled("PadSum")
    assert not popart.Patterns(["PadSum"]).InPlace
    with pytest.raises(TypeError):
        popart.Patterns("PadSum")
    with refused("Unknown pattern Nothing"):
        popart.Patterns(["Nothing"])


def test_mandatory_patterns_are_asserted_unless_switched_off():
    check = popart.patterns.check_mandatory
    check(popart.Patterns())
    check(popart.Patterns(Level.Minimal))
    with refused("Mandatory patterns are not enabled: MulArgGradOp.*enableRuntimeAsserts"):
        check(popart.Patterns().enablePattern("MulArgGradOp", False))
    check(popart.Patterns(Level.NoPatterns).enableRuntimeAsserts(False))


def test_input_settings_overloads():
    settings = popart.InputSettings(popart.TileSet.IO, popart.ExchangeStrategy.OverlapLoops)
    assert (settings.tileSet(), settings.exchangeStrategy()) == (popart.TileSet.IO, popart.ExchangeStrategy.OverlapLoops)
    assert settings.replicatedStreamMode() is popart.ReplicatedStreamMode.Replicate
    for made in (
        popart.InputSettings(popart.ReplicatedStreamMode.Broadcast),
        popart.InputSettings(relicatedStreamMode=popart.ReplicatedStreamMode.Broadcast),
    ):
        assert made.replicatedStreamMode() is popart.ReplicatedStreamMode.Broadcast
    with pytest.raises(TypeError):
        popart.InputSettings("IO")


def test_input_shape_info_keeps_the_first_and_names_the_missing():
    info = popart.InputShapeInfo()
    info.add("x", popart.TensorInfo("FLOAT", [2]))
    info.add("x", popart.TensorInfo("FLOAT", [3]))
    assert info.has("x") and info.get("x").shape() == [2] and not info.has("y")
    with refused("'y'"):
        info.get("y")


def test_a_debug_context_names_what_a_builder_makes():
    builder = popart.Builder()
    x = builder.addInputTensor(popart.TensorInfo("FLOAT", [2]), debugContext=popart.DebugContext("data"))
    assert x == "data"
    outer = popart.DebugInfo(popart.DebugContext("outer"), "layer")
    assert popart.DebugContext(outer, "inner").getPathName() == "outer/inner"
    assert outer.setValue("key", 1) and not outer.setValue("key", 2)


def test_loggers_have_levels(caplog):
    logger = popart.getLogger()
    logger.setLevel("debug")
    with caplog.at_level(logging.DEBUG, "popart"):
        popart.getLogger("ir").debug("100% heard")
    assert "100% heard" in caplog.text
    logger.setLevel("ERR")
    assert not logging.getLogger("popart.ir").isEnabledFor(logging.WARNING)
    logger.setLevel("WARN")
    with pytest.raises(ValueError, match="Unknown logging level 'LOUD'"):
        logger.setLevel("LOUD")


@pytest.mark.parametrize("name, prefix", [
    ("Gradient", "Gradient___"), ("Accum", "Accum___"), ("Accl1", "Accl1___"), ("Step", "Step___"),
    ("Restored", "Restored___"), ("Stashed", "Stashed___"), ("LossScaling", "lossScaling_"),
    ("RandomSeed", "randomSeed___"), ("AcclToReduce", "AcclIntoReduce___"), ("AcclToUpdate", "AcclIntoUpdate___"),
    ("AcclFinalOut", "AcclOutOfAcclUpdate___"), ("UpdatedVar", "UpdatedVar___"), ("GlobalNorm", "GlobalNorm___"),
    ("DefaultScaledLearningRate0", "scaledLearningRate0___default___"),
    ("SpecificWeightDecayScaleFactor0", "weightDecayScaleFactor0___specific___"),
])  # fmt: skip
def test_reserved_prefixes(name, prefix):
    function = getattr(popart, f"reserved{name}Prefix")
    assert function() == prefix and prefix in popart.reservedPrefixes() and function.__name__ in popart.__all__


def test_op_lists_hold_what_sessions_take():
    public, everything = popart.getSupportedOperations(False), popart.getSupportedOperations(True)
    assert popart.OperatorIdentifier("ai.onnx", "Conv", 11) in public and set(public) < set(everything)
    assert popart.OperatorIdentifier("ai.graphcore", "AddBias", 1) in set(everything) - set(public)
    definition = popart.getSupportedOperationsDefinition(False)[popart.OperatorIdentifier("ai.onnx", "TopK", 11)]
    assert [(entry.name, entry.constant) for entry in definition.inputs] == [("X", False), ("K", True)]
    assert definition.inputs[1].supportedTensors == (popart.DataType.INT64,)
    assert definition.attributes["axis"].supportedValuesRegex == "*" and len(definition.outputs) == 2
    absent = popart.getUnsupportedOperations(11)
    assert popart.OperatorIdentifier("ai.onnx", "NonZero", 9) in absent and not set(absent) & set(public)
    with refused("opset 12"):
        popart.getUnsupportedOperations(12)


@pytest.mark.parametrize("seed", range(3))
def test_numerics_report_is_the_relative_distance_of_two_updates(seed):
    random = np.random.default_rng(seed)
    arrays = {label: random.normal(size=(4, 3)).astype(np.float32) for label in ("a0", "a1", "b0", "b1")}
    models = [model("g (float[4,3] x) => (float[4,3] y) { y = Add(x, w) }", w=array) for array in arrays.values()]
    report = popart.NumericsReport(*(proto.SerializeToString() for proto in models))
    wide = {label: array.astype(np.float64) for label, array in arrays.items()}
    norm = np.linalg.norm
    wanted = norm(wide["a1"] - wide["b1"]) ** 2 / (norm(wide["a1"] - wide["a0"]) * norm(wide["b1"] - wide["b0"]))
    assert report.getRelativeErrors() == {"w": pytest.approx(wanted)}
    assert "w" in report.fullReport() and f"{wanted:g}" in report.report("w")
    same = models[0].SerializeToString()
    assert popart.NumericsReport(same, same, same, same).getRelativeErrors() == {"w": 0.0}
    with refused("the weight 'w' of A0 is absent in B1"):
        popart.NumericsReport(same, same, same, model("g (float x) => (float y) { y = Relu(x) }").SerializeToString())


def test_tensor_location_overloads():
    on_chip, sharded, io = popart.TensorStorage.OnChip, popart.ReplicatedTensorSharding.On, popart.TileSet.IO
    group = popart.CommGroup(popart.CommGroupType.Consecutive, 2)
    short = popart.TensorLocation(on_chip, sharded, group)
    assert (short.replicatedTensorSharding, short.shardingDomain, short.loadTileSet) == (sharded, group, popart.TileSet.Compute)
    assert popart.TensorLocation(on_chip, io, io, sharded, group).storageTileSet is io
    settings = popart.TensorLocationSettings(popart.TensorStorage.OffChip, 4, 16)
    assert settings.location.storage is popart.TensorStorage.OffChip and settings.minElementsForOffChip == 4
    with pytest.raises(TypeError):
        short.storage = "OnChip"
    phases = popart.ExecutionPhaseSettings(phases=2, optimizerSchedule=popart.ExecutionPhaseSchedule.Batch)
    assert phases.schedule is popart.ExecutionPhaseSchedule.Batch and popart.AutodiffSettings().stitchStrategy.value == 1


def test_enum_numbers_are_those_of_the_compiled_module():
    assert [int(level) for level in (Level.NoPatterns, Level.Minimal, Level.Default, Level.All)] == [0, 1, 2, 3]
    assert (int(popart.RecomputationType.Pipeline), int(popart.RecomputationType.RecomputeAll)) == (3, 4)
    assert popart.TensorStorage(0) is popart.TensorStorage.OffChip
    assert repr(popart.RecomputeType.Recompute) == "<RecomputeType.Recompute: 2>"


def test_exceptions_carry_what_programs_read():
    error = popart.OutOfMemoryException("does not fit", "tile 0 is full", "/tmp/profile.pop")
    assert (error.getSummaryReport(), error.getProfilePath()) == ("tile 0 is full", "/tmp/profile.pop")
    assert str(error) == "does not fit"
    assert error.isSuccessful() and popart.OutOfMemoryError().isSuccessful() and str(popart.OutOfMemoryError()) == ""
    assert popart.poplar_recoverable_runtime_error.recoveryAction in popart.RecoveryAction
    with pytest.raises(popart.poplar_exception):
        raise popart.poplar_unknown_runtime_error("lost")


def test_versions():
    assert popart.versionString() == popart.__version__ and popart.versionNumber() == (3, 4, 0)
    assert isinstance(popart.packageHash(), str)


def test_importing_popart_loads_neither_torch_nor_onnx():
    code = "import sys, popart; print(sorted({'torch', 'onnx'} & set(sys.modules)))"
    folder = popart.__path__[0].rsplit("/", 1)[0]
    found = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": folder}, capture_output=True, text=True)
    assert found.stdout.strip() == "[]", found.stderr


@pytest.mark.parametrize("settings, name, wrong, right", [
    (popart.AutomaticLossScalingSettings, "binEdgeLocation", "0.5", 0.25),
    (popart.AutomaticLossScalingSettings, "enabled", 1, True),
    (popart.AutomaticLossScalingSettings, "toTrackTensors", None, ["w"]),
    (popart.BatchSerializationSettings, "factor", 2.5, 4),
    (popart.ExecutionPhaseSettings, "schedule", 1, popart.ExecutionPhaseSchedule.Batch),
    (popart.AccumulateOuterFragmentSettings, "schedule", "Serial", popart.AccumulateOuterFragmentSchedule.Scheduler),
    (popart.TensorLocationSettings, "location", 3, popart.TensorLocation(popart.TensorStorage.OffChip)),
])  # fmt: skip
def test_settings_keep_the_kind_of_their_fields(settings, name, wrong, right):
    made = settings()
    setattr(made, name, right)
    assert getattr(made, name) == right
    if wrong is not None:
        with pytest.raises(TypeError, match=name):
            setattr(made, name, wrong)
    with pytest.raises(AttributeError):
        made.nothing = 1


def test_a_traceback_names_popart_core():
    folder = popart.__path__[0].rsplit("/", 1)[0]
    code = "import popart; popart.AnchorReturnType('Some')"
    found = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": folder}, capture_output=True, text=True)
    last = found.stderr.strip().splitlines()[-1]
    assert last == "popart_core.popart_exception: Invalid anchor return type ID supplied: Some"
