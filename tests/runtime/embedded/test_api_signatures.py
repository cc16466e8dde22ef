"""Every name, parameter and default of PopART's compiled module is here, or stands in a table with the reason.

popart_signatures.json is made by docs/make_popart_facts.py.
"""
from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
from popart_models import popart

FACTS = json.loads((Path(__file__).parent / "popart_signatures.json").read_text())
# Class of the compiled module -> what a program has in its hands.
HOLDERS = {
    "_InferenceSessionCore": lambda: popart.InferenceSession,
    "_TrainingSessionCore": lambda: popart.TrainingSession,
    "_BuilderCore": lambda: popart.Builder,
    "AiGraphcoreOpset1": lambda: type(popart.Builder().aiGraphcore),
}
# What PopART's Python wrappers hide from a program, so it is absent on purpose: (class, method) -> reason.
WRAPPED = {
    **{f"{kind}.{name}": "the wrapper has a property for it" for kind in ("_InferenceSessionCore", "_TrainingSessionCore")
       for name in ("_getDataFlow", "_replicationFactor", "_accumulationFactor")},
    **{f"_InferenceSessionCore.{name}": "popxl's own, no session-level program calls it" for name in (
        "copyDeviceWeightsToHost", "markHostWeightsOutOfSync", "markHostWeightsInSync", "areHostWeightsInSync",
        "setEngineIsLoaded", "_setDeviceInfo")},
    **{f"{kind}.{name}": "what a context manager of Builder returns; Python calls it in a with statement"
       for kind in ("AttributeContextManager", "KeyValueContextManager", "NameContextManager")
       for name in ("__enter__", "__exit__")},
}  # fmt: skip
# Parameters of the compiled module that the wrappers fill or rename: (class, method) -> {parameter: its name in Python}.
RENAMED = {
    "_InferenceSessionCore.__init__": {"model": "fnModel", "ir": None},
    "_TrainingSessionCore.__init__": {"model": "fnModel"},
    "_InferenceSessionCore.prepareDevice": {"err": None},
    "_TrainingSessionCore.prepareDevice": {"err": None},
    "_InferenceSessionCore.compileAndExport": {"err": None},
    "_TrainingSessionCore.compileAndExport": {"err": None},
}
# Other names of one parameter, which methods take as keywords too.
SAME = {"debug_context": "debugContext", "debugPrefix": "debugContext"}
# Session methods that raise by name when they are called.
REFUSED = {f"{kind}.{name}": reason for kind in ("_InferenceSessionCore", "_TrainingSessionCore")
           for name, reason in popart.session._ABSENT.items()}  # fmt: skip


def holder(kind):
    return HOLDERS[kind]() if kind in HOLDERS else getattr(popart, kind, None)


def expected_default(value):
    """(the default, whether None may stand for it because Python would share a mutable one)."""
    if isinstance(value, dict) and "enum" in value:
        kind, member = value["enum"].split(".")
        return getattr(getattr(popart, kind), member), False
    return (None, True) if isinstance(value, dict) or value == [] else (value, False)


def agrees(found, value):
    wanted, sentinel = expected_default(value)
    if sentinel and (found is None or isinstance(value, dict)):
        return found is not inspect.Parameter.empty
    if value == []:
        return list(found) == []
    if hasattr(wanted, "value") and isinstance(found, int):
        return found == wanted.value
    return found == wanted and isinstance(found, bool) == isinstance(wanted, bool)


def problems(kind, method, overloads):
    """What differs between a method here and the facts."""
    owner = holder(kind)
    key = f"{kind}.{method}"
    if owner is None:
        return [f"{kind} is missing"]
    if not hasattr(owner, method) and not hasattr(owner, "__getattr__"):
        return [f"{key} is missing"]
    target = owner if method == "__init__" else getattr(owner, method, None)
    if target is None:
        return [f"{key} is missing"]
    parameters = inspect.signature(target).parameters
    loose = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    found = []
    for overload in overloads:
        for name, *default in overload:
            name = RENAMED.get(key, {}).get(name, name)
            if name is None:
                continue
            here = parameters.get(name) or parameters.get(f"{name}_") or parameters.get(SAME.get(name, name))
            if here is None:
                if not loose:
                    found.append(f"{key}({name}) is missing; it has {list(parameters)}")
            elif name == "args" and here.default is here.empty:
                continue  # PopART's default, no inputs at all, is refused by every op that has inputs
            elif default and len(overloads) == 1 and not agrees(here.default, default[0]):
                found.append(f"{key}({name}={default[0]!r}) has the default {here.default!r}")
    return found


