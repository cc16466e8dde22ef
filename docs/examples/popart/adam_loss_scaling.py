"""Adam on half-precision weights: float state, loss scaling, another learning rate after some steps."""
import numpy as np
import popart

STEPS, SCALE = 6, 256.0


def optimizer(rate):
    return popart.Adam(
        {"defaultLearningRate": (rate, False), "defaultBeta1": (0.8, True), "defaultEps": (1e-5, True),
         "lossScaling": (SCALE, True)},
        mode=popart.AdamMode.Adam, accl1_type=popart.DataType.FLOAT, accl2_type=popart.DataType.FLOAT,
    )


def by_hand(w, gradients, rates):
    w, m, v = w.astype(np.float64), 0.0, 0.0
    for t, (g, rate) in enumerate(zip(gradients, rates), 1):
        m, v = 0.8 * m + 0.2 * g, 0.999 * v + 0.001 * g * g
        w = w - rate * (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-5)
    return w


def main():
    random = np.random.default_rng(6)
    w0 = random.normal(size=4).astype(np.float16)
    gradients = (random.normal(size=(STEPS, 4)) * 1e-4).astype(np.float16)  # below half's normal numbers when unscaled
    builder = popart.Builder()
    x = builder.addInputTensor("FLOAT16", [4])
    w = builder.addInitializedInputTensor(w0, "w")
    loss = builder.aiGraphcore.identityloss([builder.aiOnnx.mul([x, w])], popart.ReductionType.Sum)
    session = popart.TrainingSession(
        builder.getModelProto(), popart.DataFlow(1, [loss]), loss, optimizer(0.05),
        popart.DeviceManager().createCpuDevice(),
    )
    session.prepareDevice()
    session.weightsFromHost()
    anchors = session.initAnchorArrays()
    rates = [0.05] * 3 + [0.01] * 3
    for step in range(STEPS):
        session.updateOptimizerFromHost(optimizer(rates[step]))
        session.run(popart.PyStepIO({x: gradients[step]}, anchors))
    found = {w: np.empty(4, np.float16), "Accl1___w": np.empty(4, np.float32), "Step___w": np.empty((), np.float32)}
    session.weightsToHost()
    session.readWeights(popart.PyWeightsIO(found))
    expected = by_hand(w0, gradients.astype(np.float64), rates)
    print(f"weights {found[w].tolist()}, by hand {expected.round(4).tolist()}, after {int(found['Step___w'])} updates")
    assert np.allclose(found[w], expected, atol=5e-3) and not np.allclose(found[w], w0, atol=5e-2)

    try:
        session.updateOptimizerFromHost(popart.Adam({"defaultBeta1": (0.9, True), "lossScaling": (SCALE, True)}))
    except popart.popart_exception as error:
        print(f"refused: {error}")
    else:
        raise AssertionError("a constant hyper-parameter was replaced")


if __name__ == "__main__":
    main()
