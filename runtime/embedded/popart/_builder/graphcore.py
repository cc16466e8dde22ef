"""The methods of `builder.aiGraphcore` as data (PopART 3.4, python/popart/popart_core/popart.cpp).

A parameter is (name, kind[, default]); the attribute on the node has the name after `attribute=` in ATTRIBUTES, else the
parameter's own. Kinds: int, float, str, flag (bool stored as int), their plurals, tensor, graph, and enum kinds.
`multiconv` is written out in methods.py.
"""
from typing import NamedTuple, Optional, Tuple

from ..enums import ReductionType, ScatterReduction, TensorRemapType


class Row(NamedTuple):
    op: str
    inputs: Tuple[int, int]
    params: tuple = ()
    outputs: Optional[int] = None  # None: one, returned as a str; -1: `num_outputs`; else a list of this many


MANY = 2**31 - 1
_REDUCTION = ("reduction", "reduction", ReductionType.Mean)
_SCATTER = ("reduction", "scatter_reduction", ScatterReduction.Sum)
_DYNAMIC = (("axes", "ints"), ("sizes", "ints"))
_COLLECTIVE = (("collectiveOperator", "collective", None), ("commGroup", "comm_group", None))
_PRINT = (
    ("print_gradient", "int", 1), ("debugContext",), ("title", "str", ""), ("summariseThreshold", "int", 1000),
    ("edgeItems", "int", 3), ("maxLineWidth", "int", 75), ("digits", "int", 8), ("floatFormat", "int", 0),
    ("separator", "str", " "), ("openBracket", "str", "["), ("closeBracket", "str", "]"),
)  # fmt: skip

