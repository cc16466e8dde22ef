"""Recurrent layers through Builder and sessions: onnxruntime for values, torch.nn for gradients."""
from __future__ import annotations

import numpy as np
import onnxruntime as ort
import popart_models as models
import pytest
import torch
from popart_models import popart, run, started

S, B, IN, H = 4, 2, 3, 5
GATES = {"lstm": 4, "gru": 3, "rnn": 1}
STATES = {"lstm": 2, "gru": 1, "rnn": 1}


def data(kind, seed, directions=1):
    random, gates = np.random.default_rng(seed), GATES[kind]
    shapes = {"x": (S, B, IN), "w": (directions, gates * H, IN), "r": (directions, gates * H, H),
              "b": (directions, 2 * gates * H), "h": (directions, B, H)}  # fmt: skip
    if kind == "lstm":
        shapes["c"] = (directions, B, H)
    return {name: random.normal(size=shape).astype(np.float32) * 0.5 for name, shape in shapes.items()}


def built(kind, arrays, lengths=None, opset=11, **attributes):
    builder = popart.Builder(opsets={"ai.onnx": opset, "ai.graphcore": 1})
    names = {n: builder.addInputTensor(popart.TensorInfo(a), n) for n, a in arrays.items()}
    args = [names["x"], names["w"], names["r"], names["b"], "", names["h"], *([names["c"]] if "c" in names else [])]
    if lengths is not None:
        args[4] = builder.aiOnnx.constant(np.array(lengths, np.int32))
    outputs = getattr(builder.aiOnnx, kind)(args, 1 + STATES[kind], hidden_size=H, **attributes)
    return builder, outputs


def infer(builder, outputs, arrays):
    session = popart.InferenceSession(builder.getModelProto(), popart.DataFlow(1, outputs), models.device())
    found = run(started(session), **arrays)
    return [found[name] for name in outputs]


@pytest.mark.parametrize("opset", [7, 11])
@pytest.mark.parametrize("kind, attributes", [
    ("lstm", {}), ("lstm", {"activations": ["Sigmoid", "Relu", "Tanh"]}), ("gru", {}), ("gru", {"linear_before_reset": 1}),
    ("gru", {"direction": "bidirectional"}), ("gru", {"direction": "reverse"}), ("rnn", {}), ("rnn", {"activations": ["Relu"]}),
])  # fmt: skip
def test_values_are_those_of_onnxruntime(kind, attributes, opset):
    arrays = data(kind, 0, 2 if attributes.get("direction") == "bidirectional" else 1)
    builder, outputs = built(kind, arrays, opset=opset, **attributes)
    for name in outputs:
        builder.addOutputTensor(name)
    expected = ort.InferenceSession(builder.getModelProto()).run(outputs, arrays)
    for found, wanted in zip(infer(builder, outputs, arrays), expected):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn"])
def test_sequences_end_where_their_lengths_say(kind):
    arrays = data(kind, 1)
    builder, outputs = built(kind, arrays, [4, 2])
    for name in outputs:
        builder.addOutputTensor(name)
    expected = ort.InferenceSession(builder.getModelProto()).run(outputs, arrays)
    for found, wanted in zip(infer(builder, outputs, arrays), expected):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def reordered(kind, array):
    """ONNX's gates in torch's order: i o f c -> i f c o, z r h -> r z h."""
    order = {"lstm": (0, 2, 3, 1), "gru": (1, 0, 2), "rnn": (0,)}[kind]
    blocks = np.split(array, GATES[kind])
    return torch.tensor(np.concatenate([blocks[k] for k in order]))


