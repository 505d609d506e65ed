"""Whitening of descriptors: centred, and of the same variance in every direction, so that cosines spread out.

The features of one backbone share most of what they are: their cosines all lie near 1, and a few directions decide.
SSCD (2202.10261) whitens its descriptors by a PCA of images like those that are compared.

Shape suffixes: N images, D width, K directions that are kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from unlabeled.errors import UserError

SMALLEST = 1e-6  # variance of a direction over the largest's, below which it is left out


@dataclass(frozen=True)
class Whitening:
    """Called with vectors (N, D), it returns them whitened and of length 1, float32 (N, K)."""

    mean_D: NDArray[np.float64]
    matrix_DK: NDArray[np.float64]

    def __call__(self, vectors_ND: ArrayLike) -> NDArray[np.float32]:
        """Whiten; what lies at the mean becomes 0."""
        white_NK = (np.asarray(vectors_ND, np.float64) - self.mean_D) @ self.matrix_DK
        lengths = np.linalg.norm(white_NK, axis=1, keepdims=True)
        white: NDArray[np.float32] = (white_NK / np.maximum(lengths, 1e-12)).astype(np.float32)
        return white


def fit_whitening(vectors_ND: ArrayLike) -> Whitening:
    """Fit to images of the kind that will be compared, at least some times D of them, without copies of each other.

    Raises UserError where all vectors are the same.
    """
    vectors = np.asarray(vectors_ND, np.float64)
    mean_D = vectors.mean(0)
    variances_D, directions_DD = np.linalg.eigh(np.cov((vectors - mean_D).T, bias=True))
    kept = variances_D > SMALLEST * variances_D[-1]
    if len(vectors) < 2 or not variances_D[-1] > 0:
        raise UserError(f"{len(vectors)} vectors without a difference cannot be whitened; give other images.")
    return Whitening(mean_D, directions_DD[:, kept] / np.sqrt(variances_D[kept]))
