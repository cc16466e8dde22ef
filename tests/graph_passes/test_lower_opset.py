"""lower_opset keeps the numbers and reaches opset 11, or refuses by name."""
import numpy as np
import onnx
import pytest
from pass_graphs import INFER, apply, model_from, ops, rewritten, run

from graph_passes import lower_opset
from graph_passes.fallbacks import expand_fallbacks
from graph_passes.graph_io import load_graph
from graph_passes.invariants import check
from graph_passes.lower_opset import NEW_ATTRIBUTES, RELABEL, REWRITE, LowerOpset
from runtime.errors import GraphError

INTS = "int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}, int64[1] last = {-1}, " \
       "int64[2] both = {0,2}, int64[0] none = {}"
FLOAT = "float[2,3,4] x"
SAME = "float[2,3,4] y"

# name -> (inputs, outputs, body, op types afterwards, source opsets)
CASES = {
    "squeeze": ("float[1,3,1] x", "float[3,1] y", "y = Squeeze(x, zero)", ["Squeeze"]),
    "squeeze all": ("float[1,3,1] x", "float[3] y", "y = Squeeze(x)", ["Squeeze"]),
    "unsqueeze": (FLOAT, "float[1,2,1,3,4] y", "y = Unsqueeze(x, both)", ["Unsqueeze"]),
    "reduce sum": (FLOAT, "float[2,3,1] y", "y = ReduceSum(x, last)", ["ReduceSum"]),
    "reduce sum of all": (FLOAT, "float y", "y = ReduceSum<keepdims=0>(x)", ["ReduceSum"]),
    "reduce sum of none": (FLOAT, SAME, "a = ReduceSum<noop_with_empty_axes=1>(x, none)\ny = Neg(a)", ["Neg"]),
    "reduce max": (FLOAT, "float[2,3] y", "y = ReduceMax<keepdims=0>(x, two)", ["ReduceMax"]),
    "reduce int": ("int32[2,3] x", "int32[2] y", "y = ReduceSum<keepdims=0>(x, one)", ["ReduceSum"]),
    "split by sizes": (FLOAT, "float[2,1,4] y, float[2,2,4] z", "y, z = Split<axis=1>(x, sizes)", ["Split"]),
    "split evenly": (FLOAT, "float[2,2,4] y, float[2,1,4] z", "y, z = Split<axis=1, num_outputs=2>(x)", ["Split"]),
    "softmax last": (FLOAT, SAME, "y = Softmax(x)", ["Softmax"]),
    "softmax middle": (FLOAT, SAME, "y = Softmax<axis=1>(x)", ["Transpose", "Softmax", "Transpose"]),
    "softmax first": (FLOAT, SAME, "y = Softmax<axis=-3>(x)", ["Transpose", "Softmax", "Transpose"]),
    "softmax before ones": ("float[2,3,1] x", "float[2,3,1] y", "y = Softmax<axis=1>(x)", ["Softmax"]),
    "log softmax middle": (FLOAT, SAME, "y = LogSoftmax<axis=1>(x)", ["Transpose", "LogSoftmax", "Transpose"]),
    "hardmax": (FLOAT, SAME, "y = Hardmax<axis=1>(x)", ["Transpose", "Hardmax", "Transpose"]),
    "clip": (FLOAT, SAME, "y = Clip(x, low, high)", ["Clip"]),
    "clip int": ("int32[2,3] x", "int32[2,3] y", "y = Clip(x, low_int, high_int)", ["Less", "Where", "Greater", "Where"]),
    "clip int one side": ("int32[2,3] x", "int32[2,3] y", "y = Clip(x, , high_int)", ["Greater", "Where"]),
    "max": (FLOAT, SAME, "y = Max(x, low)", ["Max"]),
    "max of three ints": ("int32[2,3] x, int32[3] b", "int32[2,3] y", "y = Max(x, b, low_int)", ["Greater", "Where"] * 2),
    "min int": ("int32[2,3] x, int32[3] b", "int32[2,3] y", "y = Min(x, b)", ["Less", "Where"]),
    "greater or equal": ("float[2,3] x, float[3] b", "bool[2,3] y", "y = GreaterOrEqual(x, b)", ["Greater", "Equal", "Or"]),
    "less or equal int": ("int32[2,3] x, int32[3] b", "bool[2,3] y", "y = LessOrEqual(x, b)", ["Greater", "Not"]),
    "greater or equal int": ("int32[2,3] x, int32[3] b", "bool[2,3] y", "y = GreaterOrEqual(x, b)", ["Less", "Not"]),
    "reshape": (FLOAT, "float[6,4] y", "y = Reshape<allowzero=1>(x, six_four)", ["Reshape"]),
    "pad two axes": (FLOAT, "float[5,3,5] y", "y = Pad(x, pads, high, both)", ["Pad"]),
    "pad negative axis": (FLOAT, "float[2,3,7] y", "y = Pad(x, pads2, , last)", ["Pad"]),
    "power": (FLOAT, SAME, "y = Pow(x, three_int)", ["Cast", "Pow"]),
    "relu": (FLOAT, SAME, "y = Relu(x)", ["Relu"]),
    "relu int": ("int32[2,3] x", "int32[2,3] y", "y = Relu(x)", ["Less", "Where"]),
    "constant": (FLOAT, SAME, "c = Constant<value_float=2.0>()\ny = Mul(x, c)", ["Constant", "Mul"]),
    "cast like": (FLOAT, "int32[2,3,4] y", "y = CastLike(x, low_int)", ["Cast"]),
    "arg max": (FLOAT, "int64[2,3,1] y", "y = ArgMax<axis=2, select_last_index=0>(x)", ["ArgMax"]),
    "batch norm": (FLOAT, SAME, "y = BatchNormalization<training_mode=0>(x, p, p, p, p)", ["BatchNormalization"]),
    "dropout": (FLOAT, SAME, "a = Dropout(x)\ny = Neg(a)", ["Neg"]),
    "hard swish": (FLOAT, SAME, "y = HardSwish(x)", ["HardSigmoid", "Mul"]),
    "mish": (FLOAT, SAME, "y = Mish(x)", ["Softplus", "Tanh", "Mul"]),
    "celu": (FLOAT, SAME, "y = Celu<alpha=0.7>(x)", ["Div", "Elu", "Mul"]),
    "layer norm": (FLOAT, SAME, "y = LayerNormalization<axis=-1>(x, four, four)",
                   ["ReduceMean", "Sub", "Mul", "ReduceMean", "Add", "Sqrt", "Div", "Mul", "Add"]),
    "layer norm of two axes": (FLOAT, SAME, "y = LayerNormalization<axis=1>(x, table)",
                               ["ReduceMean", "Sub", "Mul", "ReduceMean", "Add", "Sqrt", "Div", "Mul"]),
    "triangle": (FLOAT, SAME, "y = Trilu<upper=0>(x, one0)", ["Where"]),
    "old roi align": ("float[1,2,8,8] x, float[3,4] r", "float[3,2,2,2] y",
                      'y = RoiAlign<sampling_ratio=2, output_height=2, output_width=2, '
                      'coordinate_transformation_mode="output_half_pixel">'
                      "(x, r, images)", ["RoiAlign"]),
    "average pool": ("float[1,2,8,8] x", "float[1,2,4,4] y", "y = AveragePool<kernel_shape=[2,2], strides=[2,2]>(x)",
                     ["AveragePool"]),
}
CONSTANTS = INTS + """, int64[2] sizes = {1,2}, float low = {-0.5}, float high = {0.25}, int32 low_int = {-2},
    int32 high_int = {3},
    int64[2] six_four = {6,4}, int64[4] pads = {1,0,2,1}, int64[2] pads2 = {2,1}, int64 three_int = {3},
    float[3] p = {0.5,1.0,2.0},
    float[4] four = {0.5,1.0,2.0,-1.0}, float[3,4] table = {1,2,3,4,5,6,7,8,9,10,11,12}, int64 one0 = {1},
    int64[3] images = {0,0,0}"""


