"""The IPU codelets, compiled for this machine against vertex_shim/ and run tile by tile; arrays are numpy.

Nothing here is an IPU: it shows that the arithmetic, the division over tiles and workers and the bytes are right.
"""
from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).resolve().parent / "vertex_shim"
FLAGS = ["-std=c++14", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-ffp-contract=off", f"-I{FOLDER}"]
TILES = 1472
TILE_BYTES = 638976
BUDGET = int(0.6 * TILE_BYTES) - 16384  # tile_plan.hpp: default_budget
NO_THRESHOLD = -3.4e38


class DoesNotFit(Exception):
    """No split keeps the busiest tile within the budget."""


def compile_harness(target: Path, source: str, *flags: str) -> Path:
    subprocess.run(["g++", *FLAGS, *flags, str(FOLDER / source), "-o", str(target)], check=True, timeout=300)
    return target


def _type(array):
    return {"float32": 0, "float16": 1}[array.dtype.name]


def _address(array):
    assert array.flags.c_contiguous
    return ctypes.c_void_p(array.ctypes.data)


class Codelets:
    """`report` is what the last call said: bytes planned, most bytes seen, cycles, and more (see harness.cpp)."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self.report = np.zeros(8, np.int64)

    def _call(self, name, *arguments):
        self.report[:] = 0
        found = self._library[name](*arguments, _address(self.report))
        if found == 1:
            raise DoesNotFit(f"{name}: {self.report[0]} bytes")
        assert found == 0, f"{name} broke a rule of tile.hpp; see stderr"
        assert self.report[1] <= self.report[0], "a vertex held more than the plan says"

    def nms(self, scores, boxes, iou, keep_rows, threshold=NO_THRESHOLD, tiles=TILES, budget=BUDGET):
        """scores [N], boxes [N,4] -> (keep int32 [K], kept boxes [K,4])."""
        keep, kept = np.full(keep_rows, 77, np.int32), np.full((keep_rows, 4), 77, boxes.dtype)
        sizes = (ctypes.c_int64(len(scores)), ctypes.c_int64(keep_rows), ctypes.c_float(iou), ctypes.c_float(threshold))
        places = (ctypes.c_int64(tiles), ctypes.c_int64(budget))
        types = (_type(scores), _type(boxes))
        self._call("codelets_nms", *types, _address(scores), _address(boxes), *sizes, *places, _address(keep), _address(kept))
        return keep, kept

    def roi_align_forward(self, features, rois, height, width, scale, ratio=1, tiles=TILES, budget=BUDGET):
        """As the host library's: features [B,C,H,W], rois [B,D,4 or 5] -> [B,D,C,height,width]."""
        out = np.full((*rois.shape[:2], features.shape[1], height, width), 77, features.dtype)
        self._roi_align(features, rois, features.shape, (height, width), scale, ratio, tiles, budget, 0, out)
        return out

    def roi_align_backward(self, grad, rois, features_shape, scale, ratio=1, tiles=TILES, budget=BUDGET):
        """As the host library's: grad [B,D,C,h,w] -> the gradient of features."""
        out = np.full(features_shape, 77, grad.dtype)
        self._roi_align(grad, rois, features_shape, grad.shape[3:], scale, ratio, tiles, budget, 1, out)
        return out

    def _roi_align(self, values, rois, features, size, scale, ratio, tiles, budget, backward, out):
        sizes = np.array([*features, *rois.shape[1:], *size, ratio], np.int64)
        places = (ctypes.c_int64(tiles), ctypes.c_int64(budget), _address(out))
        pointers = (_address(values), _address(rois), _address(sizes), ctypes.c_float(scale), backward)
        self._call("codelets_roi_align", _type(values), _type(rois), *pointers, *places)

    def box_decode(self, anchors, deltas, stds, height, width, tiles=TILES):
        """anchors, deltas [N,4] -> boxes [N,4]."""
        settings, boxes = np.array([*stds, height, width], np.float32), np.full_like(anchors, 77)
        pointers = (_address(anchors), _address(deltas), ctypes.c_int64(len(anchors)), _address(settings))
        found = self._library.codelets_box_decode(_type(anchors), *pointers, ctypes.c_int64(tiles), _address(boxes))
        assert found == 0
        return boxes

    def plan_nms(self, rows, keep_rows, half, tiles=TILES, budget=BUDGET):
        """The report of a plan alone."""
        counts = [ctypes.c_int64(value) for value in (tiles, budget)]
        self._call("codelets_plan_nms", ctypes.c_int64(rows), ctypes.c_int64(keep_rows), int(half), int(half), *counts)
        names = ("bytes", "seen", "cycles", "columns", "chunks", "tiles", "resolver_bytes")
        return dict(zip(names, self.report.tolist()))

    def plan_roi_align(self, sizes, half, backward, tiles=TILES, budget=BUDGET):
        """The report of a plan alone; sizes: B, C, H, W, D, columns, h, w, ratio."""
        counts = [ctypes.c_int64(value) for value in (tiles, budget)]
        sizes = np.array(sizes, np.int64)
        self._call("codelets_plan_roi_align", _address(sizes), int(half), int(half), int(backward), *counts)
        names = ("bytes", "seen", "cycles", "group_channels", "channel_groups", "group_rois", "roi_groups")
        return dict(zip(names, self.report.tolist()))

    def to_half(self, values):
        """float32 [N] -> (float16 [N], float32 [N]) by the shim's half."""
        halves, back = np.empty(len(values), np.float16), np.empty(len(values), np.float32)
        self._library.codelets_to_half(_address(values), ctypes.c_int64(len(values)), _address(halves), _address(back))
        return halves, back
