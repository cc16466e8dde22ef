"""Every lowering against ONNX's own node tests (onnx.backend.test): the cases that opset 11 and PopART can express."""
from __future__ import annotations

import warnings
from collections import Counter

import numpy as np
import onnx
import popart_models as models
import pytest
import torch
from onnx import defs
from popart._engine import registry
from popart._engine.ir import Op, _attribute
from popart._engine.shapes import run_op
from torch._subclasses.fake_tensor import FakeTensorMode

OPSET = 11
DEVICE_TYPES = {"float32", "float16", "int32", "int64", "int16", "int8", "uint8", "bool"}
# Case name (or its beginning, with *) -> why opset 11 or PopART cannot express it.
NOT_EXPRESSIBLE = {
    "test_clip_min_greater_than_max*": "Clip-11 leaves min > max open",
    "test_maxpool_2d_uint8": "PopART pools floats only",
    "test_maxpool_with_argmax*": "PopART's MaxPool has no Indices",
    "test_maxpool_2d_dilations": "PopART pools with dilations of 1 only",
    "test_maxpool_3d_dilations*": "PopART pools with dilations of 1 only",
    "test_mod_float16_mixed_sign_fmod_0": "Mod-10 of floats needs fmod=1",
    "test_mod_float32_mixed_sign_fmod_0": "Mod-10 of floats needs fmod=1",
    "test_mod_float_edge_cases_fmod_0*": "Mod-10 of floats needs fmod=1",
    "test_pow_types_float32_int64": "two element types in one Pow are newer than opset 11",
    "test_pow_types_int64_float32": "two element types in one Pow are newer than opset 11",
    "test_pow_types_float32_int32": "two element types in one Pow are newer than opset 11",
    "test_pow_types_int32_float32": "two element types in one Pow are newer than opset 11",
    "test_wrap_pad": "the mode wrap is newer than opset 11",
    "test_reduce_max_empty_set_bool": "reducing booleans is newer than opset 11",
    "test_resize_downsample_scales_linear_align_corners": "onnxruntime, our reference, rounds the output length first",
    "test_resize_downsample_scales_cubic_align_corners": "onnxruntime, our reference, rounds the output length first",
    "test_resize_upsample_scales_cubic_A_n0p5_exclude_outside": "PopART refuses exclude_outside=1",
    "test_resize_downsample_scales_cubic_A_n0p5_exclude_outside": "PopART refuses exclude_outside=1",
    "test_resize_tf_crop_and_resize*": "the embedded runtime refuses tf_crop_and_resize",
    "test_resize_downsample_scales_linear_half_pixel_symmetric": "half_pixel_symmetric is newer than opset 11",
    "test_resize_upsample_scales_linear_half_pixel_symmetric": "half_pixel_symmetric is newer than opset 11",
    "test_lstm_reverse": "PopART's LSTM runs forward only",
    "test_lstm_bidirectional": "PopART's LSTM runs forward only",
    "test_simple_rnn_reverse": "PopART's RNN runs forward only",
    "test_simple_rnn_bidirectional": "PopART's RNN runs forward only",
    "test_lstm_with_peepholes": "PopART's LSTM has no peepholes",
    "test_scan_sum": "Scan-8 is older than PopART's Scan",
    "test_loop11": "its Slice has a length that depends on data, which PopART cannot have",
    "test_loop13_seq": "sequences are newer than opset 10 allows in PopART",
    "test_loop16_seq_none": "sequences and optionals do not exist in PopART",
    "test_if_opt": "optionals do not exist in PopART",
    "test_if_seq": "sequences do not exist in PopART",
    "test_split_1d_uneven_split_opset18": "uneven splits without sizes are newer than opset 11",
    "test_split_2d_uneven_split_opset18": "uneven splits without sizes are newer than opset 11",
}
CONTROL_FLOW = {"If", "Loop", "Scan"}
MOVED_TO_ATTRIBUTE = {"Squeeze": "axes", "Unsqueeze": "axes", "Split": "split"}  # an input since opset 13


class NotExpressible(Exception):
    """Why a case cannot be asked of an opset 11 op."""


def _cases():
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases = collect_testcases(None)
    known = {op_type for domain, op_type in registry.registered() if domain == "ai.onnx"}
    return [c for c in cases if len(c.model.graph.node) == 1 and c.model.graph.node[0].op_type in known]


