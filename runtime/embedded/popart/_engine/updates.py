"""The arithmetic of SGD in PopART's three forms (facts: include/popart/sgd.hpp, src/compoundscalarhelper.cpp).

g: gradient of one micro-batch, scaled by ls. af: accumulation factor if the reduction is Mean, else 1.
- plain (momentum const 0):  w <- w (1 - lr (1-dm) wd) - G lr (1-dm) / (ls af), G = sum of g, in Accum___w
- combined (SGD1): Accl___w = v starts at (1-dm) wd vs w0; each micro-batch v += g (1-dm) vs / (ls af); at the end
  w <- w - v lr / vs, then v <- mm v + (1-dm) wd vs w. A new momentum or weight decay therefore acts one step later.
- separate (SGD2): Accum___w = G, Accl1___w = v starts at 0; v <- mm v + G (1-dm) vs / (ls af) + (1-dm) wd vs w;
  w <- w - v lr / vs.
Nesterov replaces v / vs in the last step by G / (ls af) + wd w + mm v / vs.
"""
from __future__ import annotations

import torch

from ..enums import DataType, SGDAccumulatorAndMomentum
from ..errors import popart_exception
from ..optimizer import SGD
from ..tensorinfo import TensorInfo

_TORCH = {DataType.FLOAT: torch.float32, DataType.FLOAT16: torch.float16}
ACCUMULATOR = "Accum___"
COMBINED, SEPARATE = "Accl___", "Accl1___"


