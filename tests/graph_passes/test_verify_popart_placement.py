"""verify_popart: the rules about IPUs, stages and training; for each a graph that breaks it, and nothing but it."""

import numpy as np
import pytest
from onnx import TensorProto
from placement_graphs import Builder, chain, context, detector
from verify_graphs import broken, node, placed

from graph_passes.verify_popart import VerifyPopart, find_violations

# ---- virtual graphs and stages ----

def test_a_node_without_a_virtual_graph_is_named():
    graph = placed(chain(4))
    del node(graph, "x2").attrs["__ipu_number"]
    found = [str(v) for v in find_violations(graph, context())]
    assert any("Conv 'node_x2' (module block.2): carries no __ipu_number" in text for text in found)


def test_a_virtual_graph_must_exist():
    graph = placed(chain(4), pipelining=False)
    node(graph, "x3").attrs["__ipu_number"] = 4
    assert "is on IPU 4; the device has IPUs 0 to 3" in broken(graph, pipelining=False)


def test_a_constant_needs_no_place():
    graph = placed(detector("infer"))
    for item in graph.nodes_of("Constant"):
        item.attrs.clear()
        item.attrs["value_float"] = 0.5
    assert find_violations(graph, context()) == []


def test_a_node_without_a_stage_is_named():
    graph = placed(chain(4))
    del node(graph, "x3").attrs["__pipeline_stage"]
    found = [str(v) for v in find_violations(graph, context())]
    assert found == ["[stage] Conv 'node_x3' (module block.3): carries no __pipeline_stage; only some ops have one; "
                     "run assign_stages"]


def test_a_negative_stage_is_refused():
    graph = placed(chain(4))
    node(graph, "x0").attrs["__pipeline_stage"] = -1
    assert any("is on stage -1; number the stages from 0" in str(v) for v in find_violations(graph, context()))


def test_a_missing_stage_is_named():
    graph = placed(chain(4))
    node(graph, "x3").attrs["__pipeline_stage"] = 4
    assert "has 4 pipeline stages, but stage 3 is missing" in broken(graph)


def test_one_stage_on_two_ipus_is_refused():
    graph = placed(chain(8))
    node(graph, "x1").attrs["__ipu_number"] = 2
    text = broken(graph)
    assert "is on stage 0 and IPU 2, but Conv 'node_x0' (module block.0) of that stage is on IPU 0" in text


def test_pipelining_over_one_ipu_is_refused_but_two_stages_may_share_one():
    graph = placed(chain(4), stages={"block.0": "0_0", "block": "0_1"})
    assert "pipelining requires more than one IPU" in broken(graph)
    graph = placed(chain(4), stages={"block.0": "0_0", "block.1": "1_1", "block": "0_2"})
    assert find_violations(graph, context()) == []


def test_an_edge_to_an_earlier_stage_is_refused():
    graph = placed(chain(4))
    for name, place in (("x1", 2), ("x2", 1)):
        node(graph, name).attrs.update(__ipu_number=place, __pipeline_stage=place)
    text = broken(graph)
    assert "Conv 'node_x2' (module block.2): is on stage 1, but reads from stage 2" in text
    assert "(module block.1)" in text and "move it to stage 2 or later" in text


@pytest.mark.parametrize("pipelining", [True, False])
def test_a_weight_on_two_ipus_is_refused(pipelining):
    graph = placed(chain(4), pipelining=pipelining)
    node(graph, "x3").inputs[1] = node(graph, "x0").inputs[1]
    text = broken(graph, pipelining=pipelining)
    assert "reads 'block.0.weight' on IPU 3, and Conv 'node_x0' (module block.0) on IPU 0" in text


def test_a_constant_node_may_be_used_on_two_ipus():
    b = Builder()
    x = b.input("x", [1, 4])
    half = b.constant("half", 0.5, np.float32)
    x = b.node("Mul", [x, half], "a", [1, 4], "a")
    b.output(b.node("Mul", [x, half], "b", [1, 4], "b"))
    graph = placed(b.graph(), ipus=2)
    assert find_violations(graph, context(ipus=2)) == []


def test_an_inline_initializer_counts_as_a_weight_in_training_only():
    b = Builder()
    x = b.input("x", [1, 4])
    b.inline("shift", [1, 2, 3, 4], np.int32)
    x = b.node("Cast", ["shift"], "a", [4], "a", to=TensorProto.FLOAT)
    y = b.node("Cast", ["shift"], "c", [4], "b", to=TensorProto.FLOAT)
    x = b.node("Mul", ["x", x], "a2", [1, 4], "a")
    x = b.node("Mul", [x, y], "b2", [1, 4], "b")
    b.output(b.node("ReduceSum", [x], "loss", [], "b", keepdims=0))
    graph = placed(b.graph("train"), "train", ipus=2, stages={"a": "0_0", "b": "1_1"})
    assert "reads 'shift' on IPU 1" in broken(graph, "train", ipus=2)
    assert find_violations(graph, context("infer", ipus=2)) == []


