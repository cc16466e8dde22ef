"""swap_nms matches NonMaxSuppression and its padding as exporters write it, and says why where it does not."""
import numpy as np
import pytest
from pass_graphs import INFER, apply, model_from, ops, rewritten, run

from graph_passes.graph_io import load_graph
from graph_passes.pass_manager import PassManager
from graph_passes.pipelines import make_passes
from graph_passes.swap_nms import SwapNms
from runtime.errors import GraphError

N, K = 12, 5
INTS = """int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}, int64[1] three = {3}, int64 scalar2 = {2},
    int64[1] k = {5},
    int64[1] huge = {9223372036854775807}, int64[1] minus1 = {-1}, int64[2] row = {1,5}, int64[2] column = {-1,1},
    int64[5] pad = {-1,-1,-1,-1,-1},
    int64[5,1] pad2 = {-1,-1,-1,-1,-1}, int64[5,3] pad3 = {-1,-1,-1,-1,-1,-1,-1,-1,-1,-1,-1,-1,-1,-1,-1},
    float[1] iou = {0.5}, float[1] low = {0.2}, int64[5] fill0 = {0,0,0,0,0}, int64[2] pad_two = {-1,-1}"""
NMS = "n = NonMaxSuppression(boxes, scores, k, iou, low)  # module: proposal_layer\n"


def _feeds(batch=1, seed=0, shape=None):
    """Overlapping boxes, score ties, scores below the threshold."""
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, 10, (batch, N, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(1, 8, (batch, N, 2))], -1).astype(np.float32)
    scores = rng.integers(0, 8, (batch, 1, N)).astype(np.float32) / 8
    return {"boxes": boxes, "scores": scores if shape is None else scores.reshape(shape)}


def _model(body, output="int64[5] y", constants=INTS, nms=NMS):
    return model_from(f"(float[1,12,4] boxes, float[1,1,12] scores) => ({output})", nms + body, constants,
                      module="proposal_layer")


COLUMN = "c = Gather<axis=1>(n, scalar2)\n"
VECTOR = "g = Gather<axis=1>(n, two)\n"
PAD = "p = Concat<axis=0>(c, pad)\n"
CUT = "y = Slice(p, zero, k, zero)"
TAILS = {
    "popdet: Gather by scalar, Concat, Slice": (COLUMN + PAD + CUT, 1),
    "Gather by vector, Squeeze": (VECTOR + "c = Squeeze(g, one)\n" + PAD + CUT, 1),
    "Gather of the last column, Reshape": (
        "g = Gather<axis=1>(n, minus1)\nc = Reshape(g, minus1)\n" + PAD + "y = Slice(p, zero, k)", 1),
    "Slice of the column": ("g = Slice(n, two, three, one)\nc = Squeeze(g, minus1)\n" + PAD + CUT, 1),
    "Slice of the column to the end": ("g = Slice(n, two, huge, one)\nc = Squeeze(g, one)\n" + PAD + CUT, 1),
    "Split": ("i, j, g = Split<axis=1, num_outputs=3>(n)\nc = Squeeze(g, one)\n" + PAD + CUT, 1),
    "rows padded before the column is taken": (
        "p = Concat<axis=0>(n, pad3)\ns = Slice(p, zero, k, zero)\ny = Gather<axis=1>(s, scalar2)", 1),
    "column kept as a dimension": (
        "c = Gather<axis=1>(n, two)\np = Concat<axis=0>(c, pad2)\ns = Slice(p, zero, k, zero)\ny = Squeeze(s, one)", 1),
    "cut, padded, cut": (COLUMN + "s = Slice(c, zero, k, zero)\np = Concat<axis=0>(s, pad)\n" + CUT, 1),
    "padded with zeros": (COLUMN + "p = Concat<axis=0>(c, fill0)\n" + CUT, 1),
    "padded in two pieces": (COLUMN + "p = Concat<axis=0>(c, pad_two, pad)\n" + CUT, 1),
}


