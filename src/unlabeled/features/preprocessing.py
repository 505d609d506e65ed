"""How an image becomes what a model sees: size and shape, the same for a table and for what is searched in it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from unlabeled.errors import UserError
from unlabeled.features.fitting import MAX_PATCHES, patch_grid
from unlabeled.images.transform import evaluation_transform
from unlabeled.vit_config import VitConfig

Shape = Literal["crop", "keep", "stretch"]
CROPPED_FROM = 112  # pixels; smaller crops take the whole short side, since little would be left


@dataclass(frozen=True)
class Preprocessing:
    """An image's way to a model; resizing is Pillow's bicubic with antialiasing.

    Attributes:
        size: pixels. crop: side of a centre crop, from images whose short side is brought to 256/224 of it (to
            itself below 112 pixels). keep: about the short side; the whole image, its aspect kept up to the
            rounding of both sides to whole patches. stretch: both sides, the aspect lost.
        shape: crop, keep or stretch.
        patch_size: pixels; of the model.
    """

    size: int
    shape: Shape
    patch_size: int

    def __post_init__(self) -> None:
        if self.shape not in get_args(Shape):
            raise UserError(f"There is no shape {self.shape!r}; choose one of {', '.join(get_args(Shape))}.")
        below = max(0, self.size // self.patch_size * self.patch_size)
        if self.size < self.patch_size or (self.shape != "keep" and below != self.size):
            near = [str(side) for side in (below, below + self.patch_size) if side]
            raise UserError(
                f"A size of {self.size} pixels is no multiple of the model's patch of {self.patch_size}; "
                f"{' or '.join(near)} is."
            )
        if below**2 > MAX_PATCHES * self.patch_size**2:
            most = math.isqrt(MAX_PATCHES) * self.patch_size
            raise UserError(
                f"A size of {self.size} pixels is more than {MAX_PATCHES} patches an image; choose {most} at most."
            )

    @property
    def resize(self) -> int:
        """Short side before the crop, in pixels; also what is enough of a JPEG that may be decoded smaller."""
        if self.shape == "crop" and self.size >= CROPPED_FROM:
            return round(self.size * 256 / 224)
        return self.size

    def __call__(self, pixels_HW3: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return uint8 (3, h, w), both sides multiples of the patch.

        Raises UserError for an image that is smaller than a patch or far too long, where the shape is kept.
        """
        from PIL import Image

        if self.shape == "crop":
            return evaluation_transform(pixels_HW3, self.resize, self.size)
        height, width = pixels_HW3.shape[:2]
        wanted = (self.size, self.size)
        if self.shape == "keep":
            rows, columns = patch_grid(height, width, self.patch_size, self.size)
            wanted = (rows * self.patch_size, columns * self.patch_size)
        if wanted != (height, width):
            image = Image.fromarray(pixels_HW3).resize(wanted[::-1], Image.Resampling.BICUBIC)
            pixels_HW3 = np.asarray(image)
        return np.ascontiguousarray(pixels_HW3.transpose(2, 0, 1))


def default_preprocessing(config: VitConfig, size: int | None = None, shape: Shape = "crop") -> Preprocessing:
    """Return a model's preprocessing; of the papers' 224 pixels (or what it was trained at, if less) by default."""
    if config.in_channels != 3:
        raise UserError(f"This model sees images of {config.in_channels} channels; RGB has 3.")
    p = config.patch_size
    if size is None:
        size = max(1, min(224, config.image_size) // p) * p
    return Preprocessing(size, shape, p)