def _to_opset_11(case):
    """(Op, input arrays, expected arrays) of a case, or NotExpressible."""
    node = case.model.graph.node[0]
    inputs, expected = (list(part) for part in case.data_sets[0])
    if not all(isinstance(a, np.ndarray) for a in [*inputs, *expected]):
        raise NotExpressible("not dense tensors of a type that numpy has (float8, bfloat16, sequences)")
    for array in [*inputs, *expected]:
        if array.dtype.name not in DEVICE_TYPES:
            raise NotExpressible(f"PopART has no {array.dtype.name}")
        if array.size == 0 and array.dtype.kind == "f" and node.op_type not in ("Resize", "Upsample"):
            raise NotExpressible("empty tensors do not exist in PopART")
    attrs = {a.name: _attribute(a) for a in node.attribute}
    names, arrays = list(node.input), dict(zip([n for n in node.input if n], inputs))
    if (node.op_type in MOVED_TO_ATTRIBUTE or node.op_type.startswith("Reduce")) and len(names) > 1:
        attrs[MOVED_TO_ATTRIBUTE.get(node.op_type, "axes")] = tuple(int(v) for v in arrays[names.pop()])
    if node.op_type == "Split":
        attrs.pop("num_outputs", None)
    if attrs.pop("noop_with_empty_axes", 0) and not attrs.get("axes"):
        raise NotExpressible("noop_with_empty_axes is newer than opset 11")
    version = registry.lookup("ai.onnx", node.op_type, 9 if node.op_type == "Upsample" else OPSET)
    _check_schema(node, attrs, names, version, len(inputs[0].shape) if inputs else 0)
    constants = {i: arrays[n] for i, n in enumerate(names) if n}
    op = Op("ai.onnx", node.op_type, version, case.name, tuple(names), tuple(node.output), attrs, constants=constants)
    return op, [arrays.get(n) for n in names], expected


def _check_schema(node, attrs, names, version, rank):
    schema = defs.get_schema(node.op_type, version)
    for name in attrs:
        if name not in schema.attributes and attrs[name]:
            raise NotExpressible(f"the attribute {name} is newer than opset {OPSET}")
    for name in [n for n in attrs if n not in schema.attributes]:
        del attrs[name]
    if len(names) > schema.max_input:
        raise NotExpressible(f"its input {schema.max_input} is newer than opset {OPSET}")
    if node.op_type in ("Softmax", "LogSoftmax"):
        axis = attrs.setdefault("axis", -1)  # the default since opset 13
        if axis not in (-1, rank - 1):
            raise NotExpressible("since opset 13 only the axis itself is normalised, before it the axes behind it too")


def _named_reason(name):
    for pattern, reason in NOT_EXPRESSIBLE.items():
        if name == pattern or (pattern.endswith("*") and name.startswith(pattern[:-1])):
            return reason
    return None


CASES = _cases()


def _run(case):
    """None when the lowering agrees, else why the case was not asked."""
    reason = _named_reason(case.name)
    if reason:
        return reason
    if case.model.graph.node[0].op_type in CONTROL_FLOW:
        return _run_in_a_session(case)
    try:
        op, arrays, expected = _to_opset_11(case)
    except NotExpressible as error:
        return str(error)
    tensors = [None if a is None else torch.from_numpy(np.array(a)) for a in arrays]
    with torch.no_grad():  # inference: Dropout passes everything
        results = run_op(op, tensors)
    _check_fake(op, tensors, results)
    for result, wanted in zip([r for r, name in zip(results, op.outputs) if name], expected):
        actual = result.numpy()
        if wanted.dtype != np.int64:
            assert actual.dtype == wanted.dtype
        assert actual.shape == wanted.shape
        if wanted.dtype.kind == "f":
            rtol = max(case.rtol, 2e-3 if wanted.dtype == np.float16 else 0)
            np.testing.assert_allclose(actual, wanted, rtol=rtol, atol=max(case.atol, 1e-6))
        else:
            np.testing.assert_array_equal(actual, wanted)
    return None


def _run_in_a_session(case):
    """Ops with subgraphs: the whole model, as opset 11."""
    proto = onnx.ModelProto.FromString(case.model.SerializeToString())
    del proto.opset_import[:]
    proto.opset_import.append(onnx.helper.make_opsetid("", OPSET))
    inputs, expected = case.data_sets[0]
    names = [value.name for value in proto.graph.output]
    session = models.started(models.inference(proto, names))
    found = models.run(session, **{v.name: np.array(a) for v, a in zip(proto.graph.input, inputs)})
    for name, wanted in zip(names, expected):
        np.testing.assert_allclose(found[name], wanted, rtol=1e-5)
    return None


def _check_fake(op, tensors, results):
    """Shape inference is the lowering on fake tensors: same shapes and dtypes, and nothing that depends on data."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        fakes = run_op(op, [None if t is None else mode.from_tensor(t) for t in tensors])
    assert [(f.shape, f.dtype) for f in fakes] == [(r.shape, r.dtype) for r in results]


@pytest.mark.parametrize("case", CASES, ids=[c.name for c in CASES])
def test_agrees_with_the_onnx_node_test(case):
    reason = _run(case)
    if reason:
        pytest.skip(reason)


def test_most_node_tests_are_asked_and_the_list_of_exceptions_is_current(capsys):
    names = [c.name for c in CASES]
    stale = [p for p in NOT_EXPRESSIBLE if not any(n == p or (p[-1] == "*" and n.startswith(p[:-1])) for n in names)]
    assert not stale
    reasons = Counter()
    for case in CASES:
        try:
            control = case.model.graph.node[0].op_type in CONTROL_FLOW
            reasons[_named_reason(case.name) or ((control or _to_opset_11(case)) and "asked")] += 1
        except NotExpressible as error:
            reasons[str(error)] += 1
    with capsys.disabled():
        print(f"\nonnx node tests: {reasons['asked']} of {len(names)} asked; not asked:")
        print("\n".join(f"  {count:4} {reason}" for reason, count in reasons.most_common() if reason != "asked"))
    assert reasons["asked"] >= 380
