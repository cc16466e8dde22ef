"""LSTM, GRU and RNN of ai.onnx and the LSTM of ai.graphcore. Half inputs are computed in float and rounded once.

X [S,B,I] -> Y [S,D,B,H], Y_h [D,B,H] (and Y_c). W [D,gates*H,I], R [D,gates*H,H], B [D,2*gates*H] (Wb, Rb); gates are
i o f c for LSTM and z r h for GRU (onnx.ai/onnx/operators). A sequence that is over keeps its state and yields zeros.
"""
from __future__ import annotations

import functools

import torch

from ..registry import lowers
from .common import refuse, shaped

_ACTIVATIONS = {
    "sigmoid": torch.sigmoid, "tanh": torch.tanh, "relu": torch.relu, "softsign": torch.nn.functional.softsign,
    "softplus": torch.nn.functional.softplus, "swish": torch.nn.functional.silu, "geluerf": torch.nn.functional.gelu,
    "gelu": functools.partial(torch.nn.functional.gelu, approximate="tanh"),
    "softmax": functools.partial(torch.softmax, dim=-1),
}  # fmt: skip


def _activations(op, defaults, directions):
    names = list(op.attr("activations", ()) or ()) or list(defaults) * directions
    if len(names) != len(defaults) * directions:
        raise refuse(op, f"{len(names)} activations; {len(defaults)} a direction are needed")
    for name in names:
        if name.lower() not in _ACTIVATIONS:
            raise refuse(op, f"the activation '{name}' is not supported; {', '.join(_ACTIVATIONS)} are")
    if op.attr("activation_alpha", ()) or op.attr("activation_beta", ()):
        raise refuse(op, "activation_alpha and activation_beta are not supported")
    functions = [_ACTIVATIONS[name.lower()] for name in names]
    return [functions[i : i + len(defaults)] for i in range(0, len(functions), len(defaults))]


def _check(op, x, w, r, gates, reverse_too):
    """Refuses what PopART refuses; the directions as flags, True for backwards."""
    if op.attr("clip", None) is not None:
        raise refuse(op, "clip is not supported")
    if op.attr("layout", 0):
        raise refuse(op, "layout must be 0")
    hidden = r.shape[-1]
    if op.attr("hidden_size", None) not in (None, hidden):
        raise refuse(op, f"hidden_size {op.attr('hidden_size')} does not match the weights {list(r.shape)}")
    direction = op.attr("direction", "forward")
    directions = {"forward": [False], "reverse": [True], "bidirectional": [False, True]}.get(direction)
    if directions is None or (direction != "forward" and not reverse_too):
        raise refuse(op, f"the direction '{direction}' is not supported; use forward")
    count = len(directions)
    if w.shape != (count, gates * hidden, x.shape[-1]) or r.shape != (count, gates * hidden, hidden):
        raise refuse(op, f"the weights {list(w.shape)} and {list(r.shape)} do not fit an input of {list(x.shape)}")
    return directions, hidden


def _walk(x, backwards, lengths, states, cell):
    """One direction. cell(row, states) -> states, the first of which is the output. (Y [S,B,H], final states)."""
    steps, rows = range(x.shape[0]), [None] * x.shape[0]
    for step in reversed(steps) if backwards else steps:
        after = cell(x[step], states)
        if lengths is None:
            states, rows[step] = after, after[0]
            continue
        alive = (step < lengths).unsqueeze(1)
        states = [torch.where(alive, new, old) for new, old in zip(after, states)]
        rows[step] = torch.where(alive, after[0], torch.zeros_like(after[0]))
    return torch.stack(rows), states


def _initial(value, direction, batch, hidden, x):
    return x.new_zeros(batch, hidden) if value is None else value[direction]


def _recurrent(op, tensors, lengths, gates, defaults, state_count, make_cell, reverse_too):
    """Runs every direction; tensors: x, w, r, b and the initial states, all float."""
    x, w, r, b, *starts = tensors
    directions, hidden = _check(op, x, w, r, gates, reverse_too)
    functions = _activations(op, defaults, len(directions))
    shaped(op, "the bias", b, len(directions), 2 * gates * hidden)
    shaped(op, "sequence_lens", lengths, x.shape[1])
    for start in starts[:state_count]:
        shaped(op, "an initial state", start, len(directions), x.shape[1], hidden)
    outputs, finals = [], []
    for d, backwards in enumerate(directions):
        bias = x.new_zeros(2 * gates * hidden) if b is None else b[d]
        cell = make_cell(w[d], r[d], bias[: gates * hidden], bias[gates * hidden :], functions[d])
        states = [_initial(start, d, x.shape[1], hidden, x) for start in starts[:state_count]]
        y, states = _walk(x, backwards, lengths, states, cell)
        outputs.append(y)
        finals.append(states)
    last = [torch.stack([states[k] for states in finals]) for k in range(state_count)]
    return (torch.stack(outputs, dim=1), *last)


