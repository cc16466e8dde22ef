"""Writes methods.json, the ai.onnx methods of every opset builder, from the facts of PopART 3.4.

    python -m popart._builder.make_methods ops.json

ops.json: `builder_methods`, {aiOnnxOpsetN: {method: ["name" or "name=C++ default", ...]}}. Written: {method: [{opsets,
op, inputs: [min, max], params: [[name], [name, kind, default], ...]}]}, consecutive opsets with equal rows joined.
"""
import json
import pathlib
import re
import sys

from onnx import defs

OUT = pathlib.Path(__file__).with_name("methods.json")
_RENAMED = {"logical_and": "And", "logical_or": "Or", "logical_not": "Not", "logical_xor": "Xor", "logical_if": "If"}
_GRAPHS = {"body", "else_branch", "then_branch"}
_REQUIRED = {
    "axis": "int", "axes": "ints", "kernel_shape": "ints", "blocksize": "int", "to": "str", "size": "int", "shape": "ints",
    "num_scan_inputs": "int", "pooled_shape": "ints", "direction": "str", "value": "tensor", "starts": "ints",
    "ends": "ints", "scales": "floats", "k": "int", "sample_size": "int", "new_axis": "int", "max_gram_length": "int",
    "max_skip_count": "int", "min_gram_length": "int", "mode": "str", "ngram_counts": "ints", "ngram_indexes": "ints",
    "paddings": "ints", "pads": "ints", "directions": "ints", "height_scale": "float", "width_scale": "float",
    "output_shape": "ints", "repeats": "ints", "split": "ints", "tiles": "int",
}  # fmt: skip
_KIND = {"std::string": "str", "int64_t": "int", "float": "float"}


def main(path):
    methods = json.loads(pathlib.Path(path).read_text())["builder_methods"]
    types = {name.lower(): name for name in {s.name for s in defs.get_all_schemas_with_history() if s.domain == ""}}
    table = {}
    for opset in range(6, 12):
        for name, params in methods[f"aiOnnxOpset{opset}"].items():
            op = _RENAMED.get(name) or types[name]
            row = {"op": op, "inputs": _inputs(op, opset), "params": _params(name, params, opset)}
            rows = table.setdefault(name, [])
            if rows and {**rows[-1], "opsets": None} == {**row, "opsets": None}:
                rows[-1]["opsets"][1] = opset
            else:
                rows.append({"opsets": [opset, opset], **row})
    table["constantofshape"][-1]["opsets"][1] = 11  # the facts have opset 11's under `constant`
    lines = (f"{json.dumps(name)}: {json.dumps(rows)}" for name, rows in sorted(table.items()))
    OUT.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def _inputs(op, opset):
    schema = defs.get_schema(op, opset)
    return [schema.min_input, min(schema.max_input, 2**31 - 1)]


def _params(method, params, opset):
    if method == "constant":
        return [["value", "tensor"], *([["is_value_sparse", "flag", False]] if opset == 11 else [])]
    found = []
    for text in params:
        name, _, default = text.partition("=")
        if name == "debugContext":
            continue
        if name in ("args", "num_outputs"):
            found.append([name])
        elif not default:
            kind = "graph" if name in _GRAPHS else _REQUIRED[name]
            found.append([name, kind])
        else:
            found.append([name, *_default(default)])
    return found


def _default(text):
    """(kind, default) of a C++ default; None stands for an absent optional, [] for an empty vector."""
    vector = re.fullmatch(r"(nonstd::optional<)?std::vector<([\w:]+)>>?\(\)", text)
    if vector:
        return _KIND[vector[2]] + "s", None if vector[1] else []
    optional = re.fullmatch(r"nonstd::optional<([\w:]+)>\(\)", text)
    if optional:
        return _KIND[optional[1]], None
    if text == "std::string()":
        return "str", ""
    if text.startswith('"'):
        return "str", text.strip('"')
    if re.search(r"[.ef]", text):
        return "float", float(text.rstrip("f"))
    return "int", int(text)


if __name__ == "__main__":
    main(sys.argv[1])
