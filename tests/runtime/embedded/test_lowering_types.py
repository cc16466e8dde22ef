"""Element types: unsigned arithmetic, refused mixtures; and the gradients of Max, Min and their reductions at ties."""
from __future__ import annotations

import operator
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "runtime" / "embedded"))
from popart._engine.ir import Op
from popart._engine.shapes import run_op
from popart.errors import popart_exception


def run(op_type, version, *inputs, domain="ai.onnx", **attrs):
    """The first output of one op."""
    return run_op(Op(domain, op_type, version, "n", tuple(f"x{i}" for i in range(len(inputs))), ("y",), attrs), inputs)[0]


UNSIGNED = {
    ("ai.onnx", "Add", 7): operator.add, ("ai.onnx", "Sub", 7): operator.sub, ("ai.onnx", "Mul", 7): operator.mul,
    ("ai.onnx", "Div", 7): operator.floordiv, ("ai.onnx", "Mod", 10): operator.mod,
    ("ai.onnx", "Greater", 9): operator.gt, ("ai.onnx", "Less", 9): operator.lt, ("ai.onnx", "Equal", 11): operator.eq,
    ("ai.onnx", "Max", 8): np.maximum, ("ai.onnx", "Min", 8): np.minimum, ("ai.onnx", "Sum", 8): operator.add,
    ("ai.graphcore", "BitwiseAnd", 1): operator.and_, ("ai.graphcore", "BitwiseOr", 1): operator.or_,
    ("ai.graphcore", "BitwiseXor", 1): operator.xor, ("ai.graphcore", "BitwiseXnor", 1): lambda a, b: ~(a ^ b),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [np.uint32, np.int32])
@pytest.mark.parametrize("key", UNSIGNED, ids=lambda key: key[1])
def test_32_bit_integers_compute_and_wrap_as_numpy_does(key, dtype):
    random = np.random.default_rng(5)
    low = 1 if dtype is np.uint32 or key[1] in ("Div", "Mod") else np.iinfo(dtype).min
    a, b = (random.integers(low, np.iinfo(dtype).max, 40, dtype=dtype) for _ in range(2))
    domain, op_type, version = key
    found = run(op_type, version, torch.from_numpy(a), torch.from_numpy(b), domain=domain).numpy()
    expected = UNSIGNED[key](a, b)
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)


def test_unary_ops_and_reductions_of_uint32():
    x = np.array([0, 1, 2**31 + 5], np.uint32)
    np.testing.assert_array_equal(run("BitwiseNot", 1, torch.from_numpy(x), domain="ai.graphcore").numpy(), ~x)
    np.testing.assert_array_equal(run("ReduceSum", 11, torch.from_numpy(x), keepdims=0).numpy(), x.sum(dtype=np.uint32))
    np.testing.assert_array_equal(run("ReduceMax", 11, torch.from_numpy(x), keepdims=0).numpy(), x.max())


@pytest.mark.parametrize("op_type, version", [
    ("Add", 7), ("Sub", 7), ("Mul", 7), ("Div", 7), ("Pow", 7), ("Max", 8), ("Min", 8), ("Sum", 8), ("Mean", 8),
    ("Greater", 9), ("Less", 9), ("Equal", 11), ("Concat", 11),
])  # fmt: skip
@pytest.mark.parametrize("other", [torch.float16, torch.int32])
def test_two_element_types_in_one_op_are_refused(op_type, version, other):
    attrs = {"axis": 0} if op_type == "Concat" else {}
    with pytest.raises(popart_exception, match=r"incompatible types FLOAT and (FLOAT16|INT32)"):
        run(op_type, version, torch.ones(3), torch.ones(3, dtype=other), **attrs)


def test_labels_that_do_not_belong_to_the_probabilities_are_refused():
    p = torch.full((4, 3), 1 / 3)
    for labels in (torch.zeros(3, dtype=torch.int32), torch.zeros(4)):
        with pytest.raises(popart_exception, match="labels must be integers"):
            run("Nll", 1, p, labels, domain="ai.graphcore")


