"""Whole images to whole patches: an image's patch grid covers it exactly, whatever its size and shape.

An image is resized to the wanted short side with each side rounded to a multiple of the patch (a stretch of at
most half a patch), so that patch (row, column) of a grid (h, w) is the part of the original image from
(column * W / w, row * H / h) to ((column + 1) * W / w, (row + 1) * H / h).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unlabeled.errors import UserError
from unlabeled.features.inputs import ImageLike, as_pixels
from unlabeled.images.transform import normalize

if TYPE_CHECKING:
    from unlabeled.vit import VisionTransformer

MAX_PATCHES = 2**16  # an image; more is a mistake in the size sooner than a wish
LEAST_PATCHES = 14  # along a short side; on fewer a picture shows nothing, and no released model has fewer


def default_size(model: VisionTransformer) -> int:
    """Short side in pixels at which a model is at home: that of the images its position embedding is learned on.

    518 for the released DINOv2 models; of a model of small images LEAST_PATCHES patches.
    """
    return max(model.config.image_size, LEAST_PATCHES * model.config.patch_size)


def patch_grid(height: int, width: int, patch_size: int, size: int) -> tuple[int, int]:
    """Return the patches (h, w) of an image whose short side is brought to about `size` pixels.

    Raises UserError for an image or a size below one patch, and for more than MAX_PATCHES patches.
    """
    if min(height, width) < patch_size:
        raise UserError(
            f"An image of {width} x {height} pixels is smaller than one patch of {patch_size}; enlarge it."
        )
    if size < patch_size:
        raise UserError(
            f"A short side of {size} pixels is smaller than one patch of {patch_size}; choose more."
        )
    patches = size / min(height, width) / patch_size
    h, w = (max(1, round(side * patches)) for side in (height, width))
    if h * w > MAX_PATCHES:
        raise UserError(
            f"An image of {width} x {height} pixels has {w} x {h} patches at a short side of {size} pixels, more "
            f"than {MAX_PATCHES}; choose a smaller size."
        )
    return h, w


def fitted(model: VisionTransformer, image: ImageLike, size: int | None) -> tuple[Tensor, tuple[int, int]]:
    """Return an image as a model takes it, (1, 3, h * patch, w * patch) on the model's device, and its grid (h, w).

    size: short side in pixels; None is `default_size`.
    Raises UserError as `as_pixels` and `patch_grid` do, and for a model of other than RGB images.
    """
    from PIL import Image

    if model.config.in_channels != 3:
        raise UserError(f"This model sees images of {model.config.in_channels} channels; RGB has 3.")
    pixels = as_pixels(image)
    height, width = pixels.shape[:2]
    patch_size = model.config.patch_size
    try:
        h, w = patch_grid(height, width, patch_size, default_size(model) if size is None else size)
    except UserError as error:
        raise UserError(f"{image}: {error}" if isinstance(image, str | Path) else str(error)) from error
    if (height, width) != (h * patch_size, w * patch_size):
        wanted = (w * patch_size, h * patch_size)
        pixels = np.asarray(Image.fromarray(pixels).resize(wanted, Image.Resampling.BICUBIC))
    parameter = next(model.parameters())
    planar = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))[None].to(parameter.device)
    return normalize(planar).to(parameter.dtype), (h, w)


def patch_features(
    model: VisionTransformer, image: ImageLike, size: int | None = None
) -> NDArray[np.float32]:
    """Return the patch tokens of one image after the last norm, float32 (h, w, D).

    size: short side in pixels; None is `default_size`.
    Raises UserError for what is no image, too small or too large, and for features that are not finite.
    """
    with evaluating(model):
        images_13HW, grid = fitted(model, image, size)
        tokens = model(images_13HW)
    return finite(tokens.patches[0]).reshape(*grid, -1)


def finite(values: Tensor) -> NDArray[np.float32]:
    """Return what a model computed as a float32 array. Raises UserError for infinities and NaN."""
    array: NDArray[np.float32] = values.float().cpu().numpy()
    if not np.isfinite(array).all():
        raise UserError("The model computes infinities or NaN on this image; are its weights whole?")
    return array


@contextmanager
def evaluating(model: VisionTransformer) -> Iterator[None]:
    """Run a model without gradients and in evaluation mode, and leave it in the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def unit_rows(features_hwD: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return (h * w, D) features, row by row, each of length 1; zeros stay zeros."""
    rows = features_hwD.reshape(-1, features_hwD.shape[-1])
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    unit: NDArray[np.float32] = rows / np.maximum(lengths, np.finfo(np.float32).tiny)
    return unit


def centres(
    indices_N: NDArray[np.int64], grid: tuple[int, int], image: tuple[int, int]
) -> NDArray[np.float64]:
    """Return the centres (x, y) of patches in pixels of the original image, (N, 2).

    indices: row by row in the grid (h, w). image: (height, width). The image's edges are at 0 and width, so that
    the centre of its first pixel is (0.5, 0.5).
    """
    rows, columns = np.divmod(indices_N, grid[1])
    return np.stack(((columns + 0.5) * image[1] / grid[1], (rows + 0.5) * image[0] / grid[0]), axis=1)


def check_layer(model: VisionTransformer, layer: int) -> None:
    """Raise UserError for a block that a model has not."""
    depth = len(model.blocks)
    if not -depth <= layer < depth:
        raise UserError(
            f"There is no layer {layer}: this model has blocks 0 to {depth - 1}, or -{depth} to -1."
        )
