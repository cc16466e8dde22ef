"""A program: the ops of a graph as a function of weights and inputs. One interface, two executors.

`EagerProgram` interprets op by op; `aot.AotProgram` compiles what `run_ops` and `step_function` do, which is traceable.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

from ..errors import poplar_application_runtime_error
from .fusion import fuse
from .ir import Graph, Op
from .shapes import device_tensor, fake_like, run_op_in_replicas

if TYPE_CHECKING:
    from torch import Tensor

Tensors = dict[str, "Tensor"]


class Program(Protocol):
    """weights: every float initializer by id. inputs: every graph input by id. All torch tensors on one device."""

    def forward(self, weights: Tensors, inputs: Tensors, wanted: Sequence[str]) -> Tensors:
        """The wanted tensors."""

    def step(
        self, weights: Tensors, inputs: Tensors, wanted: Sequence[str], grads_of: Sequence[str], seed: Tensor
    ) -> tuple[Tensors, Tensors]:
        """The wanted tensors, and seed * d loss / d t for every t of `grads_of` (weights, inputs or activations).

        seed: float scalar tensor, the loss scaling.
        """


class EagerProgram:
    """Runs the lowerings one after the other. Also runs replicas in lock-step, which collectives need."""

    def __init__(self, graph: Graph, loss: str | None = None):
        self.graph, self.loss = graph, loss
        self._plans: dict[tuple, list] = {}

    def forward(self, weights, inputs, wanted):
        import torch

        with torch.no_grad():
            return run_ops(self.graph, {**weights, **inputs}, wanted, self._plan(wanted))

    def step(self, weights, inputs, wanted, grads_of, seed):
        return step_function(self.graph, self.loss, wanted, grads_of)(weights, inputs, seed)

    def forward_replicas(self, weights: list[Tensors], inputs: list[Tensors], wanted) -> list[Tensors]:
        """`forward` of every replica, all of them op by op together."""
        import torch

        with torch.no_grad():
            values = [{**w, **i} for w, i in zip(weights, inputs)]
            return run_replicas(self.graph, values, wanted, self._plan(wanted))

    def step_replicas(
        self, weights: list[Tensors], inputs: list[Tensors], wanted, grads_of, seed
    ) -> list[tuple[Tensors, Tensors]]:
        """`step` of every replica together: what is differentiated is the sum of the replicas' losses."""
        return differentiate(self.graph, self.loss, wanted, grads_of, weights, inputs, seed)

    def _plan(self, wanted):
        key = tuple(wanted)
        if key not in self._plans:
            self._plans[key] = plan(self.graph, wanted)
        return self._plans[key]


def step_function(
    graph: Graph, loss: str, wanted: Sequence[str], grads_of: Sequence[str], fused: bool = False
) -> Callable:
    """fn(weights, inputs, seed) -> (outputs, gradients): one micro-batch forward and backward, traceable by make_fx."""
    asked, steps = _training_plan(graph, loss, wanted, grads_of)
    if fused:
        steps = fuse(graph, steps, asked, training=True)

    def step(weights, inputs, seed):
        return differentiate(graph, loss, wanted, grads_of, [weights], [inputs], seed, asked, steps)[0]

    return step


def _training_plan(graph: Graph, loss: str, wanted: Sequence[str], grads_of: Sequence[str]):
    asked = [*dict.fromkeys([*wanted, loss, *grads_of])]
    return asked, plan(graph, asked, free=False)


def differentiate(graph, loss, wanted, grads_of, weights, inputs, seed, asked=None, steps=None):
    """(wanted tensors, gradients) of each replica: one forward and backward pass over all of them.

    weights, inputs: one dict a replica. seed: the gradient of every replica's loss.
    """
    import torch

    if steps is None:
        asked, steps = _training_plan(graph, loss, wanted, grads_of)
    with torch.enable_grad():
        differentiated = set(grads_of)
        leaves = [
            {name: _leaf(t, name in differentiated) for name, t in {**w, **i}.items()} for w, i in zip(weights, inputs)
        ]
        replicas = run_replicas(graph, leaves, asked, steps)
        gradients: list[Tensors] = [{} for _ in replicas]
        if grads_of:
            losses = [values[loss] for values in replicas]
            seeds = [seed.to(total.dtype).reshape(total.shape) for total in losses]
            targets = [values[n] for values in replicas for n in grads_of]
            found = iter(_gradients(losses, targets, seeds))
            gradients = [{name: next(found) for name in grads_of} for _ in replicas]
            if graph.check_floats:
                for values in gradients:
                    for name, gradient in values.items():
                        _check_finite(f"The gradient of tensor '{name}'", [gradient])
    return [({n: values[n].detach() for n in wanted}, g) for values, g in zip(replicas, gradients)]


