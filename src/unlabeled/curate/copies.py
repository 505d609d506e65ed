"""Copies of an image as people make them: the transformations of DISC21 (2106.09672) and Copydays (Douze et al. 2009).

Each takes RGB pixels and a generator, and returns RGB pixels, uint8 (H, W, 3); the same generator state gives the
same copy. Any image of at least 2 x 2 pixels will do, and what is given is never written to. What is drawn over a
picture is in `overlays.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from unlabeled.curate.overlays import Pixels, Transformation, as_bytes, emoji, resized, screenshot, text

REMOVED = (0.1, 0.8)  # share of the area that a crop takes away (Copydays)
QUALITIES = (3, 5, 8, 10, 15, 20, 30, 50, 75)  # of JPEG (Copydays)
LEVELS = np.arange(256.0)


def crop(pixels_HW3: Pixels, rng: np.random.Generator) -> Pixels:
    """Take away 10% to 80% of the area; a box anywhere, its aspect within 3/4 and 4/3 of the image's."""
    height, width = pixels_HW3.shape[:2]
    kept = 1 - rng.uniform(*REMOVED)
    # Neither side may be longer than the image's: that bounds the aspect where much is kept.
    most = min(np.log(4 / 3), -np.log(kept))
    stretch = np.exp(rng.uniform(-most, most) / 2)
    h = max(2, min(height, round(height * np.sqrt(kept) * stretch)))
    w = max(2, min(width, round(width * np.sqrt(kept) / stretch)))
    top, left = int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1))
    return pixels_HW3[top : top + h, left : left + w].copy()


def jpeg(pixels_HW3: Pixels, rng: np.random.Generator) -> Pixels:
    """Compress at one of Copydays' qualities, 3 to 75."""
    quality = int(rng.choice(QUALITIES))
    _, data = cv2.imencode(".jpg", pixels_HW3[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    return as_bytes(cv2.imdecode(data, cv2.IMREAD_COLOR)[:, :, ::-1])


def resize(pixels_HW3: Pixels, rng: np.random.Generator) -> Pixels:
    """Shrink each side to 15% to 70%, and change the aspect by up to 1.5 either way."""
    height, width = pixels_HW3.shape[:2]
    scale, stretch = rng.uniform(0.15, 0.7), np.exp(rng.uniform(-1, 1) * np.log(1.5) / 2)
    return resized(pixels_HW3, round(height * scale * stretch), round(width * scale / stretch))


def rotation(pixels_HW3: Pixels, rng: np.random.Generator) -> Pixels:
    """Turn by 5 to 45 degrees either way; the canvas grows, its corners are black, white or grey."""
    degrees = rng.uniform(5, 45) * rng.choice((-1, 1))
    height, width = pixels_HW3.shape[:2]
    matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), degrees, 1.0)
    cosine, sine = abs(matrix[0, 0]), abs(matrix[0, 1])
    w, h = round(width * cosine + height * sine), round(width * sine + height * cosine)
    matrix[:, 2] += (w - width) / 2, (h - height) / 2
    return _warped(pixels_HW3, matrix, (w, h), rng)


def quarter_turn(pixels_HW3: Pixels, rng: np.random.Generator) -> Pixels:
    """Turn by 90, 180 or 270 degrees."""
    return np.ascontiguousarray(np.rot90(pixels_HW3, int(rng.integers(1, 4))))


def flip(pixels_HW3: Pixels, rng: np.random.Generator) -> Pixels:
    """Mirror left and right; top and bottom one time in five."""
    return np.ascontiguousarray(pixels_HW3[::-1] if rng.random() < 0.2 else pixels_HW3[:, ::-1])


def perspective(pixels_HW3: Pixels, rng: np.random.Generator) -> Pixels:
    """Move each corner inwards by up to 15% of the sides, as in a photograph of a print."""
    height, width = pixels_HW3.shape[:2]
    corners = np.array([(0, 0), (width - 1, 0), (width - 1, height - 1), (0, height - 1)], np.float32)
    inwards = np.array([(1, 1), (-1, 1), (-1, -1), (1, -1)]) * (width, height)
    moved = (corners + inwards * rng.uniform(0, 0.15, (4, 2))).astype(np.float32)
    matrix = cv2.getPerspectiveTransform(corners, moved)
    return _warped(pixels_HW3, matrix, (width, height), rng)


def blur(pixels_HW3: Pixels, rng: np.random.Generator) -> Pixels:
    """Blur by a Gaussian whose standard deviation is 0.5% to 3% of the short side."""
    sigma = min(pixels_HW3.shape[:2]) * rng.uniform(0.005, 0.03)
    return as_bytes(cv2.GaussianBlur(pixels_HW3, (0, 0), max(0.3, sigma)))


def brightness(pixels_HW3: Pixels, rng: np.random.Generator) -> Pixels:
    """Change brightness by a factor of 0.4 to 1.8 and contrast, about the middle grey, by one of 0.5 to 1.5."""
    gain, contrast = rng.uniform(0.4, 1.8), rng.uniform(0.5, 1.5)
    return as_bytes(_rounded((LEVELS * gain - 127.5) * contrast + 127.5)[pixels_HW3])


def colour(pixels_HW3: Pixels, rng: np.random.Generator) -> Pixels:
    """Turn the hue by up to 90 degrees either way, and change saturation by a factor of 0.3 to 2.5."""
    hsv = cv2.cvtColor(pixels_HW3, cv2.COLOR_RGB2HSV)
    turned = ((LEVELS + rng.uniform(-45, 45)) % 180).astype(np.uint8)  # OpenCV's hue is in units of 2 degrees
    strengthened = _rounded(LEVELS * np.exp(rng.uniform(np.log(0.3), np.log(2.5))))
    hsv = np.stack((turned[hsv[:, :, 0]], strengthened[hsv[:, :, 1]], hsv[:, :, 2]), 2)
    return as_bytes(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB))


