"""How well masks of a video fit: J, of regions, and F, of their boundaries (DAVIS, Perazzi et al. 2016).

Shape suffixes: H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

TOLERANCE = 0.008  # of the image's diagonal


class VideoScores(NamedTuple):
    """Means over objects and frames, in [0, 1]."""

    j: float
    f: float
    jf: float  # the mean of both


def region_similarity(predicted_HW: NDArray[np.bool_], truth_HW: NDArray[np.bool_]) -> float:
    """Return J = intersection / union of two masks; 1 where both are empty."""
    union = int((predicted_HW | truth_HW).sum())
    return int((predicted_HW & truth_HW).sum()) / union if union else 1.0


def boundary_accuracy(
    predicted_HW: NDArray[np.bool_], truth_HW: NDArray[np.bool_], tolerance: float = TOLERANCE
) -> float:
    """Return F = 2 P R / (P + R) of two masks' boundaries.

    P is the share of the predicted boundary that is near the true one, R the share of the true one that is near the
    predicted; near is at most ceil(tolerance * diagonal) pixels away. A boundary that is empty beside one that is not
    has F = 0; two empty ones have 1.
    """
    radius = int(np.ceil(tolerance * np.hypot(*predicted_HW.shape)))
    steps = np.arange(-radius, radius + 1)
    disc = (steps[:, None] ** 2 + steps**2 <= radius**2).astype(np.uint8)
    boundaries = [boundary(mask) for mask in (predicted_HW, truth_HW)]
    counts = [int(one.sum()) for one in boundaries]
    if not all(counts):
        return float(not any(counts))
    near = [cv2.dilate(one.astype(np.uint8), disc) > 0 for one in boundaries]
    precision = (boundaries[0] & near[1]).sum() / counts[0]
    recall = (boundaries[1] & near[0]).sum() / counts[1]
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def boundary(mask_HW: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the pixels of which a neighbour, to the right, below or both, is on the other side, (H, W)."""
    padded = np.pad(mask_HW, ((0, 1), (0, 1)), mode="edge")
    here = padded[:-1, :-1]
    edge: NDArray[np.bool_] = (here != padded[:-1, 1:]) | (here != padded[1:, :-1]) | (here != padded[1:, 1:])
    return edge


def video_scores(
    predicted: Sequence[NDArray[np.uint8]],
    truth: Sequence[NDArray[np.uint8]],
    classes: Sequence[int],
    ignore: int = 255,
) -> VideoScores:
    """Return the mean J and F of some classes over frames of class numbers; the first frame, which is given, left out.

    Pixels whose truth is `ignore` are not of any class in both.
    """
    j, f = [], []
    for found_HW, true_HW in zip(predicted[1:], truth[1:], strict=True):
        known = true_HW != ignore
        for number in classes:
            pair = ((found_HW == number) & known, true_HW == number)
            j.append(region_similarity(*pair))
            f.append(boundary_accuracy(*pair))
    return VideoScores(float(np.mean(j)), float(np.mean(f)), float(np.mean(j) + np.mean(f)) / 2)