# ---- training ----

def test_the_loss_is_on_the_last_stage():
    graph = placed(detector("train"), "train")
    node(graph, "loss").attrs.update(__ipu_number=2, __pipeline_stage=2)
    found = [str(v) for v in find_violations(graph, context("train", graph))]
    assert any("makes the loss on stage 2; the last is 3; place it on stage 3" in text for text in found)


@pytest.mark.parametrize(("shape", "dtype"), [([1], np.float32), ([2, 3], np.float32), ([], np.int32)])
def test_the_loss_is_a_float_scalar(shape, dtype):
    graph = placed(chain(4, kind="train"), "train")
    loss = node(graph, "loss").outputs[0]
    loss.shape, loss.dtype = shape, np.dtype(dtype)
    assert any("it must be a float scalar" in str(v) for v in find_violations(graph, context("train")))


def test_a_training_graph_without_loss_is_refused():
    graph = placed(chain(4), "train")
    graph.metadata["popdet.kind"] = "train"
    assert "no node makes the loss 'loss', which must be an output" in broken(graph, "train")


def test_a_graph_without_outputs_is_refused():
    graph = placed(chain(4))
    graph.gs.outputs = []
    assert "a session must anchor a tensor" in broken(graph)


@pytest.mark.parametrize(("accumulation", "good"), [(1, False), (6, False), (7, True), (16, True), (None, True)])
def test_accumulation_fills_the_pipeline(accumulation, good):
    graph = placed(detector("train"), "train")
    found = [str(v) for v in find_violations(graph, context("train", graph), accumulation)]
    assert (found == []) == good
    assert all("the pipeline has 7 forward and backward stages; set train.accumulation to 7" in text for text in found)


def test_stages_that_share_an_ipu_count_once_for_the_accumulation():
    stages = {"block.0": "0_0", "block.1": "0_1", "block.2": "1_2", "block.3": "1_3", "total_loss": "1_3"}
    graph = placed(chain(4, kind="train"), "train", stages=stages)
    assert find_violations(graph, context("train", graph), 3) == []
    assert "has 3 forward and backward stages" in broken(graph, "train", accumulation=2)


def test_recompute_marks_are_refused_in_a_pipeline_and_checkpoints_are_not():
    graph = placed(detector("train"), "train")
    node(graph, "pooled").attrs["__recompute_output_in_backward_pass"] = 1
    assert find_violations(graph, context("train", graph)) == []
    node(graph, "pooled").attrs["__recompute_output_in_backward_pass"] = 2
    assert "carries a Recompute annotation in a pipelined program" in broken(graph, "train")


def frozen(detached):
    b = Builder()
    x = b.input("x", [1, 4, 8, 8])
    weight = b.weight("frozen", [4, 4, 1, 1])
    if detached:
        weight = b.node("Detach", [weight], "detached", [4, 4, 1, 1], "a", "ai.graphcore")
    x = b.node("Conv", [x, weight], "x1", [1, 4, 8, 8], "a")
    x = b.node("Conv", [x, b.weight("trained", [4, 4, 1, 1])], "x2", [1, 4, 8, 8], "b")
    b.output(b.node("ReduceMean", [x], "loss", [], "b", keepdims=0))
    return placed(b.graph("train", ["trained"]), "train", ipus=2)


def test_a_frozen_weight_that_popart_would_train_is_named():
    text = broken(frozen(False), "train", ipus=2)
    assert "Conv 'node_x1' (module a): reads 'frozen', which is not trainable" in text and "detach_frozen" in text


def test_a_detached_frozen_weight_is_fine():
    graph = frozen(True)
    assert find_violations(graph, context("train", graph, ipus=2)) == []


def test_a_trainable_weight_without_gradient_is_noted():
    graph = frozen(True)
    graph.metadata["popdet.trainable"] = '["trained", "forgotten"]'
    notes = VerifyPopart().run(graph, context("train", graph, ipus=2)).notes
    assert "trainable weight 'forgotten' is reached by no gradient and stays as it is" in notes


def test_a_batch_normalization_of_inference_form_is_refused_on_the_gradient_path():
    b = Builder()
    x = b.input("x", [1, 4, 8, 8])
    x = b.node("Conv", [x, b.weight("w", [4, 4, 1, 1])], "x1", [1, 4, 8, 8], "a")
    norm = [b.constant(name, np.ones(4), np.float32) for name in ("scale", "bias", "mean", "var")]
    x = b.node("BatchNormalization", [x, *norm], "x2", [1, 4, 8, 8], "a.norm")
    b.output(b.node("ReduceMean", [x], "loss", [], "b", keepdims=0))
    graph = placed(b.graph("train", ["w"]), "train", ipus=2)
    assert "(module a.norm): BatchNormalization in inference form lies on the gradient path" in broken(
        graph, "train", ipus=2)
