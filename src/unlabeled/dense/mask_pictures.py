"""Masks over their images: overlays, and a page of references and targets to publish."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import cv2
import numpy as np
from matplotlib.patheffects import withStroke
from matplotlib.text import Text
from numpy.typing import NDArray

from unlabeled.dense.masks import IGNORE
from unlabeled.features.page import (
    DPI,
    SMALL,
    WIDTH,
    Page,
    Scale,
    grey,
    heat,
    lay_out,
    photograph,
    shortened,
    text_width,
    to_bytes,
)  # fmt: skip

TINT = 0.6  # of the class's colour in an overlay
# Of the first classes: apart in hue and in lightness (Okabe and Ito 2008, the black left out), then by hue alone.
_COLOURS = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (213, 94, 0), (0, 114, 178), (240, 228, 66),
            (204, 121, 167))  # fmt: skip
_NAMED = 0.012  # share of a panel from which on a region bears its name


class Shown(NamedTuple):
    """An image of a page, with its classes."""

    name: str
    pixels: NDArray[np.uint8]  # (H, W, 3)
    margin: NDArray[np.float32]  # (H, W), see `Segmentation`
    mask: NDArray[np.uint8]  # (H, W), as it is written
    is_given: bool = False


def class_colour(number: int) -> NDArray[np.float64]:
    """Return the colour of a class, (3,) in [0, 1]."""
    if number < len(_COLOURS):
        return np.array(_COLOURS[number]) / 255
    hue = (number - len(_COLOURS)) * 0.618034 % 1
    return np.array(colorsys.hls_to_rgb(hue, 0.36 + 0.16 * (number % 3), 0.7))


def overlay(
    pixels_HW3: NDArray[np.uint8], mask_HW: NDArray[np.uint8], is_binary: bool = False
) -> NDArray[np.uint8]:
    """Return an image tinted by its classes, each region with an outline.

    Not tinted are pixels of the number 255; of a binary mask, of one object, those of 0.
    """
    shade = grey(pixels_HW3)
    picture = 0.25 * shade + 0.75 * pixels_HW3 / 255
    for number in _regions(mask_HW, is_binary):
        inside = mask_HW == number
        colour = class_colour(number % IGNORE)
        picture[inside] = (1 - TINT) * shade[inside] + TINT * colour
        edge = inside & (cv2.erode(inside.astype(np.uint8), np.ones((3, 3), np.uint8), borderValue=1) == 0)
        picture[edge] = 0.25 + 0.75 * colour
    return to_bytes(picture)


def _regions(mask_HW: NDArray[np.uint8], is_binary: bool) -> list[int]:
    """The numbers that are tinted and named."""
    background = 0 if is_binary else IGNORE
    return [int(number) for number in np.unique(mask_HW) if number != background]


def draw_masks(
    shown: Sequence[Shown], names: Mapping[int, str], is_binary: bool, caption: str = "", width: int = WIDTH
) -> Page:
    """Each image, the margin of its similarities, and its mask, whose large regions bear their names.

    names: of classes by number.
    """
    margins = np.concatenate([one.margin.ravel() for one in shown])
    low, high = (float(value) for value in np.percentile(margins, [1, 99]))
    label = "similarity to the first class less that to the second"
    if is_binary:
        label = "similarity to the object less that to the background"
    scale = Scale(label, low, max(high, low + 1e-3), "viridis")
    titles = [[shortened(one.name), "similarity", "mask, given" if one.is_given else "mask"] for one in shown]
    shapes = [(one.pixels.shape[0], one.pixels.shape[1]) for one in shown]
    page = lay_out(shapes, titles, scale=scale, caption=caption, width=width)
    for index, one in enumerate(shown):
        image = photograph(one.pixels, page.boxes[index][0])
        page.put(index, 0, image)
        box = page.boxes[index][1]
        margin = cv2.resize(one.margin, (box.width, box.height), interpolation=cv2.INTER_AREA)
        page.put(index, 1, heat(image, margin, scale))
        _put_mask(page, index, 2, image, one.mask, names, is_binary)
    return page


def draw_frames(
    frames: Sequence[tuple[str, NDArray[np.uint8], NDArray[np.uint8]]],
    names: Mapping[int, str],
    is_binary: bool,
    caption: str = "",
    width: int = WIDTH,
) -> Page:
    """Frames of a video, (name, pixels, mask), with their masks over them; the other arguments as `draw_masks`'s."""
    shapes = [(pixels.shape[0], pixels.shape[1]) for _, pixels, _ in frames]
    page = lay_out(shapes, [[shortened(name)] for name, _, _ in frames], caption=caption, width=width)
    for index, (_, pixels, mask) in enumerate(frames):
        image = photograph(pixels, page.boxes[index][0])
        _put_mask(page, index, 0, image, mask, names, is_binary)
    return page


def _put_mask(
    page: Page,
    image: int,
    panel: int,
    pixels_HW3: NDArray[np.uint8],
    mask: NDArray[np.uint8],
    names: Mapping[int, str],
    is_binary: bool,
) -> None:
    """Put a mask over its image at a panel's size; write each class's name where it is widest, if it has the room."""
    box = page.boxes[image][panel]
    mask_HW = cv2.resize(mask, (box.width, box.height), interpolation=cv2.INTER_NEAREST)
    page.put(image, panel, overlay(pixels_HW3, mask_HW, is_binary))
    for number in _regions(mask_HW, is_binary):
        inside = np.pad((mask_HW == number).astype(np.uint8), 1)
        if is_binary or number not in names or inside.mean() < _NAMED:
            continue
        distance = cv2.distanceTransform(inside, cv2.DIST_L2, 5)[1:-1, 1:-1]
        y, x = np.unravel_index(int(distance.argmax()), distance.shape)
        size = 0.72 * SMALL * page.unit
        half = text_width(names[number], size) / 2 + 2
        left = min(max(float(x), half), box.width - half)
        rim = withStroke(linewidth=2.4 * page.unit, foreground="#222222")
        artist = Text(
            box.left + left, box.top + float(y), names[number], color="white", fontsize=size * 72 / DPI,
            ha="center", va="center", parse_math=False, path_effects=[rim],
        )  # fmt: skip
        page.axes.add_artist(artist)
