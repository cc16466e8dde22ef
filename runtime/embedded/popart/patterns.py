"""Patterns: which graph rewrites PopART would apply, by name and by level.

The embedded runtime needs none of them, because it lowers ops and their gradients directly; they change speed and
memory, never results beyond rounding. What remains is PopART's contract: known names, levels, and the mandatory ones.
"""
from .enums import PatternsLevel
from .errors import popart_exception

# Rewrites without which PopART has no IPU implementation of an op or of its gradient: on from level Minimal upwards.
MANDATORY = tuple(
    """MulArgGradOp ReciprocalGradOp SinGradOp CosGradOp TanhGradOp SqrtGradOp ExpGradOp Expm1GradOp Log1pGradOp LogGradOp
    CoshOp TanToSinOverCos DivArg0GradOp DivArg1GradOp PowArg0GradOp PowArg1GradOp FmodArg0GradOp Atan2Arg0GradOp
    Atan2Arg1GradOp AbsGradOp AsinGradOp AtanGradOp SubtractArg1GradOp ElementWiseGradOp ReduceMinMaxGradOp
    SplitGradOpToConcat SplitOp LSTMOp GRUOp RNNOp LogSoftmaxOp RandomNormalLikeOpPattern RandomUniformLikeOpPattern
    ZerosLikeOpPattern ZerosOpPattern LikeOpsPattern UpsampleToResize ConvTranspose ConvDataGrad PackedDataBlock""".split()
)
_ON_BY_DEFAULT = tuple(
    """PreUniRepl PostNRepl SoftmaxGradDirect NlllWithSoftmaxGradDirect OpToIdentity MatMulOp MatMulLhsGradOp
    MatMulRhsGradOp MatMulPattern NegativeOneScale TransposeToIdentityOrReshape PadSum ExpandCast LoopScanOutPattern
    ContiguateIpuCopyIndicesPattern ConvFlipWeightsDoubleFlipPattern ConvFlipWeightsGradOpPattern SumToAdd InitAccumulate
    GemmDecomposition LambSerialisedWeightPattern AllReduceToIdentityPattern AcosOpPattern AcoshOpPattern AsinhOpPattern
    AtanhOpPattern TanOpPattern ModOpPattern RemainderOpPattern DepthToSpaceOpPattern SpaceToDepthOpPattern SinhGradOp
    AcosGradOp SigmoidGradOp LogSoftmaxGradOp MeanGradOp SumGradOp MaxArgGradOp MinArgGradOp OptimizerDecompose
    SGD0Decompose SGD1Decompose SGD2Decompose AdamDecompose AdaptiveDecompose InPlace""".split()
)
_OFF_BY_DEFAULT = tuple(
    """SplitGather TiedGather TiedGatherAccumulate TiedGatherPattern TiedGatherAccumulatePattern DecomposeBinaryConstScalar
    UpdateInplacePrioritiesForIpu ViewSimplifyPattern BinaryConstScalar Fuser LSTMPattern""".split()
)
NAMES = (*MANDATORY, *_ON_BY_DEFAULT, *_OFF_BY_DEFAULT)
# Other spellings of one pattern: those of the C++ enumeration and of the Python properties.
_ALIASES = {
    "SoftMaxGradDirect": "SoftmaxGradDirect",
    "NlllWithSoftMaxGradDirect": "NlllWithSoftmaxGradDirect",
    "Inplace": "InPlace",
    "ContiguateIpuCopyIndices": "ContiguateIpuCopyIndicesPattern",
    "ContiguateIPUCopyIndices": "ContiguateIpuCopyIndicesPattern",
    "ConvFlipWeightsDoubleFlip": "ConvFlipWeightsDoubleFlipPattern",
    "ConvFlipWeightsGradOp": "ConvFlipWeightsGradOpPattern",
    "LambSerialisedWeight": "LambSerialisedWeightPattern",
    "SplitGatherPattern": "SplitGather",
    "LoopScanOut": "LoopScanOutPattern",
    "ViewSimplify": "ViewSimplifyPattern",
}
_LEVELS = {
    PatternsLevel.NoPatterns: frozenset(),
    PatternsLevel.Minimal: frozenset(MANDATORY),
    PatternsLevel.Default: frozenset((*MANDATORY, *_ON_BY_DEFAULT)),
    PatternsLevel.All: frozenset(NAMES),
}
_PROPERTIES = (
    "PreUniRepl", "PostNRepl", "SoftMaxGradDirect", "NlllWithSoftMaxGradDirect", "OpToIdentity", "SubtractArg1GradOp",
    "MulArgGradOp", "MatMulOp", "MatMulLhsGradOp", "MatMulRhsGradOp", "InPlace",
)  # fmt: skip


class Patterns:
    """`Patterns()` is the level Default; `Patterns(PatternsLevel.X)`; `Patterns([names])` has these and no others."""

    def __init__(self, *args, level=None, patterns=None):
        given = args[0] if args else (level if level is not None else patterns)
        if len(args) > 1 or isinstance(given, str):
            raise TypeError("Patterns() takes a PatternsLevel or a list of pattern names")
        self._asserts = True
        self.level = given if isinstance(given, PatternsLevel) else PatternsLevel.NoPatterns
        if given is None:
            self.level = PatternsLevel.Default
        on = _LEVELS[self.level]
        self._enabled = {name: name in on for name in NAMES}
        if given is not None and not isinstance(given, PatternsLevel):
            for name in given:
                self.enablePattern(name, True)

    def enablePattern(self, name, value):
        """Switches one pattern; returns these Patterns."""
        self._enabled[_known(name)] = bool(value)
        return self

    def isPatternEnabled(self, name):
        return self._enabled[_known(name)]

    def enableRuntimeAsserts(self, value):
        """With False, a session takes these Patterns though mandatory ones are off; returns these Patterns."""
        self._asserts = bool(value)
        return self

    def __eq__(self, other):
        if not isinstance(other, Patterns):
            return NotImplemented
        return (self._enabled, self._asserts) == (other._enabled, other._asserts)

    __hash__ = None  # type: ignore[assignment]  # it can change

    def __repr__(self):
        lines = (f"  {name} {'ON' if on else 'OFF'}" for name, on in self._enabled.items())
        return "\n".join(("Patterns", *lines))


def _known(name):
    name = _ALIASES.get(name, name)
    if name not in _KNOWN:
        raise popart_exception(f"Unknown pattern {name}.")
    return name


def _property(name):
    return property(
        lambda self: self.isPatternEnabled(name),
        lambda self, value: self.enablePattern(name, value) and None,
        doc=f"Whether {name} is enabled.",
    )


_KNOWN = frozenset(NAMES)
for _name in _PROPERTIES:
    setattr(Patterns, _name, _property(_name))


def check_mandatory(patterns):
    """Raises popart_exception when a mandatory pattern is off, unless enableRuntimeAsserts(False) was called."""
    missing = [name for name in MANDATORY if not patterns._enabled[name]]
    if missing and patterns._asserts:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise popart_exception(
            f"Mandatory patterns are not enabled: {shown}. Enable them, or disable this check with "
            f"Patterns.enableRuntimeAsserts(False)."
        )


def check_excluded(names, where):
    """Raises popart_exception when a node's `__exclude_patterns` names no pattern."""
    for name in names:
        if _ALIASES.get(name, name) not in _KNOWN:
            raise popart_exception(f"Invalid pattern name '{name}' in {where}: Unknown pattern {name}.")
