"""Small ONNX-text models and one-line sessions for the tests of the embedded PopART."""
from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper, parser

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "runtime" / "embedded"))
import popart

HEADER = '<ir_version: 7, opset_import: ["" : 11, "ai.graphcore" : 1]>\n'
TWO_LAYERS = """g (float[4,3] x, float[4,2] t) => (float loss) {
    h = MatMul<__ipu_number=0, __pipeline_stage=0>(x, w1)
    a = Relu<__ipu_number=0, __pipeline_stage=0>(h)
    y = MatMul<__ipu_number=1, __pipeline_stage=1>(a, w2)
    z = Add<__ipu_number=1, __pipeline_stage=1>(y, b)
    d = Sub<__ipu_number=1, __pipeline_stage=1>(z, t)
    s = Mul<__ipu_number=1, __pipeline_stage=1>(d, d)
    loss = ReduceMean<keepdims=0, __ipu_number=1, __pipeline_stage=1>(s)
}"""


def model(text: str, header: str = HEADER, **initializers: np.ndarray) -> onnx.ModelProto:
    """ModelProto from ONNX text without its header, with these initializers."""
    proto = parser.parse_model(header + text)
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in initializers.items())
    return proto


def two_layer_weights(seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    shapes = {"w1": (3, 5), "w2": (5, 2), "b": (2,)}
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def options(**fields) -> popart.SessionOptions:
    found = popart.SessionOptions()
    for name, value in fields.items():
        setattr(found, name, value)
    return found


def accumulating(factor: int, **fields) -> popart.SessionOptions:
    return options(enableGradientAccumulation=True, accumulationFactor=factor, **fields)


def device(ipus: int = 1) -> popart.DeviceInfo:
    manager = popart.DeviceManager()
    return manager.createCpuDevice() if ipus == 1 else manager.createIpuModelDevice({"numIPUs": ipus})


def training(proto, anchors=("loss",), optimizer=None, opts=None, steps=1, ipus=1, loss="loss", art="All"):
    """A TrainingSession of a ModelProto, not yet prepared."""
    return popart.TrainingSession(
        proto.SerializeToString(),
        popart.DataFlow(steps, list(anchors), popart.AnchorReturnType(art)),
        loss,
        optimizer or popart.ConstSGD(0.1),
        device(ipus),
        userOptions=opts or popart.SessionOptions(),
    )


def inference(proto, anchors, opts=None, steps=1, ipus=1, art="All"):
    """An InferenceSession of a ModelProto, not yet prepared."""
    flow = popart.DataFlow(steps, list(anchors), popart.AnchorReturnType(art))
    return popart.InferenceSession(
        proto.SerializeToString(), flow, device(ipus), userOptions=opts or popart.SessionOptions()
    )


def started(session):
    """Prepared, weights on the device."""
    session.prepareDevice()
    session.weightsFromHost()
    return session


def run(session, **inputs) -> dict[str, np.ndarray]:
    """One run; the anchor arrays."""
    arrays = session.initAnchorArrays()
    session.run(popart.PyStepIO(inputs, arrays))
    return arrays


def weights_of(session, *names) -> dict[str, np.ndarray]:
    """The weights now on the device."""
    arrays = {name: np.empty(session.getInfo(name).shape(), session.getInfo(name).data_type_lcase()) for name in names}
    session.weightsToHost()
    session.readWeights(popart.PyWeightsIO(arrays))
    return arrays
