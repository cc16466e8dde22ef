"""narrow_integers computes in int32 and leaves what ONNX wants as int64."""
import numpy as np
import pytest
from pass_graphs import apply, model_from, ops, run

from graph_passes.narrow_integers import NarrowIntegers
from runtime.errors import GraphError


def _types(model):
    return {info.name: info.type.tensor_type.elem_type for info in (*model.graph.value_info, *model.graph.output)}


def _narrowed(signature, body, constants="", changed=None):
    model = model_from(signature, body, constants, opset=11)
    result, (record,) = apply(model, [NarrowIntegers()])
    assert changed is None or record.changed == changed
    again, (second,) = apply(result, [NarrowIntegers()])
    assert second.changed == 0 and ops(again) == ops(result)
    for seed in range(3):
        before, after = run(model, seed=seed), run(result, seed=seed)
        for name in before:
            np.testing.assert_array_equal(after[name], before[name])
    return result


def test_a_detour_over_int64_goes():
    result = _narrowed("(int32[3] x) => (int32[3] y)", "a = Cast<to=7>(x)\nb = Mul(a, c)\nd = Cast<to=6>(b)\ny = Neg(d)",
                       "int64 c = {3}")
    assert ops(result) == ["Mul", "Neg"] and 7 not in _types(result).values()


def test_a_cast_that_is_the_graphs_output_keeps_its_name():
    result = _narrowed("(int32[3] x) => (int32[3] y)", "a = Cast<to=7>(x)\ny = Cast<to=6>(a)")
    assert result.graph.output[0].name == "y" and 7 not in _types(result).values()


def test_comparisons_selections_and_fills_are_narrowed():
    result = _narrowed("(float[3] x) => (int32[3] y)", """
        a = Cast<to=7>(x)
        z = ConstantOfShape<value = int64[1] {7}>(n)
        l = Less(a, zero)
        w = Where(l, z, a)
        y = Cast<to=6>(w)""", "int64[1] n = {3}, int64 zero = {0}")
    assert [name for name, kind in _types(result).items() if kind == 7] == []


def test_indices_of_topk_and_argmax_keep_their_type_and_are_cast_for_their_readers():
    result = _narrowed("(float[2,5] x) => (int32[2,2] y, int32[2,1] z)", """
        v, i = TopK(x, k)
        j = Add(i, one)
        y = Cast<to=6>(j)
        m = ArgMax<axis=1>(x)
        z = Cast<to=6>(m)""", "int64[1] k = {2}, int64 one = {1}")
    assert sorted(name for name, kind in _types(result).items() if kind == 7) == ["i", "m"]
    assert ops(result) == ["TopK", "Cast", "Add", "ArgMax", "Cast"]


def test_shapes_and_slice_bounds_stay_int64_constants():
    result = _narrowed("(float[4,6] x) => (float[3,4] y)", "a = Slice(x, zero, end, axis)\ny = Reshape(a, shape)",
                       "int64[1] zero = {0}, int64[1] end = {2}, int64[1] axis = {0}, int64[2] shape = {3,4}", changed=0)
    assert {t.data_type for t in result.graph.initializer} == {7}


def test_a_computed_index_is_narrowed_for_gather():
    result = _narrowed("(float[4] x, int32[2] i) => (float[2] y)",
                       "a = Cast<to=7>(i)\nb = Abs(a)\nc = Where(big, zero, b)\ny = Gather(x, d)\nd = Where(over, zero, c)",
                       "int64 zero = {0}, bool[2] big = {0,0}, bool[2] over = {1,1}")
    assert 7 not in _types(result).values()


def test_a_constant_beyond_32_bits_is_refused():
    model = model_from("(int32[3] x) => (int32[3] y)", "a = Cast<to=7>(x)\nb = Add(a, c)\ny = Cast<to=6>(b)",
                       "int64 c = {4294967296}", opset=11)
    with pytest.raises(GraphError, match=r"Add .*the constant 4294967296 does not fit 32 bits"):
        apply(model, [NarrowIntegers()])


def test_an_int64_output_of_the_graph_becomes_int32_and_is_named():
    model = model_from("(float[3] x) => (int64[3] y)", "y = Cast<to=7>(x)", opset=11)
    result, (record,) = apply(model, [NarrowIntegers()])
    assert _types(result)["y"] == 6 and record.notes[1] == "graph outputs now int32: y"


def test_an_int64_input_of_the_graph_is_cast():
    result = _narrowed("(int64[3] x) => (int32[3] y)", "a = Add(x, x)\ny = Cast<to=6>(a)")
    assert ops(result) == ["Cast", "Add"]
