"""SGD and ConstSGD: hyper-parameters; the arithmetic is in `_engine/updates/sgd.py`."""
from .enums import DataType, SGDAccumulatorAndMomentum
from .errors import popart_exception
from .optimizer import Optimizer, state_type


class SGD(Optimizer):
    """v <- mm v + (1 - dm)(g + wd w);  w <- w - lr v."""

    NAME = "SGD"
    DEFAULTS = {
        "defaultLearningRate": 0.1, "defaultWeightDecay": 0.0, "defaultMomentum": 0.0, "defaultDampening": 0.0,
        "defaultVelocityScaling": 1.0, "lossScaling": 1.0, "nesterov": 0.0,
    }  # fmt: skip
    SPECIFIC = {
        "defaultLearningRate": "learningRate", "defaultWeightDecay": "weightDecay", "defaultMomentum": "momentum",
        "defaultDampening": "dampening", "defaultVelocityScaling": "velocityScaling", "nesterov": "nesterov",
    }  # fmt: skip

    def __init__(
        self,
        pyd,
        clip_norm_settings=(),
        accumulatorAndMomentum=SGDAccumulatorAndMomentum.Combined,
        accumType=DataType.UNDEFINED,
        accl1Type=DataType.UNDEFINED,
        debugContext="sgd",
    ):
        self._configure(pyd, clip_norm_settings)
        self.accumulatorAndMomentum = accumulatorAndMomentum
        self.accumType, self.accl1Type = state_type(accumType), state_type(accl1Type)
        self.debugContext = debugContext

    def settings(self):
        return {
            "SGDAccumulatorAndMomentum": self.accumulatorAndMomentum, "accumType": self.accumType,
            "accl1Type": self.accl1Type,
        }  # fmt: skip

    def _check(self, atoms):
        super()._check(atoms)
        for name in ("momentum", "dampening"):
            if atoms[name].val() < 0:
                self._refuse(f"Negative {name} ({atoms[name].val()})")
        if atoms["velocityScaling"].val() <= 0:
            self._refuse(f"Non-positive velocity scaling ({atoms['velocityScaling'].val()})")
        if atoms["nesterov"].val() != 0 and atoms["dampening"].val() != 0:
            raise popart_exception("Nesterov momentum requires zero dampening in SGD")

    def learningRates(self):
        return self.values["learningRate"]

    def weightDecays(self):
        return self.values["weightDecay"]

    def momentums(self):
        return self.values["momentum"]

    def dampenings(self):
        return self.values["dampening"]

    def velocityScalings(self):
        return self.values["velocityScaling"]

    def nesterov(self):
        return self.values["nesterov"]


class ConstSGD(SGD):
    """SGD without momentum whose values are all constant."""

    def __init__(self, learning_rate, weight_decay=0.0, loss_scaling=1.0, clip_norm_settings=()):
        super().__init__(
            {
                "defaultLearningRate": (learning_rate, True),
                "defaultWeightDecay": (weight_decay, True),
                "lossScaling": (loss_scaling, True),
            },
            clip_norm_settings,
        )
