"""One HTML page about an evaluation: figures, curves, kinds of errors, sample pictures. Nothing is loaded from elsewhere."""
from __future__ import annotations

import base64
import html
import io
from dataclasses import dataclass
from typing import Any, List, Mapping, Optional, Sequence

from detection_data.records import Detections, Record
from detection_data.transforms import PathLike, load_image
from runtime import report_charts
from runtime.atomic_io import write_bytes_atomic
from runtime.errors import EnvironmentProblem
from runtime.evaluate import EvalResult, difference, rank_classes
from runtime.evaluation_errors import KINDS, ClassErrors, ImageErrors, class_errors, image_errors
from runtime.predict import above
from runtime.report_pictures import chosen_images, sample_picture
from runtime.voc_metric import ClassRanking

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1b1f24; --quiet: #6b7480; --line: #d5dae0; --curve: #0b62c4;
  --mark: #b3261e; --true: #2e7d4f; --false: #d9822b; }
@media (prefers-color-scheme: dark) { :root { --paper: #15181c; --ink: #e6e9ed; --quiet: #98a2ae; --line: #39414b;
  --curve: #6cb0ff; --mark: #ff8a80; --true: #63c08a; --false: #f0a860; } }
body { background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; max-width: 76rem;
  margin: 0 auto; padding: 1.5rem; }
h1 { margin: 0 0 .5rem; } h2 { margin: 2.5rem 0 .5rem; } p { max-width: 46rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; } caption { text-align: left; color: var(--quiet); }
th, td { padding: .2rem .8rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td.text { text-align: left; overflow-wrap: anywhere; } tfoot th, tfoot td { font-weight: 600; }
.wide { overflow-x: auto; } .charts, .pictures { display: grid; gap: 1rem; }
.charts { grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); }
.pictures { grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); }
figure { margin: 0; } figcaption { font-size: .9rem; overflow-wrap: anywhere; } img { max-width: 100%; height: auto; }
.key { display: inline-block; width: .8em; height: .8em; margin: 0 .3em 0 .8em; }
"""


@dataclass(frozen=True, eq=False)
class ReportInput:
    """What a report is about. detections[i] belongs to records[i]; they are the first executor's of `results`."""

    name: str
    facts: Mapping[str, str]  # rows of the header, label -> text
    results: Mapping[str, Sequence[EvalResult]]  # executor -> one result a metric; at least one
    detections: Sequence[Detections]
    records: Sequence[Record]
    classes: Sequence[str]
    threshold: float = 0.5  # score from which detections are drawn and counted as mistakes
    samples: int = 4  # pictures of each kind: best, worst, random
    seed: int = 0  # of the random ones


def write_report(path: PathLike, given: ReportInput) -> None:
    """Write the page. Raises EnvironmentProblem when it cannot be written, BadInputFile for an unreadable picture."""
    try:
        write_bytes_atomic(str(path), report_html(given).encode("utf-8"))
    except OSError as error:
        raise EnvironmentProblem(f"{path}: cannot be written ({error.strerror or error}); choose another file") from error


def report_html(given: ReportInput) -> str:
    """The page as text. Names of classes, images and files are escaped. Raises BadInputFile for an unreadable picture."""
    rankings = rank_classes(given.detections, given.records, given.classes)
    title = f"Evaluation of {given.name}"
    facts = [[(label,), text] for label, text in given.facts.items()]
    return "\n".join([
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{_text(title)}</title>\n<style>{STYLE}{report_charts.STYLE}</style>\n</head>\n<body>\n<main>",
        f"<h1>{_text(title)}</h1>", _table("What was evaluated", ["Fact", "Value"], facts, words=True),
        *_figures(given), *_curves(given, rankings), *_errors(given, rankings), *_pictures(given, rankings),
        "</main>\n</body>\n</html>\n",
    ])


def _figures(given: ReportInput) -> List[str]:
    """The metric table, the difference between executors, and AP of every class."""
    columns = [(name, result) for name, results in given.results.items() for result in results]
    several = len(given.results) > 1
    rows: List[List[Any]] = [
        [(result.metric,), *([name] if several else []), _percent(result.ap50), _percent(result.coco.get("ap")),
         result.images, result.objects, result.difficult, result.detections]
        for name, result in columns
    ]
    head = ["Metric", *(["Executor"] if several else []), "AP50", "AP 50:95", "Images", "Objects", "Difficult", "Detections"]
    parts = ["<h2>Figures</h2>", _table("Mean average precision in percent; difficult objects are ignored", head, rows)]
    if several:
        lines = [difference(first, second).text() for first, second in zip(*list(given.results.values())[:2])]
        first_name, second_name = list(given.results)[:2]
        parts.append(f"<p>{_text(first_name)} minus {_text(second_name)}: {'<br>'.join(_text(line) for line in lines)}</p>")
    names = [f"{result.metric}, {name}" if several else result.metric for name, result in columns]
    classes: List[List[Any]] = [[(name,), *(_percent(result.per_class[name]) for _, result in columns)]
                                for name in given.classes]
    mean: List[Any] = [("mean",), *(_percent(result.ap50) for _, result in columns)]
    parts += ["<h2>Average precision per class</h2>",
              _table("AP at IoU 0.5 in percent; a dash: no object to find", ["Class", *names], classes, mean)]
    for name, result in columns:
        if result.coco:
            stats: List[List[Any]] = [[(key,), _percent(value)] for key, value in result.coco.items()]
            parts.append(_table(f"COCO's twelve figures in percent, {name}", ["Figure", "Value"], stats))
    return parts


def _curves(given: ReportInput, rankings: Sequence[ClassRanking]) -> List[str]:
    results = next(iter(given.results.values()))
    eleven = any(result.metric == "voc07" for result in results)
    dots = " The dots are the eleven values that voc07 averages." if eleven else ""
    parts = ["<h2>Precision over recall</h2>",
             "<p>IoU 0.5, judged as VOC does. Thin: the precision at every detection. Thick: the best precision at this recall "
             f"or a higher one, the area under which is the AP of voc.{dots}</p>", '<div class="charts">']
    for name, ranking in zip(given.classes, rankings):
        values = ", ".join(f"{result.metric} {_percent(result.per_class[name])}" for result in results)
        caption = f"AP {values}; {ranking.objects} objects, {len(ranking.scores)} detections"
        parts.append(f"<figure>{report_charts.precision_recall(ranking, name, caption, eleven)}"
                     f"<figcaption><strong>{_text(name)}</strong>: {_text(caption)}</figcaption></figure>")
    return [*parts, "</div>", "<h2>Scores</h2>",
            '<p>All detections of all classes.<span class="key" style="background: var(--true)"></span>true positive'
            '<span class="key" style="background: var(--false)"></span>false positive. The height is the square root of the '
            "count.</p>", f'<div class="charts"><figure>{report_charts.score_histogram(rankings)}</figure></div>']


def _errors(given: ReportInput, rankings: Sequence[ClassRanking]) -> List[str]:
    errors = class_errors(rankings, given.detections, given.records, given.threshold)
    head = ["Class", "Objects", "Found", "Missed", *(kind.capitalize() for kind in KINDS), "Never found"]
    rows = [_error_row(name, item) for name, item in zip(given.classes, errors)]
    total: List[Any] = [("all",), *(sum(row[column] for row in rows) for column in range(1, len(head)))]
    meanings = "".join(f"<li><strong>{kind.capitalize()}</strong>: {_text(text)}.</li>" for kind, text in KINDS.items())
    return ["<h2>Mistakes</h2>",
            f"<p>Among detections that score {given.threshold:g} or more; false positives by kind:</p><ul>{meanings}"
            "<li><strong>Missed</strong>: an object without such a detection.</li>"
            "<li><strong>Never found</strong>: an object without one at any score.</li></ul>",
            _table("Objects found and missed, false positives by kind", head, rows, total)]


def _error_row(name: str, item: ClassErrors) -> List[Any]:
    return [(name,), item.objects, item.found, item.missed, *item.kinds, item.never_found]


def _pictures(given: ReportInput, rankings: Sequence[ClassRanking]) -> List[str]:
    errors = image_errors(rankings, given.records, given.threshold)
    parts = ["<h2>Pictures</h2>",
             f"<p>Coloured frames: detections that score {given.threshold:g} or more. White dashes: objects to find; "
             "grey dashes: difficult ones. A mistake is an object missed or a false positive.</p>"]
    for title, chosen in chosen_images(errors, given.samples, given.seed).items():
        if chosen:
            figures = "".join(_figure(given, errors[index]) for index in chosen)
            parts.append(f'<h3>{title}</h3>\n<div class="pictures">{figures}</div>')
    return parts


def _figure(given: ReportInput, item: ImageErrors) -> str:
    record = given.records[item.index]
    counted = f"{item.found} found, {item.missed} missed, {item.false} false positives"
    names = ", ".join(dict.fromkeys(given.classes[number - 1] for number in record.classes)) or "no object"
    picture = sample_picture(load_image(record.image_path), record, above(given.detections[item.index], given.threshold),
                             given.classes)
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=82)
    data = base64.b64encode(stream.getvalue()).decode("ascii")
    alt = f"Image {record.image_id} with {names}: {counted}"
    return (f'<figure><img width="{picture.width}" height="{picture.height}" alt="{_text(alt)}" '
            f'src="data:image/jpeg;base64,{data}"><figcaption>{_text(record.image_id)}: {counted}</figcaption></figure>')


def _table(caption: str, head: Sequence[str], rows: Sequence[Sequence[Any]], foot: Optional[Sequence[Any]] = None,
           words: bool = False) -> str:
    """An HTML table; a cell in a tuple heads its row. words: the other cells are text, not numbers."""
    top = "".join(f'<th scope="col">{_text(cell)}</th>' for cell in head)
    body = "\n".join(_table_row(row, words) for row in rows)
    end = f"<tfoot>{_table_row(foot, words)}</tfoot>" if foot else ""
    return (f'<div class="wide"><table><caption>{_text(caption)}</caption>\n<thead><tr>{top}</tr></thead>\n'
            f"<tbody>{body}</tbody>{end}</table></div>")


def _table_row(row: Sequence[Any], words: bool) -> str:
    mark = ' class="text"' if words else ""
    return "<tr>" + "".join(f'<th scope="row">{_text(cell[0])}</th>' if isinstance(cell, tuple) else
                            f"<td{mark}>{_text(cell)}</td>" for cell in row) + "</tr>"


def _text(value: Any) -> str:
    return html.escape(str(value))


def _percent(value: Optional[float]) -> str:
    return "\u2013" if value is None else f"{100 * value:.1f}"
