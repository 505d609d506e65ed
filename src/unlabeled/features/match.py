"""Patches of two images that are each other's most similar one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from unlabeled.features.fitting import centres, patch_features, unit_rows
from unlabeled.features.inputs import ImageLike, as_pixels
from unlabeled.weights.load import as_model

if TYPE_CHECKING:
    from unlabeled.vit import VisionTransformer

_ROWS = 1024  # of the similarities at a time: all of two large images would take a gigabyte


class Matches(NamedTuple):
    """Mutual nearest patches of two images, the most similar pair first."""

    points_a: NDArray[
        np.float64
    ]  # (K, 2), x and y of the patch's centre in pixels of the first image as given
    points_b: NDArray[np.float64]  # (K, 2), of the second
    similarities: NDArray[np.float32]  # (K,), cosines


def match(
    model: VisionTransformer | str | Path, a: ImageLike, b: ImageLike, size: int | None = None
) -> Matches:
    """Return all pairs of patches, one of each image, that are each other's nearest by the cosine.

    model: a backbone, or a MODEL's text, which is loaded each time.
    a, b: path, bytes, Pillow image, array or tensor. size: short side in pixels of both; None is `default_size`.
    Raises UserError for what is no image.
    """
    model = as_model(model)
    pixels_a, pixels_b = as_pixels(a), as_pixels(b)
    # The images as given, not their pixels: errors name the files.
    features_a, features_b = patch_features(model, a, size), patch_features(model, b, size)
    indices_a, indices_b, similarities = mutual_nearest(unit_rows(features_a), unit_rows(features_b))
    return Matches(
        centres(indices_a, features_a.shape[:2], pixels_a.shape[:2]),
        centres(indices_b, features_b.shape[:2], pixels_b.shape[:2]),
        similarities,
    )


def mutual_nearest(
    a_ND: NDArray[np.float32], b_MD: NDArray[np.float32]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Return (indices into a, indices into b, cosines) of rows that are each other's nearest, best first.

    a, b: rows of length 1. Of equally near rows, the first is the nearest.
    """
    nearest_b = np.empty(len(a_ND), np.int64)
    nearest_a = np.zeros(len(b_MD), np.int64)
    best_a = np.full(len(a_ND), -np.inf, np.float32)
    best_b = np.full(len(b_MD), -np.inf, np.float32)
    columns = np.arange(len(b_MD))
    for start in range(0, len(a_ND), _ROWS):
        cosines = a_ND[start : start + _ROWS] @ b_MD.T
        here = slice(start, start + len(cosines))
        nearest_b[here] = cosines.argmax(1)
        best_a[here] = cosines.max(1)
        rows = cosines.argmax(0)
        better = cosines[rows, columns] > best_b
        nearest_a[better] = rows[better] + start
        best_b[better] = cosines[rows, columns][better]
    indices_a = np.flatnonzero(nearest_a[nearest_b] == np.arange(len(a_ND)))
    indices_a = indices_a[np.argsort(-best_a[indices_a], kind="stable")]
    return indices_a, nearest_b[indices_a], best_a[indices_a]


def best_spread(matches: Matches, most: int) -> NDArray[np.int64]:
    """Return which matches to show, at most `most`: the best, apart from each other, so that lines can be told apart.

    The best match is taken, then the next one whose points lie far from those taken in both images, and so on; what
    is far is halved until there are enough.
    """
    if len(matches.similarities) <= most:
        return np.arange(len(matches.similarities))
    both = []
    for points in (matches.points_a, matches.points_b):
        extent = np.maximum(np.ptp(points, axis=0), 1)
        both.append((points, float(np.sqrt(extent[0] * extent[1] / most))))
    taken: list[int] = []
    for halvings in range(8):
        for candidate in range(len(matches.similarities)):
            if len(taken) == most:
                break
            near = any(
                (np.hypot(*(points[taken] - points[candidate]).T) < far / 2**halvings).any()
                for points, far in both
            )
            if not near and candidate not in taken:
                taken.append(candidate)
    return np.sort(np.array(taken, np.int64))
