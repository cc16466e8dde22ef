"""The variables of a session: weights and optimizer state on the host, and on the device once for every replica.

Replicas share a tensor as long as they agree on it. A variable that the graph itself writes (running statistics of a
normalisation, CopyVarUpdate) becomes each replica's own; the host gets replica 0's.
"""
from __future__ import annotations

import numpy as np
import torch

from ..errors import popart_runtime_error, unsupported
from ..tensorinfo import TensorInfo
from . import model_io
from .host_copies import HostCopies


class Variables:
    """host: {id: ndarray}, weights, state and integer initializers. device: one {id: Tensor} a replica."""

    def __init__(self, weights: dict[str, np.ndarray], replicas: int, device: torch.device):
        self.host = HostCopies()
        self.host.add(weights)
        self.names = tuple(weights)
        self.fixed: set[str] = set()
        self.replicas, self._torch_device = replicas, device
        self.device: list[dict[str, torch.Tensor]] = [{} for _ in range(replicas)]
        self.sent = False

    def add_state(self, state: dict[str, torch.Tensor]) -> None:
        """Makes optimizer state part of what the host holds; until it is sent, `state` is the host's."""
        self.host.add({name: tensor.numpy() for name, tensor in state.items()})
        state.update({name: torch.from_numpy(self.host[name]) for name in state})

    def add_host_only(self, constants: dict[str, np.ndarray]) -> None:
        """Integer initializers: the build reads them once, the host may read them at any time but not change them."""
        self.fixed.update(constants)
        self.host.add(constants)

    def check_fixed(self, arrays: dict[str, np.ndarray]) -> None:
        """Raises when new values for the host would change what the build has read."""
        for name in self.fixed.intersection(arrays):
            if not np.array_equal(self.host[name].reshape(-1), arrays[name].reshape(-1)):
                raise unsupported(
                    f"new values for the integer initializer '{name}', which is a constant of the program",
                    "Make it an input, or build the session from a model with the new values.",
                )

    def send(self, state: dict[str, torch.Tensor]) -> None:
        """Host to device; `state` is the updater's and changes in place."""
        shared = {name: self._sent(name) for name in self.names}
        self.device = [dict(shared) for _ in range(self.replicas)]
        for name in state:
            state[name] = self._sent(name)
        self.host.give_back()
        self.sent = True

    def _sent(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self.host[name].copy()).to(self._torch_device)

    def fetch(self, state: dict[str, torch.Tensor]) -> None:
        """Device to host."""
        if not self.sent:
            return
        for name, tensor in {**self.device[0], **state}.items():
            np.copyto(self.host[name], tensor.cpu().numpy())
        self.host.give_back()

    def write(self, replica: int, name: str, value: torch.Tensor) -> None:
        """The graph's own update of a variable in one replica."""
        self.device[replica][name] = value.detach().clone()

    def reset(self, model: str | bytes, known: set[str], ignore_extra: bool) -> None:
        """New host values from a model; all of them or, when one does not fit, none."""
        new = {t.name: t for t in model_io.load_model(model).graph.initializer}
        for name in self.names:
            if name not in new:
                raise popart_runtime_error(f"resetHostWeights, no tensor '{name}' in the new model")
        extra = [name for name in new if name not in known and name not in self.host]
        if extra and not ignore_extra:
            raise popart_runtime_error(f"resetHostWeights, no tensor '{extra[0]}' in tensors")
        arrays = {name: _array(new[name]) for name in self.host if name in new}
        for name, array in arrays.items():
            if TensorInfo(array) != TensorInfo(self.host[name]):
                raise popart_runtime_error(
                    f"resetHostWeights, tensor '{name}' is {TensorInfo(array)!r} in the new model, "
                    f"{TensorInfo(self.host[name])!r} in the session"
                )
        self.check_fixed(arrays)
        for name, array in arrays.items():
            self.host[name][...] = array
        self.host.give_back()


def _array(tensor) -> np.ndarray:
    from onnx import numpy_helper

    return numpy_helper.to_array(tensor)
