"""How long the embedded PopART takes to build a graph and to make its sessions: `python benchmarks/popart_build.py`.

A chain of residual layers (MatMul, Add, Relu, Add: four nodes a layer) of 100 to 10,000 nodes. Prints, for each size,
the seconds that popart.Builder, InferenceSession and TrainingSession take. `--sizes 100 1000` chooses the sizes.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "runtime" / "embedded"))
import popart  # the embedded one: the line above puts it on the path

SIZES = (100, 300, 1000, 3000, 10000)
NODES_A_LAYER = 4
WIDTH = 8


def build(nodes: int):
    """(model bytes, output id, loss id) of a chain with about this many nodes."""
    builder = popart.Builder()
    hidden = builder.addInputTensor("FLOAT", [4, WIDTH], "x")
    for _ in range(max(nodes // NODES_A_LAYER, 1)):
        weight = builder.addInitializedInputTensor(np.eye(WIDTH, dtype=np.float32), "w")
        bias = builder.addInitializedInputTensor(np.zeros(WIDTH, np.float32), "b")
        product = builder.aiOnnx.matmul([hidden, weight])
        active = builder.aiOnnx.relu([builder.aiOnnx.add([product, bias])])
        hidden = builder.aiOnnx.add([hidden, active])
    loss = builder.aiGraphcore.l1loss([hidden], 0.1)
    builder.addOutputTensor(loss)
    return builder.getModelProto(), hidden, loss


def seconds(make, *arguments):
    """(seconds, what `make` returned)."""
    start = time.perf_counter()
    result = make(*arguments)
    return time.perf_counter() - start, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="numbers of nodes")
    device = popart.DeviceManager().createCpuDevice()
    sizes = parser.parse_args().sizes
    build(NODES_A_LAYER)  # imports torch and onnx, which is not what is measured
    print(f"{'nodes':>8} {'Builder':>10} {'Inference':>10} {'Training':>10}   seconds")
    for nodes in sizes:
        built, (model, output, loss) = seconds(build, nodes)
        flow = popart.DataFlow(1, [output])
        inference, _ = seconds(popart.InferenceSession, model, flow, device)
        training, _ = seconds(popart.TrainingSession, model, flow, loss, popart.ConstSGD(0.1), device)
        print(f"{nodes:>8} {built:>10.3f} {inference:>10.3f} {training:>10.3f}", flush=True)


if __name__ == "__main__":
    main()
