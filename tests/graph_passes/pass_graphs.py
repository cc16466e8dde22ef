"""Helpers of the pass tests: graphs from ONNX text, numbers from onnxruntime, and what every pass must keep."""
from __future__ import annotations

from typing import Dict, Optional, Sequence

import numpy as np
import onnx
import onnxruntime

from graph_passes.fallbacks import expand_fallbacks
from graph_passes.graph_io import load_graph
from graph_passes.pass_manager import GraphPass, PassContext, PassManager, PassRecord
from popdet.config import CompileConfig

onnxruntime.set_default_logger_severity(3)
INFER = PassContext("infer")
MIXED = PassContext("infer", CompileConfig(precision="mixed"))


def model_from(signature: str, body: str, constants: str = "", opset: int = 18,
               module: str = "backbone.stem") -> onnx.ModelProto:
    """A checked model `signature <constants> { body }` whose nodes carry `module`, or what `# module: x` says in its line."""
    modules, lines = [], []
    for line in filter(None, map(str.strip, body.strip().splitlines())):
        code, _, note = line.partition("# module: ")
        lines.append(code)
        modules.append(note.strip() or module)
    header = f'<ir_version: 8, opset_import: ["" : {opset}, "ai.graphcore" : 1]> g {signature} <{constants}>'
    text = f"{header} {{ " + "\n".join(lines) + " }"
    model = onnx.parser.parse_model(text)
    assert len(model.graph.node) == len(modules), "one node a line"
    for node, path in zip(model.graph.node, modules):
        node.metadata_props.add(key="popdet.module", value=path)
    return model


def run(model: onnx.ModelProto, feeds: Optional[Dict[str, np.ndarray]] = None, seed: int = 0) -> Dict[str, np.ndarray]:
    """Outputs in stock onnxruntime (custom ops through their fallbacks), for `feeds` or normal random inputs."""
    model = expand_fallbacks(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feeds = feeds or random_feeds(model, seed)
    return dict(zip([output.name for output in session.get_outputs()], session.run(None, feeds)))


def random_feeds(model: onnx.ModelProto, seed: int) -> Dict[str, np.ndarray]:
    """Normal floats, integers in -5..5, by the model's input types."""
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    feeds = {}
    for value in model.graph.input:
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        feeds[value.name] = (rng.standard_normal(shape) if dtype.kind == "f" else rng.integers(-5, 6, shape)).astype(dtype)
    return feeds


def apply(model: onnx.ModelProto, passes: Sequence[GraphPass], context: PassContext = INFER) -> tuple[onnx.ModelProto,
                                                                                                      list[PassRecord]]:
    """Run passes over a copy of `model`; asserts that every node still says which module it comes from."""
    graph = load_graph(onnx.ModelProto.FromString(model.SerializeToString()))
    records = PassManager(passes).run(graph, context)
    assert all(graph.module_of(node) for node in graph.nodes), "a node lost its module path"
    return graph.to_model(), records


def rewritten(model: onnx.ModelProto, item: GraphPass, context: PassContext = INFER, rtol: float = 1e-5,
              feeds: Optional[Dict[str, np.ndarray]] = None, changed: Optional[int] = None) -> onnx.ModelProto:
    """Apply one pass; asserts same outputs (names, types, numbers), a change, and that a second run changes nothing."""
    result, (record,) = apply(model, [item], context)
    assert record.changed if changed is None else record.changed == changed, record.notes
    again, (second,) = apply(result, [item], context)
    assert second.changed == 0 and second.notes, second
    assert [n.op_type for n in again.graph.node] == [n.op_type for n in result.graph.node]
    for seed in range(3):
        before, after = run(model, feeds, seed), run(result, feeds, seed)
        assert list(before) == list(after)
        for name, value in before.items():
            assert value.dtype == after[name].dtype and value.shape == after[name].shape, name
            np.testing.assert_allclose(after[name], value, rtol=rtol, atol=rtol, err_msg=name)
    return result


def ops(model: onnx.ModelProto) -> list[str]:
    """Op types in order."""
    return [node.op_type for node in model.graph.node]
