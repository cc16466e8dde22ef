"""What PopART's Builder checks when a windowed op or a Pad is added, before any session sees the node."""
from __future__ import annotations

from ..errors import popart_exception


def check(method: str, tensors: list[str], values: dict, shape_of) -> None:
    """Raises popart_exception for attributes that cannot fit the inputs; what has no known shape is left to the session.

    values: the method's arguments. shape_of: tensor id -> dims, or None where the shape is not known.
    """
    if method in _CHECKS:
        _CHECKS[method](tensors, values, shape_of)


def _conv(tensors, values, shape_of):
    """kernel_shape, where given, is the one of the weights."""
    weights, kernel = shape_of(tensors[1]), list(values.get("kernel_shape") or ())
    if weights is not None and len(weights) > 2:
        found = list(weights)[2:]
        if kernel and kernel != found:
            raise popart_exception(
                f"kernel_shape, {kernel}, does not match inferred shape from weight input '{tensors[1]}', {found}"
            )
        kernel = found
    _window(shape_of(tensors[0]), kernel, values)


def _pool(tensors, values, shape_of):
    _window(shape_of(tensors[0]), list(values.get("kernel_shape") or ()), values)


def _window(shape, kernel, values):
    """The lengths of the lists, and that at least one window fits into every padded axis."""
    if shape is None or len(shape) < 3:
        return
    spatial = list(shape)[2:]
    count = len(spatial)
    for name, called, wanted in (("strides", "strides", 1), ("pads", "padding", 2), ("dilations", "dilations", 1)):
        entries = values.get(name) or ()
        if entries and len(entries) != wanted * count:
            factor = "" if wanted == 1 else f"{wanted} * "
            raise popart_exception(
                f"Length of {called} vector {len(entries)} != {factor}number of spatial dimensions {count}"
            )
    if len(kernel) != count:
        if kernel:
            raise popart_exception(f"Length of kernel_shape vector {len(kernel)} != number of spatial dimensions {count}")
        return
    strides, dilations = (list(values.get(name) or [1] * count) for name in ("strides", "dilations"))
    pads = list(values.get("pads") or [0] * (2 * count))
    if any(step < 1 for step in strides + dilations):
        raise popart_exception(f"Strides {strides} and dilations {dilations} of a window must be at least 1")
    out = []
    for i, size in enumerate(spatial):
        room = size + pads[i] + pads[i + count] - (kernel[i] - 1) * dilations[i] - 1
        steps = -(-room // strides[i]) if values.get("ceil_mode") else room // strides[i]
        out.append(steps + 1 if room >= 0 else min(steps + 1, 0))
    if any(size < 1 for size in out):
        raise popart_exception(f"Window parameter values combine to give invalid spatial output shape: {out}")


def _pad(tensors, values, shape_of):
    shape, pads = shape_of(tensors[0]), values.get("pads")
    if shape is not None and pads is not None and len(pads) != 2 * len(shape):
        raise popart_exception(
            f"Padding vector (length {len(pads)}) doesn't contain 2 entries per input dimension {len(shape)}"
        )


_CHECKS = {"conv": _conv, "maxpool": _pool, "averagepool": _pool, "pad": _pad}
