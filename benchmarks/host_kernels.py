"""Host kernels of the custom ops against onnxruntime's own ops, interleaved: `python benchmarks/host_kernels.py`.

Prints the median time of each side and the ratio (above 1: popdet is faster). Sizes: NMS of 12,000 boxes to 2,000;
RoI-Align of 256 RoIs on 1024 x 50 x 50 features to 14 x 14, stride 16. onnxruntime has no RoI-Align gradient, so the
backward pass is set beside its forward pass.
"""

import os
import statistics
import time
from typing import Callable, Dict

import numpy as np
import onnx
import onnxruntime
from onnx import parser

from custom_ops.host import load

THREADS = int(os.environ.get("OMP_NUM_THREADS", "0")) or len(os.sched_getaffinity(0))
ROUNDS = 15
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


def medians(sides: Dict[str, Callable[[], object]]) -> Dict[str, float]:
    """Milliseconds of each side; the sides take turns, so that a busy machine slows all of them alike."""
    seconds: Dict[str, list] = {name: [] for name in sides}
    for turn in range(ROUNDS + 2):
        for name, call in sides.items():
            start = time.perf_counter()
            call()
            if turn >= 2:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) * 1e3 for name, values in seconds.items()}


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
        report(f"nms 12000 -> 2000, {label} ({len(reference)} kept)", medians(sides))

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
    sides = {
        "onnxruntime": lambda: onnx_align.run(None, feed),
        "forward": lambda: kernels.roi_align_forward(features, rois[None], **sizes),
        "forward channels-last": lambda: kernels.roi_align_forward(pixels, rois[None], channels_last=True, **sizes),
        "backward": lambda: kernels.roi_align_backward(grad, rois[None], features.shape, **back),
        "backward channels-last": lambda: kernels.roi_align_backward(
            grad_last, rois[None], pixels.shape, channels_last=True, **back
        ),
    }
    report(f"roi_align 1024x50x50, {ROIS} rois, 14x14", medians(sides))


def report(title: str, times: Dict[str, float]) -> None:
    print(title)
    for name, milliseconds in times.items():
        print(f"  {name:24s} {milliseconds:8.1f} ms   {times['onnxruntime'] / milliseconds:5.2f} x onnxruntime")


if __name__ == "__main__":
    main()
