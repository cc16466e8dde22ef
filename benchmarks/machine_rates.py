"""What this machine can do, measured: float32 products and convolutions in GFLOP/s, copying in GB/s. The best of some runs."""
from __future__ import annotations

import time
from typing import Callable, Dict

import torch

MATRIX = 2048
CHANNELS, SIDE = 256, 50
COPIED_FLOATS = 32 << 20  # 128 MiB, more than caches hold
PEAK = "matmul"


def machine_rates(runs: int = 5) -> Dict[str, float]:
    """{"matmul", "convolution 3x3", "convolution 1x1": GFLOP/s; "copy": GB/s, read and written bytes together}."""
    square = torch.randn(MATRIX, MATRIX)
    image = torch.randn(1, CHANNELS, SIDE, SIDE).to(memory_format=torch.channels_last)
    filters = {size: torch.randn(CHANNELS, CHANNELS, size, size).to(memory_format=torch.channels_last) for size in (1, 3)}
    source, target = torch.randn(COPIED_FLOATS), torch.empty(COPIED_FLOATS)

    def convolution(size: int) -> Callable[[], object]:
        return lambda: torch.nn.functional.conv2d(image, filters[size], padding=size // 2)

    flops = 2 * CHANNELS * CHANNELS * SIDE * SIDE
    with torch.inference_mode():
        return {
            PEAK: 2 * MATRIX ** 3 / _seconds(lambda: square @ square, runs) / 1e9,
            "convolution 3x3": 9 * flops / _seconds(convolution(3), runs) / 1e9,
            "convolution 1x1": flops / _seconds(convolution(1), runs) / 1e9,
            "copy": 2 * 4 * COPIED_FLOATS / _seconds(lambda: target.copy_(source), runs) / 1e9,
        }


def _seconds(call: Callable[[], object], runs: int) -> float:
    """The quickest of `runs`, after one that is not counted."""
    call()
    taken = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return min(taken)
