"""Predictions against labels, from the rows and files that were written.

Shape suffixes: C classes.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from unlabeled.dense.labelled import DenseData, read_depth, read_labels
from unlabeled.dense.metrics import DEPTH_METRICS, confusion_matrix, depth_scores, segmentation_scores
from unlabeled.finetune.rows import TOP, Row

Figures = tuple[dict[str, float], dict[str, float], list[str]]  # of all, by class, and notes for the user


def class_figures(rows: Iterable[Row], classes: list[str]) -> Figures:
    """Return accuracy, and that of the five most probable where there are more, over the images with a label."""
    known = set(classes)
    right: dict[str, list[bool]] = {}
    among, strange = list[bool](), set[str]()
    for row in rows:
        label = row.get("label")
        if label is None:
            continue
        if label not in known:
            strange.add(label)
            continue
        right.setdefault(label, []).append(row["top"][0][0] == label)
        among.append(label in [name for name, _ in row["top"]])
    notes = []
    if strange:
        notes = [f"labels outside of the classes do not count: {', '.join(sorted(strange)[:4])}"]
    if not among:
        return {}, {}, notes
    figures = {"accuracy": float(np.mean([one for hits in right.values() for one in hits]))}
    if len(classes) > TOP:
        figures["top5_accuracy"] = float(np.mean(among))
    return figures, {name: float(np.mean(hits)) for name, hits in sorted(right.items())}, notes


def segmentation_figures(rows: Iterable[Row], folder: Path, truth: DenseData, classes: list[str]) -> Figures:
    """Return mean IoU and pixel accuracy over all pixels together, and the IoU of each class that occurs."""
    C = len(classes)
    confusion: NDArray[np.int64] = np.zeros((C, C), np.int64)
    for file, target in _pairs(rows, folder, truth):
        confusion += confusion_matrix(read_labels(file), read_labels(target), C, truth.ignore)
    scores = segmentation_scores(confusion)
    by_class = {name: float(iou) for name, iou in zip(classes, scores.iou, strict=True) if np.isfinite(iou)}
    return {"miou": float(scores.miou), "pixel_accuracy": float(scores.accuracy)}, by_class, []


def depth_figures(
    rows: Iterable[Row], folder: Path, truth: DenseData, depth_scale: float, max_depth: float
) -> Figures:
    """Return the means over images of the depth metrics; depth_scale is that of the written files."""
    found = []
    for file, target in _pairs(rows, folder, truth):
        depth_HW = read_depth(target, truth.depth_scale)
        scores = depth_scores(read_depth(file, depth_scale), depth_HW, max_depth=max_depth)
        if scores is not None:
            found.append(scores)
    if not found:
        return {}, {}, []
    return dict(zip(DEPTH_METRICS, np.mean(found, axis=0).tolist(), strict=True)), {}, []


def _pairs(rows: Iterable[Row], folder: Path, truth: DenseData) -> list[tuple[Path, Path]]:
    """Return (written file, true file) of the images that both have."""
    files = {Path(row["key"]).with_suffix("").as_posix(): folder / row["file"] for row in rows}
    return [(files[pair.key], pair.target) for pair in truth.pairs if pair.key in files]
