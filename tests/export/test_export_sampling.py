"""Target sampling and the losses, against loops over anchors, RoIs and objects."""
from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from export.network import boxes
from export.network.detector import anchors_of
from export.network.losses import binary_cross_entropy, smooth_l1
from export.network.proposal_target import ProposalTarget
from export.network.roi_head import RoiLoss
from export.network.rpn import RpnLoss, RpnTarget
from popdet.config import NetworkConfig

CONFIG = NetworkConfig(classes=("a", "b"), rpn_batch=8, rpn_positive_fraction=0.5, rpn_positive_iou=0.6,
                       roi_batch=6, roi_positive_fraction=0.34, rpn_smooth_l1_beta=0.5)


def some_boxes(random, *shape):
    corner = random.integers(0, 30, (*shape, 2)).astype(np.float32)
    return torch.from_numpy(np.concatenate([corner, corner + random.integers(4, 30, (*shape, 2))], -1).astype(np.float32))


def permutations(random, images, length):
    return torch.from_numpy(np.stack([random.permutation(length) for _ in range(images)]).astype(np.float32))


def in_order(count):
    """The origin of proposals that come from anchors 0, 1, 2 ..."""
    return torch.arange(count, dtype=torch.int32)[None]


def iou_table(first, second):
    return boxes.pairwise_iou(first[None], second[None])[0].numpy()


def lowest_keys(rows, keys, limit):
    return sorted(rows, key=lambda row: keys[row])[:limit]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 3))
def test_rpn_target_equals_the_loop(seed, objects):
    random = np.random.default_rng(seed)
    anchors, gt = some_boxes(random, 40), some_boxes(random, 1, 4)
    keys = permutations(random, 1, 40)
    outputs = RpnTarget(CONFIG)(anchors, gt, torch.tensor([objects], dtype=torch.int32), keys)
    positive, positive_weight, deltas, negative, negative_weight = (output[0] for output in outputs)

    iou = iou_table(anchors, gt[0, :objects]) if objects else np.zeros((40, 1))
    # the same relative tolerance decides whether an anchor ties with an object's best
    best = {n for g in range(objects) for n in range(40) if iou[n, g] >= iou[:, g].max() * (1 - 1e-5) > 0}
    wanted_positive = lowest_keys([n for n in range(40) if iou[n].max() >= 0.6 or n in best], keys[0], 4)
    pool = [n for n in range(40) if iou[n].max() < 0.3 and n not in best]
    wanted_negative = lowest_keys(pool, keys[0], 8 - len(wanted_positive))
    assert positive[positive_weight > 0].tolist() == wanted_positive
    assert negative[negative_weight > 0].tolist() == wanted_negative
    for place, anchor in enumerate(wanted_positive):
        matched = gt[0, int(iou[anchor].argmax())]
        torch.testing.assert_close(deltas[place], boxes.encode(matched, anchors[anchor]))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 3), st.integers(0, 12))
def test_proposal_target_equals_the_loop(seed, objects, proposals):
    random = np.random.default_rng(seed)
    rows, gt = some_boxes(random, 1, 12), some_boxes(random, 1, 3)
    rows[:, proposals:] = 0
    classes = torch.tensor([[1, 2, 1]], dtype=torch.int32)
    keys = permutations(random, 1, 15)
    counts = [torch.tensor([count], dtype=torch.int32) for count in (proposals, objects)]
    rois, labels, targets, weight, foreground = (
        output[0] for output in ProposalTarget(CONFIG)(rows, in_order(12), counts[0], gt, classes, counts[1], keys))

    candidates = torch.cat([rows[0], gt[0]])
    usable = [*range(proposals), *range(12, 12 + objects)]
    iou = iou_table(candidates, gt[0, :objects]) if objects else np.zeros((15, 1))
    chosen = lowest_keys([n for n in usable if iou[n].max() >= 0.5], keys[0], 2)
    rest = lowest_keys([n for n in usable if iou[n].max() < 0.5], keys[0], 6 - len(chosen))
    assert weight.sum() == len(chosen) + len(rest)
    assert foreground.sum() == len(chosen)
    torch.testing.assert_close(rois[weight > 0], candidates[chosen + rest])
    assert labels.tolist() == [classes[0, iou[n].argmax()].item() for n in chosen] + [0] * (6 - len(chosen))
    for place, row in enumerate(chosen):
        want = boxes.encode(gt[0, int(iou[row].argmax())], candidates[row], CONFIG.box_stds)
        torch.testing.assert_close(targets[place], want)
    assert torch.isfinite(targets).all()


