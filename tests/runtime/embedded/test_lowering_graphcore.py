"""ai.graphcore ops against numpy and torch, and their gradients against autograd of a plain expression."""
from __future__ import annotations

import numpy as np
import popart_models as models
import pytest
import torch
from popart_models import popart, run, started

RANDOM = np.random.default_rng(7)
Reduce = popart.ScatterReduction


def floats(*shape, dtype=np.float32):
    return RANDOM.normal(size=shape).astype(dtype)


class Case:
    """One op: inputs as Builder inputs, outputs and gradients of sum(output * weight) as arrays."""

    def __init__(self):
        self.builder = popart.Builder(opsets={"ai.onnx": 11, "ai.graphcore": 1})
        self.inputs: dict[str, np.ndarray] = {}

    def input(self, array):
        name = self.builder.addInputTensor(popart.TensorInfo(array))
        self.inputs[name] = array
        return name

    def outputs(self, *names, opts=None):
        flow = popart.DataFlow(1, list(names))
        session = popart.InferenceSession(
            self.builder.getModelProto(), flow, models.device(), userOptions=opts or popart.SessionOptions()
        )
        found = run(started(session), **self.inputs)
        for name in names:
            assert self.builder.getTensorShape(name) == list(found[name].shape), name
        return [found[name] for name in names]

    def gradients(self, output, weight, *names):
        product = self.builder.aiOnnx.mul([output, self.builder.aiOnnx.constant(weight)])
        loss = self.builder.aiGraphcore.identityloss([product], popart.ReductionType.Sum)
        flow = popart.DataFlow(1, [f"Gradient___{name}" for name in names])
        session = popart.TrainingSession(
            self.builder.getModelProto(), flow, loss, popart.ConstSGD(0.1), models.device()
        )
        found = run(started(session), **self.inputs)
        return [found[f"Gradient___{name}"] for name in names]


