"""The gradient of every op that has one: finite differences in float64, and half against float.

A row of ROWS: the inputs (arrays, or a function of a random generator), the attributes, the inputs that are build-time
constants. Random shapes are drawn per seed. Every registered op is in ROWS, in a test named in ELSEWHERE, or has no
gradient for the reason in NO_GRADIENT; a test checks that.
"""
from __future__ import annotations

import numpy as np
import popart_models as models  # noqa: F401  puts the package on the path
import pytest
import torch
from popart._engine import registry
from popart._engine.ir import Op
from popart._engine.shapes import run_op

SEEDS = (0, 1)


def normal(*shape):
    return lambda random: random.normal(size=shape)


def positive(*shape):
    return lambda random: random.uniform(0.3, 2.0, size=shape)


def inside(*shape):
    return lambda random: random.uniform(-0.8, 0.8, size=shape)


def apart(*shape):
    """Values at least 0.1 from each other and from 0, so that no finite difference crosses a kink."""

    def make(random):
        count = int(np.prod(shape))
        values = 0.1 * random.permutation(np.arange(1, count + 1)) * random.choice([-1, 1], count)
        return values.reshape(shape)

    return make


def index(high, *shape):
    return lambda random: random.integers(0, high, size=shape).astype(np.int64)


def ints(*values):
    return np.array(values, np.int64)


def rows(table):
    return {key: value if isinstance(value[0], list) else ([value[0]], *value[1:]) for key, value in table.items()}


