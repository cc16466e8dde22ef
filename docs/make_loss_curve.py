"""Draw the losses of training runs: `python docs/make_loss_curve.py OUT.svg LABEL=log.jsonl [LABEL=log.jsonl ...]`.

One line a run over the weight updates, the median of WINDOW logged steps; the logs are those of `popdet train` or of
benchmarks/plain_torch_train.py.
"""
from __future__ import annotations

import html
import json
import statistics
import sys
from pathlib import Path

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 320, 48, 16, 28, 40
COLOURS = ("#1f6feb", "#d1242f", "#1a7f37", "#8250df")
WINDOW = 7


def read_losses(path: Path) -> list[tuple[int, float]]:
    """(step, loss) of every logged step, smoothed."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    points = [(int(row["step"]), float(row["loss"])) for row in rows if "loss" in row]
    half = WINDOW // 2
    return [(step, statistics.median(loss for _, loss in points[max(0, index - half): index + half + 1]))
            for index, (step, _) in enumerate(points)]


def draw(runs: dict[str, list[tuple[int, float]]]) -> str:
    """The SVG, on white, so that it reads the same in both colour schemes."""
    last = max(step for points in runs.values() for step, _ in points)
    top = max(loss for points in runs.values() for _, loss in points)

    def place(step: float, loss: float) -> tuple[float, float]:
        return (LEFT + (WIDTH - LEFT - RIGHT) * step / last, HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * loss / top)

    label = "Training loss: " + "; ".join(
        f"{name} from {points[0][1]:.2f} to {points[-1][1]:.2f} in {points[-1][0]} steps" for name, points in runs.items())
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
             f'aria-label="{html.escape(label)}" font-family="system-ui, sans-serif" font-size="12">',
             f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>']
    for part in range(5):
        (x, low), (_, y) = place(last * part / 4, 0), place(0, top * part / 4)
        parts += [f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#d0d7de"/>',
                  f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{top * part / 4:.1f}</text>',
                  f'<text x="{x:.1f}" y="{low + 16:.1f}" text-anchor="middle">{last * part // 4}</text>']
    parts += [f'<text x="{LEFT}" y="16">loss</text>',
              f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">weight updates</text>']
    for index, (name, points) in enumerate(runs.items()):
        path = "L".join("{:.1f} {:.1f}".format(*place(*point)) for point in points)
        colour = COLOURS[index % len(COLOURS)]
        parts += [f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>',
                  f'<text x="{WIDTH - RIGHT - 8}" y="{TOP + 14 + 16 * index}" text-anchor="end" fill="{colour}">'
                  f'{html.escape(name)}</text>']
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    out, *named = sys.argv[1:]
    runs = {label: read_losses(Path(path)) for label, _, path in (item.partition("=") for item in named)}
    Path(out).write_text(draw(runs), encoding="utf-8")


if __name__ == "__main__":
    main()
