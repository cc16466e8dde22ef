"""Box arithmetic and anchors, against loops and numbers worked out by hand."""
from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from export.network import boxes
from export.network.anchors import anchor_boxes

STDS = (0.1, 0.1, 0.2, 0.2)


def random_boxes(seed, *shape):
    random = np.random.default_rng(seed)
    corner = random.uniform(0, 60, (*shape, 2))
    return torch.from_numpy(np.concatenate([corner, corner + random.uniform(1, 40, (*shape, 2))], -1).astype(np.float32))


def test_encode_gives_the_numbers_of_the_paper():
    box, anchor = torch.tensor([10.0, 20, 30, 60]), torch.tensor([0.0, 0, 40, 20])
    # centre (20, 40) against (20, 10); sides 20x40 against 40x20
    want = [0.0, 30 / 20 / 0.1, math.log(0.5) / 0.2, math.log(2) / 0.2]
    assert boxes.encode(box, anchor, STDS).tolist() == pytest.approx(want, rel=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_decode_undoes_encode(seed):
    box, anchor = random_boxes(seed, 5), random_boxes(seed + 1, 5)
    torch.testing.assert_close(boxes.decode(boxes.encode(box, anchor, STDS), anchor, STDS), box, rtol=1e-4, atol=1e-3)


def test_decode_limits_how_much_a_box_grows():
    grown = boxes.decode(torch.tensor([0.0, 0, 1000, 1000]), torch.tensor([0.0, 0, 16, 16]))
    assert (grown[2] - grown[0]).item() == pytest.approx(1000, rel=1e-5)


def test_encode_of_empty_boxes_is_finite():
    assert torch.isfinite(boxes.encode(torch.zeros(4), torch.zeros(4))).all()


def test_clip_cuts_x_at_the_width_and_y_at_the_height():
    cut = boxes.clip(torch.tensor([[-5.0, -6, 200, 90], [10, 20, 30, 40]]), height=64, width=96)
    assert cut.tolist() == [[0, 0, 96, 64], [10, 20, 30, 40]]


def test_pairwise_iou_equals_the_loop_over_pairs():
    first, second = random_boxes(0, 2, 6), random_boxes(1, 2, 4)
    iou = boxes.pairwise_iou(first, second)
    for b, n, g in np.ndindex(2, 6, 4):
        p, q = first[b, n].tolist(), second[b, g].tolist()
        shared = max(0, min(p[2], q[2]) - max(p[0], q[0])) * max(0, min(p[3], q[3]) - max(p[1], q[1]))
        union = (p[2] - p[0]) * (p[3] - p[1]) + (q[2] - q[0]) * (q[3] - q[1]) - shared
        assert iou[b, n, g].item() == pytest.approx(shared / union, abs=1e-6)


def test_pairwise_iou_of_padding_is_zero():
    assert boxes.pairwise_iou(torch.zeros(1, 1, 4), torch.zeros(1, 1, 4)).item() == 0


def test_gather_rows_takes_rows_of_the_same_image():
    table = torch.arange(24).reshape(2, 4, 3)
    index = torch.tensor([[3, 0], [1, 1]], dtype=torch.int32)
    assert torch.equal(boxes.gather_rows(table, index), torch.stack([table[0, [3, 0]], table[1, [1, 1]]]))


def test_anchors_are_laid_out_row_column_size_ratio():
    anchors = anchor_boxes(rows=2, columns=3, stride=16, sizes=(16, 32), ratios=(1.0, 4.0))
    assert anchors.shape == (24, 4)
    assert anchors.dtype == torch.float32
    assert anchors[0].tolist() == [0, 0, 16, 16]  # size 16, ratio 1, first cell: centre (8, 8)
    assert anchors[3].tolist() == [0, -24, 16, 40]  # size 32, ratio height/width = 4: 16 wide, 64 high
    assert anchors[4].tolist() == [16, 0, 32, 16]  # next column
    assert anchors[12].tolist() == [0, 16, 16, 32]  # next row
