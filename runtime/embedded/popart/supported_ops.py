"""Which ops there are: PopART's own lists, asked for by a program. `popart_ops.json` has the facts."""
import functools
import json
from pathlib import Path
from typing import Dict, List, NamedTuple, Tuple

from .enums import DataType
from .errors import popart_exception


class OperatorIdentifier(NamedTuple):
    """`OperatorIdentifier("ai.onnx", "Conv", 11)`."""

    domain: str
    type: str
    version: int

    def __repr__(self):
        return f"{self.domain}.{self.type}:{self.version}"


class OpInput(NamedTuple):
    """An input or an output of an op. supportedTensors: empty where the list is open. constant: its value must be known
    when the session is built.
    """

    name: str
    supportedTensors: Tuple[DataType, ...]
    constant: bool = False


class OpAttribute(NamedTuple):
    """The values that an attribute may have."""

    supportedValuesRegex: str


class OpDefinition(NamedTuple):
    """What PopART accepts of one version of an op."""

    inputs: Tuple[OpInput, ...]
    outputs: Tuple[OpInput, ...]
    attributes: Dict[str, OpAttribute]


@functools.lru_cache(maxsize=None)
def facts():
    """{"registered", "opsets", "unsupported"}: see docs/make_popart_facts.py."""
    return json.loads(Path(__file__).with_name("popart_ops.json").read_text())


def _registered(includeInternal):
    """The ops that PopART registers and this runtime has too, with their facts; then ops registered by the program."""
    from ._engine import registry

    here = dict(registry.registered())
    for domain, ops in facts()["registered"].items():
        for op_type, versions in ops.items():
            mine = here.pop((domain, op_type), ())
            for version, facts_of in versions.items():
                if int(version) in mine and (includeInternal or facts_of["public"]):
                    yield OperatorIdentifier(domain, op_type, int(version)), facts_of
    known = facts()["opsets"]
    for (domain, op_type), versions in here.items():
        for version in versions:
            canonical = domain == "ai.onnx" and any(table.get(op_type) == version for table in known.values())
            if canonical or domain != "ai.onnx":  # rewritten at import in PopART, or a custom op
                yield OperatorIdentifier(domain, op_type, version), {"public": True}


def getSupportedOperations(includeInternal) -> List[OperatorIdentifier]:
    """Every op that a session takes; with includeInternal also those that only PopART's own rewrites make."""
    return sorted(identifier for identifier, _ in _registered(includeInternal))


def getSupportedOperationsDefinition(includeInternal) -> Dict[OperatorIdentifier, OpDefinition]:
    """{OperatorIdentifier: OpDefinition}: types and attributes that PopART accepts for it."""
    return {identifier: _definition(found) for identifier, found in _registered(includeInternal)}


def _definition(found):
    def tensors(key):
        return tuple(
            OpInput(entry["name"], tuple(DataType[name] for name in entry["types"]), bool(entry.get("const")))
            for entry in found.get(key, ())
        )

    attributes = {name: OpAttribute(pattern) for name, pattern in found.get("attributes", {}).items()}
    return OpDefinition(tensors("inputs"), tensors("outputs"), attributes)


def getUnsupportedOperations(opsetVersion) -> List[OperatorIdentifier]:
    """The ops of the ONNX specification at this ai.onnx opset that PopART has no implementation of."""
    lists = facts()["unsupported"]
    if str(opsetVersion) not in lists:
        raise popart_exception(f"ai.onnx opset {opsetVersion} is not supported; PopART takes {min(map(int, lists))} to 11")
    split = (text.rsplit("-", 1) for text in lists[str(opsetVersion)])
    return sorted(OperatorIdentifier("ai.onnx", name, int(version)) for name, version in split)
