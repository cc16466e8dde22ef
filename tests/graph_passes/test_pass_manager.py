"""The manager checks what passes require and ensure, records what they did, and refuses unknown names."""
import json

import numpy as np
import onnx
import pytest
from pass_graphs import INFER, model_from

from graph_passes.graph_io import load_graph
from graph_passes.pass_manager import GraphPass, PassManager, PassResult
from graph_passes.pipelines import STANDARD, describe_passes, format_records, make_context, make_passes, rewrite
from popdet.config import CompileConfig, Config
from runtime.errors import BadInputFile, ConfigError, GraphError

MODEL = model_from("(float[2] x) => (float[2] y)", "a = Relu(x)\ny = Neg(a)")


class _DropNeg(GraphPass):
    name = "drop_neg"

    def run(self, graph, context):
        nodes = graph.nodes_of("Neg")
        for node in nodes:
            graph.replace(node.outputs[0], node.inputs[0])
        return PassResult(len(nodes))


def test_a_record_says_what_a_pass_did_and_a_pass_that_matches_nothing_says_so():
    first, second = PassManager([_DropNeg(), _DropNeg()]).run(load_graph(MODEL), INFER)
    assert (first.name, first.nodes_before, first.nodes_after, first.changed, first.notes) == ("drop_neg", 2, 1, 1, [])
    assert (second.changed, second.notes) == (0, ["nothing to do: no match"])
    assert "drop_neg" in format_records([first]) and "nothing to do: no match" in format_records([second])


def test_a_requirement_that_does_not_hold_stops_before_the_pass():
    class Needs(_DropNeg):
        requires = ("opset_11",)

    graph = load_graph(MODEL)
    with pytest.raises(GraphError, match=r"pass drop_neg needs 'opset_11': the graph imports ai.onnx 18"):
        PassManager([Needs()]).run(graph, INFER)
    assert len(graph.nodes) == 2


def test_a_promise_that_does_not_hold_is_an_error_after_the_pass():
    class Promises(_DropNeg):
        ensures = ("opset_11",)

    with pytest.raises(GraphError, match="left behind a graph without 'opset_11'"):
        PassManager([Promises()]).run(load_graph(MODEL), INFER)


def test_an_unknown_invariant_is_refused_before_anything_runs():
    class Odd(_DropNeg):
        ensures = ("opset_eleven",)

    with pytest.raises(GraphError, match="unknown invariant 'opset_eleven'"):
        PassManager([Odd()])


def test_dump_after_writes_a_loadable_graph_after_every_pass(tmp_path):
    PassManager([_DropNeg(), _DropNeg()]).run(load_graph(MODEL), INFER, tmp_path / "dumps")
    names = sorted(path.name for path in (tmp_path / "dumps").iterdir())
    assert names == ["00_drop_neg.onnx", "01_drop_neg.onnx"]
    assert len(load_graph(tmp_path / "dumps" / names[0]).nodes) == 1


def test_every_standard_pass_loads_and_has_a_summary():
    assert [item.name for item in make_passes()] == list(STANDARD)
    assert all(entry["summary"].endswith(".") for entry in describe_passes())
    PassManager(make_passes())  # every invariant they name exists


def test_only_and_skip_choose_passes_in_standard_order():
    assert [p.name for p in make_passes(only=["lower_opset", "check_static"])] == ["check_static", "lower_opset"]
    assert [p.name for p in make_passes(skip=STANDARD[1:])] == ["check_static"]


@pytest.mark.parametrize("argument", ["only", "skip"])
def test_an_unknown_pass_is_refused_with_the_nearest(argument):
    with pytest.raises(ConfigError, match="unknown pass 'swap_mns'; did you mean 'swap_nms'"):
        make_passes(**{argument: ["swap_mns"]})


def test_a_failed_rewrite_writes_nothing(tmp_path):
    onnx.save(model_from("(float[N] x) => (float[N] y)", "y = Relu(x)"), tmp_path / "in.onnx")
    with pytest.raises(GraphError, match="fixed sizes"):
        rewrite(tmp_path / "in.onnx", tmp_path / "out.onnx", "infer", Config(), only=["check_static"])
    assert [path.name for path in tmp_path.iterdir()] == ["in.onnx"]


