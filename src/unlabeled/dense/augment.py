"""Training crops of an image together with what is known of its pixels.

Shape suffixes: H W pixels, h w pixels of the crop.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from unlabeled.images.transform import IMAGENET_MEAN

PADDING = tuple(round(255 * value) for value in IMAGENET_MEAN)  # becomes about 0 when it is normalised


@dataclass(frozen=True)
class DenseAugmentation:
    """How a training crop is drawn; mmsegmentation's pipeline, which the papers' protocols use.

    Attributes:
        size: (height, width) of the crop in pixels.
        scale: range of the factor by which the image is resized before the crop, log-uniform. Of depth (1, 1): an
            image shrunk to half shows things at twice their distance, which its depth does not say.
        flip: probability of a horizontal flip.
        jitter: probability of each of brightness, contrast, saturation and hue being changed.
    """

    size: tuple[int, int]
    scale: tuple[float, float] = (0.5, 2.0)
    flip: float = 0.5
    jitter: float = 0.5

    def __call__(
        self, pixels_HW3: NDArray[np.uint8], target_HW: NDArray[Any], fill: int, rng: np.random.Generator
    ) -> tuple[NDArray[np.uint8], NDArray[Any]]:
        """Return a crop (h, w, 3) and its target (h, w); beyond the image the target is `fill`."""
        pixels, target = self.cropped(pixels_HW3, target_HW, fill, rng)
        if rng.random() < self.flip:
            pixels, target = pixels[:, ::-1], target[:, ::-1]
        return jittered(pixels, self.jitter, rng), np.ascontiguousarray(target)

    def cropped(
        self, pixels_HW3: NDArray[np.uint8], target_HW: NDArray[Any], fill: int, rng: np.random.Generator
    ) -> tuple[NDArray[np.uint8], NDArray[Any]]:
        """Return a random part of the image at a random scale; only that part is resized."""
        scale = float(np.exp(rng.uniform(*np.log(self.scale))))
        (height, width), (h, w) = target_HW.shape, self.size
        # The part in pixels of the image, and the pixels of the crop that it fills.
        rows, columns = min(height, max(1, round(h / scale))), min(width, max(1, round(w / scale)))
        filled_h = h if rows < height else min(h, round(height * scale))
        filled_w = w if columns < width else min(w, round(width * scale))
        top, left = rng.integers(height - rows + 1), rng.integers(width - columns + 1)
        part = (slice(top, top + rows), slice(left, left + columns))
        pixels, target = resize_pair(pixels_HW3[part], target_HW[part], (filled_h, filled_w))
        if (filled_h, filled_w) == (h, w):
            return pixels, target
        padded = np.empty((h, w, 3), np.uint8)
        padded[:] = PADDING
        known = np.full((h, w), fill, target.dtype)
        top, left = rng.integers(h - filled_h + 1), rng.integers(w - filled_w + 1)
        place = (slice(top, top + filled_h), slice(left, left + filled_w))
        padded[place], known[place] = pixels, target
        return padded, known


def resize_pair(
    pixels_HW3: NDArray[np.uint8], target_HW: NDArray[Any], size: tuple[int, int]
) -> tuple[NDArray[np.uint8], NDArray[Any]]:
    """Return both at a size (h, w); of the target the nearest values, since classes and depths do not mix."""
    h, w = size
    height, width = target_HW.shape
    if (h, w) == (height, width):
        return pixels_HW3, target_HW
    interpolation = cv2.INTER_AREA if h < height else cv2.INTER_CUBIC
    pixels = cv2.resize(pixels_HW3, (w, h), interpolation=interpolation)
    rows = ((np.arange(h) + 0.5) * height / h).astype(np.int64)
    columns = ((np.arange(w) + 0.5) * width / w).astype(np.int64)
    return pixels, target_HW[rows[:, None], columns]


def jittered(
    pixels_HW3: NDArray[np.uint8], probability: float, rng: np.random.Generator
) -> NDArray[np.uint8]:
    """Return the image with its brightness, contrast, saturation and hue changed, each with this probability.

    By -32 to 32 of 255, by factors of 0.5 to 1.5 (twice), and by -36 to 36 degrees.
    """
    chances = rng.random(4)
    shift, contrast = rng.uniform(-32, 32), rng.uniform(0.5, 1.5)
    saturation, hue = rng.uniform(0.5, 1.5), int(rng.integers(-18, 19))
    pixels = np.ascontiguousarray(pixels_HW3)
    alpha = contrast if chances[1] < probability else 1.0
    beta = shift if chances[0] < probability else 0.0
    if alpha != 1 or beta != 0:
        levels = np.clip(alpha * np.arange(256) + beta, 0, 255).round().astype(np.uint8)
        pixels = cv2.LUT(pixels, levels)
    if min(chances[2:]) < probability:
        hsv = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV)  # hue in steps of two degrees
        if chances[2] < probability:
            levels = np.clip(saturation * np.arange(256), 0, 255).round().astype(np.uint8)
            hsv[..., 1] = cv2.LUT(hsv[..., 1], levels)
        if chances[3] < probability:
            hsv[..., 0] = ((hsv[..., 0].astype(np.int16) + hue) % 180).astype(np.uint8)
        pixels = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    return np.asarray(pixels, np.uint8)
