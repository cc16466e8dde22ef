"""Recomputation keeps fewer activations and changes no number."""
import numpy as np
import popart

LAYERS, WIDTH = 8, 16


def train(mode=None, annotate=False):
    """(loss, first weight after one step, summary report)."""
    random = np.random.default_rng(5)
    builder = popart.Builder()
    x = builder.addInputTensor("FLOAT", [4, WIDTH], "x")
    h = x
    for layer in range(LAYERS):
        w = builder.addInitializedInputTensor(random.normal(0, 0.3, (WIDTH, WIDTH)).astype(np.float32), f"w{layer}")
        h = builder.aiOnnx.sigmoid([builder.aiOnnx.matmul([h, w])])
        if annotate and layer % 2 == 0:
            builder.recomputeOutputInBackwardPass(h)
        if mode is not None and layer == LAYERS // 2:
            (h,) = builder.checkpointOutput([h])
    loss = builder.aiGraphcore.identityloss([h])
    options = popart.SessionOptions()
    if mode is not None:
        options.autoRecomputation = mode
    session = popart.TrainingSession(
        builder.getModelProto(), popart.DataFlow(1, [loss]), loss, popart.ConstSGD(0.5),
        popart.DeviceManager().createCpuDevice(), userOptions=options,
    )
    session.prepareDevice()
    session.weightsFromHost()
    anchors = session.initAnchorArrays()
    session.run(popart.PyStepIO({x: random.normal(size=(4, WIDTH)).astype(np.float32)}, anchors))
    weight = np.empty((WIDTH, WIDTH), np.float32)
    session.weightsToHost()
    session.readWeights(popart.PyWeightsIO({"w0": weight}))
    return anchors[loss], weight, session.getSummaryReport()


def main():
    runs = {
        "none": train(),
        "annotated": train(annotate=True),
        "standard": train(popart.RecomputationType.Standard),
        "all": train(popart.RecomputationType.RecomputeAll),
    }
    for name, (loss, weight, report) in runs.items():
        same = np.array_equal(loss, runs["none"][0]) and np.array_equal(weight, runs["none"][1])
        print(f"{name}: loss {float(loss):.6f}, same numbers: {same}; report of {len(report)} characters")
        assert same


if __name__ == "__main__":
    main()
