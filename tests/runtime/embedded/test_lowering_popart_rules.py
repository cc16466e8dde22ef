"""What PopART does and ONNX leaves open: index types, half storage, losses, gradients at the edges; random ops."""
from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "runtime" / "embedded"))
from popart._engine.ir import Op
from popart._engine.shapes import run_op
from popart.errors import popart_exception


def run(op_type, version, *inputs, domain="ai.onnx", outputs=1, constants=None, partials=None, **attrs):
    """The outputs of one op; `constants` maps input index -> array."""
    names = tuple("" if t is None else f"x{i}" for i, t in enumerate(inputs))
    names += tuple(f"c{i}" for i in range(len(names), 1 + max(constants or {-1: 0})))
    op = Op(domain, op_type, version, "n", names, tuple(f"y{i}" for i in range(outputs)), attrs,
            constants={i: np.asarray(a) for i, a in (constants or {}).items()},
            settings={"__partials_type": partials} if partials else {})  # fmt: skip
    results = run_op(op, [*inputs, *[torch.from_numpy(op.constants[i]) for i in range(len(inputs), len(names))]])
    return results[0] if outputs == 1 else results


def graphcore(op_type, *inputs, **attrs):
    return run(op_type, 1, *inputs, domain="ai.graphcore", **attrs)


def test_an_axis_before_opset_7_aligns_the_second_input_there():
    a, b = torch.arange(24.0).reshape(2, 3, 4), torch.tensor([1.0, 10.0, 100.0])
    np.testing.assert_array_equal(run("Mul", 6, a, b, broadcast=1, axis=1), a.numpy() * b.numpy()[None, :, None])
    np.testing.assert_array_equal(run("Add", 6, a, b[:1], broadcast=1), a.numpy() + 1)
    with pytest.raises(popart_exception, match="broadcast"):
        run("Pow", 1, a, b[:1])


def test_topk_takes_the_lower_index_among_equals_and_gives_int32():
    values, indices = run("TopK", 11, torch.tensor([1.0, 3.0, 3.0, 1.0, 3.0]), constants={1: [4]}, outputs=2)
    assert indices.tolist() == [1, 2, 4, 0] and indices.dtype == torch.int32
    assert values.tolist() == [3, 3, 3, 1]


def test_the_gradient_of_topk_goes_to_the_chosen_elements():
    x = torch.tensor([1.0, 4.0, 2.0], requires_grad=True)
    values, _ = run("TopK", 11, x, constants={1: [2]}, outputs=2)
    values.backward(torch.tensor([10.0, 20.0]))
    assert x.grad.tolist() == [0, 10, 20]


def test_argmax_gives_int32():
    assert run("ArgMax", 11, torch.tensor([[1.0, 5.0, 5.0]]), axis=1).tolist() == [[1]]
    assert run("ArgMax", 11, torch.zeros(2, 2)).dtype == torch.int32


@pytest.mark.parametrize("op_type, version", [("Upsample", 9), ("Resize", 10)])
def test_linear_and_cubic_resizing_before_opset_11_have_half_pixel_coordinates_as_in_pytorch(op_type, version):
    x = torch.from_numpy(np.random.default_rng(3).normal(size=(1, 2, 4, 5)).astype(np.float32))
    scales = {1: np.asarray([1, 1, 2, 3], np.float32)}
    for mode, theirs in (("linear", "bilinear"), ("cubic", "bicubic")):
        expected = F.interpolate(x, scale_factor=(2, 3), mode=theirs)
        torch.testing.assert_close(run(op_type, version, x, constants=scales, mode=mode), expected)


@pytest.mark.parametrize("version", [1, 11])
def test_gather_counts_negative_indices_from_the_end(version):
    data = torch.arange(12.0).reshape(3, 4)
    np.testing.assert_array_equal(run("Gather", version, data, torch.tensor([-1, 0]), axis=1), data[:, [-1, 0]])


def test_the_values_of_a_one_hot_may_be_computed_and_get_gradients():
    values = torch.tensor([0.5, 2.0], requires_grad=True)
    names = ("x", "depth", "values")
    op = Op("ai.onnx", "OneHot", 9, "n", names, ("y",), {}, constants={1: np.asarray(3)})
    out = run_op(op, [torch.tensor([0, 2], dtype=torch.int32), torch.tensor(3), values])[0]
    assert out.tolist() == [[2, 0.5, 0.5], [0.5, 0.5, 2]]
    out.sum().backward()
    assert values.grad.tolist() == [4, 2]


def test_a_cast_to_int64_stays_in_32_bits():
    assert run("Cast", 9, torch.tensor([2.9, -2.9]), to=7).dtype == torch.int32


def test_integers_divide_towards_zero():
    assert run("Div", 7, torch.tensor([7, -7]), torch.tensor([2, 2])).tolist() == [3, -3]


