"""benchmarks/startup.py: what a started process reports, and how its seconds are shared out."""
import json

import pytest

from benchmarks.startup import _parts, format_report, start
from popdet import build
from popdet.config import load_config

OVERRIDES = ["compile.executor=eager", "compile.ipus=1", "compile.pipelining=false", "train.executor=eager",
             "train.accumulation=2"]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    out = tmp_path_factory.mktemp("startup")
    return build.compile(load_config("configs/shapes-tiny.yaml", OVERRIDES), out, lambda text: None).directory


@pytest.mark.parametrize("graph", ["infer", "train"])
def test_a_started_program_reports_when_each_part_was_done(artifact, graph):
    found = json.loads(json.dumps(start(artifact, graph)))
    moments = list(found["moments"].values())
    assert list(found["moments"]) == ["imports", "open the artifact", "session"] and moments == sorted(moments)
    assert len(found["runs"]) == 8 and min(found["runs"]) > 0


def test_the_parts_add_up_to_the_start_without_a_later_run():
    moments = {"imports": 11.0, "open the artifact": 11.5, "session": 14.0}
    parts = _parts({"moments": moments, "runs": [3.0, 1.0, 2.0, 1.5]}, began=10.0)
    assert parts == {"imports": 1.0, "open the artifact": 0.5, "session": 2.5, "first run": 3.0, "later run": 1.5,
                     "start to first output": 5.5}
    report = {"config": "x.yaml", "graph": "infer", "compile": {"cold": {"whole": [4.0, 6.0], "export": [1.0, 1.0]}},
              "start": {name: [value] for name, value in parts.items()}}
    text = format_report(report)
    assert "cold" in text and "5.00" in text and "infer: start to first output" in text
