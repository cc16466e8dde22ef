"""Every op method of every opset: the node it makes is what ONNX's schema of that opset allows; argument rules."""
from __future__ import annotations

import inspect
import json
from pathlib import Path

import numpy as np
import onnx
import popart_models as models
import pytest
from onnx import defs, helper
from popart_models import popart

TABLE = json.loads((Path(popart.__file__).parent / "_builder" / "methods.json").read_text())
CASES = [(o, name) for name, rows in TABLE.items() for row in rows for o in range(row["opsets"][0], row["opsets"][1] + 1)]
# A value that is no default, by kind; and where ONNX or PopART takes only certain ones.
VALUES = {"int": 3, "float": 0.25, "str": "x", "ints": [1, 2], "floats": [0.5, 2.0], "strs": ["a", "b"], "flag": False}
SPECIAL = {
    ("cast", "to"): "FLOAT16",
    ("constant", "value"): np.ones(2, np.float32),
    ("constantofshape", "value"): np.ones(1, np.float32),
    ("batchnormalization", "num_outputs"): 1,
}


class Named:
    """What stands for popart.DebugContext: it has a path name."""

    def getPathName(self):
        return "n"


def attributes(node):
    return {a.name: helper.get_attribute_value(a) for a in node.attribute if a.name != "__debug_info_id"}


def last_node(builder):
    return onnx.ModelProto.FromString(builder.getModelProto()).graph.node[-1]


def body(builder):
    child = builder.createSubgraphBuilder()
    child.addOutputTensor(child.aiOnnx.identity([child.addInputTensor("FLOAT", [1])]))
    return child


def call(builder, opset, name, full: bool):
    """Calls the method with its required arguments, or with all of them; (its row, what was given)."""
    row = next(r for r in TABLE[name] if r["opsets"][0] <= opset <= r["opsets"][1])
    given = {}
    for param in row["params"]:
        key, required = param[0], len(param) == 2
        if key == "args":
            given[key] = [builder.addInputTensor("FLOAT", [1]) for _ in range(max(row["inputs"][0], 1))]
        elif key == "num_outputs":
            given[key] = SPECIAL.get((name, key), 2)
        elif param[1] == "graph":
            given[key] = body(builder)
        elif required or full:
            given[key] = SPECIAL.get((name, key), VALUES.get(param[1]))
    getattr(getattr(builder, f"aiOnnxOpset{opset}"), name)(**given)
    return row, given


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("opset,name", CASES)
def test_the_node_is_one_that_the_onnx_schema_allows(opset, name, full):
    builder = popart.Builder()
    row, given = call(builder, opset, name, full)
    node, schema = last_node(builder), defs.get_schema(row["op"], opset)
    found = attributes(node)
    assert set(found) <= set(schema.attributes)
    kinds = {a.name: a.type for a in node.attribute}
    for key, attribute in schema.attributes.items():
        assert key in found or not attribute.required
        assert key not in kinds or int(kinds[key]) == attribute.type.value
    for key in set(given) & set(found):
        value = given[key]
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(onnx.numpy_helper.to_array(found[key]), value)
        elif isinstance(value, (int, float)) or (isinstance(value, list) and not isinstance(value[0], str)):
            assert found[key] == value
    if full:
        not_attributes = {"args", "num_outputs", "is_value_sparse"}
        assert set(given) - not_attributes == set(found)


@pytest.mark.parametrize("opset", range(6, 12))
def test_every_op_of_the_opset_has_a_method(opset):
    """Against ONNX's own list; what is left out is what PopART's Builder leaves out."""
    renamed = {"And": "logical_and", "Or": "logical_or", "Not": "logical_not", "Xor": "logical_xor", "If": "logical_if"}
    schemas = {s.name for s in defs.get_all_schemas_with_history() if s.domain == "" and s.since_version <= opset}
    current = {s for s in schemas if defs.has(s) and not defs.get_schema(s, opset).deprecated}
    methods = {name for o, name in CASES if o == opset}
    missing = {s for s in current if renamed.get(s, s.lower()) not in methods}
    experimental = {"ATen", "Affine", "ConstantFill", "Crop", "DynamicSlice", "GRUUnit", "GivenTensorFill", "ImageScaler",
                    "ParametricSoftplus", "Scale", "ScaledTanh", "Upsample"}  # fmt: skip
    sequences = {"SequenceAt", "SequenceConstruct", "SequenceEmpty", "SequenceErase", "SequenceInsert", "SequenceLength"}
    print(f"opset {opset}: {len(methods)} methods, without one: {sorted(missing)}")
    assert missing <= experimental | sequences | {"Range", "Optional"}


