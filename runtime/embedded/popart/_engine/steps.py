"""One Session.run: batches per step, micro-batches, replicas, the weight update, the anchors."""
from __future__ import annotations

import contextlib

import numpy as np
import torch

from ..enums import SyntheticDataMode
from ..errors import popart_exception, popart_runtime_error
from ..tensorinfo import TensorInfo
from .anchor_sources import Kind
from .anchors import Collector
from .numerics import stochastic_round

Tensors = dict[str, torch.Tensor]
_BROADCAST = ("1", "Broadcast")  # how the Builder's metadata names ReplicatedStreamMode.Broadcast


def _made_on(device: torch.device):
    """Within it tensors are made on this device, also by lowerings that name none."""
    return contextlib.nullcontext() if device.type == "cpu" else device


class Steps:
    """The loop of a session."""

    def __init__(self, core):
        self.core = core
        graph = core.graph
        self.broadcast = {
            name for name in graph.inputs if graph.metadata.get(f"__replicated_stream_mode/{name}") in _BROADCAST
        }
        read = {name for op in graph.ops for name in op.inputs} | {s.tensor for s in core.sources.values()}
        self._streams = [name for name in graph.inputs if name in read]  # PopART makes none for the others
        self._lockstep = core.lockstep
        self.has_run = False

    def run(self, program, stepio) -> None:
        core = self.core
        self.has_run = True
        synthetic = core.options.syntheticDataMode is not SyntheticDataMode.Off
        if not synthetic:
            stepio._begin(core)
        write = (lambda name, index, array: None) if synthetic else stepio._write
        collector = Collector(core.data_flow, core.accumulation, core.replicas, write)
        if core.stale:
            core.stale.begin()
        with _made_on(core.device):
            for batch in range(core.data_flow.batchesPerStep()):
                for micro in range(core.accumulation):
                    inputs = self._inputs(None if synthetic else stepio)
                    collector.add(batch, micro, self._micro_batch(program, inputs, micro == core.accumulation - 1))

    def _micro_batch(self, program, inputs: list[Tensors], last: bool) -> list[dict]:
        """Forward, backward and, in the last one of a step, the update. The anchors' values, one dict a replica."""
        core = self.core
        results = self._differentiate(program, inputs) if core.updater else self._forward(program, inputs)
        for replica, (outputs, _) in enumerate(results):
            for variable, value in core.variable_updates:
                core.variables.write(replica, variable, outputs[value])
        accumulators: Tensors = {}
        if core.updater and core.trained:
            with torch.no_grad():
                self._accumulate([gradients for _, gradients in results])
                accumulators = self._accumulators()
                if last:
                    self._update()
        return [self._anchors(replica, *found, accumulators) for replica, found in enumerate(results)]

    # --- the program --------------------------------------------------------------------------------------------

    def _forward(self, program, inputs):
        core, weights = self.core, self.core.variables.device
        if self._lockstep:
            return [(outputs, {}) for outputs in program.forward_replicas(weights, inputs, core.wanted)]
        return [(program.forward(w, i, core.wanted), {}) for w, i in zip(weights, inputs)]

    def _differentiate(self, program, inputs):
        """(outputs, gradients scaled by the loss scale) of every replica."""
        core = self.core
        weights, context = core.variables.device, contextlib.nullcontext()
        if core.stale:
            now = weights[0]
            old = core.stale.forward_weights(now)
            context = core.stale.backward_with(now, old)
            weights = [{**own, **{name: old[name] for name in core.stale.lags}} for own in weights]
        seed = torch.tensor(core.updater.loss_scale, dtype=torch.float32)
        asked = core.wanted, core.grads_of, seed
        with context:
            if self._lockstep:
                return program.step_replicas(weights, inputs, *asked)
            return [program.step(w, i, *asked) for w, i in zip(weights, inputs)]

    # --- weights ------------------------------------------------------------------------------------------------

    def _accumulate(self, gradients: list[Tensors]) -> None:
        core = self.core
        if core.loss_scaling:
            for replica in gradients:
                core.loss_scaling.count(replica)
        total = {name: gradients[0][name] for name in core.trained}
        for replica in gradients[1:]:
            total = {name: tensor + replica[name] for name, tensor in total.items()}
        core.updater.accumulate(total)

    def _accumulators(self) -> Tensors:
        """Those that are anchored, as they are before the update."""
        core = self.core
        wanted = {s.tensor for s in core.sources.values() if s.kind is Kind.ACCUMULATOR}
        found = {**core.updater.state, **core.updater.accumulators}
        return {name: found[name].clone() for name in wanted}

    def _update(self) -> None:
        core = self.core
        weights = {name: core.variables.device[0][name] for name in core.trained}
        halves = {n: w.float() for n, w in weights.items() if core.stochastic and w.dtype == torch.float16}
        core.updater.apply({**weights, **halves})
        for name, updated in halves.items():
            weights[name].copy_(stochastic_round(updated))
        if core.loss_scaling:
            core.loss_scaling.update(core.updater)

    # --- streams ------------------------------------------------------------------------------------------------

    def _anchors(self, replica: int, outputs: Tensors, gradients: Tensors, accumulators: Tensors) -> dict:
        core, values = self.core, {}
        for name, source in core.sources.items():
            if source.kind is Kind.TENSOR:
                values[name] = outputs[source.tensor]
            elif source.kind is Kind.GRADIENT:
                values[name] = gradients[source.tensor]
            elif source.kind is Kind.VARIABLE:
                values[name] = core.variables.device[replica][source.tensor].clone()
            elif source.kind is Kind.ACCUMULATOR:
                values[name] = accumulators[source.tensor]
            else:
                values[name] = core.updater.state[source.tensor].clone()
        return values

    def _inputs(self, stepio) -> list[Tensors]:
        """The next micro-batch, one dict a replica; made up where there is no stepio."""
        replicas: list[Tensors] = [{} for _ in range(self.core.replicas)]
        for name in self._streams:
            sample = None
            for values in replicas:
                if sample is None or name not in self.broadcast:
                    sample = self._synthetic(name) if stepio is None else self._read(stepio, name)
                values[name] = sample
        return replicas

    def _read(self, stepio, name: str) -> torch.Tensor:
        info = self.core.graph.info[name]
        array = stepio._read(name, info)
        if array.dtype == np.int64 and info.dtype == np.int32 and self.core.options.enableSupportedDataTypeCasting:
            limits = np.iinfo(np.int32)
            if array.size and (array.min() < limits.min or array.max() > limits.max):
                raise popart_runtime_error(f"The input '{name}' has INT64 values that INT32 cannot hold")
            array = array.astype(np.int32)
        if array.dtype != info.dtype:
            raise popart_exception(
                f"Type discrepency for tensor {name}. User provided : {TensorInfo(array).data_type()} and expected : "
                f"{info.data_type()}. Consider a custom copy here (as memcpy cannot be used)"
            )
        return torch.from_numpy(np.array(array)).to(self.core.device)

    def _synthetic(self, name: str) -> torch.Tensor:
        """Zeros, or numbers of N(0, 1) or U(0, 1); integers and booleans are zeros (they may be indices)."""
        info, mode = self.core.graph.info[name], self.core.options.syntheticDataMode
        dtype = getattr(torch, info.dtype.name)
        if mode is SyntheticDataMode.Zeros or not dtype.is_floating_point:
            return torch.zeros(info.dims, dtype=dtype)
        draw = torch.randn if mode is SyntheticDataMode.RandomNormal else torch.rand
        return draw(info.dims).to(dtype)
