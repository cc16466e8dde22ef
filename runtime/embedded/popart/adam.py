"""Adam, AdamNoBias, Lamb, LambNoBias and AdaMax: hyper-parameters; the arithmetic is in `_engine/updates/adam.py`."""
from .enums import AdamMode, DataType, WeightDecayMode
from .optimizer import Optimizer, state_type


class Adam(Optimizer):
    """`Adam({"defaultLearningRate": (0.001, False)}, AdamMode.Adam)`; every value is (float, isConst)."""

    NAME = "Adam"
    DEFAULTS = {
        "defaultLearningRate": 0.1, "defaultWeightDecay": 0.0, "defaultBeta1": 0.9, "defaultBeta2": 0.999,
        "defaultEps": 1e-6, "lossScaling": 1.0, "defaultMaxWeightNorm": 10.0,
    }  # fmt: skip
    SPECIFIC = {
        "defaultLearningRate": "learningRate", "defaultWeightDecay": "weightDecay", "defaultBeta1": "beta1",
        "defaultBeta2": "beta2", "defaultEps": "eps", "defaultMaxWeightNorm": "maxWeightNorm",
    }  # fmt: skip

    def __init__(
        self,
        values,
        mode=AdamMode.Adam,
        weight_decay_mode=WeightDecayMode.Decay,
        accum_type=DataType.UNDEFINED,
        accl1_type=DataType.FLOAT,
        accl2_type=DataType.FLOAT,
        clip_norm_settings=(),
        scaled_optimizer_state=False,
        debugContext="adam",
    ):
        if "maxWeightNorm" in values:  # the constructor's older name of it
            values = {("defaultMaxWeightNorm" if k == "maxWeightNorm" else k): v for k, v in values.items()}
        self._configure(values, clip_norm_settings)
        self.mode, self.weight_decay_mode = mode, weight_decay_mode
        self.accumType, self.accl1Type, self.accl2Type = map(state_type, (accum_type, accl1_type, accl2_type))
        self.scaled_optimizer_state, self.debugContext = bool(scaled_optimizer_state), debugContext

    def settings(self):
        return {
            "AdamMode": self.mode, "WeightDecayMode": self.weight_decay_mode, "accum type": self.accumType,
            "accl1 type": self.accl1Type, "accl2 type": self.accl2Type,
            "scaled optimizer state": self.scaled_optimizer_state,
        }  # fmt: skip

    def _check(self, atoms):
        super()._check(atoms)
        for name in ("beta1", "beta2"):
            if not 0 <= atoms[name].val() <= 1:
                self._refuse(f"{name} ({atoms[name].val()}) outside [0, 1]")
        if atoms["maxWeightNorm"].val() < 0:
            self._refuse(f"Negative max weight norm ({atoms['maxWeightNorm'].val()})")

    def learningRates(self):
        return self.values["learningRate"]

    def weightDecays(self):
        return self.values["weightDecay"]

    def beta1s(self):
        return self.values["beta1"]

    def beta2s(self):
        return self.values["beta2"]

    def epss(self):
        return self.values["eps"]

    def maxWeightNorms(self):
        return self.values["maxWeightNorm"]
