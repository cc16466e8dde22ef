"""A checkpoint is an ONNX model with the weights and the optimizer state: a resumed run is bit-equal."""
import pathlib
import tempfile

import numpy as np
import popart

STEPS = 4


def session_of(model, loss):
    values = {"defaultLearningRate": 0.05, "defaultMomentum": 0.9, "defaultWeightDecay": 0.01}
    session = popart.TrainingSession(
        model, popart.DataFlow(1, [loss]), loss, popart.SGD({name: (value, False) for name, value in values.items()}),
        popart.DeviceManager().createCpuDevice(),
    )
    session.prepareDevice()
    session.weightsFromHost()
    return session


def train(session, x, data):
    anchors = session.initAnchorArrays()
    losses = []
    for sample in data:
        session.run(popart.PyStepIO({x: sample}, anchors))
        losses.append(float(next(iter(anchors.values()))))
    return losses


def main():
    random = np.random.default_rng(8)
    builder = popart.Builder()
    x = builder.addInputTensor("FLOAT", [2, 3], "x")
    h = builder.aiOnnx.matmul([x, builder.addInitializedInputTensor(random.normal(size=(3, 2)).astype(np.float32), "w")])
    loss = builder.aiGraphcore.l1loss([builder.aiOnnx.tanh([h])], 1.0)
    data = random.normal(size=(2 * STEPS, 2, 3)).astype(np.float32)

    straight = session_of(builder.getModelProto(), loss)
    train(straight, x, data[:STEPS])
    with tempfile.TemporaryDirectory() as folder:
        path = str(pathlib.Path(folder, "checkpoint.onnx"))
        straight.modelToHost(path)
        expected = train(straight, x, data[STEPS:])
        resumed = session_of(path, loss)
        found = train(resumed, x, data[STEPS:])
        print(f"losses after the checkpoint: {np.round(found, 5).tolist()}")
        assert found == expected

        straight.resetHostWeights(path)  # back to the checkpoint in the same session
        straight.weightsFromHost()
        assert train(straight, x, data[STEPS:]) == expected
    print("resumed and reset runs are bit-equal")


if __name__ == "__main__":
    main()
