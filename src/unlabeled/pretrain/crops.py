"""The multi-crop pipeline: two global and several local crops of an image, augmented as DINOv2's were.

Parameters are drawn here, all of an image's at once; the pixels are made in C (_pixels.c) from them.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from unlabeled.pretrain import _pixels

NUM_TRIES = 10  # boxes drawn before the centre is taken, as torchvision's RandomResizedCrop does
NUM_UNIFORM = 2 * NUM_TRIES + 2 + 4 + 5 + 5  # random numbers a crop: boxes, place, order, chances, ranges

# One crop, as _pixels.c reads it.
_NAMES = (
    *("top", "left", "height", "width"),  # the box in the image, pixels
    *(
        "flip",
        "jitter",
        "grey",
        "sigma",
        "solarise",
    ),  # 0: no; sigma: of the blur, pixels; solarise: threshold
    *("brightness", "contrast", "saturation", "hue"),  # factors; hue: share of the colour circle
    "radius",  # of the blur's kernel, pixels
)
PARAMETERS = np.dtype(
    [
        *((name, "f4") for name in _NAMES),
        ("order", "f4", 4),  # of jitter: 0 brightness, 1 contrast, 2 saturation, 3 hue
    ]
)
assert PARAMETERS.itemsize == 4 * _pixels.NUM_PARAMETERS
_BOX, _CHANCES, _SIGMA, _SOLARISE, _RANGES, _RADIUS, _ORDER = (
    slice(0, 4), slice(4, 9), 7, 8, slice(9, 13), 13, slice(14, 18)
)  # fmt: skip


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
    blur_kernel: int = 9  # pixels across, odd, at most 17; DINO's Pillow blur is not cut: 17
    solarise: float = 0.2  # probability, second global crop only
    solarise_threshold: int = 128  # grey level from which on pixels are inverted

    def fitted(self, patch_size: int) -> CropRecipe:
        """The same with both sizes at the nearest multiple of a patch, and at least one patch."""
        sizes = (self.global_size, self.local_size)
        fitted = [max(1, round(size / patch_size)) * patch_size for size in sizes]
        return replace(self, global_size=fitted[0], local_size=fitted[1])


class Crops(NamedTuple):
    """The crops of one image, planar RGB."""

    globals: NDArray[np.uint8]  # (G, 3, S, S)
    locals: NDArray[np.uint8]  # (L, 3, s, s)


class _Table(NamedTuple):
    """A recipe as arrays, one row a crop."""

    scale: tuple[NDArray[np.float64], NDArray[np.float64]]  # (V, 1) each: lowest, span
    ratio: tuple[float, float]  # lowest, span, of the logarithm
    chances: NDArray[np.float64]  # (V, 5) of flip, jitter, grey, blur, solarise
    ranges: tuple[
        NDArray[np.float64], NDArray[np.float64]
    ]  # (5,) each: lowest, span; of the factors, hue, sigma


@functools.lru_cache(maxsize=16)
def _table(recipe: CropRecipe) -> _Table:
    num_globals, num_locals = recipe.num_globals, recipe.num_locals
    views = np.repeat([0, 1, 2], [min(num_globals, 1), max(num_globals - 1, 0), num_locals])
    scale = np.array([recipe.global_scale, recipe.global_scale, recipe.local_scale])[views]
    solarise = (0.0, recipe.solarise, 0.0)
    chances = [
        (recipe.flip, recipe.jitter, recipe.grey, recipe.blur[view], solarise[view]) for view in range(3)
    ]
    halves = (recipe.brightness, recipe.contrast, recipe.saturation)
    ranges = np.array(
        [*((max(0, 1 - x), 1 + x) for x in halves), (-recipe.hue, recipe.hue), recipe.blur_sigma]
    )
    low, high = np.log(recipe.ratio)
    return _Table(
        (scale[:, :1], scale[:, 1:] - scale[:, :1]),
        (low, high - low),
        np.array(chances)[views],
        (ranges[:, 0], ranges[:, 1] - ranges[:, 0]),
    )


def draw_parameters(
    height: int, width: int, recipe: CropRecipe, rng: np.random.Generator
) -> NDArray[np.void]:
    """Everything random about the crops of an image: global crops first, then local ones.

    Args:
        height: of the image, pixels.
        width: of the image, pixels.
        recipe: the distributions.
        rng: the only source of randomness.

    Returns:
        (G + L,) of dtype PARAMETERS.
    """
    table = _table(recipe)
    count = len(table.chances)
    uniform = rng.random((count, NUM_UNIFORM))
    values = np.empty((count, _pixels.NUM_PARAMETERS), np.float32)
    rest = uniform[:, 2 * NUM_TRIES + 2 :]
    _draw_boxes(values[:, _BOX], uniform, table, recipe.ratio, height, width)
    values[:, _ORDER] = rest[:, :4].argsort(axis=1)
    values[:, _CHANCES] = rest[:, 4:9] < table.chances
    ranges = table.ranges[0] + rest[:, 9:] * table.ranges[1]
    values[:, _RANGES] = ranges[:, :4]
    values[:, _SIGMA] *= ranges[:, 4]
    values[:, _SOLARISE] *= recipe.solarise_threshold
    values[:, _RADIUS] = recipe.blur_kernel // 2
    return values.view(PARAMETERS)[:, 0]


def _draw_boxes(
    boxes: NDArray[np.float32],
    uniform: NDArray[np.float64],
    table: _Table,
    ratio: tuple[float, float],
    height: int,
    width: int,
) -> None:
    """Random-resized boxes: an area, an aspect, a place; the first of ten tries that fits, else the centre."""
    side = np.sqrt(height * width * (table.scale[0] + uniform[:, :NUM_TRIES] * table.scale[1]))
    stretch = np.exp(0.5 * (table.ratio[0] + uniform[:, NUM_TRIES : 2 * NUM_TRIES] * table.ratio[1]))
    heights, widths = np.rint(side / stretch), np.rint(side * stretch)
    fits = (widths <= width) & (heights <= height) & (widths > 0) & (heights > 0)
    first = fits.argmax(1)
    rows = np.arange(len(boxes))
    boxes[:, 2], boxes[:, 3] = heights[rows, first], widths[rows, first]
    boxes[:, :2] = uniform[:, 2 * NUM_TRIES : 2 * NUM_TRIES + 2] * ((height + 1, width + 1) - boxes[:, 2:])
    boxes[:, :2] = np.floor(boxes[:, :2])
    missed = ~fits[rows, first]
    if missed.any():
        own = width / height
        whole_width = width if own <= ratio[1] else max(1, round(height * ratio[1]))
        whole_height = height if own >= ratio[0] else max(1, round(width / ratio[0]))
        top, left = (height - whole_height) // 2, (width - whole_width) // 2
        boxes[missed] = (top, left, whole_height, whole_width)


def apply_parameters(
    image_HW3: NDArray[np.uint8],
    parameters: NDArray[np.void],
    size: int,
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """Crops of one size: resampled (bicubic, antialiased), flipped, jittered, greyed, blurred, solarised.

    Each step rounds to 8 bits as Pillow does.

    Args:
        image_HW3: uint8 RGB.
        parameters: (n,) of dtype PARAMETERS, boxes inside the image.
        size: pixels.
        out: uint8 (n, 3, size, size) to write to, each crop contiguous; a new array if None.

    Returns:
        uint8 (n, 3, size, size).

    Raises:
        ValueError: a box outside the image, a kernel beyond 17 pixels, an `out` whose crops are not contiguous.
    """
    if out is None:
        out = np.empty((len(parameters), 3, size, size), np.uint8)
    if len(parameters):
        _pixels.crops(np.ascontiguousarray(image_HW3), np.ascontiguousarray(parameters), out)
    return out


def make_crops(
    image_HW3: NDArray[np.uint8], recipe: CropRecipe, rng: np.random.Generator, out: Crops | None = None
) -> Crops:
    """The crops of one image; the same rng state gives the same crops.

    Args:
        image_HW3: uint8 RGB, any size.
        recipe: sizes and augmentations.
        rng: the only source of randomness.
        out: arrays to write to, each crop contiguous (a slot of a batch will do); new ones if None.
    """
    height, width = image_HW3.shape[:2]
    parameters = draw_parameters(height, width, recipe, rng)
    split, (globals_out, locals_out) = recipe.num_globals, out or (None, None)
    return Crops(
        apply_parameters(image_HW3, parameters[:split], recipe.global_size, globals_out),
        apply_parameters(image_HW3, parameters[split:], recipe.local_size, locals_out),
    )


def smallest_side(recipe: CropRecipe) -> int:
    """The short side, in pixels, to which an image may be reduced before its crops are made.

    From it the smallest box of the recipe is still reduced 1.5 times, so that `decode(data, smallest_side(recipe))`
    gives large photographs at 1/2, 1/4 or 1/8 of their size at no loss that resampling would not bring anyway.
    """
    narrow = min(recipe.ratio[0], 1 / recipe.ratio[1])  # the short side of a box over its long side, at least
    sides = [1.0]
    if recipe.num_globals:
        sides.append(recipe.global_size / math.sqrt(recipe.global_scale[0] * narrow))
    if recipe.num_locals:
        sides.append(recipe.local_size / math.sqrt(recipe.local_scale[0] * narrow))
    return math.ceil(1.5 * max(sides))