@pytest.mark.parametrize("op_type, best", [("Max", max), ("Min", min)])
@pytest.mark.parametrize("count", [2, 3])
def test_every_equal_input_gets_the_whole_gradient(op_type, best, count):
    rows = [[1.0, 2.0, 2.0, float("inf")], [1.0, 2.0, 3.0, 5.0], [1.0, -1.0, 3.0, 7.0]][:count]
    inputs = [torch.tensor(row, requires_grad=True) for row in rows]
    out = run(op_type, 8, *inputs)
    expected = [best(column) for column in zip(*rows)]
    assert out.tolist() == expected
    out.backward(torch.tensor([10.0, 20.0, 30.0, 40.0]))
    for tensor, row in zip(inputs, rows):
        assert tensor.grad.tolist() == [g * (v == e) for g, v, e in zip([10.0, 20.0, 30.0, 40.0], row, expected)]


@pytest.mark.parametrize("op_type, function", [("ReduceMax", np.max), ("ReduceMin", np.min)])
@pytest.mark.parametrize("keepdims", [0, 1])
def test_every_equal_element_of_a_reduction_gets_the_whole_gradient(op_type, function, keepdims):
    values = np.array([[3.0, 1.0, 3.0, 1.0], [2.0, 2.0, 2.0, 2.0], [0.0, -1.0, 4.0, 4.0]], np.float32)
    x = torch.tensor(values, requires_grad=True)
    out = run(op_type, 11, x, axes=(1,), keepdims=keepdims)
    expected = function(values, axis=1, keepdims=bool(keepdims))
    np.testing.assert_array_equal(out.detach().numpy(), expected)
    out.sum().backward()
    np.testing.assert_array_equal(x.grad.numpy(), values == function(values, axis=1, keepdims=True))


@pytest.mark.parametrize("op_type, version, shapes, message", [
    ("Add", 7, [(3,), (4,)], r"np broadcasting failed, incompatible shapes \[3\] and \[4\]"),
    ("Max", 8, [(2, 3), (3, 3)], "np broadcasting failed"),
    ("Sum", 8, [(2, 3), (3,), (2,)], "np broadcasting failed"),
    ("MatMul", 9, [(2, 3), (2, 3)], "contracting dimensions unequal: lhs 'x0'"),
    ("MatMul", 9, [(3,), (2,)], "contracting dimensions unequal"),
    ("MatMul", 9, [(3,), ()], "scalar"),
])  # fmt: skip
def test_shapes_that_do_not_fit_are_refused(op_type, version, shapes, message):
    with pytest.raises(popart_exception, match=message):
        run(op_type, version, *(torch.ones(shape) for shape in shapes))


@pytest.mark.parametrize("op_type, version, shapes", [
    ("Mul", 7, [(2, 1, 3), (4, 1)]), ("Mean", 8, [(2, 1), (1, 3), ()]), ("MatMul", 9, [(3,), (5, 3, 2)]),
    ("MatMul", 9, [(4, 1, 2, 3), (5, 3, 2)]),
])  # fmt: skip
def test_shapes_that_broadcast_are_taken(op_type, version, shapes):
    random = np.random.default_rng(3)
    arrays = [random.normal(size=shape).astype(np.float32) for shape in shapes]
    reference = {"Mul": np.multiply, "Mean": lambda *a: sum(a) / len(a), "MatMul": np.matmul}[op_type]
    found = run(op_type, version, *(torch.from_numpy(np.asarray(a)) for a in arrays))
    np.testing.assert_allclose(found.numpy(), reference(*arrays), rtol=1e-5, atol=1e-6)


def test_scatter_reduce_checks_its_shapes():
    data, index = torch.ones(3, 2), torch.tensor([0, 2, 2])
    for inputs, size, message in [
        ((data, index, torch.ones(4, 2)), 5, "initial values"), ((data, index[:2]), 5, "indices"),
        ((data, index), 0, "axis_size"),
    ]:  # fmt: skip
        with pytest.raises(popart_exception, match=message):
            run("ScatterReduce", 1, *inputs, domain="ai.graphcore", axis=0, axis_size=size)