@pytest.mark.parametrize("name", CASES)
def test_the_op_in_opset_11_gives_the_same_numbers(name):
    inputs, outputs, body, expected = CASES[name]
    lowered = rewritten(model_from(f"({inputs}) => ({outputs})", body, CONSTANTS), LowerOpset(), rtol=1e-5)
    assert ops(lowered) == expected
    assert [(o.domain, o.version) for o in lowered.opset_import if not o.domain] == [("", 11)]
    assert lowered.ir_version == 6
    onnx.checker.check_model(expand_fallbacks(lowered), full_check=True)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_of_opset_20(approximate):
    model = model_from(f"({FLOAT}) => ({SAME})", f'y = Gelu<approximate = "{approximate}">(x)', opset=20)
    assert "Gelu" not in ops(rewritten(model, LowerOpset(), rtol=1e-5))


def test_saturate_of_opset_19_is_dropped():
    model = model_from(f"({FLOAT}) => (int32[2,3,4] y)", "y = Cast<to = 6, saturate = 1>(x)", opset=19)
    assert not [a for a in rewritten(model, LowerOpset()).graph.node[0].attribute if a.name == "saturate"]


@pytest.mark.parametrize("opset", [12, 13, 14, 15, 16, 17, 18, 19, 20, 21])
def test_every_opset_up_to_21_is_read_with_its_own_meaning(opset):
    body = "a = Softmax(x)\nb = Relu(a)\ny = Transpose<perm=[2,0,1]>(b)"
    lowered = rewritten(model_from(f"({FLOAT}) => (float[4,2,3] y)", body, opset=opset), LowerOpset())
    (softmax,) = [node for node in lowered.graph.node if node.op_type == "Softmax"]
    # before 13 Softmax flattens from its default axis 1 on, and stays; since 13 it means the last axis
    assert [a.i for a in softmax.attribute if a.name == "axis"] == ([] if opset == 12 else [2])


