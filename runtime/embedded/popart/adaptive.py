"""AdaGrad, RMSProp, CenteredRMSProp and AdaDelta: hyper-parameters; the arithmetic is in `_engine/updates/adaptive.py`."""
from .enums import AdaptiveMode, DataType, WeightDecayMode
from .optimizer import Optimizer, state_type


class Adaptive(Optimizer):
    """`Adaptive({"defaultLearningRate": (0.01, False)}, AdaptiveMode.RMSProp)`; every value is (float, isConst)."""

    NAME = "Adaptive"
    DEFAULTS = {
        "defaultLearningRate": 0.01, "defaultWeightDecay": 0.0, "defaultAlpha": 0.99, "defaultMomentum": 0.0,
        "defaultEps": 1e-6, "lossScaling": 1.0,
    }  # fmt: skip
    SPECIFIC = {
        "defaultLearningRate": "learningRate", "defaultWeightDecay": "weightDecay", "defaultAlpha": "alpha",
        "defaultMomentum": "momentum", "defaultEps": "eps",
    }  # fmt: skip

    def __init__(
        self,
        values,
        mode=AdaptiveMode.RMSProp,
        weight_decay_mode=WeightDecayMode.Decay,
        accum_type=DataType.UNDEFINED,
        accl1_type=DataType.FLOAT,
        accl2_type=DataType.FLOAT,
        accl3_type=DataType.UNDEFINED,
        rmsprop_tf_variant=False,
        debugContext="adaptive",
    ):
        self._configure(values, ())
        self.mode, self.weight_decay_mode = mode, weight_decay_mode
        self.accumType, self.accl1Type = state_type(accum_type), state_type(accl1_type)
        self.accl2Type, self.accl3Type = state_type(accl2_type), state_type(accl3_type)
        self.rmsprop_tf_variant, self.debugContext = bool(rmsprop_tf_variant), debugContext

    def settings(self):
        return {
            "AdaptiveMode": self.mode, "WeightDecayMode": self.weight_decay_mode, "accum type": self.accumType,
            "accl1 type": self.accl1Type, "accl2 type": self.accl2Type, "accl3 type": self.accl3Type,
            "RMSProp variant": self.rmsprop_tf_variant,
        }  # fmt: skip

    def _check(self, atoms):
        super()._check(atoms)
        if not 0 <= atoms["alpha"].val() <= 1:
            self._refuse(f"alpha ({atoms['alpha'].val()}) outside [0, 1]")
        if atoms["momentum"].val() < 0:
            self._refuse(f"Negative momentum ({atoms['momentum'].val()})")

    def learningRates(self):
        return self.values["learningRate"]

    def weightDecays(self):
        return self.values["weightDecay"]

    def alphas(self):
        return self.values["alpha"]

    def momentums(self):
        return self.values["momentum"]

    def epss(self):
        return self.values["eps"]
