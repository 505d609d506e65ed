"""The multi-crop pipeline: two global and several local crops of an image, augmented as DINOv2's were.

Parameters are drawn here, all of an image's at once; the pixels are made in C (_pixels.c) from them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from unlabeled.pretrain import _pixels

NUM_TRIES = 10  # boxes drawn before the centre is taken, as torchvision's RandomResizedCrop does

# One crop, as _pixels.c reads it.
PARAMETERS = np.dtype(
    [
        *((name, "f4") for name in ("top", "left", "height", "width", "flip", "jitter")),
        ("order", "f4", 4),  # of 0 brightness, 1 contrast, 2 saturation, 3 hue
        *((name, "f4") for name in ("brightness", "contrast", "saturation", "hue", "grey", "sigma", "solarise")),
    ]
)
assert PARAMETERS.itemsize == 4 * _pixels.NUM_PARAMETERS


@dataclass(frozen=True)
class CropRecipe:
    """Sizes, scales and augmentations (DINOv2 appendix B; DINO section 3)."""

    global_size: int = 224  # pixels
    local_size: int = 98  # pixels
    num_globals: int = 2
    num_locals: int = 8
    global_scale: tuple[float, float] = (0.32, 1.0)  # share of the image's area
    local_scale: tuple[float, float] = (0.05, 0.32)  # share of the image's area
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width over height, log-uniform
    flip: float = 0.5  # probability of a horizontal flip
    jitter: float = 0.8  # probability of colour jitter
    brightness: float = 0.4  # factor in 1 -+ this
    contrast: float = 0.4  # factor in 1 -+ this
    saturation: float = 0.2  # factor in 1 -+ this
    hue: float = 0.1  # shift in -+ this, as a share of the colour circle
    grey: float = 0.2  # probability of greyscale
    # Probability of blur: first global, second global, local crops. The released weights were trained with these;
    # the papers say 1.0, 0.1, 0.5 (an inversion in the released code).
    blur: tuple[float, float, float] = (0.0, 0.9, 0.5)
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # pixels
    solarise: float = 0.2  # probability, second global crop only
    solarise_threshold: int = 128  # grey level from which on pixels are inverted


class Crops(NamedTuple):
    """The crops of one image, planar RGB."""

    globals: NDArray[np.uint8]  # (G, 3, S, S)
    locals: NDArray[np.uint8]  # (L, 3, s, s)


def draw_parameters(height: int, width: int, recipe: CropRecipe, rng: np.random.Generator) -> NDArray[np.void]:
    """Everything random about the crops of an image: global crops first, then local ones.

    Args:
        height: of the image, pixels.
        width: of the image, pixels.
        recipe: the distributions.
        rng: the only source of randomness.

    Returns:
        (G + L,) of dtype PARAMETERS.
    """
    num_globals, count = recipe.num_globals, recipe.num_globals + recipe.num_locals
    uniform = rng.random((count, 2 * NUM_TRIES + 16))
    crops = np.zeros(count, PARAMETERS)
    is_local = np.arange(count) >= num_globals
    scale = np.where(is_local[:, None], recipe.local_scale, recipe.global_scale)
    _draw_boxes(crops, uniform[:, : 2 * NUM_TRIES + 2], scale, recipe.ratio, height, width)
    rest = uniform[:, 2 * NUM_TRIES + 2 :]
    crops["flip"] = rest[:, 0] < recipe.flip
    crops["jitter"] = rest[:, 1] < recipe.jitter
    crops["order"] = rest[:, 2:6].argsort(axis=1)
    for column, name in enumerate(("brightness", "contrast", "saturation"), 6):
        half = getattr(recipe, name)
        crops[name] = np.maximum(0, 1 - half) + rest[:, column] * (1 + half - max(0, 1 - half))
    crops["hue"] = (2 * rest[:, 9] - 1) * recipe.hue
    crops["grey"] = rest[:, 10] < recipe.grey
    view = np.minimum(np.arange(count), 1) + is_local
    low, high = recipe.blur_sigma
    blurred = rest[:, 11] < np.asarray(recipe.blur)[np.minimum(view, 2)]
    crops["sigma"] = np.where(blurred, low + rest[:, 12] * (high - low), 0)
    inverted = (rest[:, 13] < recipe.solarise) & ~is_local & (np.arange(count) > 0)
    crops["solarise"] = inverted * recipe.solarise_threshold
    return crops


def _draw_boxes(
    crops: NDArray[np.void],
    uniform: NDArray[np.float64],
    scale: NDArray[np.float64],
    ratio: tuple[float, float],
    height: int,
    width: int,
) -> None:
    """Random-resized boxes: an area, an aspect, a place; the first of ten tries that fits, else the centre."""
    area = height * width * (scale[:, :1] + uniform[:, :NUM_TRIES] * (scale[:, 1:] - scale[:, :1]))
    low, high = np.log(ratio[0]), np.log(ratio[1])
    aspect = np.exp(low + uniform[:, NUM_TRIES : 2 * NUM_TRIES] * (high - low))
    widths, heights = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    first = fits.argmax(1)
    rows = np.arange(len(crops))
    found = fits[rows, first]
    own = width / height
    whole_width = width if own <= ratio[1] else max(1, round(height * ratio[1]))
    whole_height = height if own >= ratio[0] else max(1, round(width / ratio[0]))
    crops["width"] = np.where(found, widths[rows, first], whole_width)
    crops["height"] = np.where(found, heights[rows, first], whole_height)
    place = uniform[:, 2 * NUM_TRIES :]
    room_y, room_x = height - crops["height"], width - crops["width"]
    crops["top"] = np.where(found, np.floor(place[:, 0] * (room_y + 1)), room_y // 2)
    crops["left"] = np.where(found, np.floor(place[:, 1] * (room_x + 1)), room_x // 2)


def apply_parameters(image_HW3: NDArray[np.uint8], parameters: NDArray[np.void], size: int) -> NDArray[np.uint8]:
    """Crops of one size: resampled (bicubic, antialiased), flipped, jittered, greyed, blurred, solarised.

    Each step rounds to 8 bits as Pillow does.

    Args:
        image_HW3: uint8 RGB.
        parameters: (n,) of dtype PARAMETERS, boxes inside the image.
        size: pixels.

    Returns:
        uint8 (n, 3, size, size).
    """
    out = np.empty((len(parameters), 3, size, size), np.uint8)
    if len(parameters):
        image = np.ascontiguousarray(image_HW3)
        _pixels.crops(image, *image.shape[:2], np.ascontiguousarray(parameters), out, size)
    return out


def make_crops(image_HW3: NDArray[np.uint8], recipe: CropRecipe, rng: np.random.Generator) -> Crops:
    """The crops of one image; the same rng state gives the same crops.

    Args:
        image_HW3: uint8 RGB, any size.
        recipe: sizes and augmentations.
        rng: the only source of randomness.
    """
    parameters = draw_parameters(*image_HW3.shape[:2], recipe, rng)
    return Crops(
        apply_parameters(image_HW3, parameters[: recipe.num_globals], recipe.global_size),
        apply_parameters(image_HW3, parameters[recipe.num_globals :], recipe.local_size),
    )
