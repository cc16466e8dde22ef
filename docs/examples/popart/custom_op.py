"""Custom ops: ROI-Align and NMS of this project by Builder.customOp, and an op of one's own.

Under the Poplar SDK a custom op is a C++ library that the program loads; see load_op below. The embedded runtime takes
a Python function instead.
"""
import ctypes

import numpy as np
import popart


def load_op():
    """Makes `my.ops.Cube` known to PopART."""
    if not hasattr(popart, "register_custom_op"):
        ctypes.cdll.LoadLibrary("./libcube.so")
        return

    def gradient(inputs, outputs, gradients, attributes):
        return [3 * inputs[0] ** 2 * gradients[0]]

    @popart.register_custom_op("Cube", "my.ops", infer=lambda infos, attributes: [infos[0]], gradient=gradient)
    def cube(inputs, attributes):
        return [inputs[0] ** 3]


def run(builder, outputs, inputs):
    session = popart.InferenceSession(
        builder.getModelProto(), popart.DataFlow(1, outputs), popart.DeviceManager().createCpuDevice()
    )
    session.prepareDevice()
    anchors = session.initAnchorArrays()
    session.run(popart.PyStepIO(inputs, anchors))
    return [anchors[name] for name in outputs]


def detector_ops():
    """The two best boxes that overlap by no more than half, and what ROI-Align reads of a feature map there."""
    boxes = np.array([[[0, 0, 8, 8], [1, 0, 9, 8], [16, 16, 24, 24]]], np.float32)
    scores = np.array([[0.9, 0.8, 0.7]], np.float32)
    features = np.arange(64, dtype=np.float32).reshape(1, 1, 8, 8)
    builder = popart.Builder()
    s, b, f = (builder.addInputTensor(popart.TensorInfo(array)) for array in (scores, boxes, features))
    _, kept, keep = builder.customOp(
        opName="nms", opVersion=1, domain="ai.graphcore", inputs=[s, b], numOutputs=3,
        attributes={"threshold": 0.5, "numDetections": 2},
    )
    (pooled,) = builder.customOp(
        opName="roiAlign", opVersion=1, domain="ai.graphcore", inputs=[f, kept], numOutputs=1,
        attributes={"spatial_scale": 0.25, "aligned_height": 1, "aligned_width": 1, "batch_size": 1, "num_rois": 2,
                    "height": 8, "width": 8, "channels": 1},
    )
    found, values = run(builder, [keep, pooled], {s: scores, b: boxes, f: features})
    print(f"kept boxes {found.tolist()}, pooled features {values.ravel().tolist()}")
    assert found.tolist() == [[0, 2]]
    assert np.allclose(values.ravel(), [4.5, 40.5])  # the middles of the boxes, half-pixel


def own_op():
    load_op()
    builder = popart.Builder()
    x = builder.addInputTensor("FLOAT", [3])
    w = builder.addInitializedInputTensor(np.array([1, 2, 3], np.float32), "w")
    (y,) = builder.customOp("Cube", 1, "my.ops", [builder.aiOnnx.mul([x, w])], {})
    loss = builder.aiGraphcore.identityloss([y], popart.ReductionType.Sum)
    gradient = popart.reservedGradientPrefix() + w
    session = popart.TrainingSession(
        builder.getModelProto(), popart.DataFlow(1, [gradient]), loss, popart.ConstSGD(0.1),
        popart.DeviceManager().createCpuDevice(),
    )
    session.prepareDevice()
    session.weightsFromHost()
    anchors = session.initAnchorArrays()
    data = np.array([1, -1, 0.5], np.float32)
    session.run(popart.PyStepIO({x: data}, anchors))
    print(f"gradient of the weight through Cube: {anchors[gradient].tolist()}")
    assert np.allclose(anchors[gradient], 3 * data**3 * np.array([1, 4, 9]))


if __name__ == "__main__":
    detector_ops()
    own_op()
