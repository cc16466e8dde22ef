"""PyStepIO, PyStepIOCallback and PyWeightsIO: numpy arrays in and out of a session."""
import numpy as np

from .errors import popart_exception
from .tensorinfo import TensorInfo


class IStepIO:
    """What `Session.run` takes: PyStepIO or PyStepIOCallback."""


class IWeightsIO:
    """What readWeights and writeWeights take: PyWeightsIO."""


class PyStepIO(IStepIO):
    """inputs / outputs: {tensor id: C-contiguous ndarray}; each array is one step's data as a flat sequence.

    The order of samples is [batchesPerStep, accumulationFactor, replicas, ...tensor shape], as anchors have it.
    """

    def __init__(self, inputs, outputs):
        for kind, arrays in (("input", inputs), ("output", outputs)):
            for name, array in arrays.items():
                if not isinstance(array, np.ndarray):
                    raise TypeError(f"PyStepIO: the {kind} for tensor '{name}' must be a numpy array")
                if not array.flags["C_CONTIGUOUS"]:
                    raise popart_exception(
                        f"PyStepIO is unable to use the numpy {kind} array for tensor '{name}' as it is not "
                        f"c-contiguous (a data conversion here could have a significant impact on performance and "
                        f"hence is disallowed)"
                    )
        self._inputs, self._outputs = dict(inputs), dict(outputs)
        self._asserts = True

    def enableRuntimeAsserts(self, value):
        """With False the element counts are not compared; too few elements still raise."""
        self._asserts = bool(value)

    def _begin(self, session):
        session.check_ids(self._inputs, self._outputs)
        if self._asserts:
            for name, array in self._inputs.items():
                _assert_count("input", name, session.input_count(name), array.size)
            for name, array in self._outputs.items():
                _assert_count("output", name, session.output_count(name), array.size)
        self._cursor = dict.fromkeys(self._inputs, 0)

    def _read(self, name, info):
        """The next sample of an input, shape and dtype of `info`."""
        if name not in self._inputs:
            raise popart_exception(f"No tensor {name} provided in PyStepIO's inputs")
        flat, start = self._inputs[name].reshape(-1), self._cursor[name]
        self._cursor[name] = start + info.nelms()
        if flat.size < self._cursor[name]:
            _assert_count("input", name, self._cursor[name], flat.size)
        return flat[start : self._cursor[name]].reshape(info.dims)

    def _wants(self, name):
        return name in self._outputs

    def _write(self, name, index, array):
        """Stores the index-th returned sample of an anchor."""
        flat = self._outputs[name].reshape(-1)
        start = index * array.size
        if flat.dtype != array.dtype:
            raise popart_exception(
                f"PyStepIO's output for tensor '{name}' has type {flat.dtype}, the tensor has {array.dtype}"
            )
        if start + array.size > flat.size:
            _assert_count("output", name, start + array.size, flat.size)
        flat[start : start + array.size] = array.reshape(-1)


class PyStepIOCallback(IStepIO):
    """The same data through four callables: input(id, prefetch) and output(id) give an ndarray for one sample."""

    def __init__(self, input_callback, input_complete_callback, output_callback, output_complete_callback):
        self._input, self._input_complete = input_callback, input_complete_callback
        self._output, self._output_complete = output_callback, output_complete_callback

    def _begin(self, session):
        self._anchors = set(session.anchor_ids())

    def _read(self, name, info):
        array = np.ascontiguousarray(self._input(name, False))
        _assert_count("input", name, info.nelms(), array.size)
        self._input_complete(name)
        return array.reshape(info.dims)

    def _wants(self, name):
        return name in self._anchors

    def _write(self, name, index, array):
        target = self._output(name)
        _assert_count("output", name, array.size, target.size)
        np.copyto(target.reshape(-1), array.reshape(-1), casting="no")
        self._output_complete(name)


def _assert_count(kind, name, expected, received):
    if expected != received:
        raise popart_exception(
            f"Unexpected number of {kind} elements for Tensor {name}. Expected {expected}, but received {received}."
        )


class PyWeightsIO(IWeightsIO):
    """{tensor id: C-contiguous ndarray}: read into by readWeights, read from by writeWeights."""

    def __init__(self, weights):
        for name, array in weights.items():
            if not isinstance(array, np.ndarray):
                raise TypeError(f"PyWeightsIO: the weight '{name}' must be a numpy array")
            if not array.flags["C_CONTIGUOUS"]:
                raise popart_exception(
                    f"PyWeightsIO is unable to use the numpy array for tensor '{name}' as it is not c-contiguous"
                )
        self._weights = dict(weights)

    def _array(self, name, info):
        if name not in self._weights:
            raise popart_exception(f"No tensor {name} provided in PyWeightsIO's weights")
        array = self._weights[name]
        if array.size != info.nelms() or array.dtype != info.dtype:
            raise popart_exception(
                f"PyWeightsIO's array for tensor '{name}' is {TensorInfo(array)!r}, the tensor is {info!r}"
            )
        return array
