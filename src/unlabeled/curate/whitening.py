"""Whitening of descriptors: centred, and of the same variance in every direction, so that cosines spread out.

The features of one backbone share most of what they are: their cosines all lie near 1, and a few directions decide.
SSCD (2202.10261) whitens its descriptors by a PCA of images like those that are compared.

Shape suffixes: N images, D width, K directions that are kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from unlabeled.atomic import replacing
from unlabeled.curate.blocks import Floats, Resources, Rows, spans
from unlabeled.curate.kmeans import NO_LIMITS
from unlabeled.errors import UserError, writing

SMALLEST = 1e-6  # variance of a direction over the largest's, below which it is left out
IMAGES_PER_DIMENSION = 2  # that it takes at least: with as many as D, all would be as unlike as can be
FITTED_ON = 200_000  # images, at most; of more a sample is drawn
BLOCK = 4096  # rows of a sum: fixed, so that the sums are the same for any memory and number of workers


@dataclass(frozen=True)
class Whitening:
    """Called with vectors (N, D) of any length, it returns them whitened and of length 1, float32 (N, K)."""

    mean_D: NDArray[np.float64]
    matrix_DK: NDArray[np.float64]

    def __call__(self, vectors_ND: Any) -> Floats:
        """Whiten; what lies at the mean becomes 0. Raises UserError for values that are not finite."""
        return self.of_unit(Rows(np.asarray(vectors_ND)).between(0, len(vectors_ND)))

    def of_unit(self, unit_ND: Floats) -> Floats:
        """Whiten vectors of length 1."""
        white_NK = (unit_ND.astype(np.float64) - self.mean_D) @ self.matrix_DK
        lengths = np.linalg.norm(white_NK, axis=1, keepdims=True)
        white: Floats = (white_NK / np.maximum(lengths, 1e-12)).astype(np.float32)
        return white


def enough_to_whiten(images: int, width: int) -> bool:
    """Whether a whitening can be fitted to so many vectors of a width."""
    return images >= IMAGES_PER_DIMENSION * width


def fit_whitening(vectors: Any, *, resources: Resources = NO_LIMITS) -> Whitening:
    """Fit to images of the kind that will be compared, without copies of each other as far as that is known.

    vectors: (N, D), at least 2 D of them, scaled to length 1 first; more than 200,000 are sampled.
    Raises UserError for too few, vectors without a difference, or values that are not finite.
    """
    rows = Rows(vectors)
    count, width = rows.shape
    if not enough_to_whiten(count, width):
        need = IMAGES_PER_DIMENSION * width
        raise UserError(f"Vectors of {width} values take {need:,} images to be whitened, not {count:,}.")
    chosen = np.arange(count)
    if count > FITTED_ON:
        rng = np.random.default_rng([resources.seed, 13])
        chosen = np.sort(rng.choice(count, FITTED_ON, replace=False))
    blocks = [chosen[start:stop] for start, stop in spans(len(chosen), BLOCK)]
    held = 12 * BLOCK * width + 8 * width**2
    mean_D = sum(resources.map(_sum, rows, blocks, held), np.zeros(width)) / len(chosen)
    products = resources.map(_products, (rows, mean_D), blocks, held)
    covariance_DD = sum(products, np.zeros((width, width))) / len(chosen)
    with threadpool_limits(1):  # the same bits on any number of cores
        variances_D, directions_DD = np.linalg.eigh(covariance_DD)
    if not variances_D[-1] > np.finfo(np.float32).eps ** 2:
        raise UserError(f"{count:,} vectors without a difference cannot be whitened; give other images.")
    kept = variances_D > SMALLEST * variances_D[-1]
    return Whitening(mean_D, directions_DD[:, kept] / np.sqrt(variances_D[kept]))


def write_whitened(path: Path, whitening: Whitening, vectors: Any, *, resources: Resources) -> None:
    """Write vectors (N, D) whitened, as .npy of the same kind of numbers (N, K), all or nothing."""
    rows = Rows(vectors)
    blocks = spans(len(rows), BLOCK)
    with writing(path), replacing(path) as part:
        shape = len(rows), whitening.matrix_DK.shape[1]
        out = np.lib.format.open_memmap(part, "w+", rows.dtype, shape)
        found = resources.map(_whitened, (rows, whitening), blocks, 20 * BLOCK * rows.shape[1])
        for (start, stop), white_nK in zip(blocks, found, strict=True):
            out[start:stop] = white_nK
        out.flush()
        del out


def _sum(rows: Rows, block: NDArray[np.int64]) -> NDArray[np.float64]:
    total_D: NDArray[np.float64] = rows.at(block).sum(0, dtype=np.float64)
    rows.release()
    return total_D


def _products(context: tuple[Rows, NDArray[np.float64]], block: NDArray[np.int64]) -> NDArray[np.float64]:
    rows, mean_D = context
    centred_nD = rows.at(block) - mean_D
    rows.release()
    products_DD: NDArray[np.float64] = centred_nD.T @ centred_nD
    return products_DD


def _whitened(context: tuple[Rows, Whitening], span: tuple[int, int]) -> Floats:
    rows, whitening = context
    white_nK = whitening.of_unit(rows.between(*span))
    rows.release()
    return white_nK