@pytest.mark.parametrize("name", TAILS)
@pytest.mark.parametrize("seed", range(3))
def test_every_known_way_of_padding_becomes_the_custom_op(name, seed):
    body, changed = TAILS[name]
    swapped = rewritten(_model(body), SwapNms(), changed=changed, feeds=_feeds(seed=seed))
    assert "NonMaxSuppression" not in ops(swapped) and ops(swapped).count("nms") == 1


def test_the_settings_reach_the_op_and_int32_needs_no_detour():
    body = COLUMN + PAD + "s = Slice(p, zero, k, zero)\nt = Cast<to=6>(s)\ny = Reshape(t, row)"
    swapped = rewritten(_model(body, "int32[1,5] y"), SwapNms(), changed=1, feeds=_feeds())
    assert ops(swapped)[-1] == "nms" and "Cast" not in ops(swapped)
    attributes = {a.name: a.f if a.type == 1 else a.i for a in swapped.graph.node[-1].attribute}
    assert attributes == pytest.approx({"threshold": 0.5, "numDetections": 5, "score_threshold": 0.2})


def test_torchvisions_form_is_swapped_once_it_is_padded():
    """torchvision.ops.nms exports maxsize as the limit, no score threshold, and Gather + Squeeze of the box column."""
    model = model_from("(float[12,4] boxes, float[12] scores) => (float[5,4] kept)", """
        b = Unsqueeze(boxes, zero)
        s = Unsqueeze(scores, zero)
        t = Unsqueeze(s, zero)
        n = NonMaxSuppression(b, t, huge, iou)
        g = Gather<axis=1>(n, two)
        c = Squeeze(g, one)
        p = Concat<axis=0>(c, pad)
        keep = Slice(p, zero, k, zero)
        kept = Gather(boxes, keep)""", INTS)
    feeds = _feeds()
    swapped = rewritten(model, SwapNms(), changed=1, feeds={"boxes": feeds["boxes"][0], "scores": feeds["scores"][0, 0]})
    (node,) = [n for n in swapped.graph.node if n.op_type == "nms"]
    assert [a.i for a in node.attribute if a.name == "numDetections"] == [5]


def _batch_model(batch, score_form):
    body = [f"all_scores{i} = Reshape(scores, image_scores)" for i in range(batch)]
    for i in range(batch):
        cut = {"slice": f"Slice({{}}, at{i}, at{i + 1}, zero)", "gather": f"Gather<axis=0>({{}}, at{i})"}[score_form]
        body += [f"b{i} = {cut.format('boxes')}", f"s{i} = {cut.format(f'all_scores{i}')}",
                 f"n{i} = NonMaxSuppression(b{i}, s{i}, k, iou, low)", f"c{i} = Gather<axis=1>(n{i}, scalar2)",
                 f"p{i} = Concat<axis=0>(c{i}, pad)", f"k{i} = Slice(p{i}, zero, k, zero)", f"d{i} = Cast<to=6>(k{i})",
                 f"r{i} = Reshape(d{i}, row)"]
    body.append(f"keep = Concat<axis=0>({', '.join(f'r{i}' for i in range(batch))})")
    constants = ", ".join([INTS, f"int64[3] image_scores = {{{batch},1,12}}",
                           *[f"int64[1] at{i} = {{{i}}}" for i in range(batch + 1)]])
    return model_from(f"(float[{batch},12,4] boxes, float[{batch},12] scores) => (int32[{batch},5] keep)", "\n".join(body),
                      constants)


@pytest.mark.parametrize("batch", [2, 3])
@pytest.mark.parametrize("form", ["slice", "gather"])
def test_the_images_of_a_batch_share_one_op_without_cross_talk(batch, form):
    model = _batch_model(batch, form)
    swapped = rewritten(model, SwapNms(), changed=batch, feeds=_feeds(batch, 3, (batch, N)))
    assert ops(swapped) == ["nms"]


def test_a_batch_with_different_settings_is_swapped_image_by_image():
    model = _batch_model(2, "slice")
    iou = next(t for t in model.graph.initializer if t.name == "iou")
    iou_other = model.graph.initializer.add()
    iou_other.CopyFrom(iou)
    iou_other.name = "iou_other"
    iou_other.ClearField("float_data")
    iou_other.raw_data = np.array([0.3], np.float32).tobytes()
    next(n for n in model.graph.node if n.op_type == "NonMaxSuppression").input[3] = "iou_other"
    swapped = rewritten(model, SwapNms(), changed=2, feeds=_feeds(2, 3, (2, N)))
    assert ops(swapped).count("nms") == 2


