"""The classes behind builder.aiOnnxOpset6..11 and builder.aiGraphcore, made from methods.json and graphcore.py."""
import functools
import inspect
import json
import pathlib

from ..errors import popart_exception
from . import attributes, graphcore, verify

_DEBUG = "debugContext"
_OLD_DEBUG = ("debugPrefix", "debugName", "debug_context", "name")  # what some programs and some methods call it
_NEVER_NODE = {"is_value_sparse"}


class OpsetBuilder:
    """Adds ops of one domain at one opset to a Builder."""

    domain = ""
    version = 0

    def __init__(self, builder):
        self._builder = builder


class OnnxMlOpset1(OpsetBuilder):
    """ai.onnx.ml: PopART has the domain and none of its ops."""

    domain = "ai.onnx.ml"
    version = 1


@functools.lru_cache(maxsize=None)
def onnx_opset(version):
    """The class AiOnnxOpset<version>."""
    rows = json.loads(pathlib.Path(__file__).with_name("methods.json").read_text())
    members = {"domain": "ai.onnx", "version": version, "__doc__": f"The ops of ai.onnx, opset {version}."}
    for name, variants in rows.items():
        for row in variants:
            if row["opsets"][0] <= version <= row["opsets"][1]:
                outputs = -1 if ["num_outputs"] in row["params"] else _FIXED.get(name)
                members[name] = _method(name, row["op"], row["inputs"], row["params"], outputs)
    return type(f"AiOnnxOpset{version}", (OpsetBuilder,), members)


_FIXED = {"topk": 2}  # several outputs without a num_outputs argument; opset 1 of TopK has two as well


@functools.lru_cache(maxsize=None)
def graphcore_opset():
    """The class AiGraphcoreOpset1."""
    members = {"domain": "ai.graphcore", "version": 1, "__doc__": "The ops of ai.graphcore, opset 1."}
    for name, row in graphcore.METHODS.items():
        params = [] if name == "init" else [["args", []] if row.inputs[0] == 0 and name == "abort" else ["args"]]
        params += [["num_outputs"]] if row.outputs == -1 else []
        members[name] = _method(name, row.op, row.inputs, [*params, *row.params], row.outputs)
    members["init"] = _init_with_batch_axis(members["init"])
    members["multiconv"] = _multiconv
    return type("AiGraphcoreOpset1", (OpsetBuilder,), members)


def _init_with_batch_axis(plain):
    """`init(shape, data_type, init_type[, batch_axis], debugContext)`: PopART's two overloads."""

    def init(self, shape, data_type, init_type, batch_axis=None, debugContext=""):
        if isinstance(batch_axis, str):  # the overload without an axis, debug context given by position
            batch_axis, debugContext = None, batch_axis
        output = plain(self, shape, data_type, init_type, debugContext)
        if batch_axis is not None:
            self._builder.addNodeAttribute("batch_axis", int(batch_axis), {output})
        return output

    return init


def _signature(params):
    found = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
    for param in params:
        name, default = param[0], inspect.Parameter.empty
        if name == "args":
            default = param[1] if len(param) > 1 else default
        elif len(param) > 2:
            default = param[2]
        # PopART's `lambda` is a keyword of Python, so it can only be given by position or by **{"lambda": x}.
        found.append(_parameter(name, "" if name == _DEBUG else default))
    if [_DEBUG] not in [list(param) for param in params]:  # last, but for printtensor
        found.append(_parameter(_DEBUG, ""))
    return inspect.Signature(found)


def _parameter(name, default):
    safe = "lambda_" if name == "lambda" else name
    return inspect.Parameter(safe, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default)


