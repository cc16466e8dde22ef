"""Every placement and pipeline rule of PopART 3.4: one small model that breaks it, and the message that it must raise."""
from __future__ import annotations

import re

import numpy as np
import popart_models as models
import pytest
from popart_models import TWO_LAYERS, accumulating, inference, model, options, popart, training, two_layer_weights

Manual, Mode = popart.VirtualGraphMode.Manual, popart.VirtualGraphMode
SGD_CLIPPED = {"defaultLearningRate": (0.1, True)}


def proto(text: str = TWO_LAYERS):
    return model(text, **two_layer_weights())


def pipelined(text: str = TWO_LAYERS, factor: int = 8, ipus: int = 4, **fields):
    """A pipelined training session of this text; raises what the rules raise."""
    fields = {"virtualGraphMode": Manual, "enablePipelining": True, **fields}
    return training(proto(text), opts=accumulating(factor, **fields), ipus=ipus)


def edited(line: str, ipu: object, stage: object) -> str:
    """TWO_LAYERS with one output's placement replaced; None drops the attribute."""
    attributes = [f"__ipu_number={ipu}"] * (ipu is not None) + [f"__pipeline_stage={stage}"] * (stage is not None)
    kept = "keepdims=0, " if line == "loss" else ""
    text, count = re.subn(rf"(\n    {line} = \w+)<[^>]*>", rf"\1<{kept}{', '.join(attributes)}>", TWO_LAYERS)
    assert count == 1
    return text


def without(name: str, text: str = TWO_LAYERS) -> str:
    return re.sub(rf"{name}=-?\d+,? ?", "", text).replace(", >", ">").replace("<>", "")


def refused(message: str):
    return pytest.raises(popart.popart_exception, match=re.escape(message))


def test_the_correct_model_is_accepted_with_its_stages():
    placement = pipelined()._core.placement
    assert placement.ipus == (0, 1) and placement.total_stages == 3


def test_virtual_graphs_off_drops_the_annotations():
    session = training(proto())
    assert {op.ipu for op in session._core.graph.ops} == {None}
    session.prepareDevice()


def test_manual_needs_every_op_annotated():
    with refused("Either all Ops must have their virtual graph ids set, or none must. Op count per virtual graph id"):
        training(proto(edited("z", None, 1)), opts=options(virtualGraphMode=Manual), ipus=2)


def test_manual_needs_some_op_annotated():
    with refused("virtualGraphMode is VirtualGraphMode::Manual, but no Ops have been annotated"):
        training(proto(without("__ipu_number")), opts=options(virtualGraphMode=Manual), ipus=2)


def test_a_virtual_graph_beyond_the_device_is_refused():
    with refused("has been assigned to an invalid virtual graph 2. numIPUs = 2."):
        training(proto(TWO_LAYERS.replace("__ipu_number=1", "__ipu_number=2")), opts=options(virtualGraphMode=Manual), ipus=2)


def test_several_ipus_without_virtual_graphs_are_refused_by_prepare_device():
    session = training(proto(), ipus=2)
    with refused("If virtual graphs are disabled, the replicated graph count (1) needs to be equal to the number of IPUs (2)"):
        session.prepareDevice()


def test_without_pipelining_stages_are_dropped():
    session = training(proto(edited("loss", 1, 0)), opts=options(virtualGraphMode=Manual), ipus=2)
    assert {op.stage for op in session._core.graph.ops} == {None}


@pytest.mark.parametrize("mode, text", [(Mode.Off, TWO_LAYERS), (Manual, TWO_LAYERS.replace("number=1", "number=0"))])
def test_pipelining_needs_more_than_one_virtual_graph(mode, text):
    with refused("Pipelining requires more than 1 IPU"):
        pipelined(text, virtualGraphMode=mode)


def test_some_ops_without_a_stage_are_refused():
    with refused("Only some ops have had their pipeline stage set. Ops missing the pipeline stage:"):
        pipelined(edited("z", 1, None))


def test_one_stage_on_two_virtual_graphs_is_refused():
    with refused("have the same pipeline stage 1, but different virtual graph ids 1 and 2"):
        pipelined(edited("d", 2, 1))


