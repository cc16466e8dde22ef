"""TensorInfo: the element type and the shape of a tensor. PopART's names: FLOAT, FLOAT16, INT32, BOOL, ..."""
from typing import Tuple

import numpy as np

from .enums import DataType

_NUMPY_OF = {
    "FLOAT": np.float32, "FLOAT16": np.float16, "DOUBLE": np.float64, "BOOL": np.bool_,
    "INT8": np.int8, "INT16": np.int16, "INT32": np.int32, "INT64": np.int64,
    "UINT8": np.uint8, "UINT16": np.uint16, "UINT32": np.uint32, "UINT64": np.uint64,
}  # fmt: skip
_NAME_OF = {np.dtype(value): name for name, value in _NUMPY_OF.items()}


class TensorInfo:
    """`TensorInfo("FLOAT", [2, 3])`, `TensorInfo(np.float32, [2, 3])` or `TensorInfo(ndarray)`; immutable.

    Beside PopART's methods, `.dtype` (numpy dtype) and `.dims` (tuple of int) serve the engine.
    """

    __slots__ = ("dims", "dtype")
    dims: Tuple[int, ...]
    dtype: np.dtype

    def __init__(self, *args):
        if len(args) == 1 and isinstance(args[0], np.ndarray):
            dtype, shape = args[0].dtype, args[0].shape
        elif len(args) == 2:
            dtype, shape = args
        else:
            raise TypeError(f"Can not create TensorInfo with args {args}")
        object.__setattr__(self, "dtype", _as_dtype(dtype, args))
        object.__setattr__(self, "dims", _as_dims(shape, args))

    def __setattr__(self, name, value):
        raise AttributeError(f"TensorInfo is immutable; cannot set '{name}'")

    def shape(self):
        return list(self.dims)

    def data_type(self):
        return _NAME_OF[self.dtype]

    def data_type_lcase(self):
        """The numpy name: `float32`, `float16`, `int32`, `bool`, ..."""
        return self.dtype.name

    def nelms(self):
        return int(np.prod(self.dims, dtype=np.int64))

    def nbytes(self):
        return self.nelms() * self.dtype.itemsize

    def __eq__(self, other):
        return isinstance(other, TensorInfo) and (self.dtype, self.dims) == (other.dtype, other.dims)

    def __hash__(self):
        return hash((self.dtype, self.dims))

    def __repr__(self):
        return f"TensorInfo({self.data_type()}, {list(self.dims)})"


def _as_dtype(dtype, args):
    if isinstance(dtype, DataType):
        dtype = dtype.name
    if isinstance(dtype, str) and dtype in _NUMPY_OF:
        return np.dtype(_NUMPY_OF[dtype])
    try:
        found = np.dtype(dtype)
    except TypeError:
        found = None
    if found not in _NAME_OF:
        raise TypeError(f"Can not create TensorInfo with args {args}")
    return found


def _as_dims(shape, args):
    try:
        dims = tuple(int(d) for d in shape)
    except (TypeError, ValueError) as error:
        raise TypeError(f"Can not create TensorInfo with args {args}") from error
    if any(d < 0 for d in dims):
        raise TypeError(f"Can not create TensorInfo with args {args}: a dimension is negative")
    return dims