def _method(name, op, inputs, params, outputs):
    signature = _signature(params)
    kinds = {param[0]: param[1:] for param in params if param[0] not in ("args", "num_outputs", _DEBUG)}

    def method(self, *given, **keywords):
        for old in _OLD_DEBUG:
            if old in keywords:
                keywords[_DEBUG] = keywords.pop(old)
        if "lambda" in keywords:
            keywords["lambda_"] = keywords.pop("lambda")
        try:
            bound = signature.bind(self, *given, **keywords)
        except TypeError as error:
            raise TypeError(f"{name}(): incompatible function arguments: {error}; the signature is {signature}") from None
        bound.apply_defaults()
        values = dict(bound.arguments)
        if isinstance(values.get("is_value_sparse"), str):  # opset 11's constant called as the older ones are
            values.update({"is_value_sparse": False, _DEBUG: values["is_value_sparse"]})
        if "lambda_" in values:
            values["lambda"] = values.pop("lambda_")
        tensors = _tensors(name, values.get("args", []))
        _check_count(op, tensors, inputs)
        if self.domain == "ai.onnx":
            verify.check(name, tensors, values, self._builder._shape_of)
        protos = [p for key, kind in kinds.items() for p in _attribute(name, key, kind, values[key])]
        count = {None: 1, -1: values.get("num_outputs")}.get(outputs, outputs)
        results = self._builder._add_op(self.domain, self.version, op, tensors, count, protos, values[_DEBUG])
        if outputs is None:
            return results[0]
        return None if outputs == 0 else results

    method.__name__, method.__signature__ = name, signature
    method.__doc__ = f"Adds {op}."
    return method


def _multiconv(
    self, args, dilations=(), inDilations=(), pads=(), outPads=(), strides=(), availableMemoryProportions=(),
    partialsTypes=(), planType=None, perConvReservedTiles=None, cycleBackOff=None, enableConvDithering=(),
    debugContext="",
):  # fmt: skip
    """args: one [data, weights] or [data, weights, bias] a convolution; the lists have one entry a convolution.

    On the node there are three inputs a convolution ("" for no bias) and the lists, joined.
    """
    tensors, ranks = [], []
    for inputs in args:
        inputs = _tensors("multiconv", inputs)
        _check_count("MultiConv", inputs, (2, 3))
        tensors += [*inputs, *[""] * (3 - len(inputs))]
        ranks.append(len(self._builder.getTensorShape(inputs[1])) - 2)
    protos = []
    for name, lists, default, times in (
        ("dilations", dilations, 1, 1), ("inDilations", inDilations, 1, 1), ("strides", strides, 1, 1),
        ("pads", pads, 0, 2), ("outPads", outPads, 0, 2),
    ):  # fmt: skip
        if any(len(entry) for entry in lists):
            if len(lists) != len(ranks):
                raise popart_exception(f"MultiConv: {name} has {len(lists)} lists for {len(ranks)} convolutions")
            filled = [list(entry) or [default] * rank * times for entry, rank in zip(lists, ranks)]
            protos.append(attributes.encode(name, "ints", [v for entry in filled for v in entry]))
    for name, kind, value in (
        ("__available_memory", "floats", availableMemoryProportions), ("__partials_type", "strs", partialsTypes),
        ("__enable_conv_dithering", "ints", enableConvDithering), ("__plan_type", "str", planType),
        ("__per_conv_reserved_tiles", "int", perConvReservedTiles), ("__cycle_back_off", "float", cycleBackOff),
    ):  # fmt: skip
        if value is not None and (kind in ("str", "int", "float") or len(value)):
            protos.append(attributes.encode(name, kind, value))
    return self._builder._add_op(self.domain, self.version, "MultiConv", tensors, len(ranks), protos, debugContext)


def _tensors(name, args):
    if isinstance(args, (str, bytes)) or not hasattr(args, "__iter__") or not all(isinstance(a, str) for a in args):
        raise TypeError(f"{name}(): incompatible function arguments: args must be a list of tensor ids, not {args!r}")
    return list(args)


def _check_count(op, tensors, limits):
    low, high = limits
    if not low <= len(tensors) <= high:
        raise popart_exception(f"{op} has invalid number of inputs {len(tensors)}. Must be between {low}..{high}")


def _attribute(method, key, kind, value):
    """The attribute of one parameter; none when it has its default, which every op knows."""
    if key in _NEVER_NODE:
        if value:
            raise popart_exception("Sparse constants are not supported by PopART")
        return []
    if value is None:
        return []
    if len(kind) > 1 and kind[0] not in graphcore.ALWAYS_WRITTEN:
        is_list = kind[0] in ("ints", "floats", "strs")
        if (list(value) if is_list else value) == kind[1]:  # an empty list is written where None is the default
            return []
    name = graphcore.ATTRIBUTES.get((method, key), key)
    if method == "cast" and key == "to":
        return [attributes.encode(name, "data_type", value)]
    return [attributes.encode(name, kind[0], value)]
