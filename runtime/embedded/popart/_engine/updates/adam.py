"""Adam, AdamNoBias, Lamb, LambNoBias and AdaMax (facts: include/popart/adam.hpp). G: the summed gradient, t: Step___w.

    g = G / (ls af), clipped;  L2Regularization: g += wd w
    m = b1 m + (1-b1) g  (Accl1___w);  v = b2 v + (1-b2) g^2  (Accl2___w);  AdaMax: v = max(b2 v, |g|)
    Adam, Lamb:   x = m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)
    ...NoBias:    x = m / (sqrt(v) + eps)
    AdaMax:       x = m / (1 - b1^t) / (v + eps)
    Decay: x += wd w;  Lamb...: x *= min(||w||, max weight norm) / ||x||, 1 where either norm is 0
    w -= lr x
With scaled_optimizer_state m and v are kept times ls and ls^2 (AdaMax: ls), and eps is scaled with them.
State is float, or what accl1_type and accl2_type say; the arithmetic is float, w is rounded once.
"""
from __future__ import annotations

import torch

from ...enums import AdamMode, WeightDecayMode
from .common import WeightUpdater, torch_type

FIRST, SECOND, STEP = "Accl1___", "Accl2___", "Step___"
_CORRECTED = (AdamMode.Adam, AdamMode.Lamb, AdamMode.AdaMax)
_LAMB = (AdamMode.Lamb, AdamMode.LambNoBias)


class AdamUpdater(WeightUpdater):
    def fresh_state(self, name, weight):
        optimizer = self.optimizer
        found = {
            FIRST + name: torch.zeros_like(weight, dtype=torch_type(optimizer.accl1Type, weight.dtype)),
            SECOND + name: torch.zeros_like(weight, dtype=torch_type(optimizer.accl2Type, weight.dtype)),
        }
        if optimizer.mode in _CORRECTED:
            found[STEP + name] = torch.zeros((), dtype=torch.float32)
        return found

    def direction(self, name, weight):
        return self._sums[name].float() * self.unscale()

    def update(self, name, weight, direction):
        mode, h, gradient, wide = self.optimizer.mode, self.values(name), direction * self._state_scale(), weight.float()
        if self.optimizer.weight_decay_mode is WeightDecayMode.L2Regularization:
            gradient = gradient + h["weightDecay"] * self._state_scale() * wide
        m = h["beta1"] * self.state[FIRST + name].float() + (1 - h["beta1"]) * gradient
        old = self.state[SECOND + name].float()
        if mode is AdamMode.AdaMax:
            v = torch.maximum(h["beta2"] * old, gradient.abs())
        else:
            v = h["beta2"] * old + (1 - h["beta2"]) * gradient.square()
        self.state[FIRST + name].copy_(m)
        self.state[SECOND + name].copy_(v)
        m, v = self._corrected(name, h, m, v)
        x = m / ((v if mode is AdamMode.AdaMax else v.sqrt()) + h["eps"] * self._state_scale())
        if self.optimizer.weight_decay_mode is WeightDecayMode.Decay:
            x = x + h["weightDecay"] * wide
        rate = h["learningRate"] * (_trust(wide, x, h["maxWeightNorm"]) if mode in _LAMB else 1.0)
        weight.copy_(wide - rate * x)

    def _state_scale(self) -> float:
        return self.loss_scale if self.optimizer.scaled_optimizer_state else 1.0

    def _corrected(self, name, h, m, v):
        """m and v without the bias of their start at zero."""
        if self.optimizer.mode not in _CORRECTED:
            return m, v
        step = float(self.state[STEP + name].add_(1))
        m = m / (1 - h["beta1"] ** step)
        return m, v if self.optimizer.mode is AdamMode.AdaMax else v / (1 - h["beta2"] ** step)


def _trust(weight, x, largest):
    r1, r2 = weight.norm().clamp(max=largest), x.norm()
    return torch.where((r1 == 0) | (r2 == 0), torch.ones_like(r1), r1 / r2)