def test_rewrite_through_the_whole_standard_order(tmp_path):
    onnx.save(MODEL, tmp_path / "in.onnx")
    config = Config(compile=CompileConfig(ipus=1, pipelining=False))
    report = rewrite(tmp_path / "in.onnx", tmp_path / "out.onnx", "infer", config)
    assert [record.name for record in report.records] == list(STANDARD) and report.plan is not None
    assert json.loads(json.dumps(report.to_dict()))["passes"][0]["name"] == "check_static"
    placed = onnx.load(tmp_path / "out.onnx")
    assert placed.opset_import[0].version == 11
    assert all(any(a.name == "__ipu_number" for a in node.attribute) for node in placed.graph.node)


def _with_metadata(**entries: str) -> onnx.ModelProto:
    model = onnx.ModelProto.FromString(MODEL.SerializeToString())
    for key, value in entries.items():
        model.metadata_props.add(key=f"popdet.{key}", value=value)
    return model


def test_the_wrong_kind_of_graph_is_refused():
    with pytest.raises(BadInputFile, match="is for 'train', not 'infer'"):
        make_context(load_graph(_with_metadata(kind="train")), "infer", Config())


@pytest.mark.parametrize("text", ["{", "3"])
def test_an_unreadable_list_of_trained_weights_is_refused(text):
    with pytest.raises(BadInputFile, match=r"popdet.trainable"):
        make_context(load_graph(_with_metadata(trainable=text)), "train", Config())


def test_a_trained_weight_inside_the_onnx_file_is_refused_not_frozen():
    model = model_from("(float[2] x) => (float[2] y)", "y = Mul(x, w)", "float[2] w = {1.0, 2.0}")
    model.metadata_props.add(key="popdet.trainable", value='["w"]')
    with pytest.raises(BadInputFile, match="'w' trains but its values lie inside the ONNX file"):
        make_context(load_graph(model), "train", Config())
    with pytest.raises(GraphError, match="no weight that trains"):
        make_context(load_graph(MODEL), "train", Config())


def test_dynamic_shapes_are_named_and_nms_alone_is_let_through():
    (check,) = make_passes(only=["check_static"])
    dynamic = model_from("(bool[4] x) => (int64[1, N] y)", "a = Not(x)\ny = NonZero(a)  # module: rpn.odd")
    with pytest.raises(GraphError, match=r"NonZero .*\(module rpn.odd\).*dynamic shape"):
        PassManager([check]).run(load_graph(dynamic), INFER)
    nms = model_from("(float[1,4,4] b, float[1,1,4] s) => (int64[N,3] y)", "n = NonMaxSuppression(b, s)\ny = Identity(n)")
    (record,) = PassManager([check]).run(load_graph(nms), INFER)
    assert "2 tensors behind NonMaxSuppression wait for swap_nms" in record.notes[0]


def test_shapes_that_the_file_lacks_are_inferred():
    graph = load_graph(model_from("(float[2,3] x) => (float[3,2] y)", "a = Relu(x)\ny = Transpose<perm=[1,0]>(a)"))
    assert graph.nodes[0].outputs[0].shape is None
    graph.infer_shapes()
    assert graph.nodes[0].outputs[0].shape == [2, 3] and graph.nodes[0].outputs[0].dtype == np.float32


def test_shapes_behind_custom_ops_are_inferred_too():
    body = "s, b, k = ai.graphcore.nms<threshold=0.5, numDetections=3>(scores, boxes)\nd = ai.graphcore.Detach(b)\ny = Neg(d)"
    graph = load_graph(model_from("(float[1,6] scores, float[1,6,4] boxes) => (float[1,3,4] y)", body))
    graph.infer_shapes()
    assert [t.shape for t in graph.nodes[0].outputs] == [[1, 6, 1], [1, 3, 4], [1, 3]]
    assert graph.nodes[1].outputs[0].shape == [1, 3, 4]


def test_control_flow_is_refused_by_name():
    text = """<ir_version: 8, opset_import: ["" : 18]> g (bool c, float[2] x) => (float[2] y) {
        y = If (c) <then_branch = t () => (float[2] a) { a = Neg(x) }, else_branch = e () => (float[2] b) { b = Abs(x) }> }"""
    (check,) = make_passes(only=["check_static"])
    with pytest.raises(GraphError, match=r"If .*control flow"):
        PassManager([check]).run(load_graph(onnx.parser.parse_model(text)), INFER)