# op -> (inputs, attributes, outputs asked for, build-time inputs)
ROWS = rows({
    **{op: (apart(3, 4),) for op in (
        "Abs", "Elu", "LeakyRelu", "Relu", "Selu", "Softplus", "Softsign", "Sigmoid", "Tanh", "Exp", "Erf", "Sin", "Cos",
        "Sinh", "Cosh", "Neg", "Identity", "Atan", "Asinh", "Softmax", "LogSoftmax", "Reciprocal",
        "HardSigmoid", "ReduceL1", "ReduceL2", "ReduceMax", "ReduceMin", "ReduceMean", "ReduceSum",
        "ReduceSumSquare", "ReduceLogSumExp", "Gelu", "GeluErf", "Swish", "Expm1", "Square", "Nop", "TensorRemap")},
    **{op: (positive(3, 4),) for op in ("Log", "Sqrt", "ReduceLogSum", "ReduceProd", "Log1p", "L1")},
    **{op: (inside(3, 4),) for op in ("Acos", "Asin", "Atanh", "Tan")},
    "Shrink": (apart(3, 4), {"lambd": 0.55, "bias": 0.2}),
    "ThresholdedRelu": (apart(3, 4), {"alpha": 0.55}),
    "Acosh": (lambda random: random.uniform(1.2, 3, size=(3, 4)),),
    **{op: ([normal(3, 4), apart(4)],) for op in ("Add", "Sub", "Mul", "Div", "Atan2", "AddLhsInplace")},
    "Pow": ([positive(3, 4), normal(4)],),
    **{op: ([apart(3, 4), lambda random: 0.05 + apart(3, 4)(random)],) for op in ("Max", "Min")},
    **{op: ([normal(3, 4), normal(4), normal(3, 1)],) for op in ("Sum", "Mean")},
    "Mod": ([lambda random: random.uniform(1.1, 1.9, (3, 4)), lambda random: np.ones((3, 4))], {"fmod": 1}),
    "Fmod": ([lambda random: random.uniform(1.1, 1.9, (3, 4)), lambda random: np.ones((3, 4))],),
    "Where": ([lambda random: random.integers(0, 2, (3, 4)).astype(bool), normal(3, 4), normal(3, 4)],),
    "PRelu": ([apart(3, 4), normal(4)],),
    "Clip": ([apart(3, 4), np.array(-0.35), np.array(0.75)], {}, 1, [1, 2]),
    "Cast": (normal(3, 4), {"to": "DOUBLE"}),
    "CumSum": ([normal(3, 4), ints(1)], {}, 1, [1]),
    "Concat": ([normal(2, 3), normal(1, 3)], {"axis": 0}),
    "Split": (normal(4, 3), {"axis": 0, "split": (1, 3)}, 2),
    "Slice": ([normal(4, 5), ints(0, 4), ints(3, 0), ints(0, 1), ints(1, -2)], {}, 1, [1, 2, 3, 4]),
    "Pad": ([normal(3, 4), ints(1, 2, 0, 1)], {"mode": "reflect"}, 1, [1]),
    "Expand": ([normal(3, 1), ints(2, 3, 4)], {}, 1, [1]),
    "Tile": ([normal(2, 3), ints(2, 2)], {}, 1, [1]),
    "Reshape": ([normal(3, 4), ints(2, 6)], {}, 1, [1]),
    "Flatten": (normal(2, 3, 2), {"axis": 2}),
    "Squeeze": (normal(3, 1, 2), {"axes": (1,)}),
    "Unsqueeze": (normal(3, 2), {"axes": (0, 2)}),
    "Transpose": (normal(2, 3, 4), {"perm": (2, 0, 1)}),
    "DepthToSpace": (normal(1, 8, 2, 3), {"blocksize": 2}),
    "SpaceToDepth": (normal(1, 2, 4, 6), {"blocksize": 2}),
    "Gather": ([normal(4, 3), index(4, 2, 2)], {"axis": 0}),
    "Scatter": ([normal(4, 3), lambda random: np.stack([random.permutation(4)[:2] for _ in range(3)], 1), normal(2, 3)],),
    "ScatterElements": ([normal(4, 3), lambda random: np.stack([random.permutation(4)[:2] for _ in range(3)], 1),
                         normal(2, 3)],),
    "TopK": ([apart(3, 5), ints(2)], {}, 1, [1]),
    "Conv": ([normal(1, 4, 5, 5), normal(6, 2, 3, 3), normal(6)],
             {"group": 2, "pads": (1, 0, 1, 2), "strides": (2, 1), "dilations": (1, 2)}),
    "ConvTranspose": ([normal(1, 4, 3, 3), normal(4, 2, 3, 3), normal(2)],
                      {"strides": (2, 2), "pads": (1, 1, 0, 1), "output_padding": (1, 0)}),
    "MatMul": ([normal(2, 3, 4), normal(4, 5)],),
    "Gemm": ([normal(4, 3), normal(5, 4), normal(5)], {"transA": 1, "transB": 1, "alpha": 0.5, "beta": 2.0}),
    "AveragePool": (normal(1, 2, 5, 5), {"kernel_shape": (3, 2), "strides": (2, 1), "pads": (1, 0, 1, 1)}),
    "MaxPool": (apart(1, 2, 5, 5), {"kernel_shape": (3, 2), "strides": (2, 1), "pads": (1, 0, 1, 1)}),
    "GlobalAveragePool": (normal(2, 3, 4, 2),),
    "GlobalMaxPool": (apart(2, 3, 2, 2),),
    "LRN": (normal(1, 5, 2, 2), {"size": 3}),
    "InstanceNormalization": ([normal(2, 3, 4), normal(3), normal(3)],),
    "GroupNormalization": ([normal(2, 4, 3), normal(4), normal(4)], {"num_groups": 2}),
    "BatchNormalization": ([normal(4, 3, 2), positive(3), normal(3), normal(3), positive(3)], {}, 5),
    "Resize": ([normal(1, 2, 3, 4), np.zeros(0), np.array([1, 1, 2, 1.5])], {"mode": "linear"}, 1, [1, 2]),
    "Upsample": ([normal(1, 2, 3, 4), np.array([1, 1, 2, 2.0])], {}, 1, [1]),
    "LSTM": ([normal(3, 2, 2), normal(1, 8, 2), normal(1, 8, 2), normal(1, 16)], {}, 3),
    "GRU": ([normal(3, 2, 2), normal(1, 6, 2), normal(1, 6, 2), normal(1, 12)], {}, 2),
    "RNN": ([normal(3, 2, 2), normal(1, 2, 2), normal(1, 2, 2), normal(1, 4)], {}, 2),
    "IdentityLoss": (normal(3, 4), {"reduction": "Mean"}),
    "Nll": ([lambda random: random.dirichlet(np.ones(5), 3) * 0.9 + 0.02, index(5, 3)], {"reduction": "Sum"}),
    "AddBias": ([normal(2, 3, 4), normal(3)],),
    "BinaryConstScalar": (normal(3, 4), {"op": "Mul", "value": 1.5}),
    "ConvFlipWeights": (normal(4, 2, 3, 3), {"group": 2}),
    "DynamicSlice": ([normal(5, 3), ints(1)], {"axes": (0,), "sizes": (2,)}),
    "DynamicUpdate": ([normal(5, 3), ints(1), normal(2, 3)], {"axes": (0,), "sizes": (2,)}),
    "DynamicAdd": ([normal(5, 3), ints(1), normal(2, 3)], {"axes": (0,), "sizes": (2,)}),
    "DynamicZero": ([normal(5, 3), ints(1)], {"axes": (0,), "sizes": (2,)}),
    "GroupedGather": ([normal(2, 4, 3), index(4, 2, 2)], {"axis": 1, "group_size": 2}),
    "ScatterReduce": ([normal(5, 3), index(4, 5, 3), normal(4, 3)], {"axis": 0, "axis_size": 4, "reduction": 0}),
    "MultiConv": ([normal(1, 2, 4), normal(3, 2, 3), normal(3)], {"pads": (1, 1)}),
    "ReduceMedian": (apart(3, 5), {"axes": (1,)}),
    "Reverse": (normal(3, 4), {"dimensions": (0,)}),
    "Scale": (normal(3, 4), {"scale": 0.5}),
    "ScaledAdd": ([normal(3, 4), normal(3, 4)], {"scale0": 0.5, "scale1": 2.0}),
    "SequenceSlice": ([normal(4, 2), normal(5, 2), ints(2), ints(1), ints(3)],),
    "Sort": (apart(3, 5), {"axis": 1}),
    "SplineBasis": ([lambda random: random.uniform(0.05, 0.2, (3, 2)), ints(4, 4), ints(1, 1)], {"degree": 2}),
    "SplineWeighting": ([normal(3, 2), normal(5, 2, 3), normal(3, 4), index(5, 3, 4)],),
    "Subsample": (normal(4, 4), {"strides": (2, 3)}),
})  # fmt: skip
ROWS["L1"] = ([apart(3, 4)], {"lambda": 0.3, "reduction": "Mean"})
ELSEWHERE = {
    "Dropout": "test_dropout_and_its_gradient below", "ShapedDropout": "test_dropout_and_its_gradient below",
    "Ctc": "test_lowering_sequences", "PackedDataBlock": "test_lowering_sequences", "PrintTensor": "test_lowering_graphcore",
    "Call": "test_control_flow", "If": "test_control_flow", "Loop": "test_control_flow", "Scan": "test_control_flow",
    "ReplicatedAllReduce": "test_replication", "RoiAlign": "test_lowering_custom_ops", "roiAlign": "test_lowering_custom_ops",
    "roi_align": "test_lowering_custom_ops",
}  # fmt: skip
NO_GRADIENT = {
    "integers or booleans": "And ArgMax ArgMin BitwiseAnd BitwiseNot BitwiseOr BitwiseXnor BitwiseXor Bucketize Equal "
    "Greater Histogram IsInf IsNaN Less Not Or OneHot",
    "flat almost everywhere": "Ceil Floor Round NearbyInt Sign Detach",
    "PopART has none": "CopyVarUpdate CtcBeamSearchDecoder IncrementMod NormalizeImage Remainder UnaryZeroGrad nms Abort "
    "AllReduce ReplicatedAllGather ReplicatedAllReduceInplace ReplicatedReduceScatter",
    "makes a tensor": "Init RandomNormal RandomNormalLike RandomUniform RandomUniformLike Zeros ZerosLike",
    "refused by name": "AutoLossScaleProxy CastThenPow2Scale HostLoad HostStore LossScaleUpdate Pow2ScaleThenCast "
    "RemoteCodeLoad RemoteLoad RemoteLoadInplace RemoteStore",
}  # fmt: skip