def check(case, output, inputs, reference, rtol=1e-5):
    """Value and gradients of `output` against `reference(*leaves)`."""
    leaves = [torch.tensor(case.inputs[name], requires_grad=True) for name in inputs]
    expected = reference(*leaves)
    weight = floats(*expected.shape)
    (expected * torch.tensor(weight)).sum().backward()
    np.testing.assert_allclose(case.outputs(output)[0], expected.detach(), rtol=rtol, atol=1e-6)
    for found, leaf in zip(case.gradients(output, weight, *inputs), leaves):
        np.testing.assert_allclose(found, leaf.grad, rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("reduction, name", [(Reduce.Sum, "sum"), (Reduce.Max, "amax"), (Reduce.Min, "amin"),
                                             (Reduce.Mul, "prod")])  # fmt: skip
@pytest.mark.parametrize("axis", [0, 1])
def test_scatter_reduce_onto_initial_values(reduction, name, axis):
    case = Case()
    size = [5, 4]
    size[axis] = 3
    data, start = case.input(floats(5, 4)), case.input(floats(*size))
    index = RANDOM.integers(0, 3, (5, 4)).astype(np.int32)
    out = case.builder.aiGraphcore.scatterreduce([data, case.input(index), start], 3, axis, reduction)
    check(case, out, [data, start], lambda d, s: s.scatter_reduce(axis, torch.tensor(index).long(), d, name))


def test_scatter_reduce_broadcasts_indices_and_starts_from_zero():
    case = Case()
    data, index = case.input(floats(6, 4)), np.array([0, 2, 0, 2, 4, 4], np.int32)
    out = case.builder.aiGraphcore.scatterreduce([data, case.input(index)], 5, 0)
    check(case, out, [data], lambda d: torch.zeros(5, 4).index_add(0, torch.tensor(index).long(), d))


def test_scatter_without_reduction_overwrites():
    case = Case()
    data, start = case.input(floats(2, 3)), case.input(floats(4, 3))
    index = np.array([3, 0], np.int32)
    out = case.builder.aiGraphcore.scatterreduce([data, case.input(index), start], 4, 0, Reduce.NoReduction)
    check(case, out, [data, start], lambda d, s: s.scatter(0, torch.tensor(index).long()[:, None].expand(2, 3), d))


def test_grouped_scatter_and_gather():
    case = Case()
    data, index = case.input(floats(2, 5, 3)), RANDOM.integers(0, 4, (2, 5)).astype(np.int32)
    ids = case.input(index)
    out = case.builder.aiGraphcore.groupedscatterreduce([data, ids], 4, 1, Reduce.Sum, 2)
    rows = [torch.tensor(index[g]).long() for g in range(2)]
    check(case, out, [data], lambda d: torch.stack([torch.zeros(4, 3).index_add(0, rows[g], d[g]) for g in range(2)]))
    case = Case()
    data, ids = case.input(floats(2, 5, 3)), case.input(index)
    out = case.builder.aiGraphcore.groupedgather([data, ids], 1, 2)
    check(case, out, [data], lambda d: torch.stack([d[g][rows[g]] for g in range(2)]))


@pytest.mark.parametrize("op, reference", [
    ("dynamicupdate", lambda x, part: torch.cat([x[:, :2], part, x[:, 5:]], 1)),
    ("dynamicadd", lambda x, part: torch.cat([x[:, :2], x[:, 2:5] + part, x[:, 5:]], 1)),
])  # fmt: skip
def test_dynamic_writes(op, reference):
    case = Case()
    x, part = case.input(floats(3, 7)), case.input(floats(3, 3))
    offset = case.input(np.array([2], np.uint32))
    check(case, getattr(case.builder.aiGraphcore, op)([x, offset, part], [1], [3]), [x, part], reference)


def test_dynamic_slice_and_zero():
    case = Case()
    x, offset = case.input(floats(3, 7)), case.input(np.array([2], np.uint32))
    check(case, case.builder.aiGraphcore.dynamicslice([x, offset], [1], [3]), [x], lambda t: t[:, 2:5])
    case = Case()
    x, offset = case.input(floats(3, 7)), case.input(np.array([2], np.uint32))
    mask = torch.ones(3, 7)
    mask[:, 2:5] = 0
    check(case, case.builder.aiGraphcore.dynamiczero([x, offset], [1], [3]), [x], lambda t: t * mask)


def test_init_is_a_buffer_to_write_into():
    case = Case()
    part, offset = case.input(floats(2, 3)), case.input(np.array([1], np.uint32))
    buffer = case.builder.aiGraphcore.init([4, 3], popart.DataType.FLOAT, popart.InitType.Zero)
    out = case.builder.aiGraphcore.dynamicupdate([buffer, offset, part], [0], [2])
    check(case, out, [part], lambda p: torch.cat([torch.zeros(1, 3), p, torch.zeros(1, 3)]))


def test_multi_conv_is_several_convolutions():
    case = Case()
    a, b = case.input(floats(1, 2, 6, 6)), case.input(floats(2, 4, 5, 5))
    w, v, bias = case.input(floats(3, 2, 3, 3)), case.input(floats(4, 2, 1, 1)), case.input(floats(4))
    first, second = case.builder.aiGraphcore.multiconv(
        [[a, w], [b, v, bias]], pads=[[1, 1, 1, 1], []], strides=[[2, 2], []]
    )
    conv = torch.nn.functional.conv2d
    check(case, first, [a, w], lambda x, k: conv(x, k, stride=2, padding=1), 1e-4)
    case.inputs = {n: t for n, t in case.inputs.items()}
    check(case, second, [b, v, bias], lambda x, k, c: conv(x, k, c, groups=2), 1e-4)


@pytest.mark.parametrize("method, args, reference", [
    ("slice", ([2, 5], [0, 1], [0, 1]), lambda t: t[0:2, 1:5]),
    ("reverse", ([1],), lambda t: t.flip(1)),
    ("subsample", ([2, 3],), lambda t: t[::2, ::3]),
    ("scale", (0.25,), lambda t: t * 0.25),
    ("tensorremap", (), lambda t: t),
    ("nop", (), lambda t: t),
    ("reshape", ([6, 4],), lambda t: t.reshape(6, 4)),
    ("gelu", (), lambda t: torch.nn.functional.gelu(t, approximate="tanh")),
    ("geluerf", (), torch.nn.functional.gelu),
    ("swish", (), torch.nn.functional.silu),
    ("expm1", (), torch.expm1),
])  # fmt: skip
def test_simple_ops(method, args, reference):
    case = Case()
    x = case.input(floats(4, 6))
    check(case, getattr(case.builder.aiGraphcore, method)([x], *args), [x], reference)


@pytest.mark.parametrize("method, reference", [
    ("atan2", torch.atan2), ("fmod", torch.fmod), ("remainder", torch.remainder),
])  # fmt: skip
def test_binary_ops(method, reference):
    case = Case()
    x, y = case.input(floats(4, 6) * 3), case.input(np.abs(floats(4, 6)) + 0.5)
    (found,) = case.outputs(getattr(case.builder.aiGraphcore, method)([x, y]))
    expected = reference(torch.tensor(case.inputs[x]), torch.tensor(case.inputs[y]))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_bitwise_ops():
    case = Case()
    a, b = case.input(RANDOM.integers(0, 99, 8).astype(np.int32)), case.input(RANDOM.integers(0, 99, 8).astype(np.int32))
    x, y = case.inputs[a], case.inputs[b]
    g = case.builder.aiGraphcore
    names = g.bitwiseand([a, b]), g.bitwiseor([a, b]), g.bitwisexor([a, b]), g.bitwisexnor([a, b]), g.bitwisenot([a])
    for found, expected in zip(case.outputs(*names), (x & y, x | y, x ^ y, ~(x ^ y), ~x)):
        np.testing.assert_array_equal(found, expected)


def test_sort_and_median():
    case = Case()
    x = case.input(floats(3, 5))
    values, index = case.builder.aiGraphcore.sort([x], 1, 1)
    median, where = case.builder.aiGraphcore.reducemedian([x], [1], 0)
    found = case.outputs(values, index, median, where)
    data = case.inputs[x]
    np.testing.assert_array_equal(found[0], -np.sort(-data, axis=1))
    np.testing.assert_array_equal(np.take_along_axis(data, found[1].astype(int), 1), found[0])
    np.testing.assert_array_equal(found[2], np.median(data, axis=1).astype(np.float32))
    assert found[1].dtype == found[3].dtype == np.int32
    check(case, values, [x], lambda t: torch.sort(t, dim=1, descending=True).values)


def test_copy_var_update_writes_the_variable():
    builder = popart.Builder()
    x = builder.addInputTensor("FLOAT", [3], "x")
    w = builder.addInitializedInputTensor(np.zeros(3, np.float32), "w")
    y = builder.aiGraphcore.copyvarupdate([w, builder.aiOnnx.add([w, x])])
    session = popart.InferenceSession(
        builder.getModelProto(), popart.DataFlow(1, [y]), models.device(), userOptions=models.options(constantWeights=False)
    )
    started(session)
    for k in range(1, 4):
        assert run(session, x=np.ones(3, np.float32))[y].tolist() == [k] * 3
    assert models.weights_of(session, "w")["w"].tolist() == [3, 3, 3]


def test_print_tensor_shows_the_value_and_the_gradient(capfd):
    case = Case()
    x = case.input(np.array([1.5, -2], np.float32))
    out = case.builder.aiGraphcore.printtensor([x], 1, title="mine")
    check(case, out, [x], lambda t: t * 1.0)
    text = capfd.readouterr().err
    assert "mine: [ 1.5 -2. ]" in text and "Gradient___mine: " in text


def test_abort_ends_the_run_when_its_input_is_true():
    builder = popart.Builder()
    x, stop = builder.addInputTensor("FLOAT", [2], "x"), builder.addInputTensor("BOOL", [1], "stop")
    y = builder.aiOnnx.relu([x])
    builder.aiGraphcore.abort([stop])
    session = started(popart.InferenceSession(builder.getModelProto(), popart.DataFlow(1, [y]), models.device()))
    inputs = {"x": np.ones(2, np.float32)}
    run(session, **inputs, stop=np.array([False]))
    with pytest.raises(popart.poplar_application_runtime_error, match="aborted"):
        run(session, **inputs, stop=np.array([True]))


def test_normalize_image():
    case = Case()
    image = case.input(RANDOM.integers(0, 255, (2, 4, 4, 3)).astype(np.float32))
    offsets, scales = case.input(np.array([1, 2, 3], np.float32)), case.input(np.array([0.5, 1, 2], np.float32))
    (found,) = case.outputs(case.builder.aiGraphcore.normalize_image([image, offsets, scales], 0.25))
    expected = (case.inputs[image] * 0.25 - [1, 2, 3]) * [0.5, 1, 2]
    np.testing.assert_allclose(found[..., :3], expected, rtol=1e-5)
    assert (found[..., 3] == 0).all()


@pytest.mark.parametrize("size, kind, expected", [
    (0, 0, [10, 10, 10, 10]), (2, 1, [3, 3, 7, 7]), (2, 2, [4, 6, 4, 6]), (0, 3, [1, 2, 3, 4]),
])  # fmt: skip
def test_all_reduce_in_groups(size, kind, expected):
    builder = popart.Builder()
    x = builder.addInputTensor("FLOAT", [1], "x")
    y = builder.aiGraphcore.replicatedallreduce([x])
    builder.addNodeAttribute("__collectiveCommGroup", [kind, size], {y})
    opts = models.options(enableReplicatedGraphs=True, replicatedGraphCount=4)
    session = popart.InferenceSession(
        builder.getModelProto(), popart.DataFlow(1, [y]), models.device(4), userOptions=opts
    )
    found = run(started(session), x=np.array([[1], [2], [3], [4]], np.float32))[y]
    assert found.reshape(-1).tolist() == expected


def test_reduce_scatter_pads_its_parts():
    builder = popart.Builder()
    x = builder.addInputTensor("FLOAT", [3], "x")
    y = builder.aiGraphcore.replicatedreducescatter([x])
    opts = models.options(enableReplicatedGraphs=True, replicatedGraphCount=2)
    session = popart.InferenceSession(
        builder.getModelProto(), popart.DataFlow(1, [y]), models.device(2), userOptions=opts
    )
    found = run(started(session), x=np.array([[1, 2, 3], [10, 20, 30]], np.float32))[y]
    assert found.tolist() == [[11, 22], [33, 0]]


def test_what_the_engine_has_not_is_refused_by_name():
    builder = popart.Builder()
    x = builder.addInputTensor("FLOAT", [3])
    (y,) = builder.customOp("CastThenPow2Scale", 1, "ai.graphcore", [x], {})
    with pytest.raises(popart.popart_exception, match=r"CastThenPow2Scale.*8-bit floats"):
        popart.InferenceSession(builder.getModelProto(), popart.DataFlow(1, [y]), models.device())
