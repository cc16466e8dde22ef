"""SequenceSlice and PackedDataBlock of ai.graphcore: rows of packed sequences moved by run-time offsets."""
from __future__ import annotations

import torch

from .. import subgraphs
from ..registry import lowers
from .common import refuse, same_types


@lowers("ai.graphcore", "SequenceSlice", 1)
def sequence_slice(op, source, destination, counts, source_offsets, destination_offsets):
    """Copies counts[i] rows from source at source_offsets[i] to destination at destination_offsets[i], for every i.

    source [R,...], destination [Q,...] -> [Q,...]. zeroUnused: rows that nothing is copied to are zeros.
    """
    same_types(op, source, destination, doing="slicing sequences")
    rows = torch.arange(destination.shape[0], device=destination.device).unsqueeze(0)
    start, count = destination_offsets.long().reshape(-1, 1), counts.long().reshape(-1, 1)
    inside = (rows >= start) & (rows < start + count)  # [sequences, destination rows]
    came_from = rows - start + source_offsets.long().reshape(-1, 1)
    hit = inside.any(dim=0)
    order = torch.arange(1, inside.shape[0] + 1, device=inside.device).unsqueeze(1)
    last = (inside * order).argmax(dim=0)  # a row that two sequences write gets the later one
    row = came_from.gather(0, last.unsqueeze(0)).squeeze(0).clamp(0, source.shape[0] - 1)
    copied = source.index_select(0, row)
    kept = torch.zeros_like(destination) if op.attr("zeroUnused", 0) else destination
    return torch.where(hit.reshape(-1, *[1] * (source.dim() - 1)), copied, kept)


def _unpacked(data, offsets, lengths, longest):
    """[sequences, longest, ...] from packed rows; what is behind a sequence's end is zeros."""
    steps = torch.arange(longest, device=data.device).unsqueeze(0)
    valid = steps < lengths.long().reshape(-1, 1)
    rows = (offsets.long().reshape(-1, 1) + steps).clamp(0, data.shape[0] - 1)
    picked = data.index_select(0, rows.reshape(-1)).reshape(*rows.shape, *data.shape[1:])
    return picked * valid.reshape(*valid.shape, *[1] * (data.dim() - 1)).to(data.dtype)


@lowers("ai.graphcore", "PackedDataBlock", 1)
def packed_data_block(op, *inputs):
    """Runs `callback` over packed sequences, callbackBatchSize of them at a time.

    Inputs: for every data input its rows [R,...], offsets [N] and lengths [N]; then the offsets and lengths of the
    result. The callback gets [callbackBatchSize, maxSequenceLengths[i], ...] and returns one such tensor, whose rows go
    to the result [resultSize, ...].
    """
    given = list(inputs[: op.explicit])
    around = dict(zip(op.inputs[op.explicit :], inputs[op.explicit :]))
    longest, batch = op.attr("maxSequenceLengths"), op.attr("callbackBatchSize")
    if len(given) != 3 * len(longest) + 2:
        raise refuse(op, f"{len(given)} inputs for {len(longest)} maxSequenceLengths; three a data input and two are needed")
    offsets, lengths = given[-2:]
    sequences = lengths.reshape(-1).shape[0]
    if sequences % batch:
        raise refuse(op, f"{sequences} sequences do not divide into callback batches of {batch}")
    unpacked = [_unpacked(*given[3 * i : 3 * i + 3], size) for i, size in enumerate(longest)]
    parts = []
    for first in range(0, sequences, batch):
        parts.append(subgraphs.run(op.attr("callback"), [u[first : first + batch] for u in unpacked], around)[0])
    out = torch.cat(parts)
    result = torch.zeros((op.attr("resultSize"), *out.shape[2:]), dtype=out.dtype, device=out.device)
    steps = torch.arange(out.shape[1], device=out.device).unsqueeze(0)
    valid = steps < lengths.long().reshape(-1, 1)
    rows = offsets.long().reshape(-1, 1) + steps
    kept = (out * valid.reshape(*valid.shape, *[1] * (out.dim() - 2)).to(out.dtype)).flatten(0, 1)
    inside = (valid & (rows < result.shape[0])).reshape(-1)
    kept = kept * inside.reshape(-1, *[1] * (kept.dim() - 1)).to(kept.dtype)
    return result.index_add(0, rows.clamp(0, result.shape[0] - 1).reshape(-1), kept)
