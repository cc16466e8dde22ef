"""Op families; importing this package fills the registry. One file a family, one function an op."""
from . import (
    activation,
    custom_ops,
    elementwise,
    graphcore,
    indexing,
    linear,
    loss,
    normalisation,
    pooling,
    random,
    reduction,
    resize,
    shape,
)

__all__ = [
    "activation",
    "custom_ops",
    "elementwise",
    "graphcore",
    "indexing",
    "linear",
    "loss",
    "normalisation",
    "pooling",
    "random",
    "reduction",
    "resize",
    "shape",
]
