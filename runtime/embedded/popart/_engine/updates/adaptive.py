"""AdaGrad, RMSProp, CenteredRMSProp and AdaDelta (facts: include/popart/adaptive.hpp). G: the summed gradient.

    g = G / (ls af);  L2Regularization: g += wd w
    AdaGrad:          v1 += g^2;                       x = g / (sqrt(v1) + eps)
    RMSProp:          v1 = a v1 + (1-a) g^2;           x = g / (sqrt(v1) + eps)
    CenteredRMSProp:  as RMSProp, v2 = a v2 + (1-a) g; x = g / (sqrt(v1 - v2^2) + eps)
    AdaDelta:         v1 = a v1 + (1-a) g^2;           x = g sqrt(v2 + eps) / sqrt(v1 + eps);  v2 = a v2 + (1-a) x^2
    Decay: x += wd w;  momentum: v3 = mm v3 + x, x = v3;  w -= lr x
The TensorFlow variant of RMSProp has eps inside the root, and v3 = mm v3 + lr x, w -= v3.
v1, v2, v3 are Accl1___w, Accl2___w, Accl3___w; Accl3___w exists unless the momentum is a constant 0.
"""
from __future__ import annotations

import torch

from ...enums import AdaptiveMode, WeightDecayMode
from .common import WeightUpdater, torch_type

SQUARES, SECOND, VELOCITY = "Accl1___", "Accl2___", "Accl3___"
_WITH_SECOND = (AdaptiveMode.CenteredRMSProp, AdaptiveMode.AdaDelta)
_RMS = (AdaptiveMode.RMSProp, AdaptiveMode.CenteredRMSProp)


class AdaptiveUpdater(WeightUpdater):
    def fresh_state(self, name, weight):
        optimizer, momentum = self.optimizer, self.optimizer.of(name)["momentum"]
        kinds = {SQUARES: optimizer.accl1Type}
        if optimizer.mode in _WITH_SECOND:
            kinds[SECOND] = optimizer.accl2Type
        if not (momentum.isConst() and momentum.val() == 0):
            kinds[VELOCITY] = optimizer.accl3Type
        return {p + name: torch.zeros_like(weight, dtype=torch_type(t, weight.dtype)) for p, t in kinds.items()}

    def direction(self, name, weight):
        return self._sums[name].float() * self.unscale()

    def update(self, name, weight, direction):
        h, wide, mode = self.values(name), weight.float(), self.optimizer.weight_decay_mode
        gradient = direction + h["weightDecay"] * wide if mode is WeightDecayMode.L2Regularization else direction
        x = self._scaled(name, h, gradient)
        if mode is WeightDecayMode.Decay:
            x = x + h["weightDecay"] * wide
        rate, velocity = h["learningRate"], self.state.get(VELOCITY + name)
        tensorflow = self.optimizer.rmsprop_tf_variant and self.optimizer.mode in _RMS
        if velocity is not None:
            x = h["momentum"] * velocity.float() + (rate * x if tensorflow else x)
            velocity.copy_(x)
            rate = 1.0 if tensorflow else rate
        weight.copy_(wide - rate * x)

    def _scaled(self, name, h, gradient):
        """The gradient over the root of its running squares."""
        mode, alpha, eps = self.optimizer.mode, h["alpha"], h["eps"]
        squares = self.state[SQUARES + name]
        decay, share = (1.0, 1.0) if mode is AdaptiveMode.AdaGrad else (alpha, 1 - alpha)
        v1 = decay * squares.float() + share * gradient.square()
        squares.copy_(v1)
        if mode is AdaptiveMode.AdaDelta:
            second = self.state[SECOND + name]
            x = gradient * torch.sqrt(second.float() + eps) / torch.sqrt(v1 + eps)
            second.copy_(alpha * second.float() + (1 - alpha) * x.square())
            return x
        if mode is AdaptiveMode.CenteredRMSProp:
            mean = self.state[SECOND + name]
            mean.copy_(alpha * mean.float() + (1 - alpha) * gradient)
            v1 = v1 - mean.float().square()
        if self.optimizer.rmsprop_tf_variant and mode in _RMS:
            return gradient / torch.sqrt(v1 + eps)
        return gradient / (torch.sqrt(v1) + eps)
