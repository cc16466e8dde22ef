"""Box decoding and clipping, exported and compiled as the project does it, beside onnxruntime on the same ONNX graph.

    boxes f [..., 4] = clip(decode(deltas f [..., 4], anchors f [..., 4]))      pixels of an image of SIDE x SIDE

popdet's side is the session as a caller uses it, and the compiled program alone, called with tensors.
"""
from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Callable, Dict, Tuple

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import torch

from benchmarks.interleaved import THREADS
from export.network import boxes
from export.onnx_graph import module_to_onnx
from graph_passes.pipelines import rewrite
from popdet.config import CompileConfig, Config
from runtime.popart_api import load_popart

SIDE = 800
CASES: Dict[str, Tuple[Tuple[int, ...], Tuple[int, ...]]] = {  # shapes of the deltas and of what they are relative to
    "12,000 boxes": ((12000, 4), (12000, 4)),
    "1,000 boxes x 20 classes": ((1000, 20, 4), (1000, 1, 4)),
}


class DecodeAndClip(torch.nn.Module):
    """What the proposal layer and the detections do to a network's deltas."""

    def forward(self, deltas: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
        return boxes.clip(boxes.decode(deltas, anchors), SIDE, SIDE)


def decode_sides(case: str, random: np.random.Generator) -> Dict[str, Callable[[], object]]:
    """What `measure` calls, the outputs of all sides compared to 1e-4 pixels."""
    deltas_shape, anchors_shape = CASES[case]
    corner = random.uniform(-100, SIDE, (*anchors_shape[:-1], 2))
    anchors = np.concatenate([corner, corner + random.uniform(16, 400, corner.shape)], -1).astype(np.float32)
    feed = {"deltas": random.normal(0, 0.3, deltas_shape).astype(np.float32), "anchors": anchors}
    with tempfile.TemporaryDirectory() as folder:
        reference = Path(folder) / "reference.onnx"
        shapes = {name: (torch.float32, array.shape) for name, array in feed.items()}
        onnx.save(onnx_ir.to_proto(module_to_onnx(DecodeAndClip(), shapes, ["boxes"])), reference)
        rewrite(reference, Path(folder) / "infer.onnx", "infer", Config(compile=CompileConfig(ipus=1, pipelining=False)))
        session, found = _popdet(Path(folder) / "infer.onnx", feed)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = THREADS
        other = onnxruntime.InferenceSession(str(reference), options, providers=["CPUExecutionProvider"])
    core = session._core
    tensors = {name: torch.from_numpy(array) for name, array in feed.items()}
    weights = core.variables.device[0]

    def program() -> torch.Tensor:
        return core.program.forward(weights, tensors, ["boxes"])["boxes"]

    expected = other.run(None, feed)[0]
    np.testing.assert_allclose(found(), expected, rtol=0, atol=1e-4)
    np.testing.assert_allclose(program().numpy(), expected, rtol=0, atol=1e-4)
    return {"onnxruntime": lambda: other.run(None, feed), "popdet": found, "popdet, the program alone": program}


def _popdet(path: Path, feed: Dict[str, np.ndarray]) -> Tuple[Any, Callable[[], np.ndarray]]:
    """(the session of the compiled program, what runs it and returns the boxes)."""
    popart = load_popart()
    options = popart.SessionOptions()
    options.engineOptions = {"popdet.executor": "aot"}
    session = popart.InferenceSession(str(path), popart.DataFlow(1, ["boxes"]), popart.DeviceManager().createCpuDevice(),
                                      userOptions=options)
    session.prepareDevice()
    session.weightsFromHost()
    anchors = session.initAnchorArrays()

    def run() -> np.ndarray:
        session.run(popart.PyStepIO(feed, anchors))
        return anchors["boxes"]

    return session, run
