"""InputShapeInfo and Patterns: the two smaller arguments of a session."""
from .enums import PatternsLevel
from .errors import popart_exception
from .tensorinfo import TensorInfo

# Graph rewrites of PopART that change speed or memory, never results beyond rounding: the names are checked, no more.
_PATTERNS = frozenset(
    """PreUniRepl PostNRepl SoftMaxGradDirect SoftmaxGradDirect NlllWithSoftMaxGradDirect NlllWithSoftmaxGradDirect
    OpToIdentity SubtractArg1GradOp MulArgGradOp MatMulOp MatMulLhsGradOp MatMulRhsGradOp InPlace
    ViewSimplifyPattern SplitGather PackedDataBlock UpdateInplacePrioritiesForIpu SplitGradOpToConcat
    ConvDataGrad DivArg0GradOp DivArg1GradOp PowArg0GradOp PowArg1GradOp SinGradOp SoftmaxGrad CosGradOp TanToSinOverCos
    DecomposeBinaryConstScalar ConvTranspose ContiguateIpuCopyIndicesPattern LSTMOp GRUOp UpsampleToResize""".split()
)


class InputShapeInfo:
    """Shapes and types of model inputs that the ONNX file leaves open."""

    def __init__(self):
        self._infos = {}

    def add(self, tensorId, info):
        if not isinstance(info, TensorInfo):
            raise TypeError("InputShapeInfo.add takes a TensorInfo")
        self._infos[tensorId] = info

    def get(self, tensorId):
        if tensorId not in self._infos:
            raise popart_exception(f"There is no '{tensorId}' in this InputShapeInfo")
        return self._infos[tensorId]

    def has(self, tensorId):
        return tensorId in self._infos


class Patterns:
    """`Patterns()`, `Patterns(PatternsLevel.X)` or `Patterns([names])`. The embedded runtime needs none of them."""

    def __init__(self, patterns=PatternsLevel.Default):
        self._enabled = {}
        self._asserts = True
        if isinstance(patterns, PatternsLevel):
            self.level = patterns
        else:
            self.level = PatternsLevel.NoPatterns
            for name in patterns:
                self.enablePattern(name, True)

    def enablePattern(self, name, value):
        if name not in _PATTERNS:
            raise popart_exception(f"Unknown pattern {name}.")
        self._enabled[name] = bool(value)
        return self

    def isPatternEnabled(self, name):
        if name not in _PATTERNS:
            raise popart_exception(f"Unknown pattern {name}.")
        return self._enabled.get(name, self.level not in (PatternsLevel.NoPatterns, PatternsLevel.Minimal))

    def enableRuntimeAsserts(self, value):
        self._asserts = bool(value)
        return self

    @property
    def InPlace(self):
        return self.isPatternEnabled("InPlace")

    @InPlace.setter
    def InPlace(self, value):
        self.enablePattern("InPlace", value)

    def __repr__(self):
        return f"Patterns(level={self.level.name}, {self._enabled})"
