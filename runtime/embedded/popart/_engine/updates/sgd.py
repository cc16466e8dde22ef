"""SGD in PopART's three forms (facts: include/popart/sgd.hpp, src/compoundscalarhelper.cpp).

g: gradient of one micro-batch, scaled by ls. af: what a mean divides by.
- plain (momentum const 0):  w <- w (1 - lr (1-dm) wd) - G lr (1-dm) / (ls af), G = sum of g, in Accum___w
- combined (SGD1): Accl___w = v starts at (1-dm) wd vs w0; each micro-batch v += g (1-dm) vs / (ls af); at the end
  w <- w - v lr / vs, then v <- mm v + (1-dm) wd vs w. A new momentum or weight decay therefore acts one step later.
- separate (SGD2): Accum___w = G, Accl1___w = v starts at 0; v <- mm v + G (1-dm) vs / (ls af) + (1-dm) wd vs w;
  w <- w - v lr / vs.
Nesterov replaces v / vs in the last step by G / (ls af) + wd w + mm v / vs.
Clip norms measure G (still scaled) or the velocity that the weight update reads, never the one that is kept.
"""
from __future__ import annotations

import torch

from ...enums import SGDAccumulatorAndMomentum
from .common import WeightUpdater, in_blocks, torch_type

COMBINED, SEPARATE = "Accl___", "Accl1___"


class SgdUpdater(WeightUpdater):
    def form(self, name: str) -> str:
        """The prefix of this weight's velocity, "" when it needs none."""
        momentum = self.optimizer.of(name)["momentum"]
        if momentum.isConst() and momentum.val() == 0:
            return ""
        return SEPARATE if self.optimizer.accumulatorAndMomentum is SGDAccumulatorAndMomentum.Separate else COMBINED

    def fresh_state(self, name, weight):
        form = self.form(name)
        if form == "":
            return {}
        dtype = torch_type(self.optimizer.accl1Type, weight.dtype)
        if form == SEPARATE:
            return {form + name: torch.zeros_like(weight, dtype=dtype)}
        h = self.values(name)
        return {form + name: (weight * ((1 - h["dampening"]) * h["weightDecay"] * h["velocityScaling"])).to(dtype)}

    def keeps_sum(self, name):
        return self.form(name) != COMBINED or self.values(name)["nesterov"] != 0

    def accumulator_info(self, tensor):
        combined = self.form(tensor[tensor.index("___") + 3 :]) == COMBINED
        return None if combined and tensor not in self.state else super().accumulator_info(tensor)

    def take(self, name, gradient):
        if self.form(name) == COMBINED:
            h, velocity = self.values(name), self.state[COMBINED + name]
            scale = (1 - h["dampening"]) * h["velocityScaling"] * self.unscale()
            velocity.add_(gradient.to(velocity.dtype), alpha=scale)

    def direction(self, name, weight):
        """G, v, or Nesterov's combination (times vs)."""
        form, h = self.form(name), self.values(name)
        if form == "":
            return self.own(self._sums[name])
        velocity = self.state[form + name]
        if form == SEPARATE:
            damp = (1 - h["dampening"]) * h["velocityScaling"]
            velocity.mul_(h["momentum"]).add_(self._sums[name].to(velocity.dtype), alpha=damp * self.unscale())
            velocity.add_(weight.to(velocity.dtype), alpha=damp * h["weightDecay"])
        if h["nesterov"] == 0 or h["momentum"] == 0:
            return self.own(velocity)
        ahead = self._sums[name].to(velocity.dtype) * (self.unscale() * h["velocityScaling"])
        ahead.add_(weight.to(velocity.dtype), alpha=h["weightDecay"] * h["velocityScaling"])
        return ahead.add_(velocity, alpha=h["momentum"])

    def update(self, name, weight, direction):
        form, h = self.form(name), self.values(name)
        rate = h["learningRate"]
        if form == "":
            rate *= 1 - h["dampening"]
            for w, d in in_blocks(weight, direction):
                w.mul_(1 - rate * h["weightDecay"]).sub_(d.to(w.dtype), alpha=rate * self.unscale())
            return
        decay = (1 - h["dampening"]) * h["weightDecay"] * h["velocityScaling"]
        for w, d, v in in_blocks(weight, direction, self.state[form + name]):
            w.sub_(d.to(w.dtype), alpha=rate / h["velocityScaling"])
            if form == COMBINED:
                v.mul_(h["momentum"]).add_(w.to(v.dtype), alpha=decay)
