"""Patch features as colours: their principal components, fitted over several images together."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from unlabeled.errors import UserError
from unlabeled.features.fitting import patch_features
from unlabeled.features.inputs import ImageLike, are_several
from unlabeled.weights.load import as_model

if TYPE_CHECKING:
    from unlabeled.vit import VisionTransformer

_ROWS = 4096  # taken to float64 at a time
# A component with less than this share of the first one's variance is the rounding of the features.
_NOISE = 1e-10


class PatchPca(NamedTuple):
    """Principal components of the patches of some images; each image has a grid (h, w) that covers it."""

    colours: list[NDArray[np.float32]]  # (h, w, 3) in [0, 1]; 0 where the background is
    foreground: list[NDArray[np.bool_]]  # (h, w); everywhere True without a separation
    explained: NDArray[np.float64]  # (3,), share of the variance of the patches that are coloured


def patch_pca(
    model: VisionTransformer | str | Path,
    images: ImageLike | Iterable[ImageLike],
    foreground: bool = True,
    size: int | None = None,
) -> PatchPca:
    """Return the first three principal components of the patch tokens, fitted over all images together.

    As in the DINOv2 paper (arXiv 2304.07193, figure 1), a threshold on the first component separates the foreground,
    and a second analysis of its patches alone gives the colours. For the first one each image is centred by itself:
    what differs between images that show different things would be its first component otherwise, and whole images
    would be background. The threshold is each image's own, by Otsu's method, which also finds an object of a few
    patches. Which side is the foreground: the one that is less common along the borders of the images than inside.

    model: a backbone, or a MODEL's text, which is loaded each time.
    images: one or several: paths, bytes, Pillow images, arrays or tensors; of different shapes, if they are.
    foreground: separate it; False colours every patch by one analysis.
    size: short side in pixels; None is `default_size`.

    Each component is scaled from its 1st to its 99th percentile over all coloured patches, and its largest loading
    is positive; a component without variance is 0.5.
    Raises UserError for what is no image.
    """
    model = as_model(model)
    several = list(
        cast("Iterable[ImageLike]", images) if are_several(images) else [cast("ImageLike", images)]
    )
    if not several:
        raise UserError("A PCA needs at least one image.")
    return components([patch_features(model, image, size) for image in several], foreground)


def components(features: list[NDArray[np.float32]], foreground: bool = True) -> PatchPca:
    """`patch_pca`, from the images' patch features (h, w, D)."""
    grids = [grid.shape[:2] for grid in features]
    rows_ND = np.concatenate([grid.reshape(-1, grid.shape[-1]) for grid in features])
    ends = np.cumsum([h * w for h, w in grids])[:-1]
    wanted = np.ones(len(rows_ND), bool)
    if foreground:
        centred = [part - part.mean(0, dtype=np.float64) for part in np.split(rows_ND, ends)]
        first = np.split(principal(np.concatenate(centred, dtype=np.float32), 1)[0][:, 0], ends)
        masks = [above(part).reshape(grid) for part, grid in zip(first, grids, strict=True)]
        if more_on_the_border(masks):
            masks = [above(-part).reshape(grid) for part, grid in zip(first, grids, strict=True)]
        if any(mask.any() for mask in masks):  # patches that are all alike have no background
            wanted = np.concatenate([mask.ravel() for mask in masks])
    scores, explained = principal(rows_ND[wanted], 3)
    low, high = np.percentile(scores, [1, 99], axis=0)
    spread = high - low
    scaled = np.where(spread > 0, (scores - low) / np.where(spread > 0, spread, 1), 0.5)
    colours = np.zeros((len(rows_ND), 3), np.float32)
    colours[wanted] = scaled.clip(0, 1)
    return PatchPca(
        [part.reshape(*grid, 3) for part, grid in zip(np.split(colours, ends), grids, strict=True)],
        [part.reshape(grid) for part, grid in zip(np.split(wanted, ends), grids, strict=True)],
        explained,
    )


def principal(rows_ND: NDArray[np.float32], count: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the first principal components of centred rows, (N, count), and their shares of the variance, (count,).

    From the eigenvectors of the covariance, in float64 and a part of the rows at a time. Signs: the largest loading
    is positive. Components beyond the rank are zeros.
    """
    N, D = rows_ND.shape
    mean = rows_ND.mean(0, dtype=np.float64)
    scatter = np.zeros((D, D))
    for start in range(0, N, _ROWS):
        part = rows_ND[start : start + _ROWS] - mean
        scatter += part.T @ part
    variances, vectors = np.linalg.eigh(scatter)
    variances, vectors = variances[::-1][:count], vectors[:, ::-1][:, :count]
    total = float(np.trace(scatter))
    # The scale of the features themselves tells a variance from what rounding leaves of equal rows.
    noise = max(_NOISE * variances[0], N * float(mean @ mean) * np.finfo(np.float32).eps ** 2)
    kept = variances > noise
    vectors = vectors[:, kept]
    vectors = vectors * np.sign(vectors[np.abs(vectors).argmax(0), np.arange(vectors.shape[1])])
    scores, explained = np.zeros((N, count)), np.zeros(count)
    for start in range(0, N, _ROWS):
        scores[start : start + _ROWS, : vectors.shape[1]] = (rows_ND[start : start + _ROWS] - mean) @ vectors
    explained[: vectors.shape[1]] = variances[kept] / total if total > 0 else 0
    return scores, explained


def above(values_N: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return which values are above the threshold that leaves the least variance within both parts (Otsu 1979).

    Of values that are all the same, none is.
    """
    N = len(values_N)
    ordered = np.sort(values_N)
    if ordered[0] == ordered[-1]:
        return np.zeros(N, bool)
    counts = np.arange(1, N)
    sums = np.cumsum(ordered - ordered.mean())[:-1]
    # Between the parts, counted from below: sums**2 / (counts * (N - counts)) up to a factor; cuts only where values
    # differ.
    between = np.where(np.diff(ordered) > 0, sums**2 / (counts * (N - counts)), -1)
    parts: NDArray[np.bool_] = values_N > ordered[int(between.argmax())]
    return parts


def more_on_the_border(masks: list[NDArray[np.bool_]]) -> bool:
    """Whether a part of some images is the more common along their borders, compared with the whole images.

    Each image counts the same. Where there is no difference, the part that is the larger one is the background.
    """
    difference = 0.0
    for mask in masks:
        border = np.ones(mask.shape, bool)
        border[1:-1, 1:-1] = False
        difference += float(mask[border].mean() - mask.mean())
    if abs(difference) < 1e-9:
        return sum(float(mask.mean()) - 0.5 for mask in masks) > 0
    return difference > 0