def make(name, seed, dtype):
    """(Op at its newest version, torch inputs)."""
    defaults = (None, {}, 1, [])
    inputs, attributes, outputs, constant = (*ROWS[name], *defaults[len(ROWS[name]) :])
    random = np.random.default_rng([seed, *name.encode()])
    arrays = [value(random) if callable(value) else value for value in inputs]
    domain = "ai.onnx" if ("ai.onnx", name) in registry.registered() else "ai.graphcore"
    version = max(registry.registered()[domain, name])
    op = Op(
        domain, name, version, name, tuple(f"i{k}" for k in range(len(arrays))), tuple(f"o{k}" for k in range(outputs)),
        dict(attributes), constants={k: arrays[k] for k in constant}, explicit=len(arrays),
    )  # fmt: skip
    tensors = []
    for array in arrays:
        tensor = torch.tensor(array)
        tensors.append(tensor.to(dtype) if tensor.is_floating_point() else tensor)
    return op, tensors, [k for k, t in enumerate(tensors) if t.is_floating_point() and k not in constant]


def float_outputs(op, tensors):
    return tuple(t for t in run_op(op, tensors) if t.is_floating_point() and t.requires_grad)


@pytest.fixture(autouse=True)
def double_can_be_cast_to(monkeypatch):
    from popart._engine.lowering import elementwise

    monkeypatch.setitem(elementwise._TORCH_TYPES, "DOUBLE", torch.float64)