def test_the_gradient_of_clip_is_zero_on_its_bounds():
    x = torch.tensor([0.0, 3.0, 6.0, 9.0], requires_grad=True)
    run("Clip", 6, x, min=0.0, max=6.0).sum().backward()
    assert x.grad.tolist() == [0, 1, 0, 0]
    lower = torch.tensor([0.0, 3.0], requires_grad=True)
    run("Clip", 6, lower, min=0.0).sum().backward()
    assert lower.grad.tolist() == [0, 1]


def test_half_sums_are_accumulated_in_float():
    ones = torch.full((1, 4096), 1.0, dtype=torch.float16)
    ones[0, 0] = 2048.0  # 2048 + 1 is 2048 in half
    assert run("ReduceSum", 11, ones, keepdims=0).item() == 2048 + 4095 + 1  # 6143 rounds to 6144
    assert run("MatMul", 9, ones, torch.ones(4096, 1, dtype=torch.float16)).item() == 6144


def test_half_partials_round_between_slices_of_channels():
    x = torch.ones(1, 4096, dtype=torch.float16)
    x[0, 0] = 2048.0
    w = torch.full((4096, 1), 0.0625, dtype=torch.float16)
    w[0] = 1.0
    # 255 slices of 16 channels add 1.0 each to 2048.9375, which half rounds to 2048 or 2050: 2048 + 1 ties to even.
    assert run("MatMul", 9, x, w, partials="half").item() == 2048
    assert run("MatMul", 9, x, w).item() == 2304


def test_half_partials_of_a_grouped_convolution_stay_close_to_float_ones():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((1, 64, 5, 5), generator=generator).half()
    w = torch.randn((4, 32, 3, 3), generator=generator).half()
    exact = F.conv2d(x.double(), w.double(), groups=2)
    half = run("Conv", 11, x, w, group=2, partials="half")
    assert half.dtype == torch.float16 and not torch.equal(half, run("Conv", 11, x, w, group=2))
    torch.testing.assert_close(half.double(), exact, rtol=5e-3, atol=0.1)


def test_unknown_partials_are_refused():
    with pytest.raises(popart_exception, match="Bad partialsType 'quarter'"):
        run("MatMul", 9, torch.ones(1, 1), torch.ones(1, 1), partials="quarter")


@pytest.mark.parametrize("op_type", ["Conv", "Softmax", "GlobalAveragePool", "ReduceMean"])
def test_half_results_are_float_results_rounded_once(op_type):
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn((2, 8, 5, 5), generator=generator).half()]
    if op_type == "Conv":
        inputs.append(torch.randn((4, 8, 3, 3), generator=generator).half())
    version = {"GlobalAveragePool": 1}.get(op_type, 11)
    exact = run(op_type, version, *(t.float() for t in inputs))
    torch.testing.assert_close(run(op_type, version, *inputs), exact.half(), rtol=0, atol=0)


def test_softmax_flattens_what_follows_the_axis():
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(run("Softmax", 11, x), torch.softmax(x.reshape(2, 12), 1).reshape(2, 3, 4))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nll_equals_torch_where_probabilities_are_not_tiny(reduction):
    logits = torch.randn(5, 4, requires_grad=True)
    labels = torch.tensor([0, 3, 1, 1, 2], dtype=torch.int32)
    popart = {"mean": "Mean", "sum": "Sum", "none": "NoReduction"}[reduction]
    loss = graphcore("Nll", torch.softmax(logits, 1), labels, reduction=popart)
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels.long(), reduction=reduction))


def test_nll_ignores_an_index_and_a_mean_counts_the_others_but_at_least_one():
    log_p = torch.log_softmax(torch.randn(3, 4), 1)
    labels = torch.tensor([1, 2, 1], dtype=torch.int32)
    some = graphcore("Nll", log_p, labels, ignore_index=1, input_is_log_probability=1)
    torch.testing.assert_close(some, -log_p[1, 2])
    assert graphcore("Nll", log_p, labels[:1].repeat(3), ignore_index=1, input_is_log_probability=1).item() == 0


def test_nll_raises_tiny_probabilities_and_keeps_their_gradient():
    p = torch.tensor([[0.0, 1.0]], requires_grad=True)
    loss = graphcore("Nll", p, torch.tensor([0]), reduction="Sum")
    loss.backward()
    torch.testing.assert_close(loss.detach(), -torch.log(torch.tensor(1e-7)))
    torch.testing.assert_close(p.grad, torch.tensor([[-1e7, 0.0]]))


def test_the_other_losses():
    x = torch.tensor([[1.0, -2.0], [3.0, -4.0]])
    assert graphcore("L1", x, **{"lambda": 0.5}).item() == 0.5 * 2.5
    assert graphcore("L1", x, **{"lambda": 0.5}, reduction="Sum").item() == 5.0
    assert graphcore("IdentityLoss", x).item() == -0.5
    assert torch.equal(graphcore("IdentityLoss", x, reduction="NoReduction"), x)
    with pytest.raises(popart_exception, match="reduction 'mean'"):
        graphcore("IdentityLoss", x, reduction="mean")


