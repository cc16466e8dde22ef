"""Inference with every anchor return type: All, Final, Sum, EveryN, over several batches a step."""
import numpy as np
import popart

BATCHES = 6


def main():
    builder = popart.Builder()
    x = builder.addInputTensor("FLOAT", [2], "x")
    w = builder.addInitializedInputTensor(np.array([1, 10], np.float32), "w")
    y = {kind: builder.aiOnnx.mul([x, w]) for kind in ("ALL", "Final", "sum", "EveryN")}
    arts = {
        y["ALL"]: popart.AnchorReturnType("ALL"),
        y["Final"]: popart.AnchorReturnType("Final"),
        y["sum"]: popart.AnchorReturnType("sum"),
        y["EveryN"]: popart.AnchorReturnType("EveryN", 2),
    }
    session = popart.InferenceSession(
        fnModel=builder.getModelProto(), dataFlow=popart.DataFlow(BATCHES, arts),
        deviceInfo=popart.DeviceManager().createCpuDevice(),
    )
    session.prepareDevice()
    anchors = session.initAnchorArrays()
    data = np.arange(2 * BATCHES, dtype=np.float32).reshape(BATCHES, 2)
    session.run(popart.PyStepIO({x: data}, anchors))
    for kind, name in y.items():
        print(f"{kind:7}{list(anchors[name].shape)}: {anchors[name].tolist()}")
    products = data * [1, 10]
    assert np.array_equal(anchors[y["ALL"]], products)
    assert np.array_equal(anchors[y["Final"]], products[-1])
    assert np.array_equal(anchors[y["sum"]], products.sum(axis=0))
    assert np.array_equal(anchors[y["EveryN"]], products[1::2])


if __name__ == "__main__":
    main()