@pytest.fixture(autouse=True)
def doubles_stay_double(monkeypatch):
    """Ops that compute in float whatever comes in (PopLibs' float statistics) compute in double here."""
    monkeypatch.setattr(torch.Tensor, "float", lambda t: t if t.dtype == torch.float64 else t.to(torch.float32))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", sorted(ROWS))
def test_gradients_are_finite_differences(name, seed):
    op, tensors, trained = make(name, seed, torch.float64)

    def function(*leaves):
        given = list(tensors)
        for k, leaf in zip(trained, leaves):
            given[k] = leaf
        return float_outputs(op, given)

    leaves = [tensors[k].clone().requires_grad_(True) for k in trained]
    assert torch.autograd.gradcheck(function, leaves, eps=1e-6, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", sorted(set(ROWS) - {"Cast", "SplineBasis"}))
def test_half_gradients_are_the_float_ones_rounded(name):
    found = {}
    for dtype in (torch.float32, torch.float16):
        op, tensors, trained = make(name, 0, torch.float16)
        tensors = [t.to(dtype).requires_grad_(True) if k in trained else t for k, t in enumerate(tensors)]
        outputs = float_outputs(op, tensors)
        seeds = [torch.full_like(t, 0.5) for t in outputs]
        gradients = torch.autograd.grad(outputs, [tensors[k] for k in trained], seeds, allow_unused=True)
        found[dtype] = [torch.zeros(1) if g is None else g.float() for g in gradients]
    for half, whole in zip(found[torch.float16], found[torch.float32]):
        torch.testing.assert_close(half, whole, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("op_type, attributes", [
    ("Dropout", {"ratio": 0.4}), ("ShapedDropout", {"ratio": 0.4, "shape": (50, 1)}),
])  # fmt: skip
def test_dropout_and_its_gradient(op_type, attributes):
    domain = "ai.onnx" if op_type == "Dropout" else "ai.graphcore"
    version = max(registry.registered()[domain, op_type])
    op = Op(domain, op_type, version, "", ("x",), ("y",), attributes)
    x = torch.ones(50, 40, requires_grad=True)
    (y,) = run_op(op, [x])[:1]
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, y.detach())  # y = x * mask / (1 - ratio) with x = 1
    assert y.unique().tolist() == pytest.approx([0.0, 1 / 0.6])
    assert 0.3 < (y == 0).float().mean() < 0.5 or op_type == "ShapedDropout"


def test_every_registered_op_is_tested_or_has_a_reason():
    none = {name for names in NO_GRADIENT.values() for name in names.split()}
    known = {*ROWS, *ELSEWHERE, *none}
    registered = {name for domain, name in registry.registered() if domain.startswith("ai.")}
    assert registered - known == set()
    assert known - registered == set()
    assert not none & ({*ROWS} | {*ELSEWHERE})
