"""verify_popart: for every rule a graph that breaks it, and nothing but it."""
import time

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from onnx import TensorProto, helper
from placement_graphs import Builder, chain, context, detector
from verify_graphs import ONE, broken, node, place_by_hand, placed, single

from graph_passes.popart_op_rules import OP_RULES
from graph_passes.popart_placement_rules import PLACEMENT_RULES
from graph_passes.popart_rule import popart_ops
from graph_passes.verify_popart import VerifyPopart, find_violations
from runtime.errors import GraphError

# ---- what holds ----

@pytest.mark.parametrize("kind", ["infer", "train"])
def test_a_placed_detector_breaks_no_rule(kind):
    graph = placed(detector(kind), kind)
    result = VerifyPopart(accumulation=7).run(graph, context(kind, graph))
    assert result.changed == 0 and result.notes == [f"{len(OP_RULES) + len(PLACEMENT_RULES)} rules of PopART hold"]


@pytest.mark.parametrize("op", ["nms", "roiAlign"])
def test_our_custom_ops_are_known(op):
    assert find_violations(custom_op(op), context(**ONE)) == []


def custom_op(op, **changes):
    b = Builder()
    if op == "nms":
        inputs = [b.input("scores", [1, 8]), b.input("boxes", [1, 8, 4])]
        attrs, shape = {"threshold": 0.5, "numDetections": 4}, [1, 8, 1]
    else:
        inputs = [b.input("features", [1, 4, 8, 8]), b.input("rois", [1, 3, 4])]
        attrs = {"spatial_scale": 0.5, "aligned_height": 7, "aligned_width": 7, "sampling_ratio": 2}
        shape = [1, 3, 4, 7, 7]
    b.output(b.node(op, inputs, "y", shape, "layer", "ai.graphcore", **{**attrs, **changes}))
    return place_by_hand(b.graph())


def test_the_facts_table_names_its_source_and_the_ops_of_opset_11():
    table = popart_ops()
    assert "PopART 3.4" in table["source"] and table["opset"] == 11
    assert len(table["supported"]) == 107 and len(table["canonicalised"]) == 9 and len(table["unsupported"]) == 40
    assert table["supported"]["TopK"]["version"] == 11 and table["supported"]["Add"]["version"] == 7
    assert not set(table["unsupported"]) & set(table["supported"])


# ---- opsets and ops ----

def test_another_opset_is_refused():
    graph = chain(1)
    graph.gs.opset = 13
    assert "imports ai.onnx 13" in broken(place_by_hand(graph), **ONE)


@pytest.mark.parametrize(("domains", "message"), [
    ([("", 11)], "imports ai.graphcore (missing)"),
    ([("", 11), ("ai.graphcore", 2)], "imports ai.graphcore 2"),
])
def test_the_graphcore_domain_must_be_imported_at_version_1(domains, message):
    graph = place_by_hand(chain(1))
    graph.gs.import_domains = [helper.make_opsetid(*domain) for domain in domains]
    assert message in broken(graph, **ONE)


@pytest.mark.parametrize(("op", "domain", "message"), [
    ("Xor", "", r"Xor 'node_y' (module layer): PopART does not implement it; rewrite it in supported ops"),
    ("HardSwish", "", "HardSwish 'node_y' (module layer): opset 11 has no such op"),
    ("NoSuchOp", "ai.graphcore", "ai.graphcore.NoSuchOp 'node_y' (module layer): PopART has no such public op"),
    ("AddBias", "ai.graphcore", "PopART has no such public op"),
    ("Gelu", "com.microsoft", "domain 'com.microsoft' is unknown to PopART"),
    ("Mod", "", "PopART has Mod with fmod=1 only"),
])
def test_an_unsupported_op_is_named_with_its_module_and_a_remedy(op, domain, message):
    assert message in broken(single(op, domain=domain), **ONE)


@pytest.mark.parametrize(("op", "remedy"), [("NonMaxSuppression", "run swap_nms"), ("GatherND", "use Gather on flattened"),
                                            ("ScatterND", "use ScatterElements"), ("NonZero", "fixed capacity"),
                                            ("Range", "use a constant")])
def test_the_ops_that_detectors_hit_have_their_own_remedy(op, remedy):
    assert remedy in broken(single(op), **ONE)


@pytest.mark.parametrize(("op", "domain"), [("Gemm", ""), ("Tan", ""), ("Detach", "ai.graphcore"), ("Gelu", "ai.graphcore")])
def test_canonicalised_and_public_ops_pass(op, domain):
    assert find_violations(single(op, domain=domain), context(**ONE)) == []


# ---- element types ----