def test_detach_stops_the_gradient():
    x = torch.ones(2, requires_grad=True)
    assert not graphcore("Detach", x).requires_grad


def test_group_normalization_gives_mean_and_inverse_deviation():
    x = torch.randn(2, 6, 3, 3)
    scale, bias = torch.randn(6), torch.randn(6)
    y, mean, inverse = graphcore("GroupNormalization", x, scale, bias, num_groups=2, epsilon=1e-3, outputs=3)
    torch.testing.assert_close(y, F.group_norm(x, 2, scale, bias, 1e-3), rtol=1e-4, atol=1e-5)
    rows = x.reshape(4, -1)
    torch.testing.assert_close(mean, rows.mean(1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(inverse, 1 / (rows.var(1, unbiased=False) + 1e-3).sqrt(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("domain", "version", "unbiased"), [("ai.onnx", 9, False), ("ai.graphcore", 1, True)])
def test_batch_normalization_in_training_gives_running_and_saved_statistics(domain, version, unbiased):
    x = torch.randn(4, 3, 5)
    scale, bias, mean, var = torch.randn(3), torch.randn(3), torch.randn(3), torch.rand(3)
    y, running_mean, running_var, saved_mean, saved_var = run(
        "BatchNormalization", version, x, scale, bias, mean, var, domain=domain, outputs=5, momentum=0.75
    )
    batch_var = x.var((0, 2), unbiased=unbiased)
    torch.testing.assert_close(y, F.batch_norm(x, None, None, scale, bias, True), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(saved_mean, x.mean((0, 2)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(saved_var, batch_var, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(running_mean, 0.75 * mean + 0.25 * saved_mean)
    torch.testing.assert_close(running_var, 0.75 * var + 0.25 * saved_var)


def test_scatter_reduce_sums_what_shares_an_index():
    out = graphcore("ScatterReduce", torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([2, 0, 2]), axis=0, axis_size=3)
    assert out.tolist() == [[2.0], [0.0], [4.0]]


def test_dynamic_slices_are_moved_back_inside():
    x, update = torch.arange(6.0), torch.tensor([10.0, 20.0])
    at = torch.tensor([5], dtype=torch.int32)
    assert graphcore("DynamicSlice", x, at, axes=(0,), sizes=(2,)).tolist() == [4, 5]
    assert graphcore("DynamicUpdate", x, at, update, axes=(0,), sizes=(2,)).tolist() == [0, 1, 2, 3, 10, 20]
    assert graphcore("DynamicAdd", x, at - 4, update, axes=(0,), sizes=(2,)).tolist() == [0, 11, 22, 3, 4, 5]


def test_round_of_graphcore_takes_halves_away_from_zero():
    x = torch.tensor([0.5, 1.5, -2.5])
    assert graphcore("Round", x).tolist() == [1, 2, -3]
    assert run("Round", 11, x).tolist() == [0, 2, -2]
    assert graphcore("NearbyInt", x).tolist() == [0, 2, -2]


def test_dropout_drops_in_a_training_step_only():
    x = torch.ones(1000)
    with torch.no_grad():
        assert torch.equal(run("Dropout", 10, x, ratio=0.25), x)
    torch.manual_seed(0)
    dropped, mask = run("Dropout", 10, x, ratio=0.25, outputs=2)
    assert 200 < (dropped == 0).sum() < 300
    assert torch.equal(dropped, mask / 0.75)
    with pytest.raises(popart_exception, match="ratio"):
        run("Dropout", 10, x, ratio=1.0)


def test_random_ops_have_the_distribution_that_is_asked():
    torch.manual_seed(0)
    normal = run("RandomNormal", 1, shape=(4000,), mean=3.0, scale=2.0)
    uniform = run("RandomUniformLike", 1, torch.empty(4000, dtype=torch.float16), low=-1.0, high=3.0)
    assert abs(normal.mean() - 3) < 0.2 and abs(normal.std() - 2) < 0.2
    assert uniform.dtype == torch.float16 and -1 <= uniform.min() and uniform.max() <= 3
    assert abs(uniform.float().mean() - 1) < 0.1


def test_roi_align_averages_whatever_its_mode_says_as_popart_does():
    x, rois, image = torch.rand(1, 2, 8, 8), torch.tensor([[1.0, 1.0, 6.0, 7.0]]), torch.zeros(1, dtype=torch.int32)
    sizes = {"output_height": 2, "output_width": 2, "sampling_ratio": 2}
    modes = [run("RoiAlign", 10, x, rois, image, mode=mode, **sizes) for mode in ("avg", "max")]
    torch.testing.assert_close(*modes)
