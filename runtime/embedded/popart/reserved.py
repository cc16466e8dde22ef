"""The prefixes that PopART keeps for tensors of its own (popart/tensornames.hpp), one function each.

`popart.reservedGradientPrefix() + "w"` is the id of the gradient of `w`.
"""

PREFIXES = {
    "Gradient": "Gradient___",
    "UpdatedVar": "UpdatedVar___",
    "Accum": "Accum___",
    "Accl": "Accl___",
    "AcclToAccumulator": "AcclIntoAccumulator___",
    "AcclToReduce": "AcclIntoReduce___",
    "AcclToUpdate": "AcclIntoUpdate___",
    "AcclFinalOut": "AcclOutOfAcclUpdate___",
    "Accl1": "Accl1___",
    "Accl2": "Accl2___",
    "Accl3": "Accl3___",
    "Accl1ToUpdate": "Accl1IntoUpdate___",
    "Step": "Step___",
    "Counter": "Counter___",
    "Stash": "Stash___",
    "AdamUpdater": "AdamUpdater___",
    "AdaptiveUpdater": "AdaptiveUpdater___",
    "LambR1Sq": "LambR1Sq___",
    "LambR2Sq": "LambR2Sq___",
    "FinalReducedGrad": "FinalReducedGradient___",
    "GlobalNorm": "GlobalNorm___",
    "Restored": "Restored___",
    "Stashed": "Stashed___",
    "LossScaling": "lossScaling_",
    "LossScalingRatio": "lossScalingRatio_",
    "RandomSeed": "randomSeed___",
    "Concat": "Concat___",
    "LoopCond": "LoopCond___",
    "LoopIterator": "LoopIteration___",
    "Outlined": "Outlined___",
    "AutomaticLossScale": "AutomaticLossScale___",
}
# Each of these has `reservedDefault<Name>Prefix` and `reservedSpecific<Name>Prefix`: the streamed hyper-parameters.
SCALARS = {
    "ScaledLearningRate0": "scaledLearningRate0",
    "WeightDecayScaleFactor0": "weightDecayScaleFactor0",
    "ScaledLearningRate1": "scaledLearningRate1",
    "WeightDecayScaleFactor1": "weightDecayScaleFactor1",
    "DampeningScaleFactor1": "dampeningScaleFactor1",
    "ScaledMomentum1": "scaledMomentum1",
    "NesterovDampeningScaleFactor1": "nesterovDampeningScaleFactor1",
    "NesterovGradScaleFactor1": "nesterovGradScaleFactor1",
    "ScaledLearningRate2": "scaledLearningRate2",
    "DampeningScaleFactor2": "dampeningScaleFactor2",
    "ScaledMomentum2": "scaledMomentum2",
    "Momentum": "momentum",
    "LearningRate": "learningRate",
    "WeightDecay": "weightDecay",
    "AdamBeta1": "beta1",
    "AdamBeta2": "beta2",
    "AdamEps": "eps",
    "AdamMaxWeightNorm": "maxWeightNorm",
    "AdamGradientScaling": "gradientScaling",
    "AdaptiveAlpha": "alpha",
    "AdaptiveMomentum": "adaptiveMomentum",
    "AdaptiveEps": "adaptiveEps",
    "AdaptiveGradientScaling": "adaptiveGradientScaling",
}


def _constant(name, prefix):
    def function():
        return prefix

    function.__name__ = function.__qualname__ = name
    function.__doc__ = f"`{prefix}`."
    return function


FUNCTIONS = {
    f"reserved{name}Prefix": _constant(f"reserved{name}Prefix", prefix)
    for name, prefix in (
        *PREFIXES.items(),
        *((f"Default{name}", f"{text}___default___") for name, text in SCALARS.items()),
        *((f"Specific{name}", f"{text}___specific___") for name, text in SCALARS.items()),
    )
}


def reservedPrefixes():
    """All of them, sorted."""
    return sorted({*PREFIXES.values(), *reservedDefaultPrefixes(), *reservedSpecificPrefixes()})


def reservedDefaultPrefixes():
    return sorted(f"{text}___default___" for text in SCALARS.values())


def reservedSpecificPrefixes():
    return sorted(f"{text}___specific___" for text in SCALARS.values())


FUNCTIONS.update(
    {function.__name__: function for function in (reservedPrefixes, reservedDefaultPrefixes, reservedSpecificPrefixes)}
)
