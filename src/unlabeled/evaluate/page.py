"""A report as Markdown, as JSON, and as one HTML page that needs no other file."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path

from unlabeled.errors import writing
from unlabeled.evaluate.report import Comparison, Report
from unlabeled.evaluate.result import LOWER_IS_BETTER, Result, column
from unlabeled.weights.files import replacing

COLOURS = ("#2563a8", "#d9822b", "#3d8b55", "#a8324e", "#6a4fa3", "#8a6d3b", "#3a9d9d", "#7a7a7a")
BAR, LABEL, WIDTH = 22, 190, 760  # pixels
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 980px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.6em } h2 { margin-top: 2em; border-bottom: 1px solid #ddd }
h3 { font-size: 1em; margin-bottom: .3em } table { border-collapse: collapse; margin: 1em 0 }
td, th { padding: .25em .8em; text-align: right; border-bottom: 1px solid #eee }
td:first-child, th:first-child { text-align: left } td.best { font-weight: 600 }
small { color: #6b6b6b; font-weight: 400 } svg text { font: 13px system-ui, sans-serif }
.pictures { display: flex; flex-wrap: wrap; gap: 8px } figure { margin: 0; width: 148px }
figure img { max-width: 144px; border: 2px solid; border-radius: 3px }
figcaption { font-size: 12px; overflow-wrap: anywhere } .notes { color: #6b6b6b; font-size: 14px }
.hit img { border-color: #3d8b55 } .miss img { border-color: #c0392b } .neither img { border-color: #bbb }
code { background: #f4f4f4; padding: 0 .3em }
"""


def write_report(folder: str | Path, report: Report, title: str) -> None:
    """Write report.md, report.json and report.html. Raises UserError where the folder cannot be written."""
    texts = {
        "report.md": as_markdown(report, title),
        "report.json": json.dumps(report.as_json(), indent=2) + "\n",
        "report.html": as_html(report, title),
    }
    for name, text in texts.items():
        path = Path(folder).expanduser() / name
        with writing(path), replacing(path) as part:
            part.write_text(text, encoding="utf-8")


def short_names(models: Sequence[str]) -> dict[str, str]:
    """The shortest ends of paths that tell models apart."""
    unique = list(dict.fromkeys(models))
    for parts in range(1, max((len(Path(one).parts) for one in unique), default=1) + 1):
        names = ["/".join(Path(one).parts[-parts:]) for one in unique]
        if len(set(names)) == len(unique):
            return dict(zip(unique, names, strict=True))
    return {one: one for one in unique}


def number(name: str, value: float) -> str:
    """A metric as a table shows it: shares in percent."""
    return f"{value:.4g}" if name in LOWER_IS_BETTER else f"{100 * value:.1f}"


def cell(result: Result, name: str) -> tuple[str, str]:
    """A metric and its interval, as a table shows them."""
    pair = result.intervals.get(name)
    return number(name, result.metrics[name]), " to ".join(number(name, one) for one in pair) if pair else ""


def best(results: Sequence[Result], name: str) -> float:
    """The best value of a metric."""
    values = [one.metrics[name] for one in results if name in one.metrics]
    return min(values) if name in LOWER_IS_BETTER else max(values)


def rows_of(results: Sequence[Result]) -> list[str]:
    """Names of the metrics that any of a task's results has, in order."""
    return list(dict.fromkeys(name for one in results for name in one.metrics))


def said(one: Comparison, names: dict[str, str]) -> str:
    """A comparison as a sentence."""
    found, a, b = one.found, names[one.a], names[one.b]
    scale, unit = (1.0, "") if one.metric in LOWER_IS_BETTER else (100.0, " points")
    values = [scale * value for value in (found.difference, found.low, found.high)]
    verdict = "they differ" if found.is_clear else "no difference can be told"
    return (
        f"{column(one.task, one.metric)}: {b} less {a} is {values[0]:+.2f}{unit} "
        f"(95% {values[1]:+.2f} to {values[2]:+.2f}, p = {found.p_value:.3f}; "
        f"paired bootstrap over {one.items:,} test items): {verdict}"
    )


