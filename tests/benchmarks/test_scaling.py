"""benchmarks/scaling.py at sizes that take seconds: the graph is as wished, every part is timed, the report is JSON."""
import json
import sys
from dataclasses import replace

import onnx
import pytest

from benchmarks import scaling
from benchmarks.scaling_step import PLANS, Plan, measure_part, part_text, size_config
from benchmarks.synthetic_graph import WEIGHTS_FILE, write_graph
from graph_passes.pipelines import STANDARD


@pytest.mark.parametrize("nodes", [100, 400])
def test_the_synthetic_graph_is_a_valid_model_of_the_wished_size(tmp_path, nodes):
    path = write_graph(tmp_path, nodes, "train")
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(path, load_external_data=False)
    assert nodes <= len(model.graph.node) <= nodes + 50
    assert all(any(entry.key == "popdet.module" for entry in node.metadata_props) for node in model.graph.node)
    assert (tmp_path / WEIGHTS_FILE).stat().st_size > 0


def test_every_pass_and_every_part_of_a_session_is_timed_and_reported(tmp_path, monkeypatch, capsys):
    file = tmp_path / "graph.json"
    arguments = ["scaling.py", "--rounds", "1", "--json", str(file), "graph", "--nodes", "100", "160", "--most-traced", "130"]
    monkeypatch.setattr(sys, "argv", arguments)
    scaling.main()
    report = json.loads(file.read_text(encoding="utf-8"))
    parts = {row["part"]: row for row in report["graph"]}
    assert report["threads"] >= 1
    assert {f"{kind}: {name}" for kind in ("infer", "train") for name in STANDARD} <= set(parts)
    assert len(parts["session: annotate"]["seconds"]) == 2 and "exponent" in parts["session: annotate"]
    assert len(parts["session: trace"]["seconds"]) == 1 and "exponent" not in parts["session: trace"]
    assert all(seconds > 0 for row in parts.values() for seconds in row["seconds"])
    text = capsys.readouterr().out
    assert all(name in text for name in parts)


def test_an_exponent_beyond_the_limit_is_marked():
    row = {"part": "x", "nodes": [1, 2], "seconds": [1.0, 4.0], "last": 2.0}
    assert "worse than linear" in scaling.graph_table([{**row, "exponent": 2.0}])
    assert "worse than linear" not in scaling.graph_table([{**row, "exponent": 1.0}])


def test_a_part_of_the_step_varies_one_value():
    plan = PLANS["full"]
    for part in plan.parts.values():
        networks = [size_config(plan, part, size, "aot").network for size in part.sizes]
        base = plan.parts["train-batch" if part.graph == "train" else "infer-rois"]
        assert len({network.image_height for network in networks}) in (1, len(networks))
        assert len(part.sizes) == len(base.sizes) and len(set(networks)) == len(networks)


@pytest.mark.slow
def test_a_part_of_the_step_is_measured_and_fitted(tmp_path):
    part = PLANS["small"].parts["infer-rois"]
    two = Plan(PLANS["small"].config, {"infer-rois": replace(part, sizes={n: part.sizes[n] for n in (16, 32)})})
    row = measure_part(two, "infer-rois", rounds=2, executor="eager", out=tmp_path)
    assert row["sizes"] == [16, 32] and len(row["milliseconds"]) == 2 and json.loads(json.dumps(row)) == row
    assert {"intercept", "slope", "r_squared", "residual"} <= set(row) and "RoIs" in part_text(row)


def test_graphs_too_small_for_the_placement_map_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scaling.py", "graph", "--nodes", "60"])
    with pytest.raises(SystemExit):
        scaling.main()
    assert "100 nodes" in capsys.readouterr().err