def test_a_debug_context_is_a_string_or_an_object_last_or_by_keyword():
    builder = popart.Builder()
    x = builder.addInputTensor("FLOAT", [2])
    on, gc = builder.aiOnnx, builder.aiGraphcore
    calls = (
        lambda: on.relu([x], "n"), lambda: on.relu([x], debugContext="n"), lambda: on.concat([x, x], 0, "n"),
        lambda: on.constant(np.ones(1), "n"), lambda: gc.gelu([x], "n"), lambda: gc.printtensor([x], 1, "n"),
        lambda: on.relu([x], debugContext=Named()),
    )  # fmt: skip
    for made in calls:
        made()
        assert last_node(builder).name == "n"


def test_the_constant_of_opset_11_knows_sparse_values_and_refuses_them():
    builder = popart.Builder(opsets={"ai.onnx": 11, "ai.graphcore": 1})
    builder.aiOnnx.constant(np.ones(1), False, "n")
    assert last_node(builder).name == "n"
    with pytest.raises(popart.popart_exception, match=r"[Ss]parse"):
        builder.aiOnnx.constant(np.ones(1), True)


def test_positional_order_is_popart_s():
    builder = popart.Builder()
    x, w = builder.addInputTensor("FLOAT", [1, 2, 8, 8]), builder.addInputTensor("FLOAT", [4, 1, 3, 3])
    builder.aiOnnx.conv([x, w], [1, 1], 2, [3, 3], [1, 1, 1, 1], [2, 2], "c")
    expected = {"dilations": [1, 1], "group": 2, "kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "strides": [2, 2]}
    assert attributes(last_node(builder)) == expected
    builder.aiGraphcore.slice([x], [3], [1], [2])
    assert attributes(last_node(builder)) == {"ends": [3], "starts": [1], "axes": [2]}
    builder.aiOnnx.reducesum([x], [1], 0)
    assert attributes(last_node(builder)) == {"axes": [1], "keepdims": 0}


def test_an_empty_list_of_axes_is_not_the_absence_of_axes():
    builder = popart.Builder()
    x = builder.addInputTensor("FLOAT", [2, 3])
    builder.aiOnnx.reducesum([x], [])
    assert attributes(last_node(builder)) == {"axes": []}
    builder.aiOnnx.reducesum([x])
    assert attributes(last_node(builder)) == {}
    builder.aiOnnx.conv([builder.addInputTensor("FLOAT", [1, 1, 3, 3])] * 2, pads=[])  # the default is empty
    assert attributes(last_node(builder)) == {}


def test_lists_may_be_tuples_or_numpy_arrays():
    builder = popart.Builder()
    x = builder.addInputTensor("FLOAT", [2, 3])
    builder.aiOnnx.transpose((x,), np.array([1, 0]))
    assert attributes(last_node(builder)) == {"perm": [1, 0]}
    assert builder.getTensorShape("Transpose:0") == [3, 2]


def test_every_method_states_its_parameters():
    builder = popart.Builder()
    conv = inspect.signature(builder.aiOnnx.conv)
    assert list(conv.parameters) == ["args", "dilations", "group", "kernel_shape", "pads", "strides", "debugContext"]
    assert conv.parameters["group"].default == 1
    printed = list(inspect.signature(builder.aiGraphcore.printtensor).parameters)
    assert printed[:4] == ["args", "print_gradient", "debugContext", "title"]


def test_graphcore_enumerations_are_stored_as_popart_stores_them():
    builder = popart.Builder()
    gc, x = builder.aiGraphcore, builder.addInputTensor("FLOAT", [4])
    index = builder.addInputTensor("INT32", [4])
    gc.scatterreduce([x, index], 3, 0, popart.ScatterReduction.Max)
    assert attributes(last_node(builder)) == {"axis_size": 3, "axis": 0, "reduction": 1}
    gc.identityloss([x], popart.ReductionType.NoReduction)
    assert attributes(last_node(builder)) == {"reduction": b"NoReduction"}
    gc.nllloss([x, index], reduction=popart.ReductionType.Mean, ignoreIndex=0)
    assert attributes(last_node(builder)) == {"reduction": b"Mean", "ignoreIndex": 0}
    with pytest.raises(TypeError):
        gc.identityloss([x], "Mean")
    gc.init([2], popart.DataType.FLOAT16, popart.InitType.Zero)
    assert attributes(last_node(builder)) == {"shape": [2], "data_type": onnx.TensorProto.FLOAT16, "init_type": 1}
    assert len(gc.sort([x])) == len(gc.reducemedian([x])) == 2
    assert gc.abort([x]) is None


@pytest.mark.parametrize("seed", range(3))
def test_l1_loss_of_a_session(seed):
    random = np.random.default_rng(seed)
    builder = popart.Builder()
    x = builder.addInputTensor("FLOAT", [3, 4])
    loss = builder.aiGraphcore.l1loss([x], 0.3, reduction=popart.ReductionType.Sum)
    session = popart.InferenceSession(builder.getModelProto(), popart.DataFlow(1, [loss]), models.device())
    data = random.normal(size=(3, 4)).astype(np.float32)
    found = models.run(models.started(session), **{x: data})[loss]
    np.testing.assert_allclose(found, 0.3 * np.abs(data).sum(), rtol=1e-6)
