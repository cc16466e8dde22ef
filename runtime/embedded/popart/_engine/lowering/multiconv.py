"""MultiConv of ai.graphcore: several independent convolutions in one op."""
from __future__ import annotations

import dataclasses

from ..registry import lowers
from .common import refuse
from .linear import conv

_LISTS = {"dilations": 1, "strides": 1, "pads": 2, "inDilations": 1, "outPads": 2}  # entries per spatial axis


@lowers("ai.graphcore", "MultiConv", 1)
def multi_conv(op, *tensors):
    """Inputs: data, weights, bias ("" for none) of each convolution in turn; the lists of all of them are joined."""
    if len(tensors) % 3:
        raise refuse(op, f"{len(tensors)} inputs; three a convolution are needed")
    lists = {name: list(op.attr(name, ())) for name in _LISTS}
    for name, neutral in (("inDilations", 1), ("outPads", 0)):
        if any(value != neutral for value in lists[name]):
            raise refuse(op, f"{name} {lists[name]} are not supported by the embedded runtime")
    partials = list(op.settings.get("__partials_type", ()) or ())
    results = []
    for index in range(0, len(tensors), 3):
        data, weights, bias = tensors[index : index + 3]
        rank = weights.dim() - 2
        attrs = {}
        for name in ("dilations", "strides", "pads"):
            count = rank * _LISTS[name]
            attrs[name], lists[name] = tuple(lists[name][:count]), lists[name][count:]
        attrs["group"] = data.shape[1] // weights.shape[1]
        settings = {"__partials_type": partials[index // 3]} if index // 3 < len(partials) else {}
        single = dataclasses.replace(op, attrs=attrs, settings=settings)
        results.append(conv(single, data, weights, bias))
    return tuple(results)
