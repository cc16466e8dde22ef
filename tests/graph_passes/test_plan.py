"""The stage plan: FLOPs, bytes, stashes, copies and totals against numbers worked out by hand."""
import dataclasses
import json

import pytest
from onnx import TensorProto
from placement_graphs import Builder, chain, context, detector

from graph_passes.assign_stages import AssignStages
from graph_passes.costs import GC200, node_cost
from graph_passes.plan import build_plan, format_stage_table, stash_depth, total_stages
from runtime.errors import GraphError


def planned(graph, kind="infer", **options):
    options = context(kind, graph, **options)
    item = AssignStages()
    item.run(graph, options)
    return item.plan


def one_node(op, inputs, output, dtype=TensorProto.FLOAT, domain="", **attrs):
    b = Builder()
    names = [b.input(f"i{n}", shape) for n, shape in enumerate(inputs)]
    b.output(b.node(op, names, "y", output, domain=domain, dtype=dtype, **attrs))
    return node_cost(b.graph().nodes[0])


@pytest.mark.parametrize(("op", "inputs", "output", "attrs", "flops"), [
    ("Conv", ([1, 3, 8, 8], [16, 3, 3, 3]), [1, 16, 8, 8], {"pads": [1, 1, 1, 1]}, 2 * 16 * 64 * 27),
    ("Conv", ([1, 8, 8, 8], [8, 1, 3, 3], [8]), [1, 8, 8, 8], {"group": 8, "pads": [1] * 4}, 2 * 512 * 9 + 512),
    ("MatMul", ([2, 5, 7], [7, 3]), [2, 5, 3], {}, 2 * 2 * 5 * 3 * 7),
    ("Gemm", ([7, 5], [7, 3], [3]), [5, 3], {"transA": 1}, 2 * 5 * 3 * 7 + 15),
    ("Relu", ([2, 5],), [2, 5], {}, 10),
    ("MaxPool", ([1, 4, 8, 8],), [1, 4, 4, 4], {"kernel_shape": [3, 3]}, 64 * 9),
    ("ReduceSum", ([4, 6],), [4, 1], {"axes": [1]}, 24),
    ("Transpose", ([4, 6],), [6, 4], {"perm": [1, 0]}, 0),
    ("Reshape", ([4, 6], [2]), [24], {}, 0),
])
def test_flops_of_an_op(op, inputs, output, attrs, flops):
    assert one_node(op, inputs, output, **attrs).flops == flops


def test_roi_align_costs_four_taps_a_sample():
    cost = one_node("roiAlign", ([1, 4, 8, 8], [1, 10, 4]), [1, 10, 4, 7, 7], domain="ai.graphcore", spatial_scale=0.5,
                    aligned_height=7, aligned_width=7, sampling_ratio=2)
    assert cost.flops == 10 * 4 * 49 * 4 * 8


def test_views_move_nothing_and_keep_nothing():
    cost = one_node("Reshape", ([4, 6], [2]), [24])
    assert (cost.traffic_bytes, cost.activation_bytes, cost.cycles) == (0, 0, 0)


def test_64_bit_integers_take_32_bits_on_the_device():
    assert one_node("Relu", ([4],), [4], dtype=TensorProto.INT64).activation_bytes == 16


def test_bytes_of_a_stage_by_hand():
    plan = planned(chain(2), ipus=2)
    first, second = plan["stages"]
    assert first["weight_bytes"] == second["weight_bytes"] == 4 * 4 * 9 * 4
    assert first["activation_bytes"] == 4 * 64 * 4
    assert first["flops"] == 2 * 4 * 64 * 36
    assert (first["copy_out_bytes"], second["copy_in_bytes"]) == (1024, 1024)
    assert first["stash_bytes"] == first["optimizer_bytes"] == 0  # nothing to go back to


def test_a_tensor_that_skips_a_stage_is_paid_for_on_every_hop():
    b = Builder()
    x = b.input("image", [1, 4, 8, 8])
    a = b.node("Relu", [x], "a", [1, 4, 8, 8], "a")
    c = b.node("ReduceMean", [b.node("Sigmoid", [a], "b", [1, 4, 8, 8], "b")], "c", [1, 4, 1, 1], "b", axes=[2, 3])
    b.output(b.node("Mul", [a, c], "d", [1, 4, 8, 8], "d"))
    stages = planned(b.graph(), stages={"a": "0_0", "b": "1_1", "d": "2_2"})["stages"]
    assert [row["copy_in_bytes"] for row in stages] == [0, 1024, 1024 + 16]
    stages = planned(b.graph(), stages={"a": "0", "b": "1", "d": "2"}, pipelining=False)["stages"]
    assert [row["copy_in_bytes"] for row in stages] == [0, 1024, 1024 + 16]
    assert [row["copy_out_bytes"] for row in stages] == [2048, 16, 0]