def test_stages_are_inferred_from_virtual_graphs():
    assert [op.stage for op in pipelined(without("__pipeline_stage"))._core.graph.ops] == [0, 0, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("text", [without("__pipeline_stage", edited("d", 0, 0)), edited("d", 0, 0)])
def test_an_edge_may_not_go_back_to_an_earlier_stage(text):
    with refused("is consumed in an earlier pipeline stage than it is produced"):
        pipelined(text)


def test_holes_between_stages_are_refused():
    with refused("contains 2 stages, but stage 1 is missing"):
        pipelined(TWO_LAYERS.replace("__pipeline_stage=1", "__pipeline_stage=2"))


def test_a_negative_stage_is_refused():
    with refused("Op has bad pipeline stage -1"):
        pipelined(TWO_LAYERS.replace("__pipeline_stage=0", "__pipeline_stage=-1"))


def test_the_loss_must_be_in_the_last_forward_stage():
    after = TWO_LAYERS.replace("(s)\n", "(s)\n    extra = Relu<__ipu_number=2, __pipeline_stage=2>(z)\n")
    with refused("the loss is in stage 1, which must be the last forward one"):
        pipelined(after)


def test_consecutive_stages_on_one_virtual_graph_count_once():
    first, second = (f"a = Relu<__ipu_number=0, __pipeline_stage={stage}>" for stage in (0, 1))
    text = TWO_LAYERS.replace("_stage=1", "_stage=2").replace(first, second)
    assert pipelined(text, factor=3)._core.placement.total_stages == 3


def test_training_depth_is_the_accumulation_factor():
    assert pipelined(factor=3)._core.placement.total_stages == 3
    with refused("depth (gradient accumulation factor) must equal at least the number of pipeline stages (3)"):
        pipelined(factor=2)


def test_inference_depth_is_batches_per_step():
    opts = options(virtualGraphMode=Manual, enablePipelining=True)
    assert inference(proto(), ["z"], opts, steps=2, ipus=2)._core.placement.total_stages == 2
    with refused("depth (batchesPerStep) must equal at least the number of pipeline stages (2)"):
        inference(proto(), ["z"], opts, steps=1, ipus=2)


def test_pipelined_training_without_accumulation_needs_batches_to_fill_the_pipeline():
    opts = options(virtualGraphMode=Manual, enablePipelining=True)
    with refused("depth (batchesPerStep) must equal at least the number of pipeline stages (3)"):
        training(proto(), opts=opts, steps=2, ipus=2)
    assert training(proto(), opts=opts, steps=3, ipus=2)._core.placement.lag == {0: 2, 1: 0}


def test_a_weight_on_two_virtual_graphs_is_refused_when_pipelining():
    text = TWO_LAYERS.replace("(d, d)", "(d, b)")
    pipelined(text)  # b is used twice on one virtual graph
    shared = text.replace("h = MatMul", "u = Relu<__ipu_number=0, __pipeline_stage=0>(b)\n    h = MatMul")
    with refused("Can not copy variable tensor b between virtual graphs when pipelining"):
        pipelined(shared)


def test_constants_may_be_used_on_two_virtual_graphs():
    text = TWO_LAYERS.replace("{\n", "{\n    two = Constant<value = float {2.0}>()\n", 1)
    doubled = "    a2 = Mul<__ipu_number=0, __pipeline_stage=0>(a, two)\n    y ="
    text = text.replace("(a, w2)", "(a2, w2)").replace("    y =", doubled)
    text = text.replace("(d, d)", "(d, two)")
    pipelined(text)


def test_user_recompute_is_refused_when_pipelining_and_checkpoint_is_not():
    annotate = "a = Relu<__recompute_output_in_backward_pass={}, "
    pipelined(TWO_LAYERS.replace("a = Relu<", annotate.format(1)))
    with refused("When pipelining is enabled, user annotation for recomputation is not allowed"):
        pipelined(TWO_LAYERS.replace("a = Relu<", annotate.format(2)))


def test_auto_and_manual_recomputation_do_not_mix():
    text = TWO_LAYERS.replace("a = Relu<", "a = Relu<__recompute_output_in_backward_pass=2, ")
    training(proto(text))
    with refused("A mixture of auto and manual recomputation is not supported"):
        training(proto(text), opts=options(autoRecomputation=popart.RecomputationType.Standard))


def test_pipeline_recomputation_needs_pipelining():
    pipelined(autoRecomputation=popart.RecomputationType.Pipeline)
    with refused("Invalid RecomputationType::Pipeline in autoAnnotate"):
        training(proto(), opts=options(autoRecomputation=popart.RecomputationType.Pipeline))


def test_explicit_main_loops_need_host_copy_ops():
    with refused("enableExplicitMainLoops requires useHostCopyOps."):
        training(proto(), opts=options(enableExplicitMainLoops=True))


def test_explicit_pipelining_needs_explicit_recomputation_and_no_every_n_anchor():
    explicit = {"useHostCopyOps": True, "enableExplicitMainLoops": True}
    with refused("Explicit pipelining requires explicitRecomputation."):
        pipelined(**explicit)
    opts = accumulating(8, virtualGraphMode=Manual, enablePipelining=True, explicitRecomputation=True, **explicit)
    flow = popart.DataFlow(4, {"loss": popart.AnchorReturnType("EveryN", 2)})
    with refused("EveryN is unsupported for explicit pipelining"):
        popart.TrainingSession(
            proto().SerializeToString(), flow, "loss", popart.ConstSGD(0.1), models.device(2), userOptions=opts
        )


def test_gradient_clipping_in_a_pipeline_needs_another_schedule():
    clipped = popart.SGD(SGD_CLIPPED, [popart.ClipNormSettings.clipAllWeights(1.0)])
    opts = accumulating(8, virtualGraphMode=Manual, enablePipelining=True)
    with refused("Incompatible accumulateOuterFragmentSchedule used with gradient clipping"):
        training(proto(), optimizer=clipped, opts=opts, ipus=2)
    schedule = popart.AccumulateOuterFragmentSchedule.OverlapMemoryOptimized
    opts.accumulateOuterFragmentSettings = popart.AccumulateOuterFragmentSettings(schedule)
    training(proto(), optimizer=clipped, opts=opts, ipus=2)


def test_auto_virtual_graphs_split_an_unannotated_graph_in_order():
    session = training(proto(without("__ipu_number")), opts=options(virtualGraphMode=Mode.Auto), ipus=2)
    ipus = [op.ipu for op in session._core.graph.ops]
    assert ipus == sorted(ipus) and set(ipus) == {0, 1}
    with refused("does not support VirtualGraphMode.Auto with annotations"):
        training(proto(), opts=options(virtualGraphMode=Mode.Auto), ipus=2)


def test_split_ratios_are_one_share_for_each_ipu():
    text = without("__ipu_number")
    mostly_first = options(virtualGraphMode=Mode.Auto, virtualGraphSplitRatios=[0.9, 0.1])
    ipus = [op.ipu for op in training(proto(text), opts=mostly_first, ipus=2)._core.graph.ops]
    assert ipus.count(0) > ipus.count(1) > 0
    for ratios in ([0.5], [0.5, 0.6], [1.0, 0.0]):
        with refused("must be one number in (0, 1) for each of the 2 IPUs, sum 1"):
            opts = options(virtualGraphMode=Mode.Auto, virtualGraphSplitRatios=ratios)
            training(proto(text), opts=opts, ipus=2)


def test_auto_virtual_graphs_can_be_pipelined():
    opts = accumulating(8, virtualGraphMode=Mode.Auto, enablePipelining=True)
    text = without("__pipeline_stage", without("__ipu_number"))
    assert training(proto(text), opts=opts, ipus=2)._core.placement.total_stages == 3

@pytest.mark.parametrize("stages", [1, 2, 4])
def test_the_number_of_stages_changes_no_result(stages):
    names = ["h", "a", "y", "z", "d", "s", "loss"]
    text = TWO_LAYERS
    for index, name in enumerate(names):
        stage = index * stages // len(names)
        kept = "keepdims=0, " if name == "loss" else ""
        text = re.sub(rf"(\n    {name} = \w+)<[^>]*>", rf"\1<{kept}__ipu_number={stage}, __pipeline_stage={stage}>", text)
    fields = {"virtualGraphMode": Manual, "enablePipelining": True} if stages > 1 else {}
    random = np.random.default_rng(3)
    x, t = random.normal(size=(8, 4, 3)).astype(np.float32), random.normal(size=(8, 4, 2)).astype(np.float32)
    results = []
    for opts, ipus in ((accumulating(8, **fields), 4 if fields else 1), (accumulating(8), 1)):
        session = models.started(training(proto(text), opts=opts, ipus=ipus))
        losses = models.run(session, x=x, t=t)["loss"]
        results.append((losses, models.weights_of(session, "w1", "w2", "b")))
    np.testing.assert_array_equal(results[0][0], results[1][0])
    for name in ("w1", "w2", "b"):
        np.testing.assert_array_equal(results[0][1][name], results[1][1][name])
