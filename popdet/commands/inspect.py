"""`popdet inspect`: what is in an artifact or an ONNX file."""
from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, Dict, List

import click

from popdet.options import emit, json_option
from runtime.errors import BadInputFile


@click.command("inspect")
@click.argument("path", type=click.Path(path_type=Path))
@json_option
def command(path: Path, as_json: bool) -> None:
    """Describe an artifact directory (and verify every checksum) or an ONNX file."""
    if not path.exists():
        raise BadInputFile(f"{path}: no such artifact or ONNX file")
    if path.is_dir():
        from runtime.artifact import Artifact

        report = Artifact.open(path).summary()
        emit(report, as_json, _format(report))
    else:
        report = _inspect_onnx(path)
        emit(report, as_json, _format(report))


def _inspect_onnx(path: Path) -> Dict[str, Any]:
    from graph_passes.graph_io import load_graph

    model = load_graph(path).to_model()
    graph = model.graph
    placed = Counter(f"ipu {_attribute(node, '__ipu_number')} stage {_attribute(node, '__pipeline_stage')}"
                     for node in graph.node)
    ops = Counter(f"{node.domain}.{node.op_type}" if node.domain else node.op_type for node in graph.node)
    return {
        "file": str(path),
        "opsets": {entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
        "nodes": len(graph.node),
        "ops": dict(ops.most_common()),
        "inputs": [_tensor(value) for value in graph.input],
        "outputs": [_tensor(value) for value in graph.output],
        "initializers": len(graph.initializer),
        "placement": dict(sorted(placed.items())),
    }


def _attribute(node: Any, name: str) -> Any:
    return next((entry.i for entry in node.attribute if entry.name == name), "-")


def _tensor(value: Any) -> str:
    shape = ",".join(str(dim.dim_value) if dim.HasField("dim_value") else dim.dim_param or "?"
                     for dim in value.type.tensor_type.shape.dim)
    return f"{value.name} [{shape}]"


def _format(report: Any, indent: int = 0) -> str:
    """A plain tree: `key: value`, nested values indented."""
    lines: List[str] = []
    pad = "  " * indent
    for key, value in report.items():
        if isinstance(value, dict):
            lines += [f"{pad}{key}:", _format(value, indent + 1)] if value else [f"{pad}{key}: none"]
        elif isinstance(value, list):
            lines.append(f"{pad}{key}:")
            for item in value:
                text = ", ".join(f"{k} {v}" for k, v in item.items()) if isinstance(item, dict) else str(item)
                lines.append(f"{pad}  {text}")
        else:
            lines.append(f"{pad}{key}: {value}")
    return "\n".join(lines)