def test_the_published_numbers_at_full_size_equal_plain_loops():
    """37,500 anchors of an 800x800 picture and 2,020 proposals: 0.7 / 0.3, 256 anchors, 256 RoIs of which 64 foreground."""
    config, random = NetworkConfig(), np.random.default_rng(20261)
    print("seed 20261")
    anchors = anchors_of(config)
    gt = torch.tensor([[[100.0, 120, 420, 500], [300, 90, 360, 150], [40, 600, 700, 780]] + [[0.0] * 4] * 17])
    count = torch.tensor([3], dtype=torch.int32)
    keys = permutations(random, 1, len(anchors))
    positive, positive_weight, _, negative, negative_weight = RpnTarget(config)(anchors, gt, count, keys)
    iou = iou_table(anchors, gt[0, :3])
    best = [iou[:, number].max() for number in range(3)]
    want, pool = [], []
    for row in range(len(anchors)):
        if iou[row].max() >= 0.7 or any(iou[row, number] >= best[number] * (1 - 1e-5) for number in range(3)):
            want.append(row)
        elif iou[row].max() < 0.3:
            pool.append(row)
    want = lowest_keys(want, keys[0], 128)
    assert positive[positive_weight > 0].tolist() == want and 3 <= len(want) <= 128
    assert negative[negative_weight > 0].tolist() == lowest_keys(pool, keys[0], 256 - len(want))

    near = gt[0, random.integers(0, 3, 400)] + torch.from_numpy(random.uniform(-60, 60, (400, 4)).astype(np.float32))
    proposals = torch.cat([near, some_boxes(random, 1600) * 10])[None]
    keys = permutations(random, 1, 2020)
    classes = torch.tensor([[7, 3, 20] + [0] * 17], dtype=torch.int32)
    rois, labels, deltas, weight, foreground = ProposalTarget(config)(
        proposals, in_order(2000), torch.tensor([2000], dtype=torch.int32), gt, classes, count, keys)
    candidates = torch.cat([proposals[0], gt[0]])
    iou = iou_table(candidates, gt[0, :3])
    exists = [*range(2000), *range(2000, 2003)]
    chosen = lowest_keys([row for row in exists if iou[row].max() >= 0.5], keys[0], 64)
    chosen += lowest_keys([row for row in exists if 0 <= iou[row].max() < 0.5], keys[0], 256 - len(chosen))
    assert weight.sum() == 256 and foreground.sum() == 64
    torch.testing.assert_close(rois[0], candidates[chosen])
    for place, row in enumerate(chosen[:64]):
        matched = int(iou[row].argmax())
        assert labels[0, place] == [7, 3, 20][matched]
        mine, its = candidates[row].tolist(), gt[0, matched].tolist()
        width, height = mine[2] - mine[0], mine[3] - mine[1]
        wanted = [((its[0] + its[2]) / 2 - (mine[0] + mine[2]) / 2) / width / 0.1,
                  ((its[1] + its[3]) / 2 - (mine[1] + mine[3]) / 2) / height / 0.1,
                  math.log((its[2] - its[0]) / width) / 0.2, math.log((its[3] - its[1]) / height) / 0.2]
        assert deltas[0, place].tolist() == pytest.approx(wanted, rel=1e-4, abs=1e-4)
    assert not labels[0, 64:].any()


def test_a_proposal_keeps_its_key_wherever_it_stands_in_the_list():
    """Two orders of the same proposals, one of them without the best: the sample is the same but for the one."""
    random = np.random.default_rng(5)
    rows, gt = some_boxes(random, 1, 12), some_boxes(random, 1, 3)
    origin = torch.from_numpy(random.permutation(40)[None, :12].astype(np.int32))
    classes, count = torch.tensor([[1, 2, 1]], dtype=torch.int32), torch.tensor([3], dtype=torch.int32)
    arguments = (gt, classes, count, permutations(random, 1, 43))
    config = dataclasses.replace(CONFIG, roi_batch=15, roi_positive_fraction=1.0)

    def sample(order):
        target = ProposalTarget(config)
        padded = torch.cat([rows[:, order], torch.zeros(1, 12 - len(order), 4)], dim=1)
        origins = torch.cat([origin[:, order], torch.zeros(1, 12 - len(order), dtype=torch.int32)], dim=1)
        rois, _, _, weight, _ = target(padded, origins, torch.tensor([len(order)], dtype=torch.int32), *arguments)
        return [tuple(row) for row in rois[0, weight[0] > 0].tolist()]

    whole = sample(list(range(12)))
    assert len(whole) == 15 and sample(list(random.permutation(12))) == whole
    assert sample(list(range(1, 12))) == [row for row in whole if row != tuple(rows[0, 0].tolist())]