@pytest.mark.parametrize("op", ["Max", "Clip", "Floor", "Sqrt"])
def test_ops_registered_for_floats_refuse_integers(op):
    graph = single(op, types=[TensorProto.INT32], dtype=TensorProto.INT32)
    assert "input 0 ('x0') is INT32; PopART takes FLOAT16, FLOAT" in broken(graph, **ONE)


def test_the_second_input_of_a_variadic_op_is_checked_too():
    graph = single("Max", ((1, 4), (1, 4)), types=[TensorProto.FLOAT, TensorProto.INT32])
    assert "input 1 ('x1') is INT32; PopART takes FLOAT16, FLOAT" in broken(graph, **ONE)


def test_double_precision_is_refused():
    graph = single("Relu", types=[TensorProto.DOUBLE], dtype=TensorProto.DOUBLE)
    found = [str(v) for v in find_violations(graph, context(**ONE))]
    assert any("'y' is DOUBLE" in text for text in found) and any("'x0' is DOUBLE" in text for text in found)


def test_bfloat16_is_refused():
    found = find_violations(single("Identity", types=[TensorProto.BFLOAT16], dtype=TensorProto.BFLOAT16), context(**ONE))
    assert len(found) == 2 and all("an IPU computes in float32 and float16" in str(v) for v in found)


def test_64_bit_arithmetic_is_refused_but_64_bit_inputs_are_noted():
    graph = single("Add", ((1, 4), (1, 4)), types=[TensorProto.INT64] * 2, dtype=TensorProto.INT64)
    assert "'y' is computed in INT64" in broken(graph, **ONE)
    graph = single("Gather", ((9, 4), (2,)), (2, 4), types=[TensorProto.FLOAT, TensorProto.INT64])
    assert VerifyPopart().run(graph, context(**ONE)).notes[1:] == [
        "graph input 'x1' is INT64: PopART casts it to 32 bits"]


@pytest.mark.parametrize(("consumer", "good"), [("Cast", True), ("Gather", True), ("Neg", False), ("output", False)])
def test_indices_of_top_k_may_go_to_cast_and_gather_only(consumer, good):
    b = Builder()
    x = b.input("x", [1, 8])
    b.node("TopK", [x, b.constant("k", [3], np.int64)], "values", [1, 3], "layer")
    b.nodes[-1].output.append("indices")
    b.infos["indices"] = helper.make_tensor_value_info("indices", TensorProto.INT64, [1, 3])
    b.output("values")
    if consumer == "Cast":
        b.output(b.node("Cast", ["indices"], "y", [1, 3], dtype=TensorProto.INT32, to=TensorProto.INT32))
    elif consumer == "Gather":
        b.output(b.node("Gather", [x, "indices"], "y", [1, 1, 3], axis=1))
    elif consumer == "Neg":
        b.output(b.node("Identity", ["indices"], "y", [1, 3], dtype=TensorProto.INT64))
        b.output(b.node("Cast", ["y"], "z", [1, 3], dtype=TensorProto.INT32, to=TensorProto.INT32))
    else:
        b.output("indices")
    found = [str(v) for v in find_violations(place_by_hand(b.graph()), context(**ONE))]
    assert (found == []) == good and all("cast to int32 right where it is made" in text for text in found)


def test_a_cast_to_int64_is_refused():
    graph = single("Cast", types=[TensorProto.INT32], dtype=TensorProto.INT64, to=TensorProto.INT64)
    found = [str(v) for v in find_violations(graph, context(**ONE))]
    assert any(f"to is {TensorProto.INT64}; PopART casts to" in text for text in found)


# ---- constants and shapes ----

@pytest.mark.parametrize(("op", "inputs", "types", "index"), [
    ("TopK", ((1, 8), (1,)), [1, 7], 1), ("Reshape", ((1, 4), (2,)), [1, 7], 1),
    ("Slice", ((1, 4), (1,), (1,)), [1, 7, 7], 1), ("Pad", ((1, 4), (4,)), [1, 7], 1),
    ("Clip", ((1, 4), (), ()), [1, 1, 1], 1), ("Expand", ((1, 4), (2,)), [1, 7], 1), ("Tile", ((1, 4), (2,)), [1, 7], 1),
    ("Resize", ((1, 1, 2, 2), (8,), (4,)), [1, 1, 1], 1), ("OneHot", ((4,), (), (2,)), [6, 6, 1], 1),
    ("CumSum", ((1, 4), ()), [1, 6], 1),
])
def test_inputs_that_shape_the_program_must_be_constants(op, inputs, types, index):
    found = [str(v) for v in find_violations(single(op, inputs, types=types), context(**ONE))]
    assert all(text.startswith(f"[constant] {op} 'node_y' (module layer): input ") for text in found)
    assert f"input {index} ('x{index}') must be a constant" in found[0]


