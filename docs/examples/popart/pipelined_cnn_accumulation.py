"""A network in four pipeline stages on four IPUs, with gradient accumulation: the numbers of one IPU."""
import numpy as np
import popart

STAGES, ACCUMULATION, BATCH, WIDTH = 4, 8, 2, 12


def build(builder, random):
    """One convolution a stage; the loss is in the last one."""
    x = builder.addInputTensor("FLOAT", [BATCH, 3, WIDTH, WIDTH], "x")
    h = x
    for stage in range(STAGES):
        with builder.virtualGraph(stage), builder.pipelineStage(stage):
            w = random.normal(0, 0.3, (4, 3 if stage == 0 else 4, 3, 3)).astype(np.float32)
            h = builder.aiOnnx.conv([h, builder.addInitializedInputTensor(w, f"w{stage}")], pads=[1, 1, 1, 1])
            h = builder.aiOnnx.relu([h])
            if stage == STAGES - 1:
                loss = builder.aiGraphcore.l1loss([h], 1.0, popart.ReductionType.Mean)
    return x, loss


def train(pipelined, data):
    """Losses of every micro-batch and the last stage's weight after one step over data [accumulation, ...]."""
    builder = popart.Builder()
    x, loss = build(builder, np.random.default_rng(2))
    options = popart.SessionOptions()
    options.enableGradientAccumulation = True
    options.accumulationFactor = len(data)
    device = popart.DeviceManager().createCpuDevice()
    if pipelined:
        options.enablePipelining = True
        options.virtualGraphMode = popart.VirtualGraphMode.Manual
        options.autoRecomputation = popart.RecomputationType.Pipeline
        device = popart.DeviceManager().createIpuModelDevice({"numIPUs": STAGES})
    session = popart.TrainingSession(
        builder.getModelProto(), popart.DataFlow(1, [loss]), loss, popart.ConstSGD(0.1), device, userOptions=options
    )
    session.prepareDevice()
    session.weightsFromHost()
    anchors = session.initAnchorArrays()
    session.run(popart.PyStepIO({x: data}, anchors))
    weight = np.empty(session.getInfo("w3").shape(), np.float32)
    session.weightsToHost()
    session.readWeights(popart.PyWeightsIO({"w3": weight}))
    return anchors[loss], weight


def main():
    data = np.random.default_rng(3).normal(size=(ACCUMULATION, BATCH, 3, WIDTH, WIDTH)).astype(np.float32)
    losses, weight = train(True, data)
    single_losses, single_weight = train(False, data)
    print(f"{ACCUMULATION} micro-batches through {STAGES} stages: mean loss {losses.mean():.4f}")
    print(f"largest difference to one IPU: {np.abs(weight - single_weight).max():.1e}")
    assert losses.shape == (ACCUMULATION,)
    assert np.allclose(losses, single_losses) and np.allclose(weight, single_weight, atol=1e-6)

    try:  # four forward stages make seven with the backward ones, so four micro-batches cannot fill the pipeline
        train(True, data[:4])
    except popart.popart_exception as error:
        print(f"refused: {error}")
    else:
        raise AssertionError("an accumulation factor of 4 fills no pipeline of 7 stages")


if __name__ == "__main__":
    main()
