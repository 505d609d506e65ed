"""What is measured of one image, and the limits it has to keep.

Pixels are measured with the short side shrunk to at most 256 pixels, never enlarged, so that the figures of a
12-megapixel photograph and of its small copy are alike.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from unlabeled.curate.recipe import QualityRecipe

SHORT_SIDE = 256  # pixels
FLAT = 8  # grey levels; a 3 x 3 neighbourhood that spans no more is plain
HARD = 96  # grey levels; one that spans this or more is a hard edge
COLOUR_SIDE = 64  # rows and columns that are enough to tell colour by
CLIP = 5  # grey levels from black or white
_SQUARE = np.ones((3, 3), np.uint8)


class Measures(NamedTuple):
    """Figures of an image's pixels.

    blur: variance of the Laplacian of grey levels 0 to 255, low where nothing is sharp.
    mean: luminance, 0 to 1. clipped: share of pixels within 5 levels of black or of white.
    entropy: of the histogram of grey levels, in bits, 0 to 8.
    plain: share of pixels whose 3 x 3 neighbourhood spans at most 8 levels; 1 for a blank image.
    text: plain times the share of the other pixels whose neighbourhood spans 96 levels or more. Photographs have soft
        transitions; writing, screens and diagrams are plain with hard edges.
    grain: blur over the blur at half the size. Photographs look alike at any size and have about 1; in noise every
        pixel is for itself, so that it averages out: 4.
    """

    blur: float
    mean: float
    clipped: float
    entropy: float
    plain: float
    text: float
    grain: float


class Criterion(NamedTuple):
    """A limit: rows whose `column` is below (`is_minimum`) or above the recipe's `field` are dropped."""

    name: str  # of the reason
    column: str  # of the measured table
    field: str  # of QualityRecipe
    is_minimum: bool
    words: str  # what is measured, in the report
    most: float = np.inf  # that it can be


CRITERIA = (
    Criterion("small", "side", "min_side", True, "short side in pixels"),
    Criterion("narrow", "aspect", "max_aspect", False, "long side over short side"),
    Criterion("dark", "mean", "min_mean", True, "mean luminance", 1.0),
    Criterion("bright", "mean", "max_mean", False, "mean luminance", 1.0),
    Criterion("clipped", "clipped", "max_clipped", False, "share of black and white pixels", 1.0),
    Criterion("blank", "plain", "max_plain", False, "share of plain pixels", 1.0),
    Criterion("uniform", "entropy", "min_entropy", True, "bits of grey levels", 8.0),
    Criterion("text", "text", "max_text", False, "plain share x hard edges", 1.0),
    Criterion("noise", "grain", "max_grain", False, "sharpness over that at half the size"),
    Criterion("blurred", "blur", "min_blur", True, "variance of the Laplacian"),
)


def shrunk_grey(pixels_HW3: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the grey levels of an image with its short side shrunk to at most 256 pixels."""
    height, width = pixels_HW3.shape[:2]
    scale = SHORT_SIDE / min(height, width)
    if scale < 1:
        size = max(1, round(width * scale)), max(1, round(height * scale))
        pixels_HW3 = cv2.resize(pixels_HW3, size, interpolation=cv2.INTER_AREA)
    grey: NDArray[np.uint8] = cv2.cvtColor(pixels_HW3, cv2.COLOR_RGB2GRAY)
    return grey


def colour(pixels_HW3: NDArray[np.uint8]) -> float:
    """Return the mean difference of an image's highest and lowest channel, in levels of 255: 0 where it is grey."""
    steps = [max(1, side // COLOUR_SIDE) for side in pixels_HW3.shape[:2]]
    some = pixels_HW3[:: steps[0], :: steps[1]]
    return float((some.max(axis=2) - some.min(axis=2)).mean())


def measure(grey_HW: NDArray[np.uint8]) -> Measures:
    """Return the figures of a shrunk grey image, uint8 (H, W); see `Measures`."""
    counts = np.bincount(grey_HW.ravel(), minlength=256) / grey_HW.size
    present = counts[counts > 0]
    span = cv2.morphologyEx(grey_HW, cv2.MORPH_GRADIENT, _SQUARE)
    plain = float((span <= FLAT).mean())
    hard = float((span >= HARD).mean())
    height, width = grey_HW.shape
    half = cv2.resize(grey_HW, (-(-width // 2), -(-height // 2)), interpolation=cv2.INTER_AREA)
    blur, blur_of_half = (float(cv2.Laplacian(grey, cv2.CV_32F).var()) for grey in (grey_HW, half))
    return Measures(
        blur=blur,
        mean=float(counts @ np.arange(256)) / 255,
        clipped=float(counts[: CLIP + 1].sum() + counts[255 - CLIP :].sum()),
        entropy=float(abs(-(present * np.log2(present)).sum())),
        plain=plain,
        text=plain * hard / (1 - plain) if plain < 1 else 0.0,
        grain=blur / blur_of_half if blur_of_half > 0 else 0.0,
    )


def criteria(recipe: QualityRecipe) -> list[tuple[Criterion, float]]:
    """Return the limits of a recipe, in the order in which an image is held against them."""
    found = [(one, float(getattr(recipe, one.field))) for one in CRITERIA]
    if recipe.scorer:
        words = f"score of {recipe.scorer}"
        found.append(
            (Criterion("score", "score", "score", recipe.scorer_keeps == "above", words), recipe.score)
        )
    return found


def failed(recipe: QualityRecipe, measured: dict[str, NDArray[Any]]) -> NDArray[np.int8]:
    """Return for each image the number of the first of `criteria` that it fails; -1 where it fails none.

    measured: columns by name, (N,) each. Values that are not finite fail.
    """
    names = list(measured)
    result = np.full(len(measured[names[0]]), -1, np.int8)
    for number, (criterion, limit) in enumerate(criteria(recipe)):
        result[fails(criterion, limit, measured[criterion.column]) & (result < 0)] = number
    return result


def fails(criterion: Criterion, limit: float, values_N: NDArray[Any]) -> NDArray[np.bool_]:
    """Return which values are beyond a limit; one at the limit is kept."""
    good = values_N >= np.float32(limit) if criterion.is_minimum else values_N <= np.float32(limit)
    return ~good
