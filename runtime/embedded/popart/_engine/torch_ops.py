"""popdet's arithmetic as torch ops, `popdet_embedded::<name>`, which survive tracing.

As torch.library.custom_op, without its guard against torch.compile: that imports torch's compiler when an op is first called,
which is a second of every start.
"""
import functools
from collections.abc import Callable

import torch

# The kernels on feature maps are channels-last, in and out: whatever layout comes in, results are laid out [.., height,
# width, C] in memory. The tag tells the compiler that inputs need no conversion first.
ANY_LAYOUT = torch.Tag.flexible_layout


class TorchOp:
    """A torch op with the schema of an annotated function, which is its implementation. It changes none of its arguments.

    One that is not differentiable raises where its gradient is asked for.
    """

    def __init__(self, function: Callable, tags: tuple[torch.Tag, ...], differentiable: bool):
        functools.update_wrapper(self, function)
        self.name = f"popdet_embedded::{function.__name__}"
        torch.library.define(self.name, torch.library.infer_schema(function, mutates_args=()), tags=tags)
        torch.library.impl(self.name, "default", function)
        self.overload = getattr(torch.ops.popdet_embedded, function.__name__).default
        if not differentiable:  # without this, what the function does would be differentiated
            self.register_autograd(self._refuse, lambda ctx, inputs, output: None)

    def __call__(self, *arguments):
        return self.overload(*arguments)

    def register_fake(self, function: Callable) -> Callable:
        """The types of the results, given tensors without data; its results are laid out as those of the op."""
        torch.library.register_fake(self.name, function)
        return function

    def register_autograd(self, backward: Callable, setup_context: Callable) -> None:
        """The gradient, as torch.library.register_autograd takes it."""
        torch.library.register_autograd(self.name, backward, setup_context=setup_context)

    def _refuse(self, ctx, *gradients):
        raise RuntimeError(f"{self.name} has no gradient")


def torch_op(*tags: torch.Tag, differentiable: bool = False) -> Callable[[Callable], TorchOp]:
    """Decorator that makes a TorchOp of a function; one that is differentiable gets its gradient by `register_autograd`."""
    return lambda function: TorchOp(function, tags, differentiable)
