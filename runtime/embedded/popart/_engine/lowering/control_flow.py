"""Call, If, Loop and Scan. Their subgraphs run op by op, and autograd differentiates through them.

While types are inferred there is no data: an If then runs both branches, a Loop as many iterations as it takes for every
carried value to reach every other.
"""
from __future__ import annotations

import torch

from .. import subgraphs
from ..registry import lowers
from .common import DEVICE_INT, axis_of, refuse


def _around(op, inputs):
    return dict(zip(op.inputs[op.explicit :], inputs[op.explicit :]))


def _is_fake(inputs) -> bool:
    return torch._guards.detect_fake_mode(list(inputs)) is not None


@lowers("ai.graphcore", "Call", 1)
def call(op, *inputs):
    """The attribute `callee` with these inputs."""
    return tuple(subgraphs.run(op.attr("callee"), list(inputs[: op.explicit]), _around(op, inputs)))


@lowers("ai.onnx", "If", 1, 11)
def branch(op, condition, *captured):
    """then_branch where the condition holds, else else_branch; both return the same types."""
    around = _around(op, (condition, *captured))
    then, other = op.attr("then_branch"), op.attr("else_branch")
    if 0 in op.constants:
        return tuple(subgraphs.run(then if op.constants[0].reshape(-1)[0] else other, [], around))
    if not _is_fake((condition, *captured)):
        return tuple(subgraphs.run(then if bool(condition.reshape(()).item()) else other, [], around))
    results = []
    for a, b in zip(subgraphs.run(then, [], around), subgraphs.run(other, [], around)):
        if a.shape != b.shape or a.dtype != b.dtype:
            raise refuse(op, f"the branches return {a.dtype}{list(a.shape)} and {b.dtype}{list(b.shape)}")
        results.append(torch.where(condition.reshape(()), a, b))
    return tuple(results)


@lowers("ai.onnx", "Loop", 1, 11)
def loop(op, *inputs):
    """Inputs (trip count or "", condition or "", carried...), body (iteration, condition, carried...) -> (condition,
    carried..., scanned...); outputs (final carried..., scanned stacked over [trip count]...).

    The scanned outputs need a constant trip count; iterations after the condition fell leave zeros in them.
    """
    body, around, fake = op.attr("body"), _around(op, inputs), _is_fake(inputs)
    count, going, *carried = inputs[: op.explicit]
    known = subgraphs.known_trip_count(op)
    scanned = len(body.outputs) - 1 - len(carried)
    if scanned and known is None:
        raise refuse(op, "the maximum trip count must be constant for a Loop with scan outputs")
    limit = known if known is not None else None if count is None or fake else int(count.reshape(()).item())
    if fake:
        limit = len(carried) + 1 if limit is None else min(limit, len(carried) + 1)
    rows: list = [[] for _ in range(scanned)]
    going = torch.ones((), dtype=torch.bool) if going is None else going.reshape(())
    iteration = 0
    while (limit is None or iteration < limit) and (fake or bool(going.item())):
        results = subgraphs.run(body, [torch.tensor(iteration, dtype=DEVICE_INT), going, *carried], around)
        going, carried = results[0].reshape(()), _carried(op, carried, results[1 : 1 + len(carried)])
        for row, value in zip(rows, results[1 + len(carried) :]):
            row.append(value)
        iteration += 1
    return (*carried, *(_stacked(op, body, i, row, known) for i, row in enumerate(rows)))


def _carried(op, before, after):
    for old, new in zip(before, after):
        if old.shape != new.shape or old.dtype != new.dtype:
            raise refuse(
                op, f"a carried value changes from {old.dtype}{list(old.shape)} to {new.dtype}{list(new.shape)}"
            )
    return list(after)


def _stacked(op, body, index, row, count):
    """The values of one scan output over [count], zeros where no iteration ran."""
    if row:
        rest = [torch.zeros_like(row[0])] * (count - len(row))
        return torch.stack([*row, *rest])
    info = body.info[body.outputs[op.explicit - 1 + index]]  # behind the condition and op.explicit - 2 carried values
    return torch.zeros((count, *info.dims), dtype=getattr(torch, subgraphs.device(info).dtype.name))


@lowers("ai.onnx", "Scan", 9, 11)
def scan(op, *inputs):
    """Inputs (states..., sequences...); body (states..., slices...) -> (states..., results...), one call a slice."""
    body, around, given = op.attr("body"), _around(op, inputs), list(inputs[: op.explicit])
    sequences = op.attr("num_scan_inputs")
    states, scans = given[: len(given) - sequences], given[len(given) - sequences :]
    outputs = len(body.outputs) - len(states)
    axes = op.attr("scan_input_axes", ()) or (0,) * sequences
    axes = [axis_of(op, axis, x.dim()) for axis, x in zip(axes, scans)]
    backwards = op.attr("scan_input_directions", ()) or (0,) * sequences
    lengths = {x.shape[axis] for x, axis in zip(scans, axes)}
    if len(lengths) != 1:
        raise refuse(op, f"the scan inputs have different lengths {sorted(lengths)}")
    (length,) = lengths
    rows: list = [[] for _ in range(outputs)]
    for step in range(length):
        slices = [
            x.select(axis, length - 1 - step if back else step) for x, axis, back in zip(scans, axes, backwards)
        ]
        results = subgraphs.run(body, [*states, *slices], around)
        states = _carried(op, states, results[: len(states)])
        for row, value in zip(rows, results[len(states) :]):
            row.append(value)
    out_axes = op.attr("scan_output_axes", ()) or (0,) * outputs
    reverse = op.attr("scan_output_directions", ()) or (0,) * outputs
    stacked = [
        torch.stack(row[::-1] if back else row, dim=axis_of(op, axis, row[0].dim() + 1))
        for row, axis, back in zip(rows, out_axes, reverse)
    ]
    return (*states, *stacked)
