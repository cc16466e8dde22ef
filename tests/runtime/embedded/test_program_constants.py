"""What an inference program makes of weights alone: made once for a set of weights, again for others, never what changes."""
import numpy as np
import popart_models as models
import pytest
import torch
from fusion_graphs import graph_of, tensors_of
from popart._engine import constants
from popart._engine.aot import AotProgram
from popart._engine.constants import Prepared, split
from popart._engine.fusion import fuse
from popart._engine.program import EagerProgram, plan, run_ops
from popart_models import inference, model, options, popart, run, started

SCALED = "g (float[1,4,5,5] x) => (float y) { s = Mul(w, v)  c = Conv(x, s)  y = Relu(c) }"
WEIGHTS = {"w": (6, 4, 1, 1), "v": (6, 1, 1, 1)}


def _split(graph, wanted=("y",)):
    return split(graph, fuse(graph, plan(graph, wanted), wanted, training=False), list(wanted))


@pytest.fixture
def calls(monkeypatch) -> list:
    """One entry for every time that something is made of weights."""
    made, original = [], constants.run_ops
    monkeypatch.setattr(constants, "run_ops", lambda *given: made.append(given[2]) or original(*given))
    return made


def test_what_needs_weights_alone_is_taken_out() -> None:
    graph = graph_of(SCALED, **WEIGHTS)
    ahead, others, names = _split(graph)
    assert [op.outputs[0] for op, _ in ahead] == ["s", "c.packed"] and [op.outputs[0] for op, _ in others] == ["y"]
    assert names == ["c.packed"]


def test_what_is_wanted_itself_is_given() -> None:
    ahead, _, names = _split(graph_of(SCALED, **WEIGHTS), ("y", "s"))
    assert len(ahead) == 2 and names == ["c.packed", "s"]


def test_it_is_made_once_and_again_for_other_or_changed_weights(calls) -> None:
    graph = graph_of(SCALED, **WEIGHTS)
    ahead, others, names = _split(graph)
    prepared, (weights, inputs) = Prepared(graph, ahead, names), tensors_of(graph)

    def check(count):
        found = run_ops(graph, {**weights, **inputs, **prepared(weights)}, ["y"], others)
        torch.testing.assert_close(found, run_ops(graph, {**weights, **inputs}, ["y"], plan(graph, ["y"])))
        assert len(calls) == count

    check(1)
    check(1)
    weights = dict(weights)
    check(1)  # another dict with the same tensors
    weights["v"] = weights["v"] * 2
    check(2)
    check(2)
    weights["w"].mul_(3)
    check(3)
    check(3)
    weights["w"].copy_(torch.ones(6, 4, 1, 1))
    check(4)


def test_random_ops_stay_in_the_program() -> None:
    text = "g (float[1,4,5,5] x) => (float y) { d = Dropout(w)  s = Mul(d, v)  y = Conv(x, s) }"
    random = graph_of("g (float[1,4,5,5] x) => (float y) { d = RandomNormalLike(w)  s = Mul(d, v)  y = Conv(x, s) }", **WEIGHTS)
    for graph in (random, graph_of(text, **WEIGHTS)):
        ahead, others, names = _split(graph)
        assert ahead == [] and names == [] and others[0][0].outputs[0] == "d"


def test_a_weight_that_the_graph_writes_is_not_known_ahead() -> None:
    graph = graph_of(SCALED, **WEIGHTS)
    graph.ops[0].updates = (("v", "s"),)  # as an op that writes a variable
    ahead, others, names = _split(graph)
    assert graph.variable_updates() == [("v", "s")]
    assert ahead == [] and names == [] and others[0][0].outputs[0] == "s"


def test_an_output_that_is_left_out_is_not_asked_for() -> None:
    text = """g (float[1,4,5,5] x) => (float y) <int64[1] k = {1}>
        { , i = TopK<axis = 0>(t, k)  f = Cast<to = 1>(i)  c = Conv(x, w)  y = Add(c, f) }"""
    graph = graph_of(text, w=(4, 4, 1, 1), t=(3,))
    ahead, others, names = _split(graph)
    assert "" not in names
    weights, inputs = tensors_of(graph)
    found = run_ops(graph, {**weights, **inputs, **Prepared(graph, ahead, names)(weights)}, ["y"], others)
    torch.testing.assert_close(found, run_ops(graph, {**weights, **inputs}, ["y"], plan(graph, ["y"])))


@pytest.mark.slow
def test_a_compiled_forward_gives_the_numbers_of_the_weights_it_is_given(calls) -> None:
    graph = graph_of(SCALED, **WEIGHTS)
    program, (weights, inputs) = AotProgram(graph), tensors_of(graph)
    program.compile(["y"])
    calls.clear()  # compiling makes them of shapes
    for change in (lambda: None, lambda: None, lambda: weights.update(w=weights["w"] + 1), lambda: weights["v"].neg_()):
        change()
        found, expected = (p.forward(weights, inputs, ["y"]) for p in (program, EagerProgram(graph)))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert len(calls) == 3


@pytest.mark.slow
def test_a_session_gives_the_numbers_of_its_new_weights_also_when_loaded(tmp_path) -> None:
    random = np.random.default_rng(0)

    def proto(factor):
        given = {name: (factor * np.random.default_rng(1).standard_normal(s)).astype(np.float32) for name, s in WEIGHTS.items()}
        return model(SCALED.replace("(float y)", "(float[1,6,5,5] y)"), **given)

    x = random.standard_normal((1, 4, 5, 5)).astype(np.float32)
    compiled = options(constantWeights=False, engineOptions={"popdet.executor": "aot"})
    first = started(inference(proto(1), ["y"], compiled))
    first.saveExecutable(str(tmp_path))
    second = inference(proto(1), ["y"], compiled)
    second.loadExecutable(str(tmp_path))
    second = started(second)
    for session in (first, second):
        for factor in (1, 2, -1):
            session.resetHostWeights(proto(factor).SerializeToString())
            session.weightsFromHost()
            expected = run(started(inference(proto(factor), ["y"])), x=x)["y"]
            np.testing.assert_allclose(run(session, x=x)["y"], expected, rtol=1e-5, atol=1e-5)
        session.writeWeights(popart.PyWeightsIO({"v": np.full(WEIGHTS["v"], 5, np.float32)}))
        session.weightsFromHost()
        assert (models.weights_of(session, "v")["v"] == 5).all()
        eager = started(inference(proto(-1), ["y"], options(constantWeights=False)))
        eager.writeWeights(popart.PyWeightsIO({"v": np.full(WEIGHTS["v"], 5, np.float32)}))
        eager.weightsFromHost()
        np.testing.assert_allclose(run(session, x=x)["y"], run(eager, x=x)["y"], rtol=1e-5, atol=1e-5)