def _in_float(op, function, tensors):
    half = tensors[0].dtype == torch.float16
    wanted = [t.float() if half and t is not None and t.dtype == torch.float16 else t for t in tensors]
    results = function(wanted)
    return tuple(t.half() for t in results) if half else results


def _given(inputs, count):
    return [*inputs, *[None] * (count - len(inputs))]


@lowers("ai.onnx", "LSTM", 1, 7)
def lstm(op, *inputs):
    """Inputs X, W, R, B, sequence_lens, initial_h, initial_c -> Y, Y_h, Y_c. Forward only, no peepholes."""
    x, w, r, b, lengths, h, c, peepholes = _given(inputs, 8)
    if peepholes is not None:
        raise refuse(op, "peephole weights are not supported")
    if op.attr("input_forget", 0):
        raise refuse(op, "input_forget must be 0")

    def make_cell(w, r, wb, rb, functions):
        f, g, last = functions

        def cell(row, states):
            old_h, old_c = states
            i, o, forget, candidate = (row @ w.t() + old_h @ r.t() + wb + rb).chunk(4, dim=1)
            new_c = f(forget) * old_c + f(i) * g(candidate)
            return [f(o) * last(new_c), new_c]

        return cell

    defaults = ("Sigmoid", "Tanh", "Tanh")
    return _in_float(
        op, lambda t: _recurrent(op, t, lengths, 4, defaults, 2, make_cell, False), [x, w, r, b, h, c]
    )[: len(op.outputs)]


@lowers("ai.onnx", "GRU", 3, 7)
def gru(op, *inputs):
    """Inputs X, W, R, B, sequence_lens, initial_h -> Y, Y_h."""
    x, w, r, b, lengths, h = _given(inputs, 6)
    before = bool(op.attr("linear_before_reset", 0))

    def make_cell(w, r, wb, rb, functions):
        f, g = functions

        def cell(row, states):
            (old,) = states
            size = old.shape[1]
            into = row @ w.t() + wb
            gates = into[:, : 2 * size] + old @ r[: 2 * size].t() + rb[: 2 * size]
            z, reset = f(gates[:, :size]), f(gates[:, size:])
            if before:
                inner = reset * (old @ r[2 * size :].t() + rb[2 * size :])
            else:
                inner = (reset * old) @ r[2 * size :].t() + rb[2 * size :]
            return [(1 - z) * g(into[:, 2 * size :] + inner) + z * old]

        return cell

    return _in_float(
        op, lambda t: _recurrent(op, t, lengths, 3, ("Sigmoid", "Tanh"), 1, make_cell, True), [x, w, r, b, h]
    )[: len(op.outputs)]


@lowers("ai.onnx", "RNN", 7)
def rnn(op, *inputs):
    """Inputs X, W, R, B, sequence_lens, initial_h -> Y, Y_h."""
    x, w, r, b, lengths, h = _given(inputs, 6)

    def make_cell(w, r, wb, rb, functions):
        return lambda row, states: [functions[0](row @ w.t() + states[0] @ r.t() + wb + rb)]

    return _in_float(op, lambda t: _recurrent(op, t, lengths, 1, ("Tanh",), 1, make_cell, False), [x, w, r, b, h])[
        : len(op.outputs)
    ]


@lowers("ai.graphcore", "LSTM", 1)
def graphcore_lstm(op, x, weights, bias=None, initial=None, lengths=None):
    """x [S,B,I], weights [4,I+H,H] in PopLibs' order (forget, input, candidate, output), bias [4,H], initial state
    [2,B,H] (output, cell) -> output [S,B,H], or [B,H] with output_full_sequence 0, and the last cell state [B,H].
    """
    hidden = weights.shape[-1]
    if weights.dim() != 3 or weights.shape[:2] != (4, x.shape[-1] + hidden):
        raise refuse(op, f"weights {list(weights.shape)} do not fit an input of {list(x.shape)}")
    shaped(op, "the bias", bias, 4, hidden)
    shaped(op, "the initial state", initial, 2, x.shape[1], hidden)
    shaped(op, "the sequence lengths", lengths, x.shape[1])
    full = bool(op.attr("output_full_sequence", 1))

    def run(x, weights, bias, initial):
        def cell(row, states):
            old_h, old_c = states
            both = torch.cat([row, old_h], dim=1)
            gates = [both @ weights[k] + (0.0 if bias is None else bias[k]) for k in range(4)]
            new_c = torch.sigmoid(gates[0]) * old_c + torch.sigmoid(gates[1]) * torch.tanh(gates[2])
            return [torch.sigmoid(gates[3]) * torch.tanh(new_c), new_c]

        zero = x.new_zeros(x.shape[1], hidden)
        start = [zero, zero] if initial is None else [initial[0], initial[1]]
        y, (h, c) = _walk(x, False, lengths, start, cell)
        return (y if full else h), c

    outputs = _in_float(op, lambda tensors: run(*tensors), [x, weights, bias, initial])
    return outputs[: len(op.outputs)]


