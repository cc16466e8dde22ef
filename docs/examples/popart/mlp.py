"""A two-layer perceptron learns XOR: Builder, a loss, SGD, the training loop."""
import numpy as np
import popart

X = np.array([[0, 0], [0, 1], [1, 0], [1, 1]], np.float32)
LABELS = np.array([0, 1, 1, 0], np.int32)
STEPS = 300


def build(builder, random):
    """The network; ids of the input, the labels, the probabilities and the loss."""
    x = builder.addInputTensor(popart.TensorInfo("FLOAT", X.shape), "x")
    labels = builder.addInputTensor(popart.TensorInfo("INT32", LABELS.shape), "labels")
    h = x
    for index, (rows, columns) in enumerate([(2, 16), (16, 2)]):
        w = builder.addInitializedInputTensor(random.normal(0, 1, (rows, columns)).astype(np.float32), f"w{index}")
        b = builder.addInitializedInputTensor(np.zeros(columns, np.float32), f"b{index}")
        h = builder.aiOnnx.gemm([h, w, b])
        h = builder.aiOnnx.tanh([h]) if index == 0 else builder.aiOnnx.softmax([h])
    loss = builder.aiGraphcore.nllloss([h, labels], popart.ReductionType.Mean)
    return x, labels, h, loss


def main():
    builder = popart.Builder()
    x, labels, probabilities, loss = build(builder, np.random.default_rng(0))
    builder.addOutputTensor(loss)
    session = popart.TrainingSession(
        fnModel=builder.getModelProto(),
        dataFlow=popart.DataFlow(1, {loss: popart.AnchorReturnType("All"), probabilities: popart.AnchorReturnType("All")}),
        loss=loss,
        optimizer=popart.SGD({"defaultLearningRate": (0.3, False), "defaultMomentum": (0.9, False)}),
        deviceInfo=popart.DeviceManager().createCpuDevice(),
    )
    session.prepareDevice()
    session.weightsFromHost()
    anchors = session.initAnchorArrays()
    losses = []
    for _ in range(STEPS):
        session.run(popart.PyStepIO({x: X, labels: LABELS}, anchors))
        losses.append(float(anchors[loss]))
    answers = anchors[probabilities].argmax(axis=1)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.4f}; answers {answers.tolist()}")
    assert losses[-1] < 0.05 and (answers == LABELS).all()


if __name__ == "__main__":
    main()
