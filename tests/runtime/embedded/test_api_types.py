"""The small types of the API: names, defaults and messages of PopART 3.4."""
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from popart_models import options, popart

Art = popart.AnchorReturnType


def refused(message):
    return pytest.raises(popart.popart_exception, match=message)


@pytest.mark.parametrize(
    "name, dtype",
    [
        ("FLOAT", "float32"),
        ("FLOAT16", "float16"),
        ("INT32", "int32"),
        ("INT64", "int64"),
        ("BOOL", "bool"),
        ("UINT8", "uint8"),
    ],
)
def test_tensor_info_takes_names_and_numpy_types(name, dtype):
    for info in (
        popart.TensorInfo(name, [2, 3]), popart.TensorInfo(np.dtype(dtype), (2, 3)),
        popart.TensorInfo(getattr(np, dtype if dtype != "bool" else "bool_"), [2, 3]),
        popart.TensorInfo(np.zeros((2, 3), dtype)),
    ):  # fmt: skip
        assert (info.data_type(), info.data_type_lcase(), info.shape(), info.nelms()) == (name, dtype, [2, 3], 6)


@pytest.mark.parametrize("args", [(), ("FLOAT",), ("FLOAT99", [1]), ("FLOAT", [-1]), ("FLOAT", 3), (1, 2, 3)])
def test_tensor_info_refuses_the_rest(args):
    with pytest.raises(TypeError, match="Can not create TensorInfo with args"):
        popart.TensorInfo(*args)


@pytest.mark.parametrize("text", ["All", "all", "FINAL", "sum"])
def test_anchor_return_types_ignore_case(text):
    assert Art(text).id().name == text.capitalize() and Art(text).rp() == 1


@pytest.mark.parametrize(
    "args, message",
    [
        (("EveryN",), "Must specify return period with option 'EVERYN'"),
        (("EveryN", 0), "Anchor return period must be greater than zero"),
        (("All", 2), "A return period should not be supplied for this anchor return type"),
        (("Some",), "Invalid anchor return type ID supplied: Some"),
    ],
)
def test_anchor_return_type_errors(args, message):
    with refused(message):
        Art(*args)


def test_data_flow_overloads_agree():
    one = popart.DataFlow(4, {"a": Art("EveryN", 2), "b": Art("Sum")})
    assert (one.batchesPerStep(), one.anchors(), one.nAnchors(), one.art("a").rp()) == (4, ["a", "b"], 2, 2)
    assert one.isAnchored("a") and not one.isAnchored("c")
    assert popart.DataFlow(1, ["a"]).art("a").id() is popart.AnchorReturnTypeId.All
    assert popart.DataFlow(1, anchorIds=["a"], anchorReturnType=Art("Final")).art("a").id().name == "Final"


@pytest.mark.parametrize(
    "steps, anchors, message",
    [
        (0, {}, "'Batches per step' must be greater than zero"),
        (2, {"a": Art("EveryN", 4)}, "Return period must be <= to the number of batches per step"),
        (4, {"a": Art("EveryN", 3)}, "Return period must be a factor of the number of batches per step"),
    ],
)
def test_data_flow_errors(steps, anchors, message):
    with refused(message):
        popart.DataFlow(steps, anchors)


# The table of facts, typed by hand a second time: the fields most programs touch.
OPTION_DEFAULTS = {
    "accumulationFactor": 1, "replicatedGraphCount": 1, "enableGradientAccumulation": False, "enablePipelining": False,
    "virtualGraphMode": popart.VirtualGraphMode.Off, "autoRecomputation": popart.RecomputationType.NoRecompute,
    "accumulationAndReplicationReductionType": popart.ReductionType.Sum,
    "meanAccumulationAndReplicationReductionStrategy": popart.MeanReductionStrategy.Post,
    "constantWeights": True, "compileEngine": True, "cachePath": "session_cache", "enableEngineCaching": False,
    "outlineThreshold": 1.0, "mergeVarUpdateMemThreshold": 1000000, "timeLimitScheduler": 1e9, "finalDotOp": 10000,
    "swapLimitScheduler": 10**9, "kahnTieBreaker": "greedy", "delayVarUpdates": True, "strictOpVersions": True,
    "enableSupportedDataTypeCasting": True, "enableVariablesCaching": True, "engineOptions": {}, "dotChecks": set(),
    "hardwareInstrumentations": {popart.Instrumentation.Outer}, "transitiveClosureOptimizationThreshold": 100000,
}  # fmt: skip


def test_session_options_have_popart_defaults(monkeypatch):
    monkeypatch.delenv("POPART_CACHE_DIR", raising=False)
    monkeypatch.delenv("POPXL_CACHE_DIR", raising=False)
    found = popart.SessionOptions()
    assert {name: getattr(found, name) for name in OPTION_DEFAULTS} == OPTION_DEFAULTS
    assert found.accumulateOuterFragmentSettings.schedule is popart.AccumulateOuterFragmentSchedule.Serial
    assert found.weightTensorLocationSettings.minElementsForReplicatedTensorSharding == 8192


