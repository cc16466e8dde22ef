"""What the updates of all optimizers share. One object holds the optimizer state of every trained weight.

A step is `accumulate` once a micro-batch, then `apply`. Gradients arrive summed over replicas and scaled by
`loss_scale`; `mean_factor` is what a mean divides them by (micro-batches times replicas), else 1.
"""
from __future__ import annotations

import torch

from ...enums import DataType
from ...errors import popart_exception
from ...tensorinfo import TensorInfo
from ..shapes import info_of

ACCUMULATOR = "Accum___"
_BLOCK = 1 << 17  # elements
_TORCH = {DataType.FLOAT: torch.float32, DataType.FLOAT16: torch.float16}


def torch_type(dtype: DataType, default: torch.dtype) -> torch.dtype:
    """The torch dtype of an optimizer's state type; `default` for UNDEFINED."""
    return _TORCH.get(dtype, default)


class WeightUpdater:
    """Base: sums the gradients in Accum___w, clips, and lets a subclass update each weight."""

    def __init__(self, optimizer, weights: dict[str, torch.Tensor], saved: dict, mean_factor: float):
        """weights: the trained ones. saved: {id: ndarray}, optimizer state of an earlier modelToHost."""
        unknown = [name for name in optimizer.specific_weights if name not in weights]
        if unknown:
            raise popart_exception(f"Optimizer-specific values were given for '{unknown[0]}', which is not trained")
        for settings in optimizer.clip_norm_settings:
            missing = [name for name in settings.weightIds if name not in weights]
            if missing:
                raise popart_exception(f"Clip norm settings name '{missing[0]}', which is not a trained weight")
        self.optimizer, self.mean_factor = optimizer, mean_factor
        self.loss_scale: float = optimizer.getLossScalingVal()
        self.names = list(weights)
        self._infos = {n: TensorInfo(str(w.dtype).split(".")[1], tuple(w.shape)) for n, w in weights.items()}
        self._sums: dict[str, torch.Tensor] = {}
        self.state: dict[str, torch.Tensor] = {}
        for name, weight in weights.items():
            for key, fresh in self.fresh_state(name, weight).items():
                self.state[key] = _restored(key, fresh, saved)

    # --- for the session ----------------------------------------------------------------------------------------

    @property
    def accumulators(self) -> dict[str, torch.Tensor]:
        """Accum___w: the sum of the gradients so far, between accumulate and apply."""
        return {ACCUMULATOR + name: tensor for name, tensor in self._sums.items()}

    def accumulator_info(self, tensor: str) -> TensorInfo | None:
        """Type of Accum___w or Accl___w; None where this optimizer does not keep it."""
        if tensor in self.state:
            return info_of(self.state[tensor])
        name = tensor[len(ACCUMULATOR) :]
        if not tensor.startswith(ACCUMULATOR) or not self.keeps_sum(name):
            return None
        info, dtype = self._infos[name], self.optimizer.accumType
        return info if dtype is DataType.UNDEFINED else TensorInfo(dtype.name, info.dims)

    def replace(self, optimizer) -> None:
        """New values for the variable hyper-parameters; raises when a constant one differs."""
        self.optimizer.check_replacement(optimizer, self.names)
        self.optimizer, self.loss_scale = optimizer, optimizer.getLossScalingVal()

    def accumulate(self, gradients: dict[str, torch.Tensor]) -> None:
        """Takes the gradients of one micro-batch."""
        for name, gradient in gradients.items():
            self.take(name, gradient)
            if not self.keeps_sum(name):
                continue
            dtype = torch_type(self.optimizer.accumType, gradient.dtype)
            if name in self._sums:
                self._sums[name] += gradient.to(dtype)
            else:
                self._sums[name] = gradient.to(dtype, copy=True)

    def apply(self, weights: dict[str, torch.Tensor]) -> None:
        """One update of every weight, in place; the accumulators are empty afterwards."""
        directions = {name: self.direction(name, weights[name]) for name in self.names}
        self._clip(directions)
        for name, direction in directions.items():
            self.update(name, weights[name], direction)
        self._sums.clear()

    # --- for the subclasses -------------------------------------------------------------------------------------

    def values(self, name: str) -> dict[str, float]:
        """The hyper-parameters of one weight."""
        return {key: value.val() for key, value in self.optimizer.of(name).items()}

    def unscale(self) -> float:
        return 1.0 / (self.loss_scale * self.mean_factor)

    def fresh_state(self, name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """{id: initial value} of the state of one weight."""
        raise NotImplementedError

    def keeps_sum(self, name: str) -> bool:
        """Whether the gradients of this weight are summed in Accum___w."""
        return True

    def take(self, name: str, gradient: torch.Tensor) -> None:
        """What a micro-batch does beside the sum."""

    def direction(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """What the clip norm measures and scales in place; `own` it where it is kept."""
        raise NotImplementedError

    def own(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy, where the clip norm would change the tensor."""
        return tensor.clone() if self.optimizer.clip_norm_settings else tensor

    def update(self, name: str, weight: torch.Tensor, direction: torch.Tensor) -> None:
        """Changes the weight and its state in place."""
        raise NotImplementedError

    def _clip(self, directions: dict[str, torch.Tensor]) -> None:
        for settings in self.optimizer.clip_norm_settings:
            group = list(directions) if settings.all else settings.weightIds
            norm = torch.sqrt(sum((directions[name].float() ** 2).sum() for name in group))
            factor = settings.maxNorm / torch.clamp(norm, min=settings.maxNorm)
            for name in group:
                directions[name].mul_(factor.to(directions[name].dtype))


def in_blocks(*tensors: torch.Tensor):
    """Parts of tensors of one size that fit a processor's cache together, so that several updates of a part read and write
    memory once."""
    if tensors[0].device.type != "cpu" or not all(tensor.is_contiguous() for tensor in tensors):
        yield tensors
        return
    flat = [tensor.view(-1) for tensor in tensors]
    for first in range(0, len(flat[0]), _BLOCK):
        yield tuple(tensor[first : first + _BLOCK] for tensor in flat)


def _restored(key: str, fresh: torch.Tensor, saved: dict) -> torch.Tensor:
    if key not in saved:
        return fresh
    return torch.tensor(saved[key]).to(fresh.device, fresh.dtype).reshape(fresh.shape)
