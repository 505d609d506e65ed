"""Image retrieval by cosine: by label, or by a ground truth in the manner of the revisited Oxford and Paris.

Shape suffixes: M queries, N gallery images, D width.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray

from unlabeled.errors import UserError
from unlabeled.evaluate.average_precision import average_precision, trapezoid_average_precision
from unlabeled.evaluate.ground_truth import GroundTruth, Places, Query, read_ground_truth
from unlabeled.evaluate.labelled import (
    Data,
    Extraction,
    Model,
    bad_files,
    labelled,
    name_of,
    tables_of,
    view_of,
)
from unlabeled.evaluate.nearest import unit
from unlabeled.evaluate.result import Figure, Result, result_of
from unlabeled.features.extractor import Extractor, Kind
from unlabeled.features.inputs import as_pixels
from unlabeled.features.table import FeatureTable

RECALLS = (1, 5, 10)
BLOCK_BYTES = 2**28  # of similarities held at once
LEVELS = {
    "medium": (("easy", "hard"), ("junk",)),
    "easy": (("easy",), ("junk", "hard")),
    "hard": (("hard",), ("junk", "easy")),
}


def retrieval(
    model: Model | None = None,
    train: Data = "",
    test: Data = "",
    *,
    ground_truth: str | Path | None = None,
    features: str = "cls",
    seed: int = 0,
    **extraction: Unpack[Extraction],
) -> Result:
    """How well each query finds its like in the gallery, by the cosine of frozen features.

    By label (without a ground truth): images of a query's class are what it should find. map is the mean average
    precision over the whole ranking, recall_k the share of queries with one of their class among the first k. Where
    train and test are the same, a query is not searched in itself.

    By ground truth: mAP of easy, medium and hard (1803.11285): what does not count at a level is taken out of the
    ranking. Queries are cropped to their boxes.

    Args:
        model: a MODEL; none where both sides are feature tables.
        train: the gallery, DATA or a feature table; with labels where there is no ground truth.
        test: the queries.
        ground_truth: a JSON file, see `ground_truth.py`.
        features: cls, or cls+mean for CLS and mean patch side by side.
        seed: of the intervals.
        extraction: see `Extraction`.

    Raises:
        UserError: as `labelled` does; the ground truth cannot be read, or names no image that is there.
    """
    kind: Kind = "cls+mean" if "mean" in features else "cls"
    if ground_truth is not None:
        return _by_ground_truth(
            model, train, test, read_ground_truth(ground_truth), kind, features, extraction
        )
    task = labelled(model, train, test, kind=kind, **extraction)
    gallery, queries = (unit(task.vectors(side, features)[:]) for side in (task.train, task.test))
    same = task.train.table.path == task.test.table.path
    truths, numbers = task.train.labels_N, task.test.labels_N

    def judged(place: int, similarities_N: NDArray[np.float32]) -> list[float]:
        relevant = truths == numbers[place]
        if same:
            similarities_N, relevant = np.delete(similarities_N, place), np.delete(relevant, place)
        few = min(RECALLS[-1], len(relevant))
        first = np.argpartition(-similarities_N, few - 1)[:few]
        first = first[np.argsort(-similarities_N[first], kind="stable")]
        return [
            average_precision(similarities_N, relevant),
            *(float(relevant[first[:k]].any()) for k in RECALLS),
        ]

    values_M4 = np.array(list(_each(queries, gallery, judged)))
    counts, notes = dict(task.counts), list(task.notes)
    alone = np.isnan(values_M4[:, 0])
    if alone.all():
        raise UserError(
            f"Each image of {task.test.name} is the only one of its class: there is nothing to find."
        )
    if alone.any():
        notes.append(f"{alone.sum()} queries are the only images of their class and are left out")
    figures = {
        name: Figure(values_M4[~alone, column])
        for column, name in enumerate(("map", *(f"recall_{k}" for k in RECALLS)))
    }
    counts |= {"gallery": len(gallery), "queries": int((~alone).sum())}
    return result_of(
        "retrieval", task.model, figures, np.array(task.test.keys, object)[~alone].tolist(),
        settings={"features": features, "by": "label"}, counts=counts, bad_files=task.bad_files, notes=notes, seed=seed,
    )  # fmt: skip


def _each(
    queries_MD: NDArray[np.float32],
    gallery_ND: NDArray[np.float32],
    judged: Callable[[int, NDArray[np.float32]], list[float]],
) -> Iterator[list[float]]:
    """What `judged` makes of each query's similarities (N,), on every core."""
    at_once = max(1, BLOCK_BYTES // (4 * len(gallery_ND)))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(queries_MD), at_once):
            similarities = queries_MD[start : start + at_once] @ gallery_ND.T
            yield from pool.map(judged, range(start, start + len(similarities)), similarities)


def _by_ground_truth(
    model: Model | None,
    train: Data,
    test: Data,
    truth: GroundTruth,
    kind: Kind,
    features: str,
    extraction: Extraction,
) -> Result:
    (gallery_table, query_table), held = tables_of(model, [train, test], kind, dict(extraction))
    gallery_keys, query_keys = gallery_table.keys, query_table.keys
    places, query_places = Places(gallery_keys), Places(query_keys)
    rows = np.unique(places.all_of(truth.gallery)) if truth.gallery else np.arange(len(gallery_table))
    notes = []
    if missing := len(truth.gallery) - len(rows) if truth.gallery else 0:
        notes.append(f"{missing} of {len(truth.gallery)} gallery images are not in {train} and are left out")
    found = [(query, place) for query in truth.queries if (place := query_places(query.name)) is not None]
    if not len(rows):
        raise UserError(
            f"No gallery image of the ground truth is in {train}; keys there are like {gallery_keys[0]}."
        )
    if not found:
        raise UserError(f"No query of the ground truth is in {test}; keys there are like {query_keys[0]}.")
    if missing := len(truth.queries) - len(found):
        notes.append(f"{missing} of {len(truth.queries)} queries are not in {test} and are left out")
    columns = view_of(gallery_table, features)
    gallery = unit(np.asarray(gallery_table.vectors[rows])[:, columns])
    queries = unit(np.asarray(query_table.vectors[[place for _, place in found]])[:, columns])
    boxed = [number for number, (query, _) in enumerate(found) if query.box]
    if boxed:
        cropped = _cropped(model, query_table, [found[number] for number in boxed], extraction)
        queries[boxed] = unit(cropped[:, columns])
    row_of = np.full(len(gallery_table), -1)
    row_of[rows] = np.arange(len(rows))

    def judged(number: int, similarities_N: NDArray[np.float32]) -> list[float]:
        query, place = found[number]
        sets = {level: row_of[places.all_of(getattr(query, level))] for level in ("easy", "hard", "junk")}
        if gallery_table.path == query_table.path:  # itself is no find
            sets["junk"] = np.append(sets["junk"], row_of[place])
        order = np.argsort(-similarities_N, kind="stable")
        return [value for level in LEVELS for value in _level_figures(order, sets, level)]

    values_MV = np.array(list(_each(queries, gallery, judged)))
    names = [f"{name}_{level}" for level in LEVELS for name in ("map", "precision_10")]
    figures = {}
    for column, name in enumerate(names):
        counted = ~np.isnan(values_MV[:, column])
        if counted.any():
            pairs = np.stack((np.where(counted, values_MV[:, column], 0), counted), 1)
            figures[name] = Figure(pairs, "ratio")
    if not figures:
        raise UserError("No query of the ground truth has an image to find in the gallery.")
    ordered = sorted(figures, key=lambda name: not name.startswith("map"))
    tables = dict.fromkeys(table.path for table in (gallery_table, query_table))
    bad = [pair for path in tables for pair in bad_files(path)]
    result = result_of(
        "retrieval", name_of(model) if model is not None else gallery_table.identity["model"]["name"],
        {name: figures[name] for name in ordered}, [query.name for query, _ in found],
        settings={"features": features, "by": "ground truth", "cropped_queries": len(boxed)},
        counts={"gallery": len(gallery), "queries": len(queries), "bad_files": len(bad)}, bad_files=bad, notes=notes,
    )  # fmt: skip
    del held
    return result


def _level_figures(order_N: NDArray[np.int64], sets: dict[str, NDArray[np.int64]], level: str) -> list[float]:
    """Average precision and precision of the first 10 at a level; NaN where nothing is to be found."""
    wanted, ignored = (np.concatenate([sets[name] for name in names]) for names in LEVELS[level])
    wanted = wanted[wanted >= 0]
    if not len(wanted):
        return [float("nan"), float("nan")]
    counted = order_N[~np.isin(order_N, ignored)]
    ranks = np.flatnonzero(np.isin(counted, wanted))
    few = min(10, int(ranks[-1]) + 1)  # as the release: no deeper than the last that is to be found
    return [trapezoid_average_precision(ranks), float((ranks < few).sum() / few)]


def _cropped(
    model: Model | None, table: FeatureTable, found: list[tuple[Query, int]], extraction: Extraction
) -> NDArray[np.float32]:
    """Features of queries' boxes."""
    extractor = Extractor.of(table.identity, extraction.get("device", "auto"), model)
    crops: list[Any] = []
    for query, place in found:
        pixels = as_pixels(table.read_image(place))
        assert query.box is not None
        left, top, right, bottom = (max(0, round(side)) for side in query.box)
        crop = pixels[top:bottom, left:right]
        if not crop.size:
            raise UserError(
                f"The box {query.box} of {query.name} lies outside of its {pixels.shape[1]} x {pixels.shape[0]} pixels."
            )
        crops.append(np.ascontiguousarray(crop))
    return np.asarray(extractor(crops))