@pytest.mark.parametrize("name", ["enablePipelinig", "looseThresholdAtPeak", "autodiffSettings", "enableSerializedMatmuls"])
def test_an_option_that_popart_does_not_show_cannot_be_set(name):
    with pytest.raises(AttributeError, match=f"object has no attribute '{name}'"):
        setattr(popart.SessionOptions(), name, 1)
    with pytest.raises(AttributeError):
        popart.SessionOptions().accumulateOuterFragmentSettings.wrong = 1


@pytest.mark.parametrize(
    "name, value",
    [("accumulationFactor", "4"), ("accumulationFactor", True), ("enablePipelining", 1), ("virtualGraphMode", "Manual")],
)
def test_options_of_the_wrong_type_are_refused(name, value):
    with pytest.raises(TypeError, match=name):
        options(**{name: value})


def test_option_dicts_are_written_through_and_are_not_shared():
    one, two = popart.SessionOptions(), popart.SessionOptions()
    one.engineOptions["debug.allowOutOfMemory"] = "true"
    assert one.engineOptions == {"debug.allowOutOfMemory": "true"} and two.engineOptions == {}


def test_cache_folder_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("POPART_CACHE_DIR", "/somewhere")
    assert (popart.SessionOptions().enableEngineCaching, popart.SessionOptions().cachePath) == (True, "/somewhere")


def test_explicit_ir_sets_three_options():
    found = popart.SessionOptions()
    found.enableExplicitIR(True)
    assert found.useHostCopyOps and found.enableExplicitMainLoops and found.explicitRecomputation


@pytest.mark.parametrize("ipus", [1, 2, 4, 16])
def test_acquired_devices_are_emulated_ipus(ipus):
    with popart.DeviceManager().acquireAvailableDevice(ipus) as device:
        assert (device.type, device.numIpus, device.isAttached, device.isEmulated) == (popart.DeviceType.Ipu, ipus, True, True)
        assert device.tilesPerIPU == device.tilesPerIpu == 1472 and "emulated" in repr(device)
    assert not device.isAttached


@pytest.mark.parametrize("ipus", [0, 3, 6])
def test_the_number_of_ipus_is_a_power_of_two(ipus):
    for acquire in (popart.DeviceManager().acquireAvailableDevice, popart.DeviceManager().tryAcquireAvailableDevice):
        with refused(f"You have attempted to acquire {ipus} IPUs. The number of IPUs requested must be a power of two"):
            acquire(ipus)


def test_device_options_are_checked():
    manager = popart.DeviceManager()
    model = manager.createIpuModelDevice({"numIPUs": "2", "tilesPerIPU": 8})
    assert (model.type.name, model.numIpus, model.tilesPerIPU) == ("IpuModel", 2, 8)
    offline = manager.createOfflineIPUDevice({"numIPUs": 4, "ipuVersion": "ipu21"})
    assert offline.connectionType is popart.DeviceConnectionType.Never and not offline.attach()
    with refused("Invalid option `numIPU' passed to DevicexManager::createHostDevice for device type IpuModel"):
        manager.createIpuModelDevice({"numIPU": 2})
    with refused("Unknown ipuVersion 'ipu9'"):
        manager.createOfflineIPUDevice({"ipuVersion": "ipu9"})
    with refused("when connectionType is DeviceConnectionType::Never"):
        manager.acquireAvailableDevice(1, connectionType=popart.DeviceConnectionType.Never)
    simulated = manager.createSimDevice({"numIPUs": 2, "tilesPerIPU": 8})
    assert (simulated.type.name, simulated.numIpus, simulated.tilesPerIPU) == ("Sim", 2, 8)


def test_exceptions_form_popart_hierarchy():
    assert issubclass(popart.popart_runtime_error, popart.popart_exception)
    assert issubclass(popart.OutOfMemoryException, popart.popart_exception)
    assert issubclass(popart.poplar_recoverable_runtime_error, popart.poplar_system_runtime_error)
    assert not issubclass(popart.poplar_exception, popart.popart_exception)


def test_patterns_know_their_names():
    patterns = popart.Patterns(popart.PatternsLevel.NoPatterns)
    assert not patterns.InPlace and popart.Patterns().InPlace
    patterns.enablePattern("OpToIdentity", True)
    assert patterns.isPatternEnabled("OpToIdentity") and not patterns.isPatternEnabled("PostNRepl")
    with refused("Unknown pattern Nothing"):
        patterns.enablePattern("Nothing", True)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError):
        popart.nothing  # noqa: B018


def test_enum_members_are_no_ints_and_convert_to_them():
    assert popart.RecomputeType.Recompute != 2 and int(popart.RecomputeType.Recompute) == 2
    assert popart.BatchSerializationTransformContext.Fwd is popart.BatchSerializationTransformContext.Forward


def test_import_is_light_and_popart_core_is_the_same_module_by_another_name():
    embedded = Path(popart.__file__).parents[1]
    code = (
        "import sys, popart, popart_core; assert popart_core.SGD is popart.SGD; assert popart_core.popart_exception;"
        "assert popart_core.VirtualGraphMode is popart.VirtualGraphMode; print('torch' in sys.modules, popart.__version__)"
    )
    found = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(embedded)}, capture_output=True, text=True)
    assert found.stdout.strip() == "False 3.4.0+embedded", found.stderr