@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn"])
def test_gradients_are_those_of_torch(kind):
    arrays = data(kind, 2)
    extra = {"linear_before_reset": 1} if kind == "gru" else {}  # torch's form of the layer
    builder, outputs = built(kind, arrays, **extra)
    parts = [builder.aiGraphcore.identityloss([name], popart.ReductionType.Sum) for name in outputs]
    loss = builder.aiOnnx.sum(parts)
    flow = popart.DataFlow(1, [f"Gradient___{name}" for name in arrays])
    session = popart.TrainingSession(builder.getModelProto(), flow, loss, popart.ConstSGD(0.1), models.device())
    found = run(started(session), **arrays)

    layer = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU, "rnn": torch.nn.RNN}[kind](IN, H)
    half = GATES[kind] * H
    with torch.no_grad():
        layer.weight_ih_l0.copy_(reordered(kind, arrays["w"][0]))
        layer.weight_hh_l0.copy_(reordered(kind, arrays["r"][0]))
        layer.bias_ih_l0.copy_(reordered(kind, arrays["b"][0][:half]))
        layer.bias_hh_l0.copy_(reordered(kind, arrays["b"][0][half:]))
    leaves = {n: torch.tensor(arrays[n], requires_grad=True) for n in ("x", "h", "c") if n in arrays}
    state = (leaves["h"], leaves["c"]) if kind == "lstm" else leaves["h"]
    y, last = layer(leaves["x"], state)
    (y.sum() + sum(t.sum() for t in (last if kind == "lstm" else [last]))).backward()
    for name, leaf in leaves.items():
        np.testing.assert_allclose(found[f"Gradient___{name}"], leaf.grad, rtol=1e-4, atol=1e-5)
    order = np.split(np.arange(half), GATES[kind])
    order = np.concatenate([order[k] for k in {"lstm": (0, 2, 3, 1), "gru": (1, 0, 2), "rnn": (0,)}[kind]])
    np.testing.assert_allclose(found["Gradient___w"][0][order], layer.weight_ih_l0.grad, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["Gradient___r"][0][order], layer.weight_hh_l0.grad, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["Gradient___b"][0][:half][order], layer.bias_ih_l0.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("full", [0, 1])
def test_the_graphcore_lstm_is_the_same_layer_in_another_layout(full):
    arrays = data("lstm", 3)
    builder, outputs = built("lstm", arrays)
    y, y_h, y_c = infer(builder, outputs, arrays)
    blocks = {n: np.split(arrays[n][0], 4) for n in ("w", "r")}
    order = (2, 0, 3, 1)  # i o f c -> f i c o
    weights = np.stack([np.concatenate([blocks["w"][k].T, blocks["r"][k].T]) for k in order])
    bias = np.stack([np.split(arrays["b"][0][: 4 * H] + arrays["b"][0][4 * H :], 4)[k] for k in order])
    other = popart.Builder()
    x = other.addInputTensor("FLOAT", [S, B, IN], "x")
    state = other.addInitializedInputTensor(np.stack([arrays["h"][0], arrays["c"][0]]))
    args = [x, other.addInitializedInputTensor(weights), other.addInitializedInputTensor(bias), state]
    names = other.aiGraphcore.lstm(args, full)
    output, cell = infer(other, names, {"x": arrays["x"]})
    np.testing.assert_allclose(output, y[:, 0] if full else y_h[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(cell, y_c[0], rtol=1e-4, atol=1e-5)


def test_half_is_computed_in_float():
    arrays = {name: array.astype(np.float16) for name, array in data("lstm", 4).items()}
    builder, outputs = built("lstm", arrays)
    found = infer(builder, outputs, arrays)
    wide = {name: array.astype(np.float32) for name, array in arrays.items()}
    builder, outputs = built("lstm", wide)
    for half, full in zip(found, infer(builder, outputs, wide)):
        assert half.dtype == np.float16
        np.testing.assert_array_equal(half, full.astype(np.float16))


@pytest.mark.parametrize("kind, attributes, message", [
    ("lstm", {"direction": "reverse"}, "the direction 'reverse' is not supported"),
    ("lstm", {"input_forget": 1}, "input_forget must be 0"),
    ("lstm", {"clip": 1.0}, "clip is not supported"),
    ("gru", {"activations": ["Sigmoid", "Affine"]}, "the activation 'Affine' is not supported"),
])  # fmt: skip
def test_what_popart_has_not_is_refused(kind, attributes, message):
    builder, outputs = built(kind, data(kind, 0), **attributes)
    with pytest.raises(popart.popart_exception, match=message):
        popart.InferenceSession(builder.getModelProto(), popart.DataFlow(1, outputs), models.device())


@pytest.mark.parametrize("name, function", [
    ("Gelu", lambda t: torch.nn.functional.gelu(t, approximate="tanh")), ("Swish", torch.nn.functional.silu),
    ("Softmax", lambda t: torch.softmax(t, dim=-1)),
])  # fmt: skip
def test_the_activations_that_popart_has_beyond_onnx(name, function):
    arrays = data("rnn", 6)
    builder, outputs = built("rnn", arrays, activations=[name])
    y, _ = infer(builder, outputs, arrays)
    x, w, r, b, h = (torch.from_numpy(arrays[key]) for key in ("x", "w", "r", "b", "h"))
    state = h[0]
    for step in range(S):
        state = function(x[step] @ w[0].T + state @ r[0].T + b[0, :H] + b[0, H:])
        np.testing.assert_allclose(y[step, 0], state, rtol=1e-4, atol=1e-5)
