"""assign_stages: automatic split, explicit maps, and the pipeline rules of PopART."""
import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from placement_graphs import Builder, chain, context, detector, places

from graph_passes.assign_stages import AssignStages, split_problem
from graph_passes.auto_split import best_split
from graph_passes.placement import Line
from graph_passes.verify_popart import find_violations
from runtime.errors import GraphError


def run(graph, kind="infer", **options):
    return AssignStages().run(graph, context(kind, graph, **options))


def value_of(costs, receive, starts):
    """(largest part, sum of the squared parts)."""
    bounds = [0, *starts, len(costs)]
    parts = [sum(costs[a:b]) + (receive[a] if a else 0) for a, b in zip(bounds, bounds[1:])]
    return max(parts), sum(part * part for part in parts)


def brute_force(costs, receive, allowed, parts):
    """Value of the best split, by trying all."""
    best = None
    for cuts in itertools.combinations([i for i in range(1, len(costs)) if allowed[i]], parts - 1):
        value = value_of(costs, receive, cuts)
        best = value if best is None else min(best, value)
    return best


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 5), st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.booleans()), max_size=9))
def test_the_split_is_the_best_of_all_splits(parts, units):
    costs, receive, allowed = ([unit[i] for unit in units] for i in range(3))
    expected = brute_force(costs, receive, allowed, parts) if costs else None
    starts = best_split(costs, receive, allowed, parts)
    if expected is None:
        assert starts is None
        return
    assert len(starts) == parts - 1 and all(allowed[i] for i in starts)
    assert all(a < b for a, b in zip([0, *starts], [*starts, len(costs)]))
    assert value_of(costs, receive, starts) == expected


def test_a_long_line_still_gets_the_smallest_maximum_and_even_parts():
    costs = [7 if i % 500 == 3 else 1 for i in range(5000)]
    costs[4000] = 3000
    starts = best_split(costs, [2] * 5000, [True] * 5000, 4)
    largest, squares = value_of(costs, [2] * 5000, starts)
    assert largest == 3002  # the one big unit and what it receives: alone, or with nothing beside it
    rest = (sum(costs) - 3000) / 3
    assert squares - 3002 ** 2 < 3 * rest ** 2 * 1.6


@pytest.mark.parametrize("kind", ["infer", "train"])
def test_the_plan_reports_the_cost_that_auto_minimised(kind):
    graph = detector(kind)
    item = AssignStages()
    notes = item.run(graph, context(kind, graph)).notes
    assert f"the largest costs {max(row['cycles'] for row in item.plan['stages']):,} cycles" in notes[0]


