"""_serializeIr as a reader of its text sees it, and the memory account against sums by hand."""
from __future__ import annotations

import importlib
import json
import math

import numpy as np
import pytest
import torch
from popart_models import TWO_LAYERS, accumulating, inference, model, options, popart, training, two_layer_weights

memory = importlib.import_module("popart._engine.memory")
ir_json = importlib.import_module("popart._engine.ir_json")
JSON = popart.IrSerializationFormat.JSON
Recompute = popart.RecomputationType
F32 = 4


def ir_of(session):
    return json.loads(session._serializeIr(JSON))


def pipelined(factor=3, **fields):
    opts = accumulating(factor, enablePipelining=True, virtualGraphMode=popart.VirtualGraphMode.Manual, **fields)
    return training(model(TWO_LAYERS, **two_layer_weights()), opts=opts, ipus=2)


def test_ops_tensors_and_placement_are_in_the_text():
    ops = ir_of(pipelined())["maingraph"]
    assert [op["type"] for op in ops] == ["MatMul", "Relu", "IpuCopy", "MatMul", "Add", "Sub", "Mul", "ReduceMean"]
    first = ops[0]
    assert (first["domain"], first["version"]) == ("ai.onnx", 9)
    assert first["inputs"] == [
        {"index": 0, "name": "x", "type": "FLOAT", "shape": "[4 3]"},
        {"index": 1, "name": "w1", "type": "FLOAT", "shape": "[3 5]"},
    ]
    assert first["outputs"][0]["name"] == "h"
    assert [op["attributes"]["__ipu_number"] for op in ops if op["type"] == "MatMul"] == ["0", "1"]
    assert [int(op["attributes"]["__pipeline_stage"]) for op in ops if op["type"] != "IpuCopy"] == [0, 0, 1, 1, 1, 1, 1]


def test_a_copy_feeds_the_other_virtual_graph():
    copy, product = ir_of(pipelined())["maingraph"][2:4]
    assert copy["attributes"] == {"__sourceIpus": "[0]", "__destIpu": "1"} and copy["inputs"][0]["name"] == "a"
    assert product["inputs"][0]["name"] == copy["outputs"][0]["name"] == "a_c1"


def test_placement_that_options_switch_off_is_not_shown():
    ops = ir_of(inference(model(TWO_LAYERS, **two_layer_weights()), ["z"]))["maingraph"]
    assert all("__ipu_number" not in op["attributes"] for op in ops) and "IpuCopy" not in {op["type"] for op in ops}


def test_recomputed_ops_are_marked():
    core = training(chain(), opts=options(autoRecomputation=Recompute.RecomputeAll))._core
    again = memory.recomputed_ops(core.graph, core.options, core.with_gradient)
    ops = json.loads(ir_json.serialise(core.graph, again))["maingraph"]
    assert {op["attributes"]["recompute"] for op in ops} == {"YES"}
    assert {op["attributes"]["recompute"] for op in json.loads(ir_json.serialise(core.graph))["maingraph"]} == {"NO"}


def test_subgraphs_have_their_own_entry():
    builder = popart.Builder()
    x = builder.addInputTensor(popart.TensorInfo("FLOAT", [2]))
    inner = builder.createSubgraphBuilder()
    inner.addOutputTensor(inner.aiOnnx.relu([inner.addInputTensor(popart.TensorInfo("FLOAT", [2]))]))
    (out,) = builder.aiGraphcore.call([x], 1, inner)
    builder.addOutputTensor(out)
    session = popart.InferenceSession(
        builder.getModelProto(), popart.DataFlow(1, [out]), popart.DeviceManager().createCpuDevice()
    )
    found = ir_of(session)
    (key,) = found.keys() - {"maingraph"}
    assert [op["type"] for op in found["maingraph"]] == ["Call"] and [op["type"] for op in found[key]] == ["Relu"]


# --- the memory account -------------------------------------------------------------------------------------------

WIDTHS = [4, 6, 5, 7, 3, 2]  # a chain of matrix products with tanh between them


