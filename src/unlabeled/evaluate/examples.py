"""Predictions of single test images, and pictures of some that are right and some that are wrong."""

from __future__ import annotations

from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from unlabeled.errors import UserError
from unlabeled.evaluate.result import Picture
from unlabeled.features.inputs import as_pixels

if TYPE_CHECKING:
    from unlabeled.evaluate.labelled import Labelled

EACH = 8  # hits, and as many misses
SIDE = 144  # pixels


def examples(task: Labelled, predicted_M: NDArray[np.int64], seed: int = 0) -> dict[str, Any]:
    """What `result_of` takes of single images: predictions, truths, pictures.

    The same test images are tried in the same order for every model, so that pages of several can be compared.
    """
    truths_M = task.test.labels_N
    pictures = []
    for is_hit in (True, False):
        order = np.random.default_rng(seed).permutation(len(truths_M))
        for place in order[(predicted_M == truths_M)[order] == is_hit][:EACH].tolist():
            said, truth = task.classes[predicted_M[place]], task.classes[truths_M[place]]
            try:
                image = thumbnail(as_pixels(task.test.read_image(place)))
            except UserError:  # a table whose images have moved has no pictures, and its figures all the same
                continue
            pictures.append(Picture(truth if is_hit else f"{truth}, said {said}", image, is_hit))
    return {
        "predictions": [task.classes[number] for number in predicted_M],
        "truths": [task.classes[number] for number in truths_M],
        "pictures": pictures,
    }


def thumbnail(pixels_HW3: NDArray[np.uint8], side: int = SIDE) -> bytes:
    """A JPEG of an image, whose longer side has `side` pixels; small images are enlarged pixel by pixel."""
    height, width = pixels_HW3.shape[:2]
    scale = side / max(height, width)
    way = Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS
    sides = (max(1, round(width * scale)), max(1, round(height * scale)))
    buffer = BytesIO()
    Image.fromarray(pixels_HW3).resize(sides, way).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()
