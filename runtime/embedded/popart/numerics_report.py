"""NumericsReport: how far two trainings of one model went apart."""
import math

from .errors import popart_exception


class NumericsReport:
    """A0, A1: the ONNX model before and after training in one way; B0, B1: in another way. File names or bytes.

    The relative error of a weight is ||A1 - B1||^2 / (||A1 - A0|| ||B1 - B0||): small when both moved alike.
    """

    def __init__(self, A0, A1, B0, B1):
        models = {"A0": A0, "A1": A1, "B0": B0, "B1": B1}
        arrays = {label: _float_weights(model) for label, model in models.items()}
        for label, weights in arrays.items():
            other = next((n for n, w in arrays["A0"].items() if n not in weights or weights[n].shape != w.shape), None)
            if other is not None:
                raise popart_exception(f"NumericsReport: the weight '{other}' of A0 is absent in {label} or has another shape")
        self._sums = {name: _sums(*(arrays[label][name] for label in models)) for name in arrays["A0"]}

    def getRelativeErrors(self):
        """{weight: relative error}."""
        return {name: _relative(*sums) for name, sums in self._sums.items()}

    def report(self, tensorId):
        """One line about one weight."""
        dA, dB, dAB = self._sums[tensorId]
        return (
            f"|A1-A0| = {math.sqrt(dA):g}  |B1-B0| = {math.sqrt(dB):g}  |A1-B1| = {math.sqrt(dAB):g}  "
            f"relative error = {_relative(dA, dB, dAB):g}"
        )

    def fullReport(self):
        """One line a weight."""
        return "\n".join(f"{name}: {self.report(name)}" for name in self._sums)


def _float_weights(model):
    from onnx import numpy_helper

    from ._engine.model_io import load_model

    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in load_model(model).graph.initializer}
    return {name: array for name, array in arrays.items() if array.dtype.kind == "f"}


def _sums(a0, a1, b0, b1):
    """The squared norms of A1 - A0, of B1 - B0 and of A1 - B1, in float64."""
    a0, a1, b0, b1 = (array.astype("float64") for array in (a0, a1, b0, b1))
    return tuple(float((difference**2).sum()) for difference in (a1 - a0, b1 - b0, a1 - b1))


def _relative(dA, dB, dAB):
    if dAB == 0:
        return 0.0
    scale = math.sqrt(dA) * math.sqrt(dB)
    return math.inf if scale == 0 else dAB / scale