METHODS = [
    (kind, method, overloads) for kind, facts in FACTS["classes"].items() for method, overloads in facts["methods"].items()
]


@pytest.mark.parametrize("kind, method, overloads", METHODS, ids=[f"{kind}.{method}" for kind, method, _ in METHODS])
def test_methods_have_popart_names_and_defaults(kind, method, overloads):
    key = f"{kind}.{method}"
    if key in REFUSED:
        assert REFUSED[key] and not hasattr(holder(kind), method)
        return
    if key in WRAPPED:
        assert not hasattr(holder(kind), method), f"{key} exists now: take it out of WRAPPED"
        return
    assert not problems(kind, method, overloads)


@pytest.mark.parametrize("kind", [kind for kind, facts in FACTS["classes"].items() if facts["attributes"]])
def test_attributes_exist(kind):
    made = {
        "OperatorIdentifier": lambda: popart.OperatorIdentifier("ai.onnx", "Relu", 6),
        "_BuilderCore": popart.Builder,
        "DeviceInfo": lambda: popart.DeviceManager().createCpuDevice(),
        "ClipNormSettings": lambda: popart.ClipNormSettings(["w"], 1.0),
    }
    target = made.get(kind, getattr(popart, kind, None))()
    names = FACTS["classes"][kind]["attributes"]
    if kind == "_BuilderCore":  # the first opset builder that is asked for fixes the opset, so only the class can be asked
        target = popart.Builder
    assert [name for name in names if not hasattr(target, name)] == []


@pytest.mark.parametrize("name", [name for name, members in FACTS["enums"].items() if members])
def test_enums_have_popart_members_in_popart_order(name):
    assert list(getattr(popart, name).__members__) == FACTS["enums"][name]


def test_session_options_are_those_of_popart():
    assert set(popart.options.FIELDS) == set(FACTS["options"])


@pytest.mark.parametrize("name", FACTS["options"])
def test_session_options_have_popart_defaults(name, monkeypatch):
    for variable in ("POPART_CACHE_DIR", "POPXL_CACHE_DIR"):
        monkeypatch.delenv(variable, raising=False)
    wanted, found = FACTS["options"][name], getattr(popart.SessionOptions(), name)
    if isinstance(wanted, dict) and "call" in wanted:
        assert found == getattr(popart, wanted["call"])()
    elif isinstance(wanted, list):
        assert set(found) == {expected_default(entry)[0] for entry in wanted} and isinstance(found, (list, set))
    else:
        wanted = expected_default(wanted)[0] if isinstance(wanted, dict) and wanted else wanted
        assert found == wanted and type(found) is type(wanted)


WRAPPERS = {  # PopART's Python classes around the compiled ones
    "Builder": {"modelProtoOrFilename": None, "opsets": None, "builderCore": None},
    "InferenceSession": {
        "fnModel": ..., "dataFlow": ..., "deviceInfo": ..., "inputShapeInfo": None, "patterns": None, "userOptions": None,
        "name": "inference",
    },
    "TrainingSession": {
        "fnModel": ..., "dataFlow": ..., "loss": ..., "optimizer": ..., "deviceInfo": ..., "inputShapeInfo": None,
        "patterns": None, "userOptions": None, "name": "training",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", WRAPPERS)
def test_python_classes_have_popart_order_of_arguments(name):
    parameters = inspect.signature(getattr(popart, name)).parameters.values()
    assert {p.name: ... if p.default is p.empty else p.default for p in parameters} == WRAPPERS[name]
    assert [p.name for p in parameters] == list(WRAPPERS[name])


def test_recovery_actions():
    assert list(popart.RecoveryAction.__members__) == ["IPU_RESET", "LINK_RESET", "PARTITION_RESET", "FULL_RESET"]


def test_the_check_sees_a_wrong_default_and_a_missing_name(monkeypatch):
    class Wrong:
        def acquireAvailableDevice(self, numIpus=2, tilesPerIpu=0):
            """A broken double."""

    monkeypatch.setattr(popart, "DeviceManager", Wrong)
    facts = FACTS["classes"]["DeviceManager"]["methods"]
    found = problems("DeviceManager", "acquireAvailableDevice", facts["acquireAvailableDevice"])
    assert any("numIpus=1" in text for text in found) and any("pattern" in text for text in found)
    assert problems("DeviceManager", "createCpuDevice", facts["createCpuDevice"]) == [
        "DeviceManager.createCpuDevice is missing"
    ]