@pytest.mark.parametrize("ipus", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", ["infer", "train"])
def test_auto_fills_every_stage_and_breaks_no_rule(kind, ipus):
    graph = detector(kind)
    run(graph, kind, ipus=ipus)
    assert {stage for _, stage in places(graph).values()} == set(range(ipus))
    assert all(ipu == stage for ipu, stage in places(graph).values())
    assert find_violations(graph, context(kind, graph, ipus=ipus)) == []


def test_auto_splits_equal_layers_evenly():
    graph = chain(8, channels=64)
    run(graph, ipus=4)
    assert [place[1] for place in places(graph).values()] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_attributes_are_written_as_onnx_ints():
    graph = chain(4)
    run(graph, ipus=2)
    for node in graph.to_model().graph.node:
        kinds = {attribute.name: attribute.type for attribute in node.attribute}
        assert kinds["__ipu_number"] == kinds["__pipeline_stage"] == 2  # AttributeProto.INT


def test_without_pipelining_only_the_ipu_is_written_and_an_old_stage_goes():
    graph = chain(4)
    run(graph, ipus=2)
    run(graph, ipus=2, pipelining=False)
    assert all("__pipeline_stage" not in node.attrs for node in graph.nodes)
    assert {ipu for ipu, _ in places(graph).values()} == {0, 1}


def test_a_second_run_changes_nothing():
    graph = detector("train")
    assert run(graph, "train").changed == len(graph.nodes)
    assert run(graph, "train").changed == 0


def test_nodes_that_share_a_weight_stay_on_one_stage():
    b = Builder()
    x = b.input("image", [1, 4, 8, 8])
    shared = b.weight("shared", [4, 4, 1, 1])
    for i in range(6):
        weight = shared if i in (1, 4) else b.weight(f"w{i}", [4, 4, 1, 1])
        x = b.node("Conv", [x, weight], f"x{i}", [1, 4, 8, 8], f"block.{i}")
    b.output(x)
    graph = b.graph()
    run(graph, ipus=2)
    found = places(graph)
    assert found["x1"] == found["x4"]
    assert {stage for _, stage in found.values()} == {0, 1}
    with pytest.raises(GraphError, match="falls into 3 parts at most"):
        run(b.graph(), ipus=4)


def test_nothing_is_cut_after_the_loss():
    b = Builder()
    x = b.input("image", [1, 4])
    x = b.node("Relu", [x], "x0", [1, 4])
    b.node("ReduceMean", [x], "loss", [], keepdims=0)
    for i in range(1, 9):
        x = b.node("Relu", [x], f"x{i}", [1, 4])
    b.output("loss")
    b.output(x)
    graph = b.graph("train")
    run(graph, "train", ipus=2)
    assert places(graph)["loss"] == (1, 1)


def test_frozen_weight_arithmetic_and_constants_sit_with_their_first_consumer():
    b = Builder()
    x = b.input("image", [1, 4, 8, 8])
    scale = b.constant("scale", np.ones((4, 1, 1, 1)), np.float32)  # constants come first, as the passes leave them
    folded = b.node("Mul", [b.weight("w5", [4, 4, 1, 1]), scale], "folded", [4, 4, 1, 1])
    for i in range(6):
        x = b.node("Conv", [x, folded if i == 5 else b.weight(f"w{i}", [4, 4, 1, 1])], f"x{i}", [1, 4, 8, 8])
    b.output(x)
    graph = b.graph()
    run(graph, ipus=2)
    assert places(graph)["scale"] == places(graph)["folded"] == places(graph)["x5"] == (1, 1)


def test_more_stages_than_nodes_is_refused():
    with pytest.raises(GraphError, match="4 pipeline stages, but the graph has 3 nodes"):
        run(chain(3), ipus=4)


def test_three_ipus_are_refused():
    with pytest.raises(GraphError, match=r"compile\.ipus is 3; IPUs are acquired in powers of two"):
        run(chain(3), ipus=3)


def test_an_explicit_map_is_obeyed_longest_prefix_first():
    graph = chain(5)
    run(graph, ipus=2, stages={"block": "0_0", "block.3": "1_1", "block.4": "1_1"})
    assert [place for place in places(graph).values()] == [(0, 0)] * 3 + [(1, 1)] * 2


def test_a_prefix_matches_whole_path_components_only():
    graph = chain(11)
    result = run(graph, ipus=2, stages={"block": "0_0", "block.10": "1_1", "block.1": "0_0"})
    assert places(graph)["x10"] == (1, 1) and places(graph)["x1"] == (0, 0) and result.changed == 11


def test_a_stage_may_share_its_ipu_with_another():
    graph = chain(4)
    run(graph, ipus=2, stages={"block.0": "0_0", "block.1": "1_1", "block.2": "0_2", "block.3": "0_2"})
    assert [place for place in places(graph).values()] == [(0, 0), (1, 1), (0, 2), (0, 2)]


def test_a_bare_ipu_is_also_the_stage_when_pipelined_and_free_when_not():
    graph = chain(3)
    run(graph, ipus=2, stages={"block": 0, "block.2": "1"})
    assert places(graph)["x2"] == (1, 1)
    graph = chain(3)
    run(graph, ipus=2, pipelining=False, stages={"block.0": "1", "block.1": "0", "block.2": "1"})
    assert list(places(graph).values()) == [(1, -1), (0, -1), (1, -1)]


def test_unmatched_nodes_follow_their_latest_producer_or_else_their_first_consumer():
    b = Builder()
    x = b.input("image", [1, 4])
    early = b.node("Relu", [x], "early", [1, 4], "a")
    alone = b.node("Sigmoid", [x], "alone", [1, 4])  # no producer
    late = b.node("Add", [early, alone], "late", [1, 4], "b")
    b.output(b.node("Mul", [late, early], "product", [1, 4], "unknown.module"))
    graph = b.graph()
    run(graph, ipus=2, stages={"a": "0_0", "b": "1_1"})
    assert places(graph) == {"early": (0, 0), "alone": (1, 1), "late": (1, 1), "product": (1, 1)}


def test_one_map_serves_both_graphs():
    stages = {"backbone": "0_0", "rpn": "1_1", "proposal_layer": "1_1", "proposal_target": "1_1", "rpn_loss": "1_1",
              "roi_align": "1_1", "roi_head": "1_1", "box_predictor": "1_1", "roi_loss": "1_1", "total_loss": "1_1",
              "detections": "1_1"}
    train = run(detector("train"), "train", ipus=2, stages=stages)
    infer = run(detector("infer"), "infer", ipus=2, stages=stages)
    assert train.notes == ["'detections' is not in the train graph: its entry is unused here"]
    assert len(infer.notes) == 4 and all("not in the infer graph" in note for note in infer.notes)


def test_a_stage_that_only_the_training_graph_fills_is_closed_in_the_inference_graph():
    stages = {"backbone": "0_0", "proposal_target": "1_1", "rpn": "0_0", "proposal_layer": "0_0", "roi_align": "2_2"}
    graph = detector("infer")
    result = run(graph, ipus=4, stages=stages)
    assert set(places(graph).values()) == {(0, 0), (2, 1)}
    assert "no node of this graph is on stage 1: the stages above are renumbered down" in result.notes


@pytest.mark.parametrize(("stages", "message"), [
    ({"backbone.layer7": "0_0"}, r"names the module 'backbone.layer7', which this graph does not have \(nearest: "
                                 r"'backbone.layer\d'\)"),
    ({"backbone": "0_0", "rpn": "1_1", "roi_align": "4_1"}, "on IPU 4, but compile.ipus is 4"),
    ({"backbone": "0_0", "rpn": "1_0"}, "puts stage 0 on IPU 0 .'backbone'. and on IPU 1 .'rpn'."),
    ({"backbone": "0_0", "rpn": "1_2"}, "no module on stage 1"),
    ({"backbone": "first"}, "'backbone' is 'first'; expected"),
    ({"backbone": "-1_0"}, "'backbone' is '-1_0'; expected"),
    ({"backbone": 1.5}, "'backbone' is 1.5; expected"),
    ({"backbone": True}, "'backbone' is True; expected"),
    ({}, "empty map"),
    ({"backbone": "1_1", "rpn": "0_0"}, r"Conv 'node_rpn.conv.out' \(module rpn.conv\): is on stage 0, but reads from "
                                        r"stage 1 .*\(module backbone.layer3.0.conv1\)"),
    ({"backbone": "0_0", "roi_head": "1_1", "total_loss": "1_1", "roi_loss": "1_1", "box_predictor.class_logits": "1_1",
      "roi_head.layer4.2": "2_2"}, "stages may not decrease"),
])
def test_a_map_that_cannot_be_obeyed_is_refused_by_name(stages, message):
    with pytest.raises(GraphError, match=message):
        run(detector("train"), "train", stages=stages)


def test_a_map_that_splits_a_weight_is_refused():
    b = Builder()
    x = b.input("image", [1, 4, 8, 8])
    shared = b.weight("shared", [4, 4, 1, 1])
    x = b.node("Conv", [x, shared], "x0", [1, 4, 8, 8], "a")
    b.output(b.node("Conv", [x, shared], "x1", [1, 4, 8, 8], "b"))
    with pytest.raises(GraphError, match=r"reads the weight 'shared' on IPU 1, and .*\(module a\) on IPU 0"):
        run(b.graph(), ipus=2, stages={"a": "0_0", "b": "1_1"})
    run(b.graph(), ipus=1, stages={"a": "0_0", "b": "0_1"})  # two stages of one IPU may share it


def test_a_map_that_leaves_the_loss_behind_is_refused():
    b = Builder()
    x = b.node("Relu", [b.input("image", [1, 4])], "x", [1, 4], "a")
    b.node("ReduceMean", [x], "loss", [], "total_loss", keepdims=0)
    b.output("loss")
    b.output(b.node("Sigmoid", [x], "scores", [1, 4], "b"))
    with pytest.raises(GraphError, match="makes the loss on stage 0 of 0 to 1"):
        run(b.graph("train"), "train", ipus=2, stages={"a": "0_0", "total_loss": "0_0", "b": "1_1"})


def test_an_unsorted_graph_is_sorted_first():
    graph = chain(4)
    graph.gs.nodes.reverse()
    run(graph, ipus=2)
    assert [node.outputs[0].name for node in graph.nodes] == ["x0", "x1", "x2", "x3"]


def test_ten_thousand_nodes_are_placed_in_seconds():
    b = Builder()
    x = b.input("image", [1, 64])
    for i in range(10_000):
        x = b.node("Relu", [x], f"x{i}", [1, 64], f"block.{i // 100}")
    b.output(x)
    graph = b.graph()
    started = time.perf_counter()
    run(graph, ipus=8)
    assert time.perf_counter() - started < 10  # 0.3 s on an idle core
    assert sorted({stage for _, stage in places(graph).values()}) == list(range(8))


def test_a_layer_with_a_trained_weight_costs_three_times_its_forward_part():
    forward, _, _ = split_problem(Line(chain(2)))
    b = Builder()
    x = b.input("image", [1, 4, 8, 8])
    frozen = b.node("Detach", [b.weight("w0", [4, 4, 3, 3])], "w0.detached", [4, 4, 3, 3], domain="ai.graphcore")
    x = b.node("Conv", [x, frozen], "x0", [1, 4, 8, 8], pads=[1, 1, 1, 1])
    x = b.node("Conv", [x, b.weight("w1", [4, 4, 3, 3])], "x1", [1, 4, 8, 8], pads=[1, 1, 1, 1])
    b.node("ReduceMean", [x], "loss", [], keepdims=0)
    b.output("loss")
    costs, _, _ = split_problem(Line(b.graph("train", ["w1"])))
    assert costs[:2] == [forward[0], 3 * forward[1]]