def test_a_list_longer_than_the_limit_is_padded_up():
    body = "c = Gather<axis=1>(n, scalar2)\np = Concat<axis=0>(c, pad)\ny = Slice(p, zero, k, zero)"
    model = _model(body, nms=NMS.replace("scores, k", "scores, three"))
    swapped = rewritten(model, SwapNms(), changed=1, feeds=_feeds())
    assert "Concat" in ops(swapped)


PADDED = "c = Gather<axis=1>(n, scalar2)\np = Concat<axis=0>(c, pad)\ny = Slice(p, zero, k, zero)"


@pytest.mark.parametrize("model, reason", [
    (lambda: _model("c = Gather<axis=1>(n, scalar2)\nd = Gather(boxes0, c)\ny = ReduceSum(d)", "float[1,1] y",
                    INTS + ", float[12,4] boxes0 = {" + ",".join(["1"] * 48) + "}"), "used without a capacity by Gather"),
    (lambda: _model("y = Identity(n)", "int64[M,3] y"), "is the graph output 'y'"),
    (lambda: _model("c = Gather<axis=1>(n, scalar2)\np = Concat<axis=0>(c, pad_two)\ny = Slice(p, zero, k, zero)",
                    "int64[M] y"),
     "only 2 padding rows were appended"),
    (lambda: _model("c = Gather<axis=1>(n, scalar2)\np = Concat<axis=0>(pad, c)\ny = Slice(p, zero, k, zero)"),
     "puts padding before the kept boxes"),
    (lambda: _model(COLUMN + "s = Slice(c, zero, two, zero)\np = Concat<axis=0>(s, pad)\n" + CUT),
     "cut to 2 rows and padded to 5"),
    (lambda: _model("c = Gather<axis=1>(n, scalar2)\np = Concat<axis=0>(c, pad, fill0)\ny = Slice(p, zero, k, zero)"),
     "appends different values"),
    (lambda: _model("p = Concat<axis=0>(n, pad3)\ny = Slice(p, zero, k, zero)", "int64[5,3] y"), "image and class columns"),
    (lambda: _model(PADDED, nms=NMS.replace("Suppression(", "Suppression<center_point_box = 1>(")), "centre, width, height"),
    (lambda: _model(PADDED, nms=NMS.replace("scores, k", "scores, zero")), "keeps nothing"),
    (lambda: _model(PADDED, nms=NMS.replace(", iou, low", ", computed, low").replace("n =", "computed = Relu(iou)\nn =")),
     "IoU threshold is computed at run time"),
    (lambda: model_from("(float[1,12,4] boxes, float[1,3,12] scores) => (int64[5] y)", NMS + PADDED, INTS),
     "3 classes at once"),
    (lambda: model_from("(float[2,12,4] boxes, float[2,1,12] scores) => (int64[5] y)", NMS + PADDED, INTS), "2 images at once"),
])
def test_what_has_no_static_form_stays_and_the_note_says_why(model, reason):
    result, (record,) = apply(model(), [SwapNms()])
    assert "NonMaxSuppression" in ops(result) and record.changed == 0
    assert "not swapped" in record.notes[0] and reason in record.notes[0]


def test_the_next_pass_repeats_the_reason_instead_of_a_vague_one():
    graph = load_graph(_model("y = Identity(n)", "int64[M,3] y"))
    with pytest.raises(GraphError, match=r"NonMaxSuppression .*\(module proposal_layer\).*pad it to a fixed capacity"):
        PassManager(make_passes(only=["swap_nms", "lower_opset"])).run(graph, INFER)


def test_no_surviving_box_gives_padding_only():
    swapped, _ = apply(_model(PADDED), [SwapNms()])
    feeds = _feeds()
    feeds["scores"][:] = 0.1
    assert run(swapped, feeds)["y"].tolist() == [-1] * 5