def chain(rows=8, ipus=1):
    lines, weights, name = [], {}, "x"
    for i, (fan_in, fan_out) in enumerate(zip(WIDTHS, WIDTHS[1:])):
        ipu = i * ipus // (len(WIDTHS) - 1)
        where = f"__ipu_number={ipu}, __pipeline_stage={ipu}"
        lines += [f"m{i} = MatMul<{where}>({name}, w{i})", f"t{i} = Tanh<{where}>(m{i})"]
        weights[f"w{i}"] = np.ones((fan_in, fan_out), np.float32)
        name = f"t{i}"
    lines.append(f"loss = ReduceSum<keepdims=0, __ipu_number={ipus - 1}, __pipeline_stage={ipus - 1}>({name})")
    return model(f"g (float[{rows},{WIDTHS[0]}] x) => (float loss) {{ {' '.join(lines)} }}", **weights)


def account(session):
    return memory.of_session(session._core)


def names(session):
    return {stash.tensor for stash in account(session)["stashes"]}


def test_weights_and_state_are_counted_where_they_live():
    opts = accumulating(4, enablePipelining=True, virtualGraphMode=popart.VirtualGraphMode.Manual)
    adam = popart.Adam({"defaultLearningRate": (0.1, False)})
    table = account(training(chain(ipus=2), optimizer=adam, opts=opts, ipus=2))["virtualGraphs"]
    sizes = [F32 * a * b for a, b in zip(WIDTHS, WIDTHS[1:])]
    for ipu, mine in ((0, sizes[:3]), (1, sizes[3:])):
        assert table[ipu]["weights"] == sum(mine)
        assert table[ipu]["accumulators"] == sum(mine)
        assert table[ipu]["optimizerState"] == 2 * sum(mine) + F32 * len(mine)  # two moments and a step counter a weight
        assert table[ipu]["total"] == sum(table[ipu][part] for part in ("weights", "accumulators", "optimizerState", "stashes"))


def test_without_recomputation_everything_a_gradient_reads_is_kept():
    # a matrix product reads its input, a tanh its own output, which is the next product's input
    session = training(chain())
    assert names(session) == {"x", "t0", "t1", "t2", "t3", "t4"}
    assert account(session)["virtualGraphs"][0]["stashes"] == F32 * 8 * sum(WIDTHS)
    assert account(inference(chain(), ["loss"]))["stashes"] == []


def test_recomputing_everything_keeps_the_inputs_and_the_checkpoints():
    assert names(training(chain(), opts=options(autoRecomputation=Recompute.RecomputeAll))) == {"x"}
    proto = chain()
    attribute = proto.graph.node[3].attribute.add(name="__recompute_output_in_backward_pass", type=2)
    attribute.i = popart.RecomputeType.Checkpoint.value
    assert names(training(proto, opts=options(autoRecomputation=Recompute.RecomputeAll))) == {"x", "t1"}


def test_standard_keeps_about_the_square_root():
    deep = [f"t{i} = Tanh({f't{i - 1}' if i else 'y'})" for i in range(100)]
    text = f"g (float[4,4] x) => (float loss) {{ y = MatMul(x, w) {' '.join(deep)} loss = ReduceSum<keepdims=0>(t99) }}"
    proto = model(text, w=np.ones((4, 4), np.float32))
    plain = len(names(training(proto)))
    kept = len(names(training(proto, opts=options(autoRecomputation=Recompute.Standard))))
    assert plain == 101 and kept <= 2 * math.isqrt(plain) + 2


def test_norm_only_drops_what_norms_make():
    text = """g (float[4,3,2,2] x) => (float loss) {
        c = Conv(x, w) n = InstanceNormalization(c, s, b) r = Relu(n) d = Conv(r, v) loss = ReduceSum<keepdims=0>(d)
    }"""
    weights = {"w": np.ones((3, 3, 1, 1), np.float32), "v": np.ones((2, 3, 1, 1), np.float32)}
    weights.update(s=np.ones(3, np.float32), b=np.ones(3, np.float32))
    proto = model(text, **weights)
    assert names(training(proto)) == {"x", "c", "r"}
    assert names(training(proto, opts=options(autoRecomputation=Recompute.NormOnly))) == {"x", "c"}