class WeightUpdater:
    """Optimizer state of the trained weights and the update at the end of a step."""

    def __init__(self, optimizer: SGD, weights: dict[str, torch.Tensor], saved: dict, mean_factor: int):
        """weights: the trained ones. saved: {id: ndarray}, initializers of an earlier modelToHost. mean_factor: af."""
        unknown = [name for name in optimizer.specific_weights if name not in weights]
        if unknown:
            raise popart_exception(f"Optimizer-specific values were given for '{unknown[0]}', which is not trained")
        for settings in optimizer.clip_norm_settings:
            missing = [name for name in settings.weightIds if name not in weights]
            if missing:
                raise popart_exception(f"Clip norm settings name '{missing[0]}', which is not a trained weight")
        self.optimizer, self.mean_factor = optimizer, mean_factor
        self.forms = {name: _form(optimizer, name) for name in weights}
        self.state = self._initial_state(weights, saved)
        self._sums: dict[str, torch.Tensor] = {}
        self._weight_info = {name: TensorInfo(str(w.dtype).split(".")[1], tuple(w.shape)) for name, w in weights.items()}
        self.loss_scale: float = optimizer.loss_scaling.val

    @property
    def accumulators(self) -> dict[str, torch.Tensor]:
        """Accum___w: the sum of the gradients so far, between accumulate and apply."""
        return {ACCUMULATOR + name: tensor for name, tensor in self._sums.items()}

    def accumulator_info(self, tensor: str) -> TensorInfo | None:
        """Type of Accum___w or Accl___w; None where this optimizer does not keep it."""
        if tensor in self.state:
            return TensorInfo(self.state[tensor].numpy())
        name = tensor[len(ACCUMULATOR) :]
        if not tensor.startswith(ACCUMULATOR) or self.forms.get(name, COMBINED) == COMBINED:
            return None
        info = self._weight_info[name]
        dtype = self.optimizer.accumType
        return info if dtype is DataType.UNDEFINED else TensorInfo(dtype.name, info.dims)

    def state_ids(self) -> tuple[str, ...]:
        """Accl___w or Accl1___w of every weight with momentum, in the order of the weights."""
        return tuple(self.state)

    def replace(self, optimizer: SGD) -> None:
        """New values for the variable hyper-parameters; raises when a constant one differs."""
        self.optimizer.check_replacement(optimizer, self.forms)
        self.optimizer, self.loss_scale = optimizer, optimizer.loss_scaling.val

    def _initial_state(self, weights, saved):
        state = {}
        for name, form in self.forms.items():
            if form == "":
                continue
            weight, key = weights[name], form + name
            dtype = _TORCH.get(self.optimizer.accl1Type, weight.dtype)
            if key in saved:
                state[key] = torch.tensor(saved[key]).to(weight.device, dtype).reshape(weight.shape)
            elif form == COMBINED:
                h = self._values(name)
                state[key] = (weight * ((1 - h["dampening"]) * h["weightDecay"] * h["velocityScaling"])).to(dtype)
            else:
                state[key] = torch.zeros_like(weight, dtype=dtype)
        return state

    def _values(self, name: str) -> dict[str, float]:
        return {key: value.val for key, value in self.optimizer.of(name).items()}

    def _unscale(self) -> float:
        return 1.0 / (self.loss_scale * self.mean_factor)

    def accumulate(self, gradients: dict[str, torch.Tensor]) -> None:
        """Takes the gradients of one micro-batch."""
        for name, gradient in gradients.items():
            h = self._values(name)
            if self.forms[name] == COMBINED:
                velocity = self.state[COMBINED + name]
                scale = (1 - h["dampening"]) * h["velocityScaling"] * self._unscale()
                velocity.add_(gradient.to(velocity.dtype), alpha=scale)
                if h["nesterov"] == 0:
                    continue
            dtype = _TORCH.get(self.optimizer.accumType, gradient.dtype)
            if name in self._sums:
                self._sums[name] += gradient.to(dtype)
            else:
                self._sums[name] = gradient.to(dtype, copy=True)

    def apply(self, weights: dict[str, torch.Tensor]) -> None:
        """One update of every weight, in place; the accumulators are empty afterwards."""
        directions = {name: self._direction(name, weights[name]) for name in self.forms}
        self._clip(directions)
        for name, direction in directions.items():
            self._update(name, weights[name], direction)
        self._sums.clear()

    def _direction(self, name, weight):
        """What the weight update reads, before clipping: G, v, or Nesterov's combination (times vs)."""
        form, h = self.forms[name], self._values(name)
        if form == "":
            return self._sums[name].clone()
        velocity = self.state[form + name]
        if form == SEPARATE:
            damp = (1 - h["dampening"]) * h["velocityScaling"]
            velocity.mul_(h["momentum"]).add_(self._sums[name].to(velocity.dtype), alpha=damp * self._unscale())
            velocity.add_(weight.to(velocity.dtype), alpha=damp * h["weightDecay"])
        if h["nesterov"] == 0 or h["momentum"] == 0:
            return velocity.clone()
        ahead = self._sums[name].to(velocity.dtype) * (self._unscale() * h["velocityScaling"])
        ahead.add_(weight.to(velocity.dtype), alpha=h["weightDecay"] * h["velocityScaling"])
        return ahead.add_(velocity, alpha=h["momentum"])

    def _clip(self, directions):
        for settings in self.optimizer.clip_norm_settings:
            group = list(directions) if settings.all else settings.weightIds
            norm = torch.sqrt(sum((directions[name].float() ** 2).sum() for name in group))
            factor = settings.maxNorm / torch.clamp(norm, min=settings.maxNorm)
            for name in group:
                directions[name].mul_(factor.to(directions[name].dtype))

    def _update(self, name, weight, direction):
        form, h = self.forms[name], self._values(name)
        rate = h["learningRate"]
        if form == "":
            rate *= 1 - h["dampening"]
            weight.mul_(1 - rate * h["weightDecay"]).sub_(direction.to(weight.dtype), alpha=rate * self._unscale())
            return
        weight.sub_(direction.to(weight.dtype), alpha=rate / h["velocityScaling"])
        if form == COMBINED:
            decay = (1 - h["dampening"]) * h["weightDecay"] * h["velocityScaling"]
            velocity = self.state[form + name]
            velocity.mul_(h["momentum"]).add_(weight.to(velocity.dtype), alpha=decay)


def _form(optimizer: SGD, name: str) -> str:
    """The prefix of the state tensor of this weight, "" when it needs none."""
    momentum = optimizer.of(name)["momentum"]
    if momentum.isConst and momentum.val == 0:
        return ""
    return SEPARATE if optimizer.accumulatorAndMomentum is SGDAccumulatorAndMomentum.Separate else COMBINED
