"""The FLOPs that benchmarks/roofline.py counts, against counts by hand, and its table."""
import json

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import machine_rates
from benchmarks.flops import KINDS, OPTIMIZER, REST, Count, count, kind_of, reference_counts, total_flops
from benchmarks.roofline import format_report, kind_rows
from popdet.config import load_config
from runtime.popart_api import load_popart


def _traced(function, *inputs):
    return make_fx(function, tracing_mode="fake")(*inputs)


def test_a_convolution_and_a_product_count_a_multiply_add_as_two():
    def run(x, w, m):
        return torch.nn.functional.conv2d(x, w, stride=2, padding=1), m @ m

    counts, unknown = count(_traced(run, torch.zeros(2, 3, 8, 8), torch.zeros(5, 3, 3, 3), torch.zeros(7, 7)))
    assert counts["convolutions forward"].flops == 2 * (2 * 5 * 4 * 4) * (3 * 3 * 3)
    assert counts["matmul"].flops == 2 * 7 ** 3 and not unknown
    assert counts["matmul"].bytes == 3 * 49 * 4


def test_the_backward_part_of_a_convolution_counts_only_the_gradients_that_are_asked_for():
    def run(x, w):
        w = w.detach().requires_grad_(True)
        return torch.autograd.grad(torch.nn.functional.conv2d(x, w, groups=4).sum(), [w])

    counts, _ = count(_traced(run, torch.zeros(2, 4, 8, 8), torch.zeros(4, 1, 3, 3)))
    assert counts["convolutions backward"].flops == counts["convolutions forward"].flops == 2 * (2 * 4 * 6 * 6) * 9


def test_the_host_kernels_count_as_what_they_compute():
    popart = load_popart()
    __import__(f"{popart.__name__}._engine.depthwise")

    def run(x, filters, bias):
        return torch.ops.popdet_embedded.depthwise(x, filters, bias, 1, [0.0, 6.0], [0.0, 6.0])

    counts, unknown = count(_traced(run, torch.zeros(1, 4, 6, 6), torch.zeros(4, 1, 3, 3), torch.zeros(4)))
    assert counts["depthwise"].flops == 2 * 9 * 4 * 36 and not unknown


def test_a_convolution_whose_means_alone_remain_counts_every_pixel():
    popart = load_popart()
    __import__(f"{popart.__name__}._engine.pointwise")

    def run(x, packed, bias):
        return torch.ops.popdet_embedded.pointwise_mean(x, packed, bias, None, 0.0, 6.0)

    counts, unknown = count(_traced(run, torch.zeros(2, 3, 5, 4), torch.zeros(2, 3, 32), torch.zeros(40)))
    assert counts["convolutions forward"].flops == 2 * (2 * 5 * 4) * 3 * 40 and not unknown


def test_an_inverted_residual_counts_what_it_is_made_of():
    popart = load_popart()
    __import__(f"{popart.__name__}._engine.inverted_residual")
    ops, clip = torch.ops.popdet_embedded, [0.0, 6.0]
    weights = torch.zeros(6, 1, 3, 3), torch.zeros(6), torch.zeros(1, 6, 32), torch.zeros(5)
    narrowed = 2 * (8 * 3 * 2) * 6 * (9 + 5)  # 8 maps of 5 x 4, with a stride of 2

    def maps(x, expand, filters, bias, *project):
        return ops.inverted_residual(x, expand, bias, filters, bias, *project, None, 2, clip, clip)

    def pooled(x, rois, *weights):
        return ops.inverted_residual_of_rois(x, rois, None, *weights, None, [5, 4], 0.25, 3, 2, clip, clip)

    for run, given, first in ((maps, (torch.zeros(8, 3, 5, 4), torch.zeros(1, 3, 32)), 2 * (8 * 5 * 4) * 3 * 6),
                              (pooled, (torch.zeros(2, 6, 9, 9), torch.zeros(2, 4, 4)), 8 * 3 ** 2 * (8 * 5 * 4) * 6)):
        counts, unknown = count(_traced(run, *given, *weights))
        assert counts["inverted residuals"].flops == first + narrowed and not unknown


def test_the_network_as_written_has_the_flops_that_torch_counts():
    network = load_config("configs/shapes-tiny.yaml").network
    from export.network.detector import build_detector, input_signature

    model = build_detector(network, training=False).eval()
    inputs = [torch.zeros(shape, dtype=dtype) for dtype, shape in input_signature(network, False).values()]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*inputs)
    counts = reference_counts(network, training=False)
    products = {"convolutions forward", "matmul"}
    found = sum(entry.flops for kind, entry in counts.items() if kind in products)
    inside = sum(value for name, value in counter.get_flop_counts()["Global"].items() if "bmm" in str(name))
    assert found == counter.get_total_flops() - inside  # the readable ROI-Align is made of bmm
    assert total_flops(reference_counts(network, training=True)) > 2 * found


@pytest.mark.parametrize("name, kind", [
    ("aoti_torch_cpu_convolution_backward", "convolutions backward"), ("aoti_torch_cpu_convolution", "convolutions forward"),
    ("aten::mkldnn_convolution", "convolutions forward"), ("aoti_torch_cpu_addmm_out", "matmul"), ("aten.mm.default", "matmul"),
    ("graph_1_cpp_fused_convolution_convolution_backward_relu_3", "fused pointwise kernels"),
    ("popdet_embedded::depthwise_backward", "depthwise"), ("popdet_embedded.nms.default", "NMS"),
    ("popdet_embedded::roi_align_backward", "ROI-Align"), ("aoti_torch_cpu_sort_stable", "sort, top-k"),
    ("aten::topk", "sort, top-k"), (OPTIMIZER, OPTIMIZER), ("aten::add_", REST),
])
def test_every_call_of_a_profile_has_its_kind(name, kind):
    assert kind_of(name) == kind


def test_the_table_shares_out_the_whole_step():
    counts = {"matmul": Count(3, 4_000_000_000, 2**20), "NMS": Count(1, 0, 0)}
    rows = kind_rows(counts, {"matmul": 40.0, OPTIMIZER: 10.0, REST: 3.0}, wall=100.0, peak=200.0)
    assert [row["kind"] for row in rows] == [OPTIMIZER, "matmul", "NMS", REST]
    assert sum(row["share"] for row in rows) == pytest.approx(1) and rows[-1]["ms"] == pytest.approx(50)
    assert rows[1]["gflop_per_second"] == pytest.approx(100) and rows[1]["share_of_peak"] == pytest.approx(0.5)
    report = {"case": "x", "threads": 1, "rates": {"matmul": 200.0, "copy": 9.0}, "step_ms": 90.0, "gflop": 4.0,
              "step_ms_quartiles": [89.0, 91.0], "profiled_step_ms": 100.0, "reference_gflop": 5.0, "not_counted": ["a::b"],
              "kinds": rows}
    text = format_report(json.loads(json.dumps(report)))
    assert "+20.0% removed" in text and "a::b" in text and all(row["kind"] in text for row in rows)
    assert len(KINDS) == len({kind for kind, _ in KINDS})


def test_the_machine_is_measured(monkeypatch):
    for name, value in (("MATRIX", 64), ("CHANNELS", 8), ("SIDE", 8), ("COPIED_FLOATS", 1024)):
        monkeypatch.setattr(machine_rates, name, value)
    rates = machine_rates.machine_rates(runs=1)
    assert set(rates) == {"matmul", "convolution 3x3", "convolution 1x1", "copy"} and min(rates.values()) > 0
