"""The types that shape inference found, kept for the next start: found again, never for another graph; no compiler imported."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "runtime" / "embedded"))
import popart
from popart._engine import known_types, python_ops, shapes
from popart._engine.ir import Graph, import_model

EMBEDDED = str(Path(popart.__file__).parents[1])
LEAST = known_types.LEAST_OPS


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def chain(count: int = LEAST, width: int = 4, first: str = 'Cast <to = 10> (x)') -> Graph:
    """A chain of `count` ops behind x [2, width], one of them with a shape that folds away."""
    lines = [f"t0 = {first}", *(f"t{i + 1} = Relu (t{i})" for i in range(count - 1))]
    text = f"""<ir_version: 7, opset_import: ["" : 11]>
    g (float[2, {width}] x) => (float16[2, {width}] y) {{
      {' '.join(lines)}
      sizes = Shape (t3) y = Reshape (t{count - 1}, sizes)
    }}"""
    return import_model(onnx.parser.parse_model(text))


def files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "popdet" / "types").glob("*"))


def refuse(*arguments: Any) -> Any:
    raise AssertionError("inferred again")


def test_a_graph_is_inferred_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = shapes.annotate(chain())
    assert [file.suffix for file in files(tmp_path)] == [".json"]
    monkeypatch.setattr(shapes, "infer", refuse)
    second = shapes.annotate(chain())
    assert second.info == first.info and second.info["y"] == popart.TensorInfo("FLOAT16", [2, 4])
    assert [op.outputs for op in second.ops] == [op.outputs for op in first.ops]
    assert second.constants.keys() == first.constants.keys() and "sizes" in second.constants


@pytest.mark.parametrize("change", [{"width": 5}, {"first": "Cast <to = 1> (x)"}, {"count": LEAST + 1}], ids=str)
def test_another_graph_has_a_file_of_its_own(change: dict[str, Any], tmp_path: Path) -> None:
    shapes.annotate(chain())
    assert shapes.annotate(chain(**change)).info == _without_files(chain(**change)).info
    assert len(files(tmp_path)) == 2


def _without_files(graph: Graph) -> Graph:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(known_types, "file_of", lambda graph: None)
        return shapes.annotate(graph)


def test_replicas_have_a_file_of_their_own() -> None:
    one, two = chain(), chain()
    two.replicas = 2
    for graph in (one, two):
        graph.info = shapes.resolve_inputs(graph, {})
    assert known_types.file_of(one) != known_types.file_of(two)


@pytest.mark.parametrize("content", ["", "[1]", "7", '{"t1": 3}', '{"t1": ["FLOAT", [-1]]}', '{"t1": ["NONE", [1]]}', "null"])
def test_a_damaged_file_is_replaced(content: str, tmp_path: Path) -> None:
    wanted = shapes.annotate(chain()).info
    (file,) = files(tmp_path)
    good = file.read_text()
    file.write_text(content)
    assert shapes.annotate(chain()).info == wanted
    assert json.loads(file.read_text()) == json.loads(good)


def test_a_small_graph_is_not_kept(tmp_path: Path) -> None:
    shapes.annotate(chain(LEAST // 2))
    assert not files(tmp_path)


def test_python_ops_and_subgraphs_are_not_kept() -> None:
    graph = chain()
    graph.info = shapes.resolve_inputs(graph, {})
    assert known_types.file_of(graph) is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(python_ops._ops, "ai.onnx.Relu:6", None)
        assert known_types.file_of(graph) is None
    graph.ops[5].attrs["body"] = chain(5)
    assert known_types.file_of(graph) is None


def test_a_folder_that_cannot_be_made_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    assert shapes.annotate(chain()).info["y"].dims == (2, 4)


def test_old_files_are_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_types, "KEPT", 2)
    made: list[Path] = []
    for width in range(3, 7):
        shapes.annotate(chain(width=width))
        (new,) = set(files(tmp_path)).difference(made)
        os.utime(new, (width, width))
        made.append(new)
    assert files(tmp_path) == sorted(made[-2:])


def test_starting_and_running_imports_no_compiler(tmp_path: Path) -> None:
    """An interpreted program, so that no compiled one is needed: NMS and 100 other ops."""
    lines = " ".join(f"t{i + 1} = Relu (t{i})" for i in range(LEAST))
    model = onnx.parser.parse_model(f"""<ir_version: 7, opset_import: ["" : 11, "ai.graphcore" : 1]>
    g (float[1, 4] t0, float[1, 4, 4] boxes) => (int32[1, 2] keep) {{
      {lines} same, kept, keep = ai.graphcore.nms <threshold = 0.5, numDetections = 2> (t{LEAST}, boxes)
    }}""")
    onnx.save(model, tmp_path / "nms.onnx")
    program = f"""
import sys
sys.path.insert(0, {EMBEDDED!r})
import numpy as np, popart
flow = popart.DataFlow(1, {{"keep": popart.AnchorReturnType("All")}})
session = popart.InferenceSession({str(tmp_path / "nms.onnx")!r}, flow, popart.DeviceManager().createCpuDevice())
session.prepareDevice()
anchors = session.initAnchorArrays()
boxes = np.array([[[0, 0, 4, 4], [0, 0, 4, 4], [9, 9, 12, 12], [0, 0, 1, 1]]], np.float32)
session.run(popart.PyStepIO({{"t0": np.array([[1, 2, 3, 0]], np.float32), "boxes": boxes}}, anchors))
print(anchors["keep"].tolist(), "torch._dynamo" in sys.modules)
"""
    for compiler in ("True", "False"):
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=os.environ)
        assert done.stdout.split("\n")[0] == f"[[2, 1]] {compiler}", done.stderr
