"""A small convolutional network tells vertical from horizontal stripes; the ONNX model also runs in any other runtime."""
import numpy as np
import popart

BATCH, SIZE, STEPS = 16, 12, 60


def stripes(random):
    """Images [BATCH,1,SIZE,SIZE] with stripes along one axis and noise; labels: which axis."""
    labels = random.integers(0, 2, BATCH).astype(np.int32)
    wave = (np.arange(SIZE) // 2 % 2).astype(np.float32)
    images = np.stack([np.broadcast_to(wave if axis else wave[:, None], (SIZE, SIZE)) for axis in labels])
    return (images[:, None] + random.normal(0, 0.5, (BATCH, 1, SIZE, SIZE))).astype(np.float32), labels


def build(builder, random):
    def weight(*shape):
        return builder.addInitializedInputTensor(random.normal(0, 0.3, shape).astype(np.float32))

    x = builder.addInputTensor("FLOAT", [BATCH, 1, SIZE, SIZE])
    labels = builder.addInputTensor("INT32", [BATCH])
    h = builder.aiOnnx.conv([x, weight(8, 1, 3, 3), weight(8)], pads=[1, 1, 1, 1])
    (h,) = builder.aiOnnx.maxpool([builder.aiOnnx.relu([h])], 1, [2, 2], strides=[2, 2])
    h = builder.aiOnnx.conv([h, weight(8, 8, 3, 3), weight(8)], strides=[2, 2])
    h = builder.aiOnnx.globalaveragepool([builder.aiOnnx.relu([h])])
    h = builder.reshape_const(builder.aiOnnx, [h], [BATCH, 8])
    probabilities = builder.aiOnnx.softmax([builder.aiOnnx.gemm([h, weight(8, 2), weight(2)])])
    return x, labels, probabilities, builder.aiGraphcore.nllloss([probabilities, labels])


def main():
    random = np.random.default_rng(1)
    builder = popart.Builder()
    x, labels, probabilities, loss = build(builder, random)
    optimizer = popart.Adam({"defaultLearningRate": (0.02, False)})
    session = popart.TrainingSession(
        builder.getModelProto(), popart.DataFlow(1, [loss, probabilities]), loss, optimizer,
        popart.DeviceManager().createCpuDevice(),
    )
    session.prepareDevice()
    session.weightsFromHost()
    anchors = session.initAnchorArrays()
    for step in range(STEPS):
        images, truth = stripes(random)
        session.run(popart.PyStepIO({x: images, labels: truth}, anchors))
        if step % 20 == 0 or step == STEPS - 1:
            right = (anchors[probabilities].argmax(axis=1) == truth).mean()
            print(f"step {step:3}: loss {float(anchors[loss]):.3f}, right {right:.0%}")
    assert right > 0.9


if __name__ == "__main__":
    main()