def test_k_of_top_k_is_one_number_of_type_int64():
    assert "K has shape [2]" in broken(single("TopK", constants=[([2, 3], np.int64)]), **ONE)
    assert "input 1 ('c0') is INT32; PopART takes INT64" in broken(single("TopK", constants=[([2], np.int32)]), **ONE)


@pytest.mark.parametrize("size", ["N", None])
def test_every_shape_is_static(size):
    graph = single("Relu", inputs=[[size, 4]])
    assert "[shape] graph input 'x0'" in broken(graph, **ONE)
    graph = single("Relu")
    node(graph, "y").outputs[0].shape = [size, 4]
    assert "(module layer): output 'y' has shape" in broken(graph, **ONE)


# ---- attributes ----

@pytest.mark.parametrize(("op", "attrs", "message"), [
    ("MaxPool", {"storage_order": 1}, "storage_order is 1; PopART has 0 only"),
    ("MaxPool", {"dilations": [2, 2]}, "dilations are [2, 2]; PopART has 1 only"),
    ("RoiAlign", {"sampling_ratio": 0, "output_height": 7, "output_width": 7}, "sampling_ratio is 0"),
    ("RoiAlign", {"sampling_ratio": 2, "output_width": 7}, "output_height is absent"),
    ("RoiAlign", {"sampling_ratio": 2, "output_height": 7, "output_width": 7, "mode": "max"}, "mode is max"),
    ("Resize", {"exclude_outside": 1}, "exclude_outside is 1"),
    ("Relu", {"__available_memory": 1.5}, "__available_memory is 1.5; it must be in (0, 1]"),
    ("Relu", {"__partials_type": "double"}, "__partials_type is 'double'"),
    ("Relu", {"__recompute_output_in_backward_pass": 7}, "__recompute_output_in_backward_pass is 7"),
])
def test_attribute_values_that_popart_refuses(op, attrs, message):
    assert message in broken(single(op, **attrs), **ONE)


def test_max_pool_has_no_indices():
    graph = single("MaxPool")
    node(graph, "y").outputs.append(gs.Variable("indices", np.int64, [1, 4]))
    found = " ".join(str(v) for v in find_violations(graph, context(**ONE)))
    assert "Indices is a second output; PopART has one" in found


@pytest.mark.parametrize(("op", "changes", "message"), [
    ("nms", {"threshold": 1.5}, "threshold"), ("nms", {"numDetections": 0}, "numDetections"),
    ("roiAlign", {"sampling_ratio": 0}, "sampling_ratio"), ("roiAlign", {"channels": 5}, "channels = 5"),
    ("roiAlign", {"apples": 1}, "apples"),
])
def test_custom_ops_follow_their_schema(op, changes, message):
    text = broken(custom_op(op, **changes), **ONE)
    assert text.startswith(f"[custom op] ai.graphcore.{op} 'node_y' (module layer)") and message in text


# ---- names ----

@pytest.mark.parametrize("prefix", ["Gradient___", "Accl1___", "Stashed___", "lossScaling_"])
def test_reserved_prefixes_are_refused_anywhere_in_a_name(prefix):
    graph = single("Relu")
    node(graph, "y").outputs[0].name = f"my{prefix}y"
    assert f"contains PopART's reserved prefix '{prefix}'" in broken(graph, **ONE)


def test_two_tensors_of_one_name_are_refused():
    graph = single("Relu")
    node(graph, "y").outputs[0].name = "x0"
    assert "two tensors are called 'x0'" in broken(graph, **ONE)


# ---- the report ----

def test_all_violations_are_reported_together_up_to_twenty():
    b = Builder()
    for i in range(25):
        b.output(b.node("Xor", [b.input(f"x{i}", [1, 4])], f"y{i}", [1, 4], f"layer.{i}"))
    with pytest.raises(GraphError) as caught:
        VerifyPopart().run(place_by_hand(b.graph()), context(**ONE))
    lines = str(caught.value).splitlines()
    assert lines[0] == "PopART would refuse this graph: 25 violations" and lines[-1] == "  ... and 5 more"
    assert len(lines) == 22 and "(module layer.19)" in lines[20]


def test_ten_thousand_nodes_are_verified_in_seconds():
    b = Builder()
    x = b.input("x", [1, 4])
    for i in range(10_000):
        x = b.node("Relu", [x], f"x{i}", [1, 4], f"block.{i}")
    b.output(x)
    graph = placed(b.graph())
    started = time.perf_counter()
    assert find_violations(graph, context()) == []
    assert time.perf_counter() - started < 5  # 0.2 s on an idle core
