"""Python values -> onnx AttributeProto, as PopART's Builder stores them."""
import numpy as np

from ..enums import DataType, InitType, ReductionType, ScatterReduction
from ..errors import popart_exception


def encode(name, kind, value):
    """The AttributeProto of a method's parameter. kind: see methods.json and graphcore.py."""
    return _proto(name, _ENCODERS[kind](name, value))


def from_python(name, value):
    """A value whose type says what it is, as customOp and addNodeAttribute take it; AttributeProto."""
    return _proto(name, value)


def custom_op_attribute(name, value):
    """One entry of customOp's dictionary, with PopART's type rules."""
    if isinstance(value, list):
        if not value or not (_all(value, (int, np.integer)) or _all(value, (float, np.floating))):
            raise popart_exception(
                f"Invalid or mismatched python list type provided in custom op attribute '{name}'"
            )
    elif not isinstance(value, (str, bool, int, float, np.integer, np.floating)):
        raise popart_exception(f"Invalid type provided in custom op attribute '{name}'")
    return _proto(name, value)


def decode(attribute):
    """The Python value of an AttributeProto; bytes become str."""
    from onnx import helper

    value = helper.get_attribute_value(attribute)
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, (int, float)):
        return value
    return [v.decode() if isinstance(v, bytes) else v for v in value]


def _all(values, kinds):
    return all(isinstance(v, kinds) for v in values)


def _proto(name, value):
    from onnx import AttributeProto, GraphProto, TensorProto

    proto = AttributeProto(name=name)
    if isinstance(value, TensorProto):
        proto.type = AttributeProto.TENSOR
        proto.t.CopyFrom(value)
    elif isinstance(value, GraphProto):
        proto.type = AttributeProto.GRAPH
        proto.g.CopyFrom(value)
    elif isinstance(value, str):
        proto.type, proto.s = AttributeProto.STRING, value.encode()
    elif isinstance(value, (bool, int, np.integer, np.bool_)):
        proto.type, proto.i = AttributeProto.INT, int(value)
    elif isinstance(value, (float, np.floating)):
        proto.type, proto.f = AttributeProto.FLOAT, float(value)
    elif isinstance(value, (list, tuple, np.ndarray)):
        _fill_list(proto, list(value))
    else:
        raise TypeError(f"The attribute '{name}' cannot be a {type(value).__name__}")
    return proto


def _fill_list(proto, values):
    from onnx import AttributeProto

    if values and isinstance(values[0], str):
        proto.type = AttributeProto.STRINGS
        proto.strings.extend(v.encode() for v in values)
    elif values and any(isinstance(v, (float, np.floating)) for v in values):
        proto.type = AttributeProto.FLOATS
        proto.floats.extend(float(v) for v in values)
    else:
        proto.type = AttributeProto.INTS
        proto.ints.extend(int(v) for v in values)


def _int(name, value):
    if not hasattr(value, "__index__"):
        raise TypeError(f"The argument '{name}' must be an int, not {value!r}")
    return int(value)


def _float(name, value):
    if isinstance(value, (str, bytes)) or not hasattr(value, "__float__"):
        raise TypeError(f"The argument '{name}' must be a float, not {value!r}")
    return float(value)


def _str(name, value):
    if not isinstance(value, str):
        raise TypeError(f"The argument '{name}' must be a str, not {value!r}")
    return value


def _each(convert):
    def convert_all(name, values):
        if isinstance(values, (str, bytes)) or not hasattr(values, "__iter__"):
            raise TypeError(f"The argument '{name}' must be a list, not {values!r}")
        return [convert(name, value) for value in values]

    return convert_all


def _tensor(name, value):
    from onnx import numpy_helper

    array = value if isinstance(value, np.ndarray) else np.asarray(value)
    if not isinstance(value, (np.ndarray, np.generic)):
        raise TypeError(f"The argument '{name}' must be a numpy array, not {value!r}")
    return numpy_helper.from_array(np.array(array, order="C"))


def _graph(name, value):
    graph = getattr(value, "_graph_proto", None)
    if graph is None:
        raise TypeError(f"The argument '{name}' must be a Builder made by createSubgraphBuilder, not {value!r}")
    return graph()


def _member(enumeration):
    def convert(name, value):
        if isinstance(value, enumeration):
            return value
        raise TypeError(f"The argument '{name}' must be a {enumeration.__name__}, not {value!r}")

    return convert


def _collective(name, value):
    return _int(name, value)


def _comm_group(name, value):
    if hasattr(value, "type") and hasattr(value, "replicaGroupSize"):
        value = [value.type, value.replicaGroupSize]
    return [_int(name, entry) for entry in value]


def _data_type(name, value):
    """ONNX's number of a DataType, of its name, or that number itself."""
    from onnx import TensorProto

    text = value.name if isinstance(value, DataType) else value
    if isinstance(text, str):
        if text.upper() not in TensorProto.DataType.keys():
            raise popart_exception(f"The argument '{name}' names an unknown data type '{text}'")
        return TensorProto.DataType.Value(text.upper())
    return _int(name, value)


_ENCODERS = {
    "int": _int, "float": _float, "str": _str, "flag": lambda name, value: int(bool(value)),
    "ints": _each(_int), "floats": _each(_float), "strs": _each(_str), "tensor": _tensor, "graph": _graph,
    "reduction": lambda name, value: _member(ReductionType)(name, value).name,
    "scatter_reduction": lambda name, value: int(_member(ScatterReduction)(name, value)),
    "data_type": _data_type,
    "init_type": lambda name, value: int(value) if isinstance(value, InitType) else _int(name, value),
    "remap_type": _int, "collective": _collective, "comm_group": _comm_group,
}  # fmt: skip
