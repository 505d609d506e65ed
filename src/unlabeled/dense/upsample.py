"""From patches to pixels: maps of a patch grid at an image's full size, with edges that follow the image.

Shape suffixes: H W pixels, h w patches, C maps.
"""

from __future__ import annotations

from collections.abc import Iterator

import cv2
import numpy as np
from numpy.typing import NDArray

from unlabeled.features.page import grey

RADIUS = 1.0  # patches: half the side of the filter's window
EPSILON = 1e-3  # of a guide in [0, 1]: edges with a variance well above it are kept


def guided_filter(
    guide_HW: NDArray[np.floating], values_HW: NDArray[np.floating], radius: int, epsilon: float = EPSILON
) -> NDArray[np.float32]:
    """Return values smoothed everywhere but across the edges of a guide, (H, W).

    In each window the values are taken as a linear function of the guide, and a pixel gets the mean of what the
    windows around it say (He et al. 2010, "Guided image filtering", equations 5, 6 and 8). Windows are
    (2 radius + 1) pixels wide, cut at the image's borders.

    guide: in [0, 1]. radius: pixels; 0 returns the values. epsilon: of the guide's variance.
    """
    return next(_guided(guide_HW, iter([values_HW]), radius, epsilon))


def upsampled(
    maps_Chw: NDArray[np.floating],
    pixels_HW3: NDArray[np.uint8],
    radius: float = RADIUS,
    epsilon: float = EPSILON,
) -> Iterator[NDArray[np.float32]]:
    """Give each map of a patch grid at an image's size, (H, W), one after the other.

    Bilinear between the patches' centres, then a guided filter on the image's luminance. A grid of the image's own
    size and a radius of 0 gives the maps as they are. radius: in patches; 0 is bilinear alone.
    """
    height, width = pixels_HW3.shape[:2]
    h, w = maps_Chw.shape[1:]
    pixels = round(radius * max(height / h, width / w))
    bilinear = (enlarged(values, (height, width)) for values in maps_Chw)
    if not pixels:
        yield from bilinear
        return
    yield from _guided(grey(pixels_HW3)[:, :, 0], bilinear, pixels, epsilon)


def enlarged(values_hw: NDArray[np.floating], shape: tuple[int, int]) -> NDArray[np.float32]:
    """Return a patch grid's values at (height, width), bilinear between the centres of patches."""
    values: NDArray[np.float32] = cv2.resize(
        values_hw.astype(np.float32), shape[::-1], interpolation=cv2.INTER_LINEAR
    )
    return values


def _guided(
    guide_HW: NDArray[np.floating], maps: Iterator[NDArray[np.floating]], radius: int, epsilon: float
) -> Iterator[NDArray[np.float32]]:
    """`guided_filter` of several maps with one guide, whose own means are taken once."""
    # Centred, so that float32 holds the small differences that variances are made of.
    guide = (guide_HW - guide_HW.mean()).astype(np.float32)
    side = 2 * radius + 1

    def box(values: NDArray[np.float32]) -> NDArray[np.float32]:
        sums: NDArray[np.float32] = cv2.boxFilter(
            values, cv2.CV_32F, (side, side), normalize=False, borderType=cv2.BORDER_CONSTANT
        )
        return sums

    counts = box(np.ones_like(guide))
    mean = box(guide) / counts
    variance = box(guide * guide) / counts - mean * mean
    for values_HW in maps:
        values = values_HW.astype(np.float32)
        value_mean = box(values) / counts
        slope = (box(guide * values) / counts - mean * value_mean) / (variance + epsilon)
        offset = value_mean - slope * mean
        yield (box(slope) * guide + box(offset)) / counts