@pytest.mark.parametrize("annotated, kept", [((1,), {"x", "m0"}), ((0, 1), {"x"}), ((0,), {"x", "t0"})])
def test_what_an_annotated_op_makes_is_not_kept_but_what_it_reads_is(annotated, kept):
    proto = chain()
    for index in annotated:
        attribute = proto.graph.node[index].attribute.add(name="__recompute_output_in_backward_pass", type=2)
        attribute.i = popart.RecomputeType.Recompute.value
    assert names(training(proto)) == {*kept, "t1", "t2", "t3", "t4"}


@pytest.mark.parametrize("mode", [Recompute.NoRecompute, Recompute.Pipeline])
def test_a_pipeline_keeps_one_copy_for_every_micro_batch_in_flight(mode):
    ipus = 3
    fields = {"enablePipelining": True, "virtualGraphMode": popart.VirtualGraphMode.Manual, "autoRecomputation": mode}
    session = training(chain(ipus=ipus), opts=accumulating(8, **fields), ipus=4)
    for stash in account(session)["stashes"]:
        # 2 * ipus - 1 stages on a line, one cycle each: stage s waits for its backward stage 2 * (ipus - 1) - s
        assert stash.microBatches == 2 * (ipus - 1) - 2 * stash.stage + 1
        width = 4 if stash.tensor == "x" else WIDTHS[int(stash.tensor[1:]) + 1]
        assert stash.bytes == stash.microBatches * F32 * 8 * width
        assert stash.virtualGraph == stash.stage
    wanted = {"x", "t0", "t1", "t2", "t3", "t4"} if mode is Recompute.NoRecompute else {"x", "t1", "t3", "t4"}
    assert names(session) == wanted


def test_recomputation_shows_in_the_summary_report():
    def total(**fields):
        opts = accumulating(8, enablePipelining=True, virtualGraphMode=popart.VirtualGraphMode.Manual, **fields)
        report = training(chain(ipus=3), opts=opts, ipus=4).getSummaryReport()
        row = next(line for line in report.splitlines() if line.startswith("0 "))
        return int(row.split()[-1].replace(",", ""))

    assert total(autoRecomputation=Recompute.Pipeline) < total()


READS = {  # one-line models; h is the input of the op in question, y its output
    "Relu(h)": {"y"}, "Sigmoid(h)": {"y"}, "Tanh(h)": {"y"}, "Exp(h)": {"y"}, "Sqrt(h)": {"y"}, "Softmax(h)": {"y"},
    "LogSoftmax(h)": {"y"}, "Neg(h)": set(), "Add(h, h)": set(), "Sub(h, h)": set(), "Identity(h)": set(),
    "Transpose(h)": set(), "Log(h)": {"h"}, "Sin(h)": {"h"}, "Mul(h, h)": {"h"},
}  # fmt: skip


@pytest.mark.parametrize("call", READS)
def test_what_a_gradient_reads_is_what_torch_saves(call):
    """The oracle: the values that torch's autograd keeps for the same function."""
    functions = {
        "Relu": torch.relu, "Sigmoid": torch.sigmoid, "Tanh": torch.tanh, "Exp": torch.exp, "Sqrt": torch.sqrt,
        "Softmax": lambda h: torch.softmax(h, 1), "LogSoftmax": lambda h: torch.log_softmax(h, 1), "Neg": torch.neg,
        "Add": torch.add, "Sub": torch.sub, "Identity": lambda h: h * 1, "Transpose": torch.t, "Log": torch.log,
        "Sin": torch.sin, "Mul": torch.mul,
    }  # fmt: skip
    kept = []
    h = torch.rand(3, 4).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        name, _, arguments = call.partition("(")
        y = functions[name](*[h] * arguments.count("h"))
    by_torch = {name for name, value in (("h", h), ("y", y)) for t in kept if t.data_ptr() == value.data_ptr()}
    assert by_torch == READS[call]
    proto = model(f"g (float[3,4] x) => (float loss) {{ h = Add(x, w) y = {call} loss = ReduceSum<keepdims=0>(y) }}",
                  w=np.ones((3, 4), np.float32))  # fmt: skip
    assert names(training(proto)) == READS[call]
