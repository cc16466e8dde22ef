"""Custom ops as Python functions, where PopART loads a shared library. Only the embedded runtime has this."""


def register_custom_op(op_type, domain, version=1, *, infer, gradient=None):
    """Decorator: the function computes the custom op `domain.op_type` from this version on.

        @popart.register_custom_op("Cube", "my.ops", infer=lambda infos, attributes: [infos[0]], gradient=cube_gradient)
        def cube(inputs, attributes):
            return [inputs[0] ** 3]

    inputs: list of numpy arrays (None for an absent optional one), attributes: {name: int, float, str or tuple} as the
    node has them; returns a list of arrays. infer(infos, attributes): list of TensorInfo -> list of TensorInfo, what
    the function will return. gradient(inputs, outputs, gradients, attributes): the gradients of the outputs -> one
    array or None for every input; without it no gradient passes.
    Builder.customOp and models from files reach it by domain and type, as they reach a PopART custom op.
    """

    def register(function):
        from ._engine.python_ops import register_op  # imports torch

        register_op(domain, op_type, version, function, infer, gradient)
        return function

    return register