def test_other_keys_choose_other_anchors_and_the_same_keys_the_same():
    random = np.random.default_rng(0)
    anchors, gt, count = some_boxes(random, 40), some_boxes(random, 1, 4), torch.tensor([2], dtype=torch.int32)
    keys, others = permutations(random, 1, 40), permutations(random, 1, 40)
    target = RpnTarget(CONFIG)
    first, again, other = (target(anchors, gt, count, k)[3].tolist() for k in (keys, keys, others))
    assert first == again != other


def test_padded_objects_have_no_effect():
    random = np.random.default_rng(3)
    anchors, gt, keys = some_boxes(random, 40), some_boxes(random, 1, 4), permutations(random, 1, 40)
    count = torch.tensor([2], dtype=torch.int32)
    emptied = gt.clone()
    emptied[:, 2:] = 0
    for one, two in zip(RpnTarget(CONFIG)(anchors, gt, count, keys), RpnTarget(CONFIG)(anchors, emptied, count, keys)):
        assert torch.equal(one, two)


def test_binary_cross_entropy_equals_torch():
    logits = torch.tensor([-200.0, -3, -1e-3, 2, 60])
    for target in (0.0, 1.0):
        want = torch.nn.functional.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target),
                                                                    reduction="none")
        torch.testing.assert_close(binary_cross_entropy(logits, target), want)


@pytest.mark.parametrize("beta", [0.0, 1 / 9, 1.0])
def test_smooth_l1_equals_torch(beta):
    error = torch.tensor([-3.0, -1, -0.1, 0, 0.05, 0.5, 1, 7])
    want = torch.nn.functional.smooth_l1_loss(error, torch.zeros(8), beta=beta, reduction="none")
    torch.testing.assert_close(smooth_l1(error, beta), want)


def test_rpn_loss_divides_by_the_nominal_batch_and_averages_images():
    logits, deltas = torch.tensor([[2.0, -1, 0.5], [0.1, 0.2, 0.3]]), torch.full((2, 3, 4), 0.25)
    index = torch.tensor([[0], [2]], dtype=torch.int32)
    targets = (index, torch.tensor([[1.0], [0.0]]), torch.zeros(2, 1, 4),
               torch.tensor([[1, 2], [0, 1]], dtype=torch.int32), torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    entropy, error = RpnLoss(CONFIG)(logits, deltas, targets)
    terms = [(2.0, 1), (-1.0, 0), (0.1, 0), (0.2, 0)]
    want = sum(np.log1p(np.exp(-x if label else x)) for x, label in terms) / 8 / 2
    assert entropy.item() == pytest.approx(want, rel=1e-6)
    assert error.item() == pytest.approx(4 * 0.5 * 0.25**2 / 0.5 / 8 / 2, rel=1e-6)


def test_roi_loss_uses_the_box_of_the_label_and_the_number_sampled():
    logits = torch.tensor([[[0.0, 1, 2], [1, 0, 0], [5, 5, 5]]])
    deltas = torch.zeros(1, 3, 8)
    deltas[0, 0, 4:] = 3.0  # class 2 of the first RoI; class 1 is right on
    labels = torch.tensor([[2, 0, 0]], dtype=torch.int32)
    weight, foreground = torch.tensor([[1.0, 1, 0]]), torch.tensor([[1.0, 0, 0]])
    entropy, error = RoiLoss(CONFIG)(logits, deltas, labels, torch.zeros(1, 3, 4), weight, foreground)
    want = torch.nn.functional.cross_entropy(logits[0, :2], labels[0, :2].long())
    assert entropy.item() == pytest.approx(want.item(), rel=1e-6)
    assert error.item() == pytest.approx(4 * (3 - 0.5) / 2, rel=1e-6)


def test_losses_without_a_single_sample_are_zero_with_zero_gradient():
    logits = torch.randn(1, 3, 3, requires_grad=True)
    deltas = torch.randn(1, 3, 8, requires_grad=True)
    nothing = torch.zeros(1, 3)
    entropy, error = RoiLoss(CONFIG)(logits, deltas, nothing.int(), torch.zeros(1, 3, 4), nothing, nothing)
    (entropy + error).backward()
    assert entropy.item() == error.item() == 0
    assert not logits.grad.any()
    assert not deltas.grad.any()


def test_fewer_candidates_than_the_batch_shorten_the_sample():
    config = dataclasses.replace(CONFIG, roi_batch=50)
    random = np.random.default_rng(0)
    count = torch.tensor([3], dtype=torch.int32)
    outputs = ProposalTarget(config)(some_boxes(random, 1, 5), in_order(5), torch.tensor([5], dtype=torch.int32),
                                     some_boxes(random, 1, 3), torch.ones(1, 3, dtype=torch.int32), count,
                                     permutations(random, 1, 8))
    assert outputs[0].shape == (1, 8, 4)
    assert outputs[3].sum() <= 8
