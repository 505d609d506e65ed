"""One HTML page that says what each step dropped and shows it; pictures are inside the page, and beside it as PNG."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from unlabeled.curate.lineage import Outcome
from unlabeled.errors import writing
from unlabeled.features.inputs import as_pixels
from unlabeled.images.sources import Source, open_source
from unlabeled.search.sheet import ACROSS, Tile, write_sheet
from unlabeled.weights.files import replacing

TITLES = {
    "readable": "Files that can be read",
    "quality": "Quality",
    "exact": "The same bytes",
    "perceptual": "Near perceptual hashes",
    "copies": "Copies, by features",
    "decontaminate": "Too near to the excluded sets",
    "retrieve": "Like the seeds",
    "cluster": "Balanced sample",
}
STYLE = """
body{font:16px/1.5 system-ui,sans-serif;color:#1a1a1a;max-width:1100px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.7rem;margin-bottom:0}h2{margin-top:2.5rem;border-top:1px solid #ddd;padding-top:1.2rem}
table{border-collapse:collapse;margin:.8rem 0}td,th{padding:.2rem .8rem .2rem 0;text-align:right;vertical-align:top}
td:first-child,th:first-child{text-align:left}th{font-weight:600;border-bottom:1px solid #bbb}
td.now,th.now{background:#fff3cd}figure{margin:1rem 0}figcaption,.grey{color:#6b6b6b}img{max-width:100%;height:auto}
.bar{display:inline-block;height:.8rem;background:#4878a8;vertical-align:middle}pre{overflow:auto;background:#f6f6f6;padding:1rem}
"""
SHEET_QUALITY = 82  # of the JPEG that a sheet is in the page


class Sheets:
    """Writes contact sheets of images of DATA, and gives each as HTML."""

    def __init__(self, folder: Path, source: Source) -> None:
        self.folder, self.source = folder, source
        self.others: dict[str, Source] = {}

    def tile(self, index: int, title: str, data: str = "") -> Tile:
        """One image, of DATA or of another."""
        source = self.source
        if data:
            source = self.others.setdefault(data, self.others.get(data) or open_source(data))
        try:
            sample = source.read(index)
        except OSError:
            return Tile(title, f"image {index}", None)
        try:
            return Tile(title, Path(sample.key).name, as_pixels(sample.data))
        except Exception:  # a picture of the report is no reason to stop
            return Tile(title, Path(sample.key).name, None)

    def write(self, name: str, caption: str, lines: Sequence[Sequence[Tile]]) -> str:
        """A sheet as a PNG beside the page, and as an element of it."""
        lines = [line for line in lines if line]
        if not lines:
            return ""
        path = self.folder / f"{name}.png"
        write_sheet(path, lines)
        buffer = io.BytesIO()
        with Image.open(path) as picture:
            picture.convert("RGB").save(buffer, "JPEG", quality=SHEET_QUALITY)
        encoded = base64.b64encode(buffer.getvalue()).decode()
        return (
            f'<figure><img alt="{escape(caption)}" src="data:image/jpeg;base64,{encoded}">'
            f"<figcaption>{escape(caption)}</figcaption></figure>"
        )


def write_report(
    folder: Path, source: Source, outcomes: Sequence[Outcome], counts: dict[str, dict[str, Any]]
) -> Path:
    """Write the page and its pictures, and return its path. Raises UserError where the disk is full."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("*.png"):
            old.unlink()
    sheets = Sheets(folder, source)
    total = len(source)
    left = list(counts.values())[-1]["kept"] if counts else total
    parts = [
        f"<h1>{escape(source.name)}</h1>",
        f"<p>{left:,} of {total:,} images are kept ({left / max(1, total):.1%}). "
        '<a href="lineage.parquet">lineage.parquet</a>, beside this page, has a row for every image.</p>',
        _funnel(total, counts),
    ]
    for outcome in outcomes:
        parts.append(f"<h2>{TITLES[outcome.step]}</h2>")
        parts.append(_sentence(outcome, counts[outcome.step]))
        parts += SECTIONS[outcome.step](sheets, outcome)
    recipe = folder.parent / "recipe.toml"
    if recipe.is_file():
        parts.append(f"<h2>Recipe</h2><pre>{escape(recipe.read_text())}</pre>")
    page = folder / "index.html"
    body = "\n".join(parts)
    with writing(page), replacing(page) as part:
        part.write_text(
            '<!doctype html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width">'
            f"<title>Curation of {escape(source.name)}</title><style>{STYLE}</style></head>"
            f"<body>{body}</body></html>\n",
            encoding="utf-8",
            errors="replace",
        )
    return page


def _funnel(total: int, counts: dict[str, dict[str, Any]]) -> str:
    rows = [
        (
            TITLES[step],
            one["dropped"],
            one["kept"],
            ", ".join(f"{k} {v:,}" for k, v in one["reasons"].items()),
        )
        for step, one in counts.items()
    ]
    lines = [
        f"<tr><td>{escape(title)}</td><td>{dropped:,}</td><td>{kept:,}</td>"
        f'<td style="text-align:left"><span class="bar" style="width:{240 * kept / max(1, total):.0f}px"></span></td>'
        f'<td style="text-align:left" class="grey">{escape(reasons)}</td></tr>'
        for title, dropped, kept, reasons in rows
    ]
    head = (
        '<tr><th>step</th><th>dropped</th><th>kept</th><th></th><th style="text-align:left">reasons</th></tr>'
    )
    first = f'<tr><td>images</td><td></td><td>{total:,}</td><td style="text-align:left"><span class="bar" '
    return f'<table>{head}{first}style="width:240px"></span></td><td></td></tr>{"".join(lines)}</table>'


def _sentence(outcome: Outcome, count: dict[str, Any]) -> str:
    figures = outcome.figures
    said = [f"{count['dropped']:,} of {count['in']:,} images dropped."]
    if figures.get("calibrated"):
        if figures["threshold"] is None:
            said.append(
                f"No cosine gives the wanted precision of {figures['wanted']:g} on copies made of these images, so no "
                "image was dropped; give a threshold, a lower precision, or another MODEL."
            )
        else:
            said.append(
                f"Threshold {figures['threshold']:.4f}, for a wanted precision of {figures['wanted']:g}: on copies "
                f"made of these images the precision is {figures['precision']:.4f} (at least "
                f"{figures['precision_bound']:.4f} at 95% confidence), and {figures['recall']:.1%} of the "
                "copies are found."
            )
    elif "threshold" in figures:
        said.append(f"Threshold {figures['threshold']:g}, as given.")
    if "space" in figures:
        said.append(_space(figures))
    if "search_bound" in figures:
        bound = figures["search_bound"]
        said.append(
            f"The approximate search found {figures['search_recall']:.2%} of the pairs that brute force finds on a "
            f"sample ({f'at least {bound:.2%}' if bound else 'too few for a bound'}); {figures['chained']:,} images "
            "were kept although a chain of pairs leads to another that is."
        )
    if outcome.step == "perceptual":
        said.append(
            f"Up to {figures['distance']} of 64 bits may differ; {figures['without']:,} images have no contrast."
        )
    if outcome.step == "decontaminate":
        bits = figures["hash_distance"]
        hashes = f", perceptual hashes up to {bits} of 64 bits apart" if bits >= 0 else ""
        features = "" if "space" in figures else "; without a model, features are not compared"
        unread = figures.get("unreadable", {})  # not in curations from before it was counted
        sets = ", ".join(
            f"{count:,} of {data}" + (f" ({unread[data]:,} more cannot be read)" if unread.get(data) else "")
            for data, count in figures["images"].items()
        )
        said.append(
            f"Held against {sets}: the same bytes{hashes}{', features' if not features else ''}{features}."
        )
    if outcome.step == "retrieve":
        way = f"the nearest images of each of {figures['seeds']:,} seeds"
        if figures["method"] == "clusters":
            way = (
                f"{figures['matched']:,} of {figures['clusters']:,} clusters, those with enough of "
                f"{figures['seeds']:,} seeds"
            )
        said.append(f"Kept are {way}.")
    if outcome.step == "cluster":
        levels = ", ".join(f"{k:,}" for k in figures["levels"])
        clusters = "cluster" if levels == "1" else "clusters"
        said.append(f"{figures['wanted']:,} images were wanted, from a tree of {levels} {clusters}.")
    return f"<p>{escape(' '.join(said))}</p>"


def _space(figures: dict[str, Any]) -> str:
    """Which features were compared, and why these."""
    names = {"raw": "features as they are", "whitened": "whitened features"}
    said = f"Compared are {names[figures['space']]}"
    scores = figures.get("micro_ap", {})
    if len(scores) > 1:
        found = ", ".join(f"{names[space]} {score:.3f}" for space, score in scores.items())
        said += f", which find copies of these images better by micro-average precision ({found})"
    if figures.get("not_whitened"):
        said += f": {figures['not_whitened'].rstrip('.')}"
    return f"{said}."


def _beside(values: dict[str, int], now: str, words: str) -> str:
    """A table of how many images a threshold would concern, at it and beside it."""
    if not values:
        return ""
    mark = [' class="now"' if name == now else "" for name in values]
    head = "".join(f"<th{one}>{escape(name)}</th>" for name, one in zip(values, mark, strict=True))
    row = "".join(f"<td{one}>{count:,}</td>" for count, one in zip(values.values(), mark, strict=True))
    return f"<table><tr><th>threshold</th>{head}</tr><tr><td>{escape(words)}</td>{row}</tr></table>"


def _quality(sheets: Sheets, outcome: Outcome) -> list[str]:
    values = dict(zip(outcome.column("index").tolist(), outcome.column("value").tolist(), strict=True))
    parts = []
    for limit in outcome.figures["limits"]:
        sign = "at least" if limit["is_minimum"] else "at most"
        name = f"{limit['limit']:.4g}"
        parts.append(
            f"<h3>{escape(limit['name'])}: {escape(limit['words'])} {sign} {name} "
            f'<span class="grey">({escape(limit["field"])})</span></h3>'
        )
        parts.append(_beside(limit["alone"], name, "images beyond it"))
        lines = [  # not dropped and kept: what is within one limit may be beyond another
            [sheets.tile(index, f"{word} {value:.3g}") for index, value in zip(side, own, strict=True)]
            for word, side, own in zip(("beyond", "within"), limit["sides"], limit["values"], strict=True)
        ]
        sides = "beyond it and within it" if lines[0] else "all within it"
        caption = f"{limit['name']}: the images nearest to the limit of {name}, {sides}"
        parts.append(sheets.write(f"quality_{limit['name']}_{limit['field'].split('.')[1]}", caption, lines))
    unread = [index for index in outcome.dropped.tolist() if values[index] != values[index]]
    names = [sheets.tile(index, "").name for index in unread[:12]]
    if names:
        more = f" and {len(unread) - len(names):,} more" if len(unread) > len(names) else ""
        parts.append(f'<p class="grey">Unreadable: {escape(", ".join(names))}{more}.</p>')
    return parts


def _groups(sheets: Sheets, outcome: Outcome) -> list[str]:
    value = dict(zip(outcome.column("index").tolist(), outcome.column("value").tolist(), strict=True))
    lines: list[list[Tile]] = []
    shown = 0
    for group in outcome.figures["groups"]:
        if shown + len(group) > 72:
            break
        titles = ["kept", *(_alike(outcome.step, value[index]) for index in group[1:])]
        tiles = [sheets.tile(index, title) for index, title in zip(group, titles, strict=True)]
        if lines and len(lines[-1]) + len(tiles) <= ACROSS:  # small groups stand beside each other
            lines[-1] += tiles
        else:
            lines.append(tiles)
        shown += len(group)
    caption = "The largest groups: each image that is kept, and after it those dropped for it"
    parts = [sheets.write(outcome.step, caption, lines)]
    if outcome.step == "perceptual":
        words = "images with another at most so many bits apart"
        parts.insert(0, _beside(outcome.figures["near"], str(outcome.figures["distance"]), words))
    elif outcome.figures.get("near"):
        now = f"{outcome.figures['threshold']:.4f}"
        parts.insert(0, _beside(outcome.figures["near"], now, "images with another at least so near"))
    return parts


def _alike(step: str, value: float) -> str:
    """How near an image is to the one that it is dropped for."""
    return {"exact": "same bytes", "perceptual": f"{value:g} bits", "copies": f"{value:.4f}"}[step]


def _removed(sheets: Sheets, outcome: Outcome) -> list[str]:
    figures = outcome.figures
    lines: list[list[Tile]] = []
    for start in range(0, len(figures["shown"]), 3):
        line = []
        for index, data, row, words in figures["shown"][start : start + 3]:
            line += [sheets.tile(index, f"dropped, {words}"), sheets.tile(row, "excluded set", data)]
        lines.append(line)
    parts = [
        sheets.write("decontaminate", "Dropped images, each before the excluded image that it matches", lines)
    ]
    if "near" in figures:
        words = "images at least so near to an excluded one"
        parts.insert(0, _beside(figures["near"], f"{figures['threshold']:.4f}", words))
    return parts


def _retrieved(sheets: Sheets, outcome: Outcome) -> list[str]:
    figures = outcome.figures
    value = dict(zip(outcome.column("index").tolist(), outcome.column("value").tolist(), strict=True))
    lines = [
        [
            *(sheets.tile(row, "seed", data) for data, row in seeds),
            *(sheets.tile(index, f"{value[index]:.3f}") for index in images),
        ]
        for seeds, images in figures["by_seed"]
    ]
    ways = {
        "nearest": "Seeds, and the images retrieved for each",
        "clusters": "Seeds of a cluster, up to two, and the images retrieved that are nearest to its centre",
    }
    return [sheets.write("retrieve", ways[figures["method"]], lines)]


def _clusters(sheets: Sheets, outcome: Outcome) -> list[str]:
    figures = outcome.figures
    lines = [
        [sheets.tile(index, f"cluster {number}" if place == 0 else "") for place, index in enumerate(images)]
        for number, images in figures["shown"]
    ]
    sizes, sampled = figures["sizes"], figures["sampled"]
    top = max(sizes, default=1)
    bars = "".join(
        f'<rect x="{4 * one}" y="{100 - high:.1f}" width="3" height="{high:.1f}" fill="{paint}"/>'
        for one, pair in enumerate(zip(sizes, sampled, strict=True))
        for high, paint in zip((100 * count / top for count in pair), ("#c9d6e3", "#4878a8"), strict=True)
    )
    chart = (
        f'<figure><svg width="{4 * len(sizes)}" height="100" style="max-width:100%">{bars}</svg><figcaption>Images of '
        f"the {len(sizes)} largest clusters (pale; the largest has {top:,}) and how many of each were taken (dark)"
        "</figcaption></figure>"
    )
    return [
        chart,
        sheets.write("clusters", "The largest clusters, the images nearest to their centres", lines),
    ]


def _nothing(sheets: Sheets, outcome: Outcome) -> list[str]:
    return []


SECTIONS = {
    "readable": _nothing,
    "quality": _quality,
    "exact": _groups,
    "perceptual": _groups,
    "copies": _groups,
    "decontaminate": _removed,
    "retrieve": _retrieved,
    "cluster": _clusters,
}
