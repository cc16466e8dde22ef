"""Host kernels of the custom ops against onnxruntime's own ops, interleaved: `python benchmarks/host_kernels.py`.

Sizes: NMS of 12,000 boxes to 2,000; RoI-Align of 256 RoIs on 1024 x 50 x 50 features to 14 x 14, stride 16. onnxruntime
has no RoI-Align gradient, and torchvision's does not load beside this torch; the peer of forward and backward together is
torch's grid_sample with one grid of all bins. Box decoding and clipping has no kernel of its own: it is the program that
popdet compiles from the exported graph (box_decode.py).
"""
from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import parser

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.box_decode import CASES as DECODE_CASES
from benchmarks.box_decode import decode_sides
from benchmarks.interleaved import THREADS, measure, table
from custom_ops.host import load

ROUNDS = 15
DECODE_ROUNDS = 200
ROIS = 256

NMS_MODEL = """<ir_version: 8, opset_import: ["" : 11]>
nms (float[1,12000,4] boxes, float[1,1,12000] scores) => (int64[M,3] found) {
  keep = Constant <value = int64[1] {2000}> ()
  iou = Constant <value = float[1] {0.7}> ()
  found = NonMaxSuppression (boxes, scores, keep, iou)
}"""

ROI_ALIGN_MODEL = f"""<ir_version: 8, opset_import: ["" : 16]>
roi_align (float[1,1024,50,50] features, float[{ROIS},4] rois, int64[{ROIS}] images) => (float[R,C,H,W] aligned) {{
  aligned = RoiAlign <coordinate_transformation_mode = "half_pixel", output_height = 14, output_width = 14,
    sampling_ratio = 1, spatial_scale = 0.0625> (features, rois, images)
}}"""


def session(text: str) -> onnxruntime.InferenceSession:
    model = parser.parse_model(text)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def random_boxes(random: np.random.Generator, count: int) -> np.ndarray:
    """Boxes [count, 4] of 16 to 400 pixels a side in an image of 800 x 800."""
    size = random.uniform(16, 400, (count, 2))
    corner = random.uniform(0, 1, (count, 2)) * (800 - size)
    return np.concatenate([corner, corner + size], 1).astype(np.float32)


def clustered_boxes(random: np.random.Generator, count: int) -> np.ndarray:
    """As an RPN proposes: 60 objects, many shaken copies of each, and two thirds background."""
    objects = np.repeat(random_boxes(random, 60), count // 180, 0)
    shaken = objects + random.normal(0, 6, objects.shape)
    return np.concatenate([shaken, random_boxes(random, count - len(shaken))]).astype(np.float32)


def main() -> None:
    kernels = load()
    if kernels is None:
        raise SystemExit(3)
    random = np.random.default_rng(0)
    scores = random.random((1, 12000), np.float32)
    print(f"{THREADS} threads, medians of {ROUNDS}")
    onnx_nms = session(NMS_MODEL)
    for label, boxes in (
        ("spread boxes", random_boxes(random, 12000)[None]),
        ("clustered boxes", clustered_boxes(random, 12000)[None]),
    ):
        feed = {"boxes": boxes, "scores": scores[None]}
        reference = onnx_nms.run(None, feed)[0][:, 2]
        np.testing.assert_array_equal(kernels.nms(scores, boxes, 0.7, 2000)[0, : len(reference)], reference)
        sides = {
            "onnxruntime": lambda feed=feed: onnx_nms.run(None, feed),
            "popdet": lambda boxes=boxes: kernels.nms(scores, boxes, 0.7, 2000, threads=THREADS),
        }
        print(table(f"nms 12000 -> 2000, {label} ({len(reference)} kept)", measure(sides, ROUNDS), "popdet"))

    features = random.standard_normal((1, 1024, 50, 50), np.float32)
    pixels = np.ascontiguousarray(features.transpose(0, 2, 3, 1))
    rois = random_boxes(random, ROIS)
    feed = {"features": features, "rois": rois, "images": np.zeros(ROIS, np.int64)}
    onnx_align = session(ROI_ALIGN_MODEL)
    first = onnx_align.run(None, feed)[0]
    grad = first[None]
    grad_last = np.ascontiguousarray(grad.transpose(0, 1, 3, 4, 2))
    np.testing.assert_allclose(kernels.roi_align_forward(features, rois[None], 14, 14, 0.0625)[0], first, atol=1e-5)
    sizes = dict(height=14, width=14, spatial_scale=0.0625, threads=THREADS)
    back = dict(spatial_scale=0.0625, threads=THREADS)
    title = f"roi_align 1024x50x50, {ROIS} rois, 14x14"
    forward = {
        "onnxruntime": lambda: onnx_align.run(None, feed),
        "popdet": lambda: kernels.roi_align_forward(pixels, rois[None], channels_last=True, **sizes),
        "popdet, channels-first": lambda: kernels.roi_align_forward(features, rois[None], **sizes),
    }
    print(table(f"{title}, forward", measure(forward, ROUNDS), "popdet"))
    sampled = GridSample(features, rois)
    np.testing.assert_allclose(sampled.forward().detach().numpy(), first, atol=1e-3)

    def both() -> None:
        kernels.roi_align_forward(pixels, rois[None], channels_last=True, **sizes)
        kernels.roi_align_backward(grad_last, rois[None], pixels.shape, channels_last=True, **back)

    def both_first() -> None:
        kernels.roi_align_forward(features, rois[None], **sizes)
        kernels.roi_align_backward(grad, rois[None], features.shape, **back)

    sides = {"grid_sample": lambda: sampled.forward().backward(torch.from_numpy(first)), "popdet": both,
             "popdet, channels-first": both_first}
    print(table(f"{title}, forward and backward", measure(sides, 5), "popdet"))
    torch.set_num_threads(THREADS)
    for case in DECODE_CASES:
        print(table(f"box decode and clip, {case}", measure(decode_sides(case, random), DECODE_ROUNDS, 10), "popdet"))


class GridSample:
    """RoI-Align with one sample a bin as torch.nn.functional.grid_sample: all bins of all RoIs are one tall picture."""

    def __init__(self, features: np.ndarray, rois: np.ndarray) -> None:
        self.features = torch.from_numpy(features).requires_grad_(True)
        height, width = features.shape[2:]
        start, end = torch.from_numpy(rois * 0.0625 - 0.5).split(2, dim=1)
        at = start[:, None] + (end - start)[:, None] / 14 * (torch.arange(14) + 0.5)[:, None]  # [rois, 14, (x, y)]
        at = at.clamp(min=0).minimum(torch.tensor([width - 1.0, height - 1.0]))
        x, y = at.unbind(-1)
        grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), dim=-1)
        self.grid = ((grid * 2 + 1) / torch.tensor([float(width), float(height)]) - 1).reshape(1, -1, 14, 2)
        self.count = len(rois)

    def forward(self) -> torch.Tensor:
        """[rois, C, 14, 14]."""
        out = torch.nn.functional.grid_sample(self.features, self.grid, align_corners=False)
        return out.reshape(out.shape[1], self.count, 14, 14).transpose(0, 1)


if __name__ == "__main__":
    main()
