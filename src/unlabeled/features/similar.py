"""How much every patch is like the one that is pointed at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from unlabeled.errors import UserError
from unlabeled.features.fitting import patch_features, unit_rows
from unlabeled.features.inputs import ImageLike, as_pixels
from unlabeled.weights.load import as_model

if TYPE_CHECKING:
    from unlabeled.vit import VisionTransformer


def similar(
    model: VisionTransformer | str | Path, image: ImageLike, at: tuple[float, float], size: int | None = None
) -> NDArray[np.float32]:
    """Return the cosine of every patch of an image with the one at a point, (h, w) in [-1, 1].

    model: a backbone, or a MODEL's text, which is loaded each time.
    image: path, bytes, Pillow image, array or tensor. at: (x, y) in pixels of the image as given, from its top left
        corner. size: short side in pixels; None is `default_size`.
    Raises UserError for a point outside of the image, and for what is no image.
    """
    return similar_across(as_model(model), [image], at, size)[0]


def similar_across(
    model: VisionTransformer, images: Sequence[ImageLike], at: tuple[float, float], size: int | None = None
) -> list[NDArray[np.float32]]:
    """Return the cosine of every patch of some images with the patch at a point of the first, (h, w) each.

    Arguments and errors are those of `similar`.
    """
    height, width = as_pixels(images[0]).shape[:2]
    if not (0 <= at[0] < width and 0 <= at[1] < height):
        raise UserError(
            f"The point {at[0]:g},{at[1]:g} is outside of the image: x is from 0 to {width - 1}, y to {height - 1}."
        )
    features = [patch_features(model, image, size) for image in images]
    h, w = features[0].shape[:2]
    row, column = patch_at(at, (h, w), (height, width))
    wanted_D = unit_rows(features[0])[row * w + column]
    return [(unit_rows(grid) @ wanted_D).clip(-1, 1).reshape(grid.shape[:2]) for grid in features]


def patch_at(at: tuple[float, float], grid: tuple[int, int], image: tuple[int, int]) -> tuple[int, int]:
    """Return the (row, column) of the patch that the centre of pixel (x, y) lies in.

    grid: patches (h, w). image: (height, width) in pixels. Fractions of a pixel in x and y are dropped.
    """
    column = int((int(at[0]) + 0.5) * grid[1] / image[1])
    row = int((int(at[1]) + 0.5) * grid[0] / image[0])
    return row, column