@pytest.mark.parametrize(("ipus", "depths", "total"), [
    ([0, 1, 2, 3], [7, 5, 3, 1], 7), ([0], [1], 1), ([0, 1], [3, 1], 3), ([0, 0, 1], [3, 3, 1], 3),
    ([0, 1, 0], [5, 3, 1], 5),
])
def test_stash_depths_count_the_stages_until_the_backward_part_returns(ipus, depths, total):
    assert [stash_depth(ipus, stage) for stage in range(len(ipus))] == depths
    assert total_stages(ipus) == total


def test_training_stashes_what_the_backward_pass_reads_times_the_depth():
    stages = {"block.0": "0_0", "block.1": "1_1", "total_loss": "1_1"}
    plan = planned(chain(2, kind="train"), "train", ipus=2, stages=stages)
    first, second = plan["stages"]
    image = 4 * 64 * 4
    assert (first["stash_depth"], second["stash_depth"]) == (3, 1)
    assert first["stash_bytes"] == 3 * image  # a convolution's gradient needs its input
    assert second["stash_bytes"] == image  # the first stage's output; a mean needs nothing
    assert first["optimizer_bytes"] == first["weight_bytes"]


def test_pipeline_recompute_stashes_only_what_a_stage_receives():
    def stashes(recompute):
        graph = detector("train")
        return [row["stash_bytes"] for row in planned(graph, "train", recompute=recompute)["stages"]]

    kept, recomputed = stashes("none"), stashes("pipeline")
    assert sum(recomputed) < sum(kept) and recomputed[-1] == kept[-1]
    assert recomputed[0] == 7 * 2 * 4 * 64 * 4  # the image alone, for seven micro-batches


def test_memory_is_summed_by_ipu_and_held_against_its_sram():
    plan = planned(chain(4), ipus=2, stages={"block.0": "0_0", "block.1": "1_1", "block": "0_2"})
    assert [entry["ipu"] for entry in plan["ipu_memory"]] == [0, 1]
    assert plan["ipu_memory"][0]["weight_bytes"] == 3 * plan["ipu_memory"][1]["weight_bytes"]
    assert plan["ipu_memory"][0]["sram_bytes"] == 940_572_672  # 1472 tiles x 624 KiB
    assert all(row["fits"] for row in plan["stages"])


def test_a_stage_that_does_not_fit_says_so():
    graph = chain(2)
    planned(graph, ipus=2)
    small = dataclasses.replace(GC200, tiles=1, sram_per_tile=1000)
    plan = build_plan(graph, context(ipus=2).compile, small)
    assert not any(row["fits"] for row in plan["stages"])
    assert len(plan["notes"]) == 3 and "IPU 1 needs" in plan["notes"][2]
    assert "NO" in format_stage_table(plan)


def test_a_pipeline_is_as_fast_as_its_busiest_ipu_and_a_chain_of_ipus_as_all_of_them():
    pipelined, serial = (planned(chain(5), ipus=2, pipelining=flag) for flag in (True, False))
    cycles = [row["cycles"] for row in pipelined["stages"]]
    assert pipelined["predicted"]["micro_batch_cycles"] == max(cycles)
    assert serial["predicted"]["micro_batch_cycles"] == sum(cycles)


def test_the_plan_is_json_and_carries_the_notes_of_the_preset():
    plan = planned(detector("train"), "train", stages="r50c4-fp32-8ipu", ipus=8)
    assert json.loads(json.dumps(plan)) == plan
    assert plan["placement"] == "r50c4-fp32-8ipu" and any("PopART refuses" in note for note in plan["notes"])
    assert plan["ops"]["Conv"] == 4 + 2 + 12 + 1 and sum(plan["ops"].values()) == sum(r["nodes"] for r in plan["stages"])


def test_the_table_has_a_line_for_each_stage():
    plan = planned(chain(4), ipus=4)
    lines = format_stage_table(plan).splitlines()
    assert lines[0].split()[:3] == ["stage", "ipu", "nodes"] and len({len(line) for line in lines[:5]}) == 1
    assert [line.split()[:3] for line in lines[1:5]] == [[str(i), str(i), "1"] for i in range(4)]


def test_an_unplaced_graph_has_no_plan():
    with pytest.raises(GraphError, match=r"module block.0\): has no place; run assign_stages first"):
        build_plan(chain(2), context().compile)