def test_nan_compares_as_before():
    model = model_from("(float[4] x, float[4] b) => (bool[4] y, bool[4] z)", "y = GreaterOrEqual(x, b)\nz = LessOrEqual(x, b)")
    feeds = {"x": np.array([np.nan, 1, np.nan, 2], np.float32), "b": np.array([1, np.nan, np.nan, 2], np.float32)}
    rewritten(model, LowerOpset(), feeds=feeds)


REFUSED = {
    "einsum": (FLOAT, "float[2,3,2] y", 'y = Einsum<equation = "bij,cij->bic">(x, x)',
               "write it as Transpose, Reshape and MatMul"),
    "resize": ("float[1,1,2,2] x", "float[1,1,4,4] y", "y = Resize(x, , scales)", "Resize-18 has no form in opset 11"),
    "grid sample": ("float[1,1,2,2] x, float[1,2,2,2] g", "float[1,1,2,2] y", "y = GridSample(x, g)",
                    "write the sampling as Gather"),
    "bitwise": ("int32[2] x", "int32[2] y", "y = BitwiseNot(x)", "BitwiseNot-18 has no form"),
    "integer power": ("int32[2] x", "int32[2] y", "y = Pow(x, three32)", "power of integers"),
    "half pixel roi align": ("float[1,2,8,8] x, float[3,4] r", "float[3,2,1,1] y", "y = RoiAlign(x, r, images)",
                             "sampling_ratio is 0"),
    "last arg max": (FLOAT, "int64[2,3,1] y", "y = ArgMax<axis=2, select_last_index=1>(x)", "select_last_index = 1"),
    "scatter add": ("float[3] x, int64[1] i, float[1] u", "float[3] y", 'y = ScatterElements<reduction = "add">(x, i, u)',
                    "reduction = add"),
    "training batch norm": (FLOAT, SAME + ", float[3] m, float[3] v",
                            "y, m, v = BatchNormalization<training_mode=1>(x, p, p, p, p)", "batch statistics"),
    "training dropout": (FLOAT, SAME, "y = Dropout(x, ratio, on)", "drops at random"),
    "computed axes": ("float[1,3] x, int64[1] a", "float[3] y", "y = Squeeze(x, a)", "axes is computed at run time"),
    "layer norm's mean": (FLOAT, SAME + ", float[2,3,1] m", "y, m = LayerNormalization(x, four)",
                          "mean or inverse deviation is used"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_opset_11_cannot_say_is_refused_naming_node_module_and_remedy(name):
    inputs, outputs, body, reason = REFUSED[name]
    constants = CONSTANTS + ", float[4] scales = {1,1,2,2}, int32 three32 = {3}, float ratio = {0.5}, bool on = {1}"
    with pytest.raises(GraphError, match=r"\(module roi_head\.layer4\)") as caught:
        apply(model_from(f"({inputs}) => ({outputs})", body, constants, module="roi_head.layer4"), [LowerOpset()])
    assert reason in str(caught.value)


def test_wrap_padding_and_16_bit_integers_are_refused():
    wrap = model_from("(float[4] x) => (float[6] y)", 'y = Pad<mode = "wrap">(x, pads)', "int64[2] pads = {1,1}", opset=19)
    with pytest.raises(GraphError, match="pads by wrapping"):
        apply(wrap, [LowerOpset()])
    with pytest.raises(GraphError, match=r"tensor\(int16\), which opset 11 does not take"):
        apply(model_from("(int16[4] x) => (int16[4] y)", "y = Add(x, x)"), [LowerOpset()])


@pytest.mark.parametrize("opset", [10, 22])
def test_an_opset_outside_11_to_21_is_refused(opset):
    with pytest.raises(GraphError, match=f"imports ai.onnx {opset}"):
        apply(model_from(f"({FLOAT}) => ({SAME})", "y = Relu(x)", opset=opset), [LowerOpset()])


def test_opset_11_is_left_alone():
    _, (record,) = apply(model_from(f"({FLOAT}) => ({SAME})", "y = Relu(x)", opset=11), [LowerOpset()])
    assert record.changed == 0 and record.notes == ["already opset 11"]


def test_every_changed_op_of_opsets_12_to_21_is_in_a_table_or_refused_on_purpose():
    """A new op type in onnx must be classified by a person, not fall through."""
    changed = set()
    for schema in onnx.defs.get_all_schemas_with_history():
        if schema.domain == "" and 11 < schema.since_version <= 21 and not schema.deprecated:
            changed.add(schema.name)
    refused = changed - RELABEL - set(REWRITE)
    assert refused == {
        "AffineGrid", "Bernoulli", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "BlackmanWindow", "CenterCropPad",
        "Col2Im", "DFT", "DeformConv", "DequantizeLinear", "Einsum", "GridSample", "GroupNormalization", "HammingWindow",
        "HannWindow", "If", "ImageDecoder", "Loop", "MelWeightMatrix", "NegativeLogLikelihoodLoss", "Optional",
        "OptionalGetElement", "OptionalHasElement", "QLinearMatMul", "QuantizeLinear", "RegexFullMatch", "Resize", "STFT",
        "Scan",
        "SequenceMap", "SoftmaxCrossEntropyLoss", "StringConcat", "StringSplit"}
    assert not RELABEL & set(REWRITE) and {op for op, _ in NEW_ATTRIBUTES} <= RELABEL


def test_the_invariant_names_ops_that_are_too_new():
    graph = load_graph(model_from("(float[2] x) => (float[2] y)", "a = HardSwish(x)\ny = Neg(a)", opset=18))
    assert "expected 11" in check("opset_11", graph, INFER)[0]
    lower_opset._set_opset(graph)
    assert "opset 11 has no HardSwish" in check("opset_11", graph, INFER)[0]


def test_numbers_of_a_mixed_graph_with_a_custom_op():
    model = model_from("(float[1,6] s, float[1,6,4] b) => (float[3] y)", """
        s2, b2, k = ai.graphcore.nms<threshold=0.5, numDetections=3>(s, b)
        m = ReduceMax<keepdims=0>(b2, two)
        y = Squeeze(m, zero)""", INTS)
    lowered = rewritten(model, LowerOpset())
    assert run(lowered)["y"].shape == (3,)
