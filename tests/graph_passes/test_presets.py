"""The published stage maps: their numbers, and what becomes of them where PopART would refuse them."""
import pytest
from placement_graphs import Builder, chain, context, detector, places

from graph_passes.assign_stages import AssignStages
from graph_passes.presets import BLOCKS, PRESETS, longest_prefix
from graph_passes.verify_popart import find_violations
from runtime.errors import GraphError

MIXED, FP32 = "r50c4-mixed-4ipu", "r50c4-fp32-8ipu"


def run(graph, kind, **options):
    return AssignStages().run(graph, context(kind, graph, **options))


def test_the_mixed_precision_preset_is_the_published_one():
    graph = detector("train")
    result = run(graph, "train", stages=MIXED)
    found = places(graph)
    blocks = ["backbone.stem.conv.out", "backbone.layer2.0.conv1.out", "backbone.layer3.0.conv1.out", "rpn.conv.out",
              "proposals", "targets", "pooled",
              *(f"roi_head.layer4.{i}.{part}" for i in range(3) for part in ("c1", "c3")),
              "box_predictor.class_logits.out", "loss"]
    assert [found[name] for name in blocks] == [(0, 0)] * 3 + [(1, 1)] * 4 + [(2, 2)] * 3 + [(3, 3)] * 5
    assert result.notes == []
    assert find_violations(graph, context("train", graph)) == []


def test_the_float32_preset_is_the_published_one_without_pipelining():
    graph = detector("train")
    run(graph, "train", stages=FP32, ipus=8, pipelining=False)
    found = places(graph)
    blocks = ["backbone.stem.conv.out", "backbone.layer2.0.conv1.out", "backbone.layer3.0.conv1.out", "rpn.conv.out",
              "proposals", "targets", "pooled",
              *(f"roi_head.layer4.{i}.{part}" for i in range(3) for part in ("c1", "c3")),
              "box_predictor.class_logits.out", "loss"]
    assert [found[name][0] for name in blocks] == [0, 0, 7, 1, 1, 1, 3, 6, 3, 4, 2, 7, 5, 5, 5]
    assert all(stage == -1 for _, stage in found.values())
    assert find_violations(graph, context("train", graph, ipus=8, pipelining=False)) == []


def test_the_float32_preset_pipelined_keeps_its_ipus_and_opens_a_stage_at_each_change():
    graph = detector("train")
    result = run(graph, "train", stages=FP32, ipus=8)
    found = places(graph)
    assert found["backbone.stem.conv.out"] == (0, 0) and found["backbone.layer3.0.conv1.out"] == (7, 1)
    assert found["rpn.conv.out"] == (1, 2) and found["loss"] == (5, 9)
    assert any("PopART refuses" in note and "at least 19" in note for note in result.notes)
    assert find_violations(graph, context("train", graph, ipus=8), accumulation=19) == []
    assert len(find_violations(graph, context("train", graph, ipus=8), accumulation=18)) == 1


def test_the_two_parts_of_a_bottleneck_take_their_relus_and_the_sum_along():
    graph = detector("train")
    run(graph, "train", stages=MIXED)
    found = places(graph)
    first, second = (2, 2), (3, 3)
    path = "roi_head.layer4.1"
    assert [found[f"{path}.{name}"] for name in ("c1", "r1", "c2", "r2")] == [first] * 4
    assert [found[f"{path}.{name}"] for name in ("c3", "d", "sum", "out")] == [second] * 4


def test_an_edge_back_is_repaired_upwards_and_said():
    graph = detector("train", head_first=True)
    result = run(graph, "train", stages=MIXED)
    assert places(graph)["late"] == (3, 3)
    assert any("breaks a PopART rule for this graph: proposal_layer moves from stage 1 to 3" in note
               for note in result.notes)
    assert find_violations(graph, context("train", graph)) == []


def test_a_shared_weight_pulls_its_users_onto_one_ipu():
    graph = detector("train")
    nodes = {node.outputs[0].name: node for node in graph.nodes}
    nodes["roi_head.layer4.2.c3"].inputs[1] = nodes["roi_head.layer4.0.c1"].inputs[1]
    result = run(graph, "train", stages=MIXED)
    found = places(graph)
    assert found["roi_head.layer4.0.c1"] == found["roi_head.layer4.2.c3"] == (3, 3)
    assert any("roi_head.layer4.0.conv1 moves from stage 2 to 3" in note for note in result.notes)
    assert "no node of this graph is on stage 2: the stages above are renumbered down" not in result.notes
    assert find_violations(graph, context("train", graph)) == []


def test_a_preset_serves_the_inference_graph_too():
    graph = detector("infer")
    run(graph, "infer", stages=MIXED)
    assert {stage for _, stage in places(graph).values()} == {0, 1, 2, 3}
    assert find_violations(graph, context("infer", graph)) == []


def test_a_preset_for_another_network_is_refused_naming_what_is_missing():
    with pytest.raises(GraphError, match=r"the block 'res5 part 5', but this graph has no module "
                                         r"'roi_head.layer4.2.conv1' .nearest: 'roi_head.layer4"):
        run(detector("train", blocks=2), "train", stages=MIXED)


def test_a_preset_needs_its_ipus():
    with pytest.raises(GraphError, match=r"needs 8 IPUs, but compile.ipus is 4; set compile.ipus=8"):
        run(detector("train"), "train", stages=FP32)


def test_an_unknown_preset_is_refused_with_the_nearest():
    with pytest.raises(GraphError, match="'r50c4-mixed-8ipu' is no preset; did you mean 'r50c4-mixed-4ipu'"):
        run(chain(4), "infer", stages="r50c4-mixed-8ipu")
    with pytest.raises(GraphError, match="did you mean 'auto'"):
        run(chain(4), "infer", stages="atuo")


def test_every_preset_has_a_place_for_every_block_and_fits_its_ipus():
    for preset in PRESETS.values():
        assert len(preset.places) == len(BLOCKS) == 13
        assert {int(place.split("_")[0]) for place in preset.places} == set(range(preset.ipus))


@pytest.mark.parametrize(("module", "expected"), [("a.b.c", "a.b"), ("a.bc", "a"), ("a", "a"), ("b", None), ("", None)])
def test_the_longest_prefix_wins_on_component_borders(module, expected):
    assert longest_prefix(module, {"a": 0, "a.b": 1}) == expected


def test_a_weight_shared_through_arithmetic_moves_with_its_user():
    b = Builder()
    x = b.input("image", [1, 4, 8, 8])
    shared = b.weight("shared", [4, 4, 1, 1])
    x = b.node("Conv", [x, shared], "x0", [1, 4, 8, 8], "a")
    detached = b.node("Detach", [shared], "frozen", [4, 4, 1, 1], "b", domain="ai.graphcore")
    b.output(b.node("Conv", [x, detached], "x1", [1, 4, 8, 8], "b"))
    with pytest.raises(GraphError, match="a weight sits on one IPU only"):
        run(b.graph(), "infer", ipus=2, stages={"a": "0_0", "b": "1_1"})