def chosen(result: Result) -> str:
    """Settings in one line, long lists left out."""
    parts = [
        f"{name.replace('_', ' ')} {value}"
        for name, value in result.settings.items()
        if not isinstance(value, dict | list)
    ]
    counts = [
        f"{value:,} {name.replace('_', ' ')}"
        for name, value in result.counts.items()
        if value or name != "bad_files"
    ]
    return f"{', '.join(parts)} ({', '.join(counts)})"


def as_markdown(report: Report, title: str) -> str:
    """The report's tables, comparisons, choices and notes."""
    names = short_names([one.model for one in report.results])
    lines = [f"# {title}", "", "Shares in percent, with 95% bootstrap intervals over test items.", ""]
    lines += [f"| | {' | '.join(names.values())} |", f"|---|{'---|' * len(names)}"]
    for task, results in report.tasks.items():
        by_model = {one.model: one for one in results}
        for name in rows_of(results):
            cells = []
            for model in names:
                one = by_model.get(model)
                value, between = cell(one, name) if one and name in one.metrics else ("", "")
                is_best = (
                    one
                    and name in one.metrics
                    and len(results) > 1
                    and one.metrics[name] == best(results, name)
                )
                value = f"**{value}**" if is_best else value
                cells.append(f"{value} ({between})" if between else value)
            lines.append(f"| {column(task, name)} | {' | '.join(cells)} |")
    if report.comparisons:
        lines += ["", "## Do they differ?", ""] + [f"- {said(one, names)}" for one in report.comparisons]
    lines += ["", "## What was chosen", ""]
    lines += [f"- {one.task}, {names[one.model]}: {chosen(one)}" for one in report.results]
    if notes := _notes(report, names):
        lines += ["", "## Notes", ""] + [f"- {note}" for note in notes]
    lines += ["", "Models: " + "; ".join(f"{short} is `{model}`" for model, short in names.items()) + ".", ""]
    return "\n".join(lines)


def notes_of(report: Report, names: dict[str, str]) -> list[str]:
    """Return the notes of the results, each once; one that is not of all models begins with those it is of."""
    models: dict[str, dict[str, None]] = {}
    for one in report.results:
        for note in one.notes:
            models.setdefault(note, {})[names[one.model]] = None
    return [note if len(of) == len(names) else f"{', '.join(of)}: {note}" for note, of in models.items()]


def _notes(report: Report, names: dict[str, str]) -> list[str]:
    found = notes_of(report, names)
    for one in report.results:
        found += [f"{key} could not be read: {reason}" for key, reason in one.bad_files[:10]]
        if len(one.bad_files) > 10:
            found.append(f"and {len(one.bad_files) - 10} more files could not be read, see report.json")
    found += [
        f"{task} was left out for {names.get(model, model)}: {reason}"
        for task, model, reason in report.skipped
    ]
    return list(dict.fromkeys(found))


def as_html(report: Report, title: str) -> str:
    """One page with bars, tables and pictures; it loads nothing."""
    names = short_names([one.model for one in report.results])
    colours = {model: COLOURS[place % len(COLOURS)] for place, model in enumerate(names)}
    parts = [
        "<!doctype html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<style>{STYLE}</style></head><body><h1>{escape(title)}</h1>",
        "<p>Shares in percent; whiskers and brackets are 95% bootstrap intervals over test items.</p>",
    ]
    for task, results in report.tasks.items():
        parts.append(f"<h2>{escape(task)}</h2>")
        parts.append(_bars(results, names, colours))
        parts.append(_table(task, results, names))
        about = [one for one in report.comparisons if one.task == task]
        parts += [f"<p>{escape(said(one, names))}</p>" for one in about]
        parts += [
            f'<p class="notes">{escape(names[one.model])}: {escape(chosen(one))}</p>' for one in results
        ]
        for one in results:
            parts.append(_pictures(one, names[one.model]))
    if notes := _notes(report, names):
        parts.append("<h2>notes</h2><ul>" + "".join(f"<li>{escape(note)}</li>" for note in notes) + "</ul>")
    models = "; ".join(f"{escape(short)} is <code>{escape(model)}</code>" for model, short in names.items())
    parts.append(f'<p class="notes">{models}</p></body></html>')
    return "\n".join(parts) + "\n"


