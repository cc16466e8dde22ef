"""Connectionist temporal classification: the loss (Graves et al., 2006) and PopLibs' beam search decoder."""
from __future__ import annotations

import math

import torch

from ..registry import lowers
from .common import floats_only, refuse, shaped


@torch.library.custom_op("popdet_embedded::ctc_loss", mutates_args=())
def losses_and_gradients(
    log_probs: torch.Tensor, targets: torch.Tensor, input_lengths: torch.Tensor, target_lengths: torch.Tensor,
    blank: int, zero_infinity: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """float [T,N,C], int64 [N,S], [N], [N] -> every sample's loss [N], and its gradient to log_probs [T,N,C]."""
    where = log_probs, targets, input_lengths.tolist(), target_lengths.tolist()
    losses, alpha = torch.ops.aten._ctc_loss(*where, blank, zero_infinity)
    gradient = torch.ops.aten._ctc_loss_backward(torch.ones_like(losses), *where, losses, alpha, blank, zero_infinity)
    if zero_infinity:
        losses = torch.where(losses == math.inf, torch.zeros_like(losses), losses)
    return losses, gradient


@losses_and_gradients.register_fake
def _(log_probs, targets, input_lengths, target_lengths, blank, zero_infinity):
    return log_probs.new_empty(log_probs.shape[1]), torch.empty_like(log_probs)


def _keep_gradient(ctx, inputs, output):
    ctx.save_for_backward(output[1])


def _backward(ctx, grad, _):
    (gradient,) = ctx.saved_tensors
    return gradient * grad.reshape(1, -1, 1), None, None, None, None, None


losses_and_gradients.register_autograd(_backward, setup_context=_keep_gradient)


def _check_ctc(op, log_probs, targets, lengths):
    """Raises unless the tensors are float [T,N,C], integer [N,S] and integer [N], and blank is one of the C classes."""
    floats_only(op, log_probs)
    if log_probs.dim() != 3 or targets.dim() != 2 or targets.shape[0] != log_probs.shape[1]:
        raise refuse(op, f"log probabilities [T, N, C] and targets [N, S] are expected, not {list(log_probs.shape)} and "
                         f"{list(targets.shape)}")  # fmt: skip
    for tensor in lengths:
        if list(tensor.shape) != [log_probs.shape[1]]:
            raise refuse(op, f"lengths of shape [{log_probs.shape[1]}] are expected, not {list(tensor.shape)}")
    if any(t.dtype.is_floating_point for t in (targets, *lengths)):
        raise refuse(op, "targets and lengths must be integers")
    if not 0 <= op.attr("blank", 0) < log_probs.shape[2]:
        raise refuse(op, f"the blank class {op.attr('blank')} is outside the {log_probs.shape[2]} classes")


@lowers("ai.graphcore", "Ctc", 1)
def ctc_loss(op, log_probs, targets, input_lengths, target_lengths):
    """log_probs [T,N,C] (log-softmax), targets int [N,S], lengths int [N] -> loss, and its gradient to log_probs.

    Mean divides each sample's loss by its target length, then by N, as torch does.
    """
    reduction, out_type = op.attr("reduction", "Mean"), op.attr("outDataType", "UNDEFINED")
    if reduction not in ("Mean", "Sum", "NoReduction"):
        raise refuse(op, f"reduction '{reduction}' is unknown; it is Mean, Sum or NoReduction")
    dtype = {"UNDEFINED": log_probs.dtype, "FLOAT": torch.float32, "FLOAT16": torch.float16}.get(out_type)
    if dtype is None:
        raise refuse(op, f"outDataType '{out_type}' is not FLOAT or FLOAT16")
    _check_ctc(op, log_probs, targets, (input_lengths, target_lengths))
    whole = [t.to(torch.int64) for t in (targets, input_lengths, target_lengths)]
    blank, clean = op.attr("blank", 0), bool(op.attr("zeroInfinity", 0))
    losses, gradient = losses_and_gradients(log_probs.float(), *whole, blank, clean)
    share = torch.ones_like(losses)
    if reduction == "Mean":
        share = 1.0 / (whole[2].clamp(min=1) * len(losses))
    losses = losses * share
    loss = (losses if reduction == "NoReduction" else losses.sum()).to(dtype)
    return (loss, (gradient.detach() * share.reshape(1, -1, 1)).to(log_probs.dtype))[: len(op.outputs)]


@torch.library.custom_op("popdet_embedded::ctc_beam_search", mutates_args=())
def ctc_beam_search(
    log_probs: torch.Tensor, lengths: torch.Tensor, blank: int, beam_width: int, top_paths: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """log_probs [T,N,C], lengths [N] -> log-probabilities [N,paths], lengths int32 [N,paths], labels int32 [N,paths,T].

    Prefix beam search: paths that spell the same labels are one beam, kept apart by whether they end in a blank.
    """
    steps, batch, _ = log_probs.shape
    scores = torch.full((batch, top_paths), -math.inf)
    counts = torch.zeros((batch, top_paths), dtype=torch.int32)
    labels = torch.full((batch, top_paths, steps), blank, dtype=torch.int32)
    for n in range(batch):
        rows = log_probs[: int(lengths[n]), n].double().tolist()
        for path, (prefix, score) in enumerate(_beams(rows, blank, beam_width)[:top_paths]):
            scores[n, path], counts[n, path] = score, len(prefix)
            labels[n, path, : len(prefix)] = torch.tensor(prefix, dtype=torch.int32)
    return scores, counts, labels


@ctc_beam_search.register_fake
def _(log_probs, lengths, blank, beam_width, top_paths):
    steps, batch, _ = log_probs.shape
    counts = torch.empty((batch, top_paths), dtype=torch.int32)
    return torch.empty((batch, top_paths)), counts, torch.empty((batch, top_paths, steps), dtype=torch.int32)


def _beams(rows, blank, width):
    """[(labels, log-probability)] of the best `width` prefixes, best first."""
    beams = {(): (0.0, -math.inf)}  # prefix -> log-probability ending in a blank, ending in its last label
    for row in rows:
        grown: dict = {}
        for prefix, (in_blank, in_label) in beams.items():
            either = _add(in_blank, in_label)
            _grow(grown, prefix, either + row[blank], -math.inf)
            for label, p in enumerate(row):
                if label == blank:
                    continue
                if prefix and prefix[-1] == label:
                    _grow(grown, prefix, -math.inf, in_label + p)
                    _grow(grown, (*prefix, label), -math.inf, in_blank + p)
                else:
                    _grow(grown, (*prefix, label), -math.inf, either + p)
        ranked = sorted(grown.items(), key=lambda item: -_add(*item[1]))
        beams = dict(ranked[:width])
    return [(prefix, _add(*pair)) for prefix, pair in beams.items()]


def _grow(beams, prefix, in_blank, in_label):
    old = beams.get(prefix, (-math.inf, -math.inf))
    beams[prefix] = _add(old[0], in_blank), _add(old[1], in_label)


def _add(a, b):
    """log(e^a + e^b)."""
    high, low = max(a, b), min(a, b)
    return high if low == -math.inf else high + math.log1p(math.exp(low - high))


@lowers("ai.graphcore", "CtcBeamSearchDecoder", 1)
def decode(op, log_probs, lengths):
    """log_probs [T,N,C], lengths [N] -> label_probs [N,paths], label_lengths and decoded_labels [N,paths,T] UINT32."""
    width, paths = op.attr("beam_width", 100), op.attr("top_paths", 1)
    blank = op.attr("blank_class", op.attr("blank", 0))
    floats_only(op, log_probs)
    if log_probs.dim() != 3:
        raise refuse(op, f"log probabilities [T, N, C] are expected, not {list(log_probs.shape)}")
    shaped(op, "the lengths", lengths, log_probs.shape[1])
    if not 0 < paths <= width:
        raise refuse(op, f"top_paths {paths} must be at least 1 and at most the beam_width {width}")
    if not 0 <= blank < log_probs.shape[2]:
        raise refuse(op, f"the blank class {blank} is outside the {log_probs.shape[2]} classes")
    scores, counts, labels = ctc_beam_search(log_probs.detach().float(), lengths.to(torch.int32), blank, width, paths)
    return scores.to(log_probs.dtype), counts.to(torch.uint32), labels.to(torch.uint32)
