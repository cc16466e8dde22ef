"""What every optimizer has: hyper-parameters `(float, isConst)`, clip norm settings, the rules of replacement.

The optimizers themselves are in sgd.py, adam.py and adaptive.py; `_engine/updates/` has their arithmetic.
"""
from .enums import DataType
from .errors import popart_exception


class OptimizerValue:
    """One hyper-parameter; a constant one is baked into the program and cannot be replaced later."""

    __slots__ = ("_const", "_value")

    def __init__(self, val, isConst=True):
        self._value, self._const = float(val), bool(isConst)

    def val(self):
        return self._value

    def isConst(self):
        return self._const

    def __eq__(self, other):
        return isinstance(other, OptimizerValue) and (self._value, self._const) == (other._value, other._const)

    def __hash__(self):
        return hash((self._value, self._const))

    def __repr__(self):
        return f"OptimizerValue({self._value}, {self._const})"

    def check_replacement(self, new, what):
        """Raises unless `new` may take this value's place in a built session."""
        if self._const and not new._const:
            raise popart_exception(f"Can not replace a constant value with a non constant value. ({what})")
        if not self._const and new._const:
            raise popart_exception(f"Can not replace a non constant value with a constant value. ({what})")
        if self._const and self._value != new._value:
            raise popart_exception(f"Values are constant but do not match. ({what}: {self._value} and {new._value})")


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


class Optimizer:
    """Base of the optimizers. A subclass has NAME, DEFAULTS, SPECIFIC and checks the values of one weight.

    DEFAULTS: key of the constructor's dict -> value when left out. SPECIFIC: that key -> the key of insertSpecific.
    """

    NAME = ""
    DEFAULTS = {}
    SPECIFIC = {}

    def _configure(self, values, clip_norm_settings):
        given = self._tuples(values, self.DEFAULTS)
        found = {key: given.get(key, OptimizerValue(number)) for key, number in self.DEFAULTS.items()}
        self.loss_scaling = found["lossScaling"]
        if self.loss_scaling.val() == 0:
            raise popart_exception("Loss scaling cannot be 0")
        self.values = {name: OptimizerValueMap(found[key]) for key, name in self.SPECIFIC.items()}
        self._check({name: table.getDefault() for name, table in self.values.items()})
        self.clip_norm_settings = list(clip_norm_settings)
        if len(self.clip_norm_settings) > 1 and any(c.all for c in self.clip_norm_settings):
            raise popart_exception("ClipNormSettings.clipAllWeights must be the only clip norm setting of an optimizer")
        self.specific_weights = []

    def getLossScalingVal(self):
        return self.loss_scaling.val()

    def insertSpecific(self, tensorId, values):
        """Hyper-parameters of one weight; keys left out take the optimizer's defaults as they are now."""
        given = self._tuples(values, self.SPECIFIC.values())
        atoms = {name: given.get(name, table.getDefault()) for name, table in self.values.items()}
        self._check(atoms)
        for name, value in atoms.items():
            self.values[name].insertSpecific(tensorId, value)
        self.specific_weights = [*dict.fromkeys([*self.specific_weights, tensorId])]

    def of(self, weight):
        """{learningRate: OptimizerValue, ...} of one weight."""
        return {name: table.get(weight) for name, table in self.values.items()}

    def settings(self):
        """{what: value} of everything that an optimizer taking this one's place must share."""
        return {}

    def check_replacement(self, new, weights):
        """Raises popart_exception unless `new` can be given to a session built with this optimizer."""
        if not isinstance(new, Optimizer) or new.NAME != self.NAME:
            raise popart_exception(
                f"Optimizer of type {type(new).__name__} can not replace one of type {type(self).__name__}"
            )
        if new.clip_norm_settings != self.clip_norm_settings:
            raise popart_exception("The clip norm settings of the new optimizer differ from the session's")
        for (what, mine), theirs in zip(self.settings().items(), new.settings().values()):
            if mine != theirs:
                raise popart_exception(f"The {what} of the new optimizer differs from the session's")
        self.loss_scaling.check_replacement(new.loss_scaling, "lossScaling")
        for weight in weights:
            mine, theirs = self.of(weight), new.of(weight)
            for name in self.SPECIFIC.values():
                mine[name].check_replacement(theirs[name], f"{name} of '{weight}'")

    def _check(self, atoms):
        """The rules that most optimizers share; atoms: {name: OptimizerValue} of one weight."""
        for name, label in (("learningRate", "learning rate"), ("weightDecay", "weight decay"), ("eps", "eps")):
            if name in atoms and atoms[name].val() < 0:
                self._refuse(f"Negative {label} ({atoms[name].val()})")
        rate = atoms["learningRate"]
        if rate.isConst() and rate.val() == 0:
            raise popart_exception(
                f"Constant, zero learning rate in {self.NAME}, bailing. If you need a learning rate of 0 for testing, make "
                f"it non-const."
            )

    def _refuse(self, reason):
        raise popart_exception(f"{reason} in {self.NAME}, bailing as this might not make sense")

    def _tuples(self, given, allowed):
        if not hasattr(given, "items"):
            raise TypeError(f"{self.NAME}: the values must be a dict, not {given!r}")
        found = {}
        for key, value in given.items():
            if not isinstance(key, str):
                raise popart_exception(f"A key in the optimizer map must be a py::str: {key!r} of {self.NAME}")
            if key not in allowed:
                raise popart_exception(f"Invalid {self.NAME} key, {key}, the allowed keys are ({', '.join(allowed)})")
            if not isinstance(value, tuple):
                raise popart_exception(
                    f"A value in the optimizer map must be a py::tuple: '{key}' of {self.NAME} is {value!r}"
                )
            if len(value) != 2 or not isinstance(value[1], bool):
                raise TypeError(f"{self.NAME}: the value of '{key}' must be a tuple (float, isConst: bool), not {value!r}")
            found[key] = OptimizerValue(*value)
        return found


def state_type(dtype):
    """The element type of optimizer state, checked."""
    if dtype not in (DataType.UNDEFINED, DataType.FLOAT, DataType.FLOAT16):
        raise popart_exception(f"Optimizer state can be FLOAT or FLOAT16, not {dtype.name}")
    return dtype
