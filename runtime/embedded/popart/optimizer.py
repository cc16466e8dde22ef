"""SGD, ConstSGD and ClipNormSettings: hyper-parameters only; `_engine/updates.py` has the arithmetic.

Every value is `(float, isConst)`. A constant one is baked into the program and cannot be replaced later.
"""
from typing import NamedTuple

from .enums import DataType, SGDAccumulatorAndMomentum
from .errors import popart_exception, unsupported


class OptimizerValue(NamedTuple):
    """One hyper-parameter."""

    val: float
    isConst: bool

    def check_replacement(self, new, what):
        """Raises unless `new` may take this value's place in a built session."""
        if self.isConst and not new.isConst:
            raise popart_exception(f"Can not replace a constant value with a non constant value. ({what})")
        if not self.isConst and new.isConst:
            raise popart_exception(f"Can not replace a non constant value with a constant value. ({what})")
        if self.isConst and self.val != new.val:
            raise popart_exception(f"Values are constant but do not match. ({what}: {self.val} and {new.val})")


class OptimizerValueMap:
    """A default and the weights that differ from it."""

    def __init__(self, default):
        self._default, self._specific = default, {}

    def getDefault(self):
        return self._default

    def get(self, weight):
        return self._specific.get(weight, self._default)

    def hasSpecific(self, weight):
        return weight in self._specific

    def insertSpecific(self, weight, value):
        self._specific[weight] = value


class ClipNormSettings:
    """Scale a group of gradients so that their joint 2-norm is at most maxNorm."""

    def __init__(self, weightIds, maxNorm):
        self.weightIds, self.maxNorm, self.all = list(weightIds), float(maxNorm), False

    @staticmethod
    def clipWeights(weightIds, maxNorm):
        return ClipNormSettings(weightIds, maxNorm)

    @staticmethod
    def clipAllWeights(maxNorm):
        settings = ClipNormSettings([], maxNorm)
        settings.all = True
        return settings

    def __eq__(self, other):
        return isinstance(other, ClipNormSettings) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]  # it can change, as in PopART


_DEFAULTS = {
    "defaultLearningRate": 0.1,
    "defaultWeightDecay": 0.0,
    "defaultMomentum": 0.0,
    "defaultDampening": 0.0,
    "defaultVelocityScaling": 1.0,
    "lossScaling": 1.0,
    "nesterov": 0.0,
}
# key in the dict of defaults -> key in insertSpecific
_SPECIFIC = {
    "defaultLearningRate": "learningRate",
    "defaultWeightDecay": "weightDecay",
    "defaultMomentum": "momentum",
    "defaultDampening": "dampening",
    "defaultVelocityScaling": "velocityScaling",
    "nesterov": "nesterov",
}
NAMES = tuple(_SPECIFIC.values())


class Optimizer:
    """Base of the optimizers."""

    def getLossScalingVal(self):
        return self.loss_scaling.val


