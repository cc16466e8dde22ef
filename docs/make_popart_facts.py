"""Turns a specification of PopART 3.4 into data files of this repository.

    python docs/make_popart_facts.py ops.json signatures.md facts.md

ops.json -> runtime/embedded/popart/popart_ops.json: every registered op, its versions, types, attributes.
signatures.md -> tests/runtime/embedded/popart_signatures.json: every class and method with keyword names and defaults.
facts.md -> the same file, "options": the table of SessionOptions.
"""
from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OPS = ROOT / "runtime" / "embedded" / "popart" / "popart_ops.json"
SIGNATURES = ROOT / "tests" / "runtime" / "embedded" / "popart_signatures.json"
# One line of the specification is cut at a quoted bracket; what it says in full.
CUT = {"separator": "' '", "openBracket": "'['", "closeBracket": "']'"}
LITERALS = {
    "true": True, "false": False, "std::string()": "", "py::none()": None, "pybind11::none()": None,
    "nonstd::optional<std::vector<TensorId>>()": None, "py::list()": [], "pybind11::list()": [],
    "std::vector<ClipNormSettings>{}": [], "std::vector<int>()": [], "float(1.0)": 1.0,
}  # fmt: skip
OPTION_DEFAULTS = {
    "RecomputationType::None": {"enum": "RecomputationType.NoRecompute"},
    "MergeVarUpdateType::None": {"enum": "MergeVarUpdateType.Off"},
    "initialDefaultPrefetchBufferingDepthValue": 1,
    "static_cast<int64_t>(1e9)": 1000000000,
    "{Instrumentation::Outer}": [{"enum": "Instrumentation.Outer"}],
    "TensorLocationSettings{TensorLocation(), 2, 8192}": {"call": "TensorLocationSettings"},
}
EMPTY = {"string": "", "set": [], "vector": [], "map": {}}


def ops_table(facts: dict) -> dict:
    """{"registered": {domain: {op: {version: {...}}}}, "opsets": {opset: {op: version}}, "unsupported": {opset: [op]}}."""
    registered: dict = {}
    for entry in facts["registered"]:
        versions = registered.setdefault(entry["domain"], {}).setdefault(entry["op"], {})
        versions[str(entry["version"])] = {
            "public": entry["public"], "gradient": entry["has_getGradOps"], **_definition(entry["definition"]),
        }  # fmt: skip
    opsets, unsupported = {}, {}
    for opset, lists in facts["per_onnx_opset"].items():
        named = [*lists["supported"], *lists["supported_via_onnx_canonicalization"]]
        opsets[opset] = {name: int(version) for name, version in sorted(text.rsplit("-", 1) for text in named)}
        unsupported[opset] = [entry["op"] for entry in lists["unsupported_strict"]]
    return {"registered": registered, "opsets": opsets, "unsupported": unsupported}


def _definition(definition: dict) -> dict:
    """Names of types only: where the source has a variable for a list of types, the list is empty, that is, open."""
    found = dict(definition)
    for key in ("inputs", "outputs"):
        if key in found:
            types = [[name.replace("popart::", "") for name in entry["types"]] for entry in found[key]]
            found[key] = [{**e, "types": [n for n in names if n.isupper()]} for e, names in zip(found[key], types)]
    return found


def signatures_table(text: str) -> dict:
    """{"enums": {name: [member]}, "classes": {name: {"methods": {name: [[parameter, ...], ...]}, "attributes": [name]}}}."""
    enums, classes, current = {}, {}, None
    for line in text.splitlines():
        if found := re.match(r"- enum \*\*(\w+)\*\*: *(.*)", line):
            enums[found[1]] = [name for name in found[2].split(", ") if name]
        elif found := re.match(r"### (\w+)", line):
            current = classes.setdefault(found[1], {"methods": {}, "attributes": []})
        elif current is None:
            continue
        elif line.startswith("- attributes/properties: "):
            current["attributes"] = line.split(": ", 1)[1].split(", ")
        elif found := re.match(r"- (?:static )?(\w+)\((.*)\)\s*$", line) or re.match(r"- (\w+)\((.*)$", line):
            overloads = current["methods"].setdefault(found[1], [])
            parameters = _parameters(found[1], found[2])
            if parameters not in overloads:
                overloads.append(parameters)
    return {"enums": enums, "classes": classes}


def _parameters(method: str, text: str) -> list:
    """[[name] | [name, default]]; an enum member is {"enum": "X.Y"}, an object {"call": "X"}."""
    if method == "printtensor":
        text = text.split(", separator=")[0] + "".join(f", {name}={value}" for name, value in CUT.items())
    found = []
    for part in _split(text):
        name, equals, default = part.partition("=")
        found.append([name, _value(default)] if equals else [name])
    return found


def _split(text: str) -> list[str]:
    parts, depth, quote, last = [], 0, "", 0
    for i, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        elif letter in "([{<":
            depth += 1
        elif letter in ")]}>":
            depth -= 1
        elif letter == "," and depth == 0:
            parts.append(text[last:i])
            last = i + 1
    return [part.strip() for part in (*parts, text[last:]) if part.strip()]


def options_table(text: str) -> dict:
    """{option: default} of those that Python sees."""
    rows = re.findall(r"^\| (\w+) \| (.+?) \| (.+?) \| yes \|$", text, re.MULTILINE)
    return {name: _option(cpp_type, default) for name, cpp_type, default in rows}


def _option(cpp_type: str, default: str):
    kind = cpp_type.removeprefix("std::").partition("<")[0]
    if default in OPTION_DEFAULTS:
        return OPTION_DEFAULTS[default]
    if default in ("(default-constructed)", "{}"):
        return EMPTY.get(kind, {"call": kind})
    return _value(default)


def _value(text: str):
    if text in LITERALS:
        return LITERALS[text]
    if found := re.match(r"static_cast<int>\((\w+)::(\w+)\)", text):
        return {"enum": f"{found[1]}.{found[2]}"}
    if found := re.match(r"(\w+)::(\w+)$", text):
        return {"enum": f"{found[1]}.{found[2]}"}
    if found := re.match(r"(\w+)\(.*\)$", text):
        return {"call": found[1]}
    if text[:1] in "\"'":
        return text[1:-1]
    number = text.rstrip("f")
    return float(number) if re.search(r"[.e]", number) else int(number)


def main(arguments: list[str]) -> None:
    ops, signatures, facts = (Path(name) for name in arguments)
    OPS.write_text(json.dumps(ops_table(json.loads(ops.read_text())), separators=(",", ":")) + "\n")
    table = {**signatures_table(signatures.read_text()), "options": options_table(facts.read_text())}
    SIGNATURES.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