def _gradients(losses, targets, seeds) -> list:
    """Zeros where this run took a branch that does not read the tensor."""
    import torch

    pairs = [(loss, seed) for loss, seed in zip(losses, seeds) if loss.requires_grad]
    if not pairs:
        return [torch.zeros_like(t) for t in targets]
    found = torch.autograd.grad([loss for loss, _ in pairs], targets, [seed for _, seed in pairs], allow_unused=True)
    return [torch.zeros_like(t) if grad is None else grad for t, grad in zip(targets, found)]


def _leaf(tensor, wants_grad: bool):
    leaf = tensor.detach()
    return leaf.requires_grad_(True) if wants_grad else leaf


def plan(graph: Graph, wanted: Iterable[str], free: bool = True) -> list[tuple[Op, tuple[str, ...]]]:
    """The ops that `wanted` needs, each with the tensors that nothing reads afterwards."""
    needed, ops = set(wanted), []
    for op in reversed(graph.ops):
        if needed.intersection(op.outputs) or not op.outputs:  # an op without outputs (Abort) is there for its effect
            needed.update(n for n in op.inputs if n)
            ops.append(op)
    alive, steps = set(wanted), []
    for op in ops:
        touched = {n for n in (*op.inputs, *op.outputs) if n}
        steps.append((op, tuple(touched - alive) if free else ()))
        alive |= touched
    return steps[::-1]


def run_ops(graph: Graph, values: Tensors, wanted: Sequence[str], steps: list) -> Tensors:
    """Interprets `steps` (see plan), dropping each tensor after its last reader. values: weights and inputs."""
    return run_replicas(graph, [values], wanted, steps)[0]


def run_replicas(graph: Graph, replicas: list[Tensors], wanted: Sequence[str], steps: list) -> list[Tensors]:
    """`run_ops` of every replica in lock-step."""
    import torch

    replicas = [dict(values) for values in replicas]
    device = next((t.device for t in replicas[0].values()), torch.device("cpu"))
    constants: Tensors = {}

    def value(values: Tensors, name: str) -> Tensor:
        if name not in values and name in graph.constants:
            if name not in constants:
                constants[name] = device_tensor(graph.constants[name], device)
            return constants[name]
        return values[name]

    for op, finished in steps:
        inputs = [[value(values, name) if name else None for name in op.inputs] for values in replicas]
        for values, results in zip(replicas, run_op_in_replicas(op, inputs)):
            values.update({name: t for name, t in zip(op.outputs, results) if name})
            if graph.check_floats:
                _check_finite(op.describe(), results)
            for name in finished:
                values.pop(name, None)
        for name in finished:
            constants.pop(name, None)
    return [{name: value(values, name) for name in wanted} for values in replicas]


def _check_finite(what: str, tensors) -> None:
    """SessionOptions.enableFloatingPointChecks: what an IPU raises on overflow, invalid and division by zero."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype.is_floating_point and not bool(tensor.isfinite().all()):
            raise poplar_application_runtime_error(f"Floating point exception: {what} has an inf or a NaN")


def gradient_path(graph: Graph, loss: str, candidates: Sequence[str]) -> list[str]:
    """Those of `candidates` (weights, inputs or activations) that the loss has a gradient to. Costs no arithmetic."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    needed = {loss}
    for op, _ in plan(graph, [loss]):
        needed.update((*op.inputs, *op.outputs))
    candidates = [n for n in candidates if n in needed and graph.info[n].dtype.kind == "f"]
    sources = [*graph.initializers, *graph.inputs]
    with FakeTensorMode(allow_non_fake_inputs=True), torch.enable_grad():
        leaves = {n: fake_like(graph.info[n]) for n in sources}
        for name in leaves:
            if leaves[name].dtype.is_floating_point and (name in graph.initializers or name in candidates):
                leaves[name].requires_grad_(True)
        steps = plan(graph, [loss, *candidates], free=False)
        values = run_replicas(graph, [leaves] * graph.replicas, [loss, *candidates], steps)[0]
        targets = [n for n in candidates if values[n].requires_grad]
        if not targets or not values[loss].requires_grad:
            return []
        grads = torch.autograd.grad(values[loss], [values[n] for n in targets], allow_unused=True)
    return [n for n, grad in zip(targets, grads) if grad is not None]