class SGD(Optimizer):
    """v <- mm v + (1 - dm)(g + wd w);  w <- w - lr v.  See facts of the three forms in `_engine/updates.py`."""

    def __init__(
        self,
        pyd,
        clip_norm_settings=(),
        accumulatorAndMomentum=SGDAccumulatorAndMomentum.Combined,
        accumType=DataType.UNDEFINED,
        accl1Type=DataType.UNDEFINED,
        debugContext="sgd",
    ):
        given = _tuples(pyd, _DEFAULTS)
        values = {key: given.get(key, OptimizerValue(number, True)) for key, number in _DEFAULTS.items()}
        self.loss_scaling = values.pop("lossScaling")
        if self.loss_scaling.val == 0:
            raise popart_exception("Loss scaling cannot be 0")
        self.values = {_SPECIFIC[key]: OptimizerValueMap(value) for key, value in values.items()}
        _check_atoms({name: table.getDefault() for name, table in self.values.items()})
        self.clip_norm_settings = list(clip_norm_settings)
        if len(self.clip_norm_settings) > 1 and any(c.all for c in self.clip_norm_settings):
            raise popart_exception("ClipNormSettings.clipAllWeights must be the only clip norm setting of an optimizer")
        self.accumulatorAndMomentum = accumulatorAndMomentum
        self.accumType, self.accl1Type = _state_type(accumType), _state_type(accl1Type)
        self.debugContext = debugContext
        self.specific_weights = []

    def insertSpecific(self, tensorId, values):
        """Hyper-parameters of one weight; keys left out take the optimizer's defaults as they are now."""
        given = _tuples(values, NAMES)
        atoms = {name: given.get(name, table.getDefault()) for name, table in self.values.items()}
        _check_atoms(atoms)
        for name, value in atoms.items():
            self.values[name].insertSpecific(tensorId, value)
        self.specific_weights = [*dict.fromkeys([*self.specific_weights, tensorId])]

    def of(self, weight):
        """{learningRate: OptimizerValue, ...} of one weight."""
        return {name: table.get(weight) for name, table in self.values.items()}

    def check_replacement(self, new, weights):
        """Raises popart_exception unless `new` can be given to a session built with this optimizer."""
        if not isinstance(new, SGD):
            raise popart_exception(f"Optimizer of type {type(new).__name__} can not replace one of type SGD")
        if new.clip_norm_settings != self.clip_norm_settings:
            raise popart_exception("The clip norm settings of the new optimizer differ from the session's")
        if new.accumulatorAndMomentum is not self.accumulatorAndMomentum:
            raise popart_exception("The SGDAccumulatorAndMomentum of the new optimizer differs from the session's")
        if (new.accumType, new.accl1Type) != (self.accumType, self.accl1Type):
            raise popart_exception("The accumType or accl1Type of the new optimizer differs from the session's")
        self.loss_scaling.check_replacement(new.loss_scaling, "lossScaling")
        for weight in weights:
            mine, theirs = self.of(weight), new.of(weight)
            for name in NAMES:
                mine[name].check_replacement(theirs[name], f"{name} of '{weight}'")

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


class Adam(Optimizer):
    """Refused by name: not implemented yet."""

    def __init__(self, *args, **kwargs):
        raise unsupported("the optimizer Adam", "Use SGD.")


class Adaptive(Optimizer):
    """Refused by name: not implemented yet."""

    def __init__(self, *args, **kwargs):
        raise unsupported("the optimizer Adaptive", "Use SGD.")


def _tuples(pyd, allowed):
    found = {}
    for key, value in pyd.items():
        if key not in allowed:
            raise popart_exception(f"Invalid SGD key, {key}, the allowed keys are ({', '.join(allowed)})")
        if not isinstance(value, tuple) or len(value) != 2 or not isinstance(value[1], bool):
            raise TypeError(f"SGD: the value of '{key}' must be a tuple (float, isConst: bool), not {value!r}")
        found[key] = OptimizerValue(float(value[0]), value[1])
    return found


def _state_type(dtype):
    if dtype not in (DataType.UNDEFINED, DataType.FLOAT, DataType.FLOAT16):
        raise popart_exception(f"Optimizer state can be FLOAT or FLOAT16, not {dtype.name}")
    return dtype


def _check_atoms(atoms):
    """The rules of PopART on one weight's values."""
    for name, label in (
        ("learningRate", "learning rate"), ("weightDecay", "weight decay"), ("momentum", "momentum"),
        ("dampening", "dampening"),
    ):  # fmt: skip
        if atoms[name].val < 0:
            raise popart_exception(f"Negative {label} ({atoms[name].val}) in SGD, bailing as this might not make sense")
    rate = atoms["learningRate"]
    if rate.isConst and rate.val == 0:
        raise popart_exception(
            "Constant, zero learning rate in SGD, bailing. If you need a learning rate of 0 for testing, make it "
            "non-const."
        )
    if atoms["velocityScaling"].val <= 0:
        raise popart_exception(f"Non-positive velocity scaling ({atoms['velocityScaling'].val}) in SGD, bailing")
    if atoms["nesterov"].val != 0 and atoms["dampening"].val != 0:
        raise popart_exception("Nesterov momentum requires zero dampening in SGD")
