"""Two replicas train one model on different data; the gradients are averaged, so both keep the same weights."""
import numpy as np
import popart

REPLICAS, STEPS, BATCH = 2, 3, 4
RATE = 0.1


def main():
    random = np.random.default_rng(4)
    w0 = random.normal(size=(3, 1)).astype(np.float32)
    builder = popart.Builder()
    x = builder.addInputTensor("FLOAT", [BATCH, 3], "x")
    w = builder.addInitializedInputTensor(w0, "w")
    y = builder.aiOnnx.matmul([x, w])
    loss = builder.aiGraphcore.identityloss([builder.aiOnnx.mul([y, y])], popart.ReductionType.Mean)

    options = popart.SessionOptions()
    options.enableReplicatedGraphs = True
    options.replicatedGraphCount = REPLICAS
    options.accumulationAndReplicationReductionType = popart.ReductionType.Mean
    device = popart.DeviceManager().acquireAvailableDevice(REPLICAS)
    session = popart.TrainingSession(
        builder.getModelProto(), popart.DataFlow(STEPS, [loss]), loss, popart.ConstSGD(RATE), device, userOptions=options
    )
    session.prepareDevice()
    session.weightsFromHost()
    anchors = session.initAnchorArrays()
    data = random.normal(size=(STEPS, REPLICAS, BATCH, 3)).astype(np.float32)
    session.run(popart.PyStepIO({x: data}, anchors))
    found = np.empty_like(w0)
    session.weightsToHost()
    session.readWeights(popart.PyWeightsIO({w: found}))

    expected, losses = w0.astype(np.float64), []
    for step in data:
        outputs = step @ expected
        losses.append((outputs**2).mean(axis=(1, 2)))
        gradient = np.mean([2 * xi.T @ yi / BATCH for xi, yi in zip(step, outputs)], axis=0)
        expected = expected - RATE * gradient
    print(f"losses [step, replica]: {anchors[loss].astype(float).round(3).tolist()}")
    print(f"weights {found.ravel().astype(float).round(4).tolist()}, by hand {expected.ravel().round(4).tolist()}")
    assert anchors[loss].shape == (STEPS, REPLICAS)
    assert np.allclose(anchors[loss], losses, rtol=1e-4) and np.allclose(found, expected, rtol=1e-4)


if __name__ == "__main__":
    main()
