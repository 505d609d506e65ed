"""The multi-crop pipeline: two global and several local crops of an image, augmented as DINOv2's were."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray


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
    greyscale: float = 0.2  # probability
    # Probability of blur: first global, second global, local. The released weights were trained with these; the
    # papers say (1.0, 0.1, 0.5) (an inversion in the released code).
    blur: tuple[float, float, float] = (0.0, 0.9, 0.5)
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # pixels
    solarise: float = 0.2  # probability, second global crop only
    solarise_threshold: int = 128


class Crops(NamedTuple):
    """uint8 (G, 3, S, S) and (L, 3, s, s)."""

    globals: NDArray[np.uint8]
    locals: NDArray[np.uint8]


def make_crops(image, recipe, rng):
    G = np.stack([_crop(image, recipe, rng, recipe.global_size, recipe.global_scale, recipe.blur[v], v == 1) for v in range(recipe.num_globals)])
    s = recipe.local_size
    L = np.stack([_crop(image, recipe, rng, s, recipe.local_scale, recipe.blur[2], False) for v in range(recipe.num_locals)]) if recipe.num_locals else np.zeros((0, 3, s, s), np.uint8)
    return Crops(G, L)


def _crop(im, r, rng, size, scale, blur, sol):
    H, W = im.shape[:2]
    for _ in range(10):
        ar = H * W * rng.uniform(*scale)
        q = math.exp(rng.uniform(math.log(r.ratio[0]), math.log(r.ratio[1])))
        w = round(math.sqrt(ar * q))
        h = round(math.sqrt(ar / q))
        if 0 < w <= W and 0 < h <= H:
            break
    else:
        w = h = min(H, W)
    y = int(rng.integers(0, H - h + 1))
    x = int(rng.integers(0, W - w + 1))
    c = cv2.resize(im[y : y + h, x : x + w], (size, size), interpolation=cv2.INTER_CUBIC if h < size else cv2.INTER_AREA)
    if rng.random() < r.flip:
        c = c[:, ::-1]
    f = c.astype(np.float32)
    g3 = np.float32([0.299, 0.587, 0.114])
    if rng.random() < r.jitter:
        for k in rng.permutation(4):
            if k == 0:
                f = f * rng.uniform(1 - r.brightness, 1 + r.brightness)
            elif k == 1:
                m = (f @ g3).mean()
                f = m + (f - m) * np.float32(rng.uniform(1 - r.contrast, 1 + r.contrast))
            elif k == 2:
                g = (f @ g3)[..., None]
                f = g + (f - g) * np.float32(rng.uniform(1 - r.saturation, 1 + r.saturation))
            else:
                hsv = cv2.cvtColor(np.clip(f, 0, 255).astype(np.uint8), cv2.COLOR_RGB2HSV)
                hsv[..., 0] = (hsv[..., 0].astype(int) + int(rng.uniform(-r.hue, r.hue) * 180)) % 180
                f = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB).astype(np.float32)
            f = np.clip(f, 0, 255)
    if rng.random() < r.greyscale:
        f = np.repeat((f @ g3)[..., None], 3, 2)
    if rng.random() < blur:
        f = cv2.GaussianBlur(f, (0, 0), rng.uniform(*r.blur_sigma))
    if sol and rng.random() < r.solarise:
        f = np.where(f >= r.solarise_threshold, 255 - f, f)
    return f.astype(np.uint8).transpose(2, 0, 1)
