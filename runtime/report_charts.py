"""Charts as hand-written SVG: precision over recall, and detections by score. Colours are CSS variables of the page."""
from __future__ import annotations

import html
from typing import List, Sequence, Tuple

import numpy as np

from runtime.voc_metric import TRUE, ClassRanking, eleven_points, precision_envelope

WIDTH, HEIGHT = 300, 210  # of a chart, in SVG units
LEFT, RIGHT, TOP, BOTTOM = 38, 10, 12, 32  # margins around the plot
STYLE = """
svg { width: 100%; height: auto; } svg text { fill: var(--ink); font: 11px system-ui, sans-serif; }
.grid { stroke: var(--line); stroke-width: 1; } .curve { fill: none; stroke: var(--curve); stroke-width: 2; }
.raw { fill: none; stroke: var(--quiet); stroke-width: 1; } .mark { fill: var(--mark); stroke: var(--paper); }
.true { fill: var(--true); } .false { fill: var(--false); }
"""


def precision_recall(ranking: ClassRanking, name: str, caption: str, eleven: bool) -> str:
    """An SVG of one class: the precision at every point (thin), the best at this recall or higher (thick), and with
    `eleven` the eleven values of VOC 2007 as dots. caption: what a screen reader says besides the name."""
    true, false = ranking.counts()
    lines: List[str] = []
    if len(true) and ranking.objects:
        recall, best = true / ranking.objects, precision_envelope(true, false)
        gains = np.flatnonzero(np.diff(true, prepend=0))  # the envelope is a staircase that steps where recall rises
        steps: List[Tuple[float, float]] = []
        last = 0.0
        for index in gains:
            steps += [(last, best[index]), (recall[index], best[index])]
            last = recall[index]
        lines.append(_path("raw", list(zip(recall, true / (true + false)))))
        lines.append(_path("curve", [*steps, (last, 0.0)] if steps else steps))
        if eleven:
            for point, value in enumerate(eleven_points(true, false, ranking.objects)):
                x, y = _place(point / 10, value)
                lines.append(f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="3"/>')
    return _chart(f"Precision over recall, {name}", caption, "recall", _grid("precision"), lines)


def score_histogram(rankings: Sequence[ClassRanking], bins: int = 20) -> str:
    """An SVG of the detections of all classes by score, true positives below, false positives stacked on them.

    The height is the square root of the count, or the many detections of low score would hide the rest.
    """
    edges = np.linspace(0, 1, bins + 1).astype(np.float32)  # as the scores, so that 0.95 is in the bin from 0.95 on
    scores = np.concatenate([ranking.scores for ranking in rankings] or [np.zeros(0, np.float32)]).clip(0, 1)
    outcomes = np.concatenate([ranking.outcomes for ranking in rankings] or [np.zeros(0, np.int64)])
    right, wrong = (np.histogram(scores[outcomes == kind], edges)[0] for kind in (TRUE, 0))
    top = max(int((right + wrong).max()), 1)
    lines = []
    for index, (good, bad) in enumerate(zip(right.tolist(), wrong.tolist())):
        if not good + bad:
            continue
        (x1, low), (x2, high) = _place(edges[index], 0), _place(edges[index + 1], float(np.sqrt((good + bad) / top)))
        split = low - (low - high) * good / (good + bad)
        label = f"score {edges[index]:.2f} to {edges[index + 1]:.2f}: {good} right, {bad} wrong"
        lines.append(f'<g><title>{label}</title>{_bar("false", x1, x2, high, split)}{_bar("true", x1, x2, split, low)}</g>')
    ticks = [(float(np.sqrt(share)), str(round(top * share))) for share in (0.0, 0.25, 1.0)]
    caption = f"{int(right.sum())} true positives and {int(wrong.sum())} false positives in {bins} bins of the score"
    return _chart("Detections by score", caption, "score", _grid("detections", ticks), lines)


def _chart(title: str, caption: str, x_name: str, grid: List[str], lines: List[str]) -> str:
    centre = (LEFT + WIDTH - RIGHT) / 2
    return (
        f'<svg role="img" viewBox="0 0 {WIDTH} {HEIGHT}" aria-label="{html.escape(title + ": " + caption)}">'
        f"<title>{html.escape(title)}</title><desc>{html.escape(caption)}</desc>"
        + "".join(grid) + "".join(lines)
        + f'<text x="{centre:.0f}" y="{HEIGHT - 4}" text-anchor="middle">{x_name}</text></svg>'
    )


def _grid(y_name: str, ticks: Sequence[Tuple[float, str]] = ((0.0, "0"), (0.5, "0.5"), (1.0, "1"))) -> List[str]:
    lines = []
    for value, text in ticks:
        x, y = _place(0, value)
        lines.append(f'<line class="grid" x1="{x}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
                     f'<text x="{x - 4}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    for value, text in ((0.0, "0"), (0.5, "0.5"), (1.0, "1")):
        x, y = _place(value, 0)
        lines.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{y}"/>'
                     f'<text x="{x:.1f}" y="{y + 14}" text-anchor="middle">{text}</text>')
    middle = (TOP + HEIGHT - BOTTOM) / 2
    lines.append(f'<text transform="translate(10 {middle:.0f}) rotate(-90)" text-anchor="middle">{y_name}</text>')
    return lines


def _path(kind: str, points: Sequence[Tuple[float, float]]) -> str:
    """A polyline; points that fall on the pixel of the last one are left out, or a curve would have 100,000 of them."""
    kept: List[str] = []
    for point in points:
        x, y = _place(*point)
        text = f"{x:.0f},{y:.0f}"
        if not kept or kept[-1] != text:
            kept.append(text)
    return f'<polyline class="{kind}" points="{" ".join(kept)}"/>' if kept else ""


def _bar(kind: str, x1: float, x2: float, y1: float, y2: float) -> str:
    return f'<rect class="{kind}" x="{x1 + 0.5:.1f}" y="{y1:.1f}" width="{x2 - x1 - 1:.1f}" height="{max(0.0, y2 - y1):.1f}"/>'


def _place(x: float, y: float) -> Tuple[float, float]:
    """From [0, 1] x [0, 1], y upwards, to the plot in SVG units."""
    return LEFT + x * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - y * (HEIGHT - TOP - BOTTOM)