METHODS = {
    "copyvarupdate": Row("CopyVarUpdate", (2, 2)),
    "batchnormalization": Row("BatchNormalization", (5, 5), (("epsilon", "float", 1e-5), ("momentum", "float", 0.9)), -1),
    "groupnormalization": Row("GroupNormalization", (3, 3), (("num_groups", "int"), ("epsilon", "float", 1e-5)), 3),
    "printtensor": Row("PrintTensor", (1, 1), _PRINT),
    "nop": Row("Nop", (1, 1)),
    "normalize_image": Row("NormalizeImage", (3, 3), (("scale", "float", 1.0),)),
    "scale": Row("Scale", (1, 1), (("scale", "float"),)),
    "scaledadd": Row("ScaledAdd", (2, 4), (("scale0", "float", 1.0), ("scale1", "float", 1.0))),
    "lstm": Row("LSTM", (2, 4), (("outputFullSequence", "int", 1),), 2),
    "subsample": Row("Subsample", (1, 1), (("strides", "ints"),)),
    "gelu": Row("Gelu", (1, 1)),
    "geluerf": Row("GeluErf", (1, 1)),
    "detach": Row("Detach", (1, 1)),
    "round": Row("Round", (1, 1)),
    "nearbyint": Row("NearbyInt", (1, 1)),
    "depthtospace": Row("DepthToSpace", (1, 1), (("blocksize", "int"), ("mode", "str", "DCR"))),
    "init": Row("Init", (0, 0), (("shape", "ints"), ("data_type", "data_type"), ("init_type", "init_type"))),
    "dynamicslice": Row("DynamicSlice", (2, 3), (*_DYNAMIC, ("noOverlap", "int", 0))),
    "dynamicupdate": Row("DynamicUpdate", (3, 3), (*_DYNAMIC, ("noOverlap", "int", 0))),
    "dynamiczero": Row("DynamicZero", (2, 2), _DYNAMIC),
    "dynamicadd": Row("DynamicAdd", (3, 3), _DYNAMIC),
    "sequenceslice": Row("SequenceSlice", (5, 5), (("zeroUnused", "int", 0),)),
    "packedDataBlock": Row(
        "PackedDataBlock", (1, MANY),
        (("maxSequenceLengths", "ints"), ("resultSize", "int"), ("callbackBatchSize", "int"), ("callback", "graph")),
    ),
    "call": Row("Call", (0, MANY), (("callee", "graph"),), -1),
    "fmod": Row("Fmod", (2, 2)),
    "replicatedallreduce": Row("ReplicatedAllReduce", (1, 1), _COLLECTIVE),
    "replicatedreducescatter": Row("ReplicatedReduceScatter", (1, 1), _COLLECTIVE),
    "l1loss": Row("L1", (1, 1), (("lambda", "float"), _REDUCTION)),
    "nllloss": Row(
        "Nll", (2, 2), (_REDUCTION, ("ignoreIndex", "int", None), ("inputIsLogProbability", "flag", False)),
    ),
    "identityloss": Row("IdentityLoss", (1, 1), (_REDUCTION,)),
    "ctcloss": Row(
        "Ctc", (4, 4),
        (_REDUCTION, ("blank", "int", 0), ("outDataType", "str", "UNDEFINED"), ("zeroInfinity", "flag", False)),
    ),
    "shapeddropout": Row("ShapedDropout", (1, 1), (("shape", "ints"), ("ratio", "float", 0.5))),
    "atan2": Row("Atan2", (2, 2)),
    "expm1": Row("Expm1", (1, 1)),
    "log1p": Row("Log1p", (1, 1)),
    "reshape": Row("Reshape", (1, 1), (("shape", "ints"),)),
    "remainder": Row("Remainder", (2, 2)),
    "reverse": Row("Reverse", (1, 1), (("dimensions", "ints"),)),
    "slice": Row("Slice", (1, 1), (("ends", "ints"), ("starts", "ints"), ("axes", "ints", []))),
    "abort": Row("Abort", (0, 1), (), 0),
    "bitwiseand": Row("BitwiseAnd", (2, 2)),
    "bitwisenot": Row("BitwiseNot", (1, 1)),
    "bitwiseor": Row("BitwiseOr", (2, 2)),
    "bitwisexor": Row("BitwiseXor", (2, 2)),
    "bitwisexnor": Row("BitwiseXnor", (2, 2)),
    "bucketize": Row("Bucketize", (2, 2), (("right", "int", 0),)),
    "sort": Row("Sort", (1, 1), (("axis", "int", -1), ("descending", "int", 0), ("stable", "int", 0)), 2),
    "reducemedian": Row("ReduceMedian", (1, 1), (("axes", "ints", None), ("keepdims", "int", 1)), 2),
    "scatterreduce": Row(
        "ScatterReduce", (2, 3),
        (("axis_size", "int"), ("axis", "int", -1), _SCATTER, ("enable_index_broadcast", "int", 1)),
    ),
    "groupedscatterreduce": Row(
        "ScatterReduce", (2, 3),
        (("axis_size", "int"), ("axis", "int", -1), _SCATTER, ("group_size", "int", 1),
         ("enable_index_broadcast", "int", 1)),
    ),
    "groupedgather": Row("GroupedGather", (2, 2), (("axis", "int", 0), ("group_size", "int", 1))),
    "ctcbeamsearchdecoder": Row(
        "CtcBeamSearchDecoder", (2, 2), (("blank", "int", 0), ("beam_width", "int", 100), ("top_paths", "int", 1)), 3
    ),
    "swish": Row("Swish", (1, 1)),
    "incrementmod": Row("IncrementMod", (1, 1), (("increment", "float"), ("modulus", "float"))),
    "tensorremap": Row("TensorRemap", (1, 2), (("remap_type", "remap_type", int(TensorRemapType.FwdBwdReverse)),)),
    "splinebasis": Row("SplineBasis", (3, 3), (("degree", "int"),), 2),
    "splineweighting": Row("SplineWeighting", (4, 4)),
}  # fmt: skip
# (method, parameter) -> attribute, where the two names differ
ATTRIBUTES = {
    ("lstm", "outputFullSequence"): "output_full_sequence",
    ("ctcbeamsearchdecoder", "blank"): "blank_class",
    ("replicatedallreduce", "collectiveOperator"): "__collectiveOperator",
    ("replicatedallreduce", "commGroup"): "__collectiveCommGroup",
    ("replicatedreducescatter", "collectiveOperator"): "__collectiveOperator",
    ("replicatedreducescatter", "commGroup"): "__collectiveCommGroup",
}
ALWAYS_WRITTEN = {"reduction", "scatter_reduction"}  # kinds whose default is written on the node as well