def _table(task: str, results: Sequence[Result], names: dict[str, str]) -> str:
    head = "".join(f"<th>{escape(names[one.model])}</th>" for one in results)
    rows = []
    for name in rows_of(results):
        cells = []
        for one in results:
            if name not in one.metrics:
                cells.append("<td></td>")
                continue
            value, between = cell(one, name)
            is_best = len(results) > 1 and one.metrics[name] == best(results, name)
            interval = f" <small>[{between}]</small>" if between else ""
            cells.append(f"<td{' class=best' if is_best else ''}>{value}{interval}</td>")
        rows.append(f"<tr><td>{escape(column(task, name))}</td>{''.join(cells)}</tr>")
    return f"<table><tr><th></th>{head}</tr>{''.join(rows)}</table>"


def _bars(results: Sequence[Result], names: dict[str, str], colours: dict[str, str]) -> str:
    """An inline SVG: a bar a model with its interval as a whisker, for each metric that has one, six at most."""
    metrics = [name for name in rows_of(results) if any(name in one.intervals for one in results)][:6]
    values = [one.intervals[name][1] for one in results for name in metrics if name in one.intervals]
    shares = all(name not in LOWER_IS_BETTER for name in metrics)
    top = 1.0 if shares and max(values, default=1) > 0.5 else 1.1 * max(values, default=1.0) or 1.0
    room = WIDTH - LABEL - 60
    parts, y = [], 4.0
    for name in metrics:
        parts.append(f'<text x="0" y="{y + 13:.0f}" font-weight="600">{escape(name)}</text>')
        y += 20
        for one in results:
            if name not in one.intervals:
                continue
            value, (low, high) = one.metrics[name], one.intervals[name]
            length, left, right = (LABEL + room * max(0.0, part) / top for part in (value, low, high))
            middle = y + BAR / 2 - 2
            parts.append(
                f'<text x="{LABEL - 8}" y="{middle + 4:.0f}" text-anchor="end">{escape(_cut(names[one.model]))}</text>'
                f'<rect x="{LABEL}" y="{y:.0f}" width="{max(length - LABEL, 0.5):.1f}" height="{BAR - 4}" '
                f'fill="{colours[one.model]}" opacity=".8"/>'
                f'<path d="M{left:.1f} {middle - 5:.1f}v10m0 -5H{right:.1f}m0 -5v10" '
                f'stroke="#1a1a1a" stroke-width="1.5" fill="none"/>'
                f'<text x="{max(right, length) + 8:.1f}" y="{middle + 4:.0f}">{number(name, value)}</text>'
            )
            y += BAR
        y += 6
    size = f'width="{WIDTH}" height="{y + 4:.0f}" viewBox="0 0 {WIDTH} {y + 4:.0f}"'
    return f'<svg {size} role="img">{"".join(parts)}</svg>'


def _cut(name: str, most: int = 24) -> str:
    return name if len(name) <= most else f"...{name[3 - most :]}"


def _pictures(result: Result, model: str) -> str:
    parts = []
    for kind, heading in ((True, "right"), (False, "wrong"), (None, "examples")):
        some = [one for one in result.pictures if one.is_hit is kind]
        if not some:
            continue
        shown = "".join(
            f'<figure class="{ {True: "hit", False: "miss", None: "neither"}[kind] }">'
            f'<img alt="" src="data:image/{_type(one.image)};base64,{base64.b64encode(one.image).decode()}">'
            f"<figcaption>{escape(one.title)}</figcaption></figure>"
            for one in some
        )
        parts.append(f'<h3>{escape(model)}: {heading}</h3><div class="pictures">{shown}</div>')
    return "".join(parts)


def _type(image: bytes) -> str:
    return "png" if image.startswith(b"\x89PNG") else "jpeg"
