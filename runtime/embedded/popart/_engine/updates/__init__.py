"""The weight updates of PopART's optimizers, one file a family."""
from __future__ import annotations

from .adam import AdamUpdater
from .adaptive import AdaptiveUpdater
from .common import WeightUpdater
from .sgd import SgdUpdater

_UPDATERS = {"SGD": SgdUpdater, "Adam": AdamUpdater, "Adaptive": AdaptiveUpdater}


def make_updater(optimizer, weights, saved, mean_factor) -> WeightUpdater:
    """The updater of this optimizer's family; see WeightUpdater."""
    return _UPDATERS[optimizer.NAME](optimizer, weights, saved, mean_factor)
