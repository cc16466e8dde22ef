"""Random numbers: a seed repeats a run, dropout differs from step to step, the generator's state can be stored."""
import numpy as np
import popart

COUNT, RATIO = 2000, 0.25


def main():
    builder = popart.Builder()
    x = builder.addInputTensor("FLOAT", [COUNT], "x")
    w = builder.addInitializedInputTensor(np.ones(COUNT, np.float32), "w")
    kept = builder.aiOnnx.dropout([builder.aiOnnx.mul([x, w])], 1, RATIO)[0]
    noise = builder.aiOnnx.randomnormal([COUNT], mean=2.0, scale=0.5)
    loss = builder.aiGraphcore.identityloss([kept], popart.ReductionType.Sum)
    options = popart.SessionOptions()
    options.enableLoadAndOffloadRNGState = True
    session = popart.TrainingSession(
        builder.getModelProto(), popart.DataFlow(1, [kept, noise]), loss, popart.SGD({"defaultLearningRate": (0.0, False)}),
        popart.DeviceManager().createCpuDevice(), userOptions=options,
    )
    session.prepareDevice()
    session.weightsFromHost()

    def step():
        anchors = session.initAnchorArrays()
        session.run(popart.PyStepIO({x: np.ones(COUNT, np.float32)}, anchors))
        return anchors

    session.setRandomSeed(7)
    first, second = step(), step()
    state = session.getRNGState()
    third = step()
    session.setRandomSeed(session.getRandomSeed())
    again = step()
    session.setRNGState(state)
    replayed = step()

    share = (first[kept] == 0).mean()
    print(f"dropped {share:.1%}, kept ones are {first[kept].max():.4f}")
    print(f"noise {first[noise].mean():.2f} +- {first[noise].std():.2f}")
    assert abs(share - RATIO) < 0.05 and np.isclose(first[kept].max(), 1 / (1 - RATIO))
    assert abs(first[noise].mean() - 2) < 0.05 and abs(first[noise].std() - 0.5) < 0.05
    assert not np.array_equal(first[kept], second[kept])
    assert np.array_equal(first[kept], again[kept]) and np.array_equal(first[noise], again[noise])
    assert np.array_equal(third[noise], replayed[noise])
    print("the seed and the stored state repeat their steps")


if __name__ == "__main__":
    main()