def greyscale(pixels_HW3: Pixels, rng: np.random.Generator) -> Pixels:
    """Take the colour away; half the time tint what is left, as an old photograph."""
    tint = rng.uniform(0.7, 1.1, 3) if rng.random() < 0.5 else np.ones(3)
    return as_bytes(_rounded(LEVELS[:, None] * tint)[cv2.cvtColor(pixels_HW3, cv2.COLOR_RGB2GRAY)])


def noise(pixels_HW3: Pixels, rng: np.random.Generator) -> Pixels:
    """Add Gaussian noise of 8 to 40 levels, and half the time black and white dots on 1% to 5% of the pixels."""
    shape = pixels_HW3.shape
    sigma = np.float32(rng.uniform(8, 40))
    out = _rounded(pixels_HW3 + rng.standard_normal(shape, np.float32) * sigma)
    if rng.random() < 0.5:
        share = rng.uniform(0.01, 0.05)
        drawn = rng.random(shape[:2])
        out[drawn < share / 2], out[drawn > 1 - share / 2] = 0, 255
    return out


# Of one picture alone; a collage needs others beside it.
TRANSFORMATIONS: dict[str, Transformation] = {
    one.__name__: one
    for one in (
        crop, jpeg, resize, rotation, quarter_turn, flip, perspective, blur, brightness, colour, greyscale, noise,
        text, emoji, screenshot,
    )
}  # fmt: skip


def collage(pixels_HW3: Pixels, rng: np.random.Generator, others: Sequence[Pixels]) -> Pixels:
    """Put the picture beside 1 to 3 others, in a canvas of its own size, with a gap of up to 3%.

    Two are halves, three a half and two quarters, four quarters; sides are moved by up to a tenth. Each picture is cut
    to the aspect of its cell around its centre.

    others: images, from which those beside it are drawn; at least one.
    """
    height, width = pixels_HW3.shape[:2]
    h, w = max(16, height), max(16, width)
    y, x = round(h * rng.uniform(0.45, 0.55)), round(w * rng.uniform(0.45, 0.55))
    quarters = [(0, y, 0, x), (0, y, x, w), (y, h, 0, x), (y, h, x, w)]
    count = int(rng.integers(2, 5))
    cells = quarters
    if count < 4:
        upright = bool(rng.integers(2))  # halves side by side, not above each other
        halves = [(0, h, 0, x), (0, h, x, w)] if upright else [(0, y, 0, w), (y, h, 0, w)]
        cells = halves if count == 2 else [halves[0], *(quarters[1::2] if upright else quarters[2:])]
    own = int(rng.integers(len(cells)))
    gap = round(min(h, w) * rng.uniform(0, 0.03) / 2)
    canvas = np.full((h, w, 3), rng.integers(0, 256, 3), np.uint8)
    for place, (top, bottom, left, right) in enumerate(cells):
        shown = pixels_HW3 if place == own else others[int(rng.integers(len(others)))]
        top, bottom, left, right = top + gap, bottom - gap, left + gap, right - gap
        canvas[top:bottom, left:right] = _covering(shown, bottom - top, right - left)
    return canvas


def composed(names: Sequence[str], pixels_HW3: Pixels, rng: np.random.Generator) -> Pixels:
    """Apply transformations one after the other.

    names: of TRANSFORMATIONS.
    """
    for name in names:
        pixels_HW3 = TRANSFORMATIONS[name](pixels_HW3, rng)
    return pixels_HW3


def composition(pixels_HW3: Pixels, rng: np.random.Generator) -> Pixels:
    """Two or three different transformations, drawn at random, one after the other."""
    return composed(draw_names(rng, int(rng.integers(2, 4))), pixels_HW3, rng)


def draw_names(
    rng: np.random.Generator, count: int, names: Sequence[str] = tuple(TRANSFORMATIONS)
) -> list[str]:
    """Draw different transformations, in a random order."""
    return [names[place] for place in rng.permutation(len(names))[:count].tolist()]


def make_copy(pixels_HW3: Pixels, rng: np.random.Generator) -> Pixels:
    """Return a copy by one to three transformations, drawn at random: one in half of the cases, else a composition."""
    if rng.random() < 0.5:
        return composed(draw_names(rng, 1), pixels_HW3, rng)
    return composition(pixels_HW3, rng)


def _warped(
    pixels_HW3: Pixels, matrix: NDArray[np.float64], size: tuple[int, int], rng: np.random.Generator
) -> Pixels:
    """The pixels moved by an affine or projective matrix, onto one shade of grey; size: width, height."""
    border = (int(rng.choice((0, 128, 255))),) * 3
    warp = cv2.warpAffine if matrix.shape[0] == 2 else cv2.warpPerspective
    return as_bytes(warp(pixels_HW3, matrix, size, flags=cv2.INTER_LINEAR, borderValue=border))


def _covering(pixels_HW3: Pixels, h: int, w: int) -> Pixels:
    """The largest centred part of the aspect of h x w, resized to that."""
    height, width = pixels_HW3.shape[:2]
    scale = min(height / h, width / w)
    inner_h, inner_w = (
        max(1, min(side, round(wanted * scale))) for side, wanted in ((height, h), (width, w))
    )
    top, left = (height - inner_h) // 2, (width - inner_w) // 2
    return resized(pixels_HW3[top : top + inner_h, left : left + inner_w], h, w)


def _rounded(values: NDArray[Any]) -> Pixels:
    return values.clip(0, 255).round().astype(np.uint8)
