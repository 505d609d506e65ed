"""The evaluation transform, and the normalisation every model expects."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def evaluation_transform(image_HW3: NDArray[np.uint8], resize: int = 256, crop: int = 224) -> NDArray[np.uint8]:
    """Short side to `resize` pixels (bicubic, antialiased), then the centre `crop` x `crop`.

    Args:
        image_HW3: uint8 RGB.
        resize: pixels; at least crop.
        crop: pixels.

    Returns:
        uint8 (3, crop, crop).
    """
    from PIL import Image

    height, width = image_HW3.shape[:2]
    scale = resize / min(height, width)
    size = (max(resize, round(width * scale)), max(resize, round(height * scale)))
    if size != (width, height):
        image_HW3 = np.asarray(Image.fromarray(image_HW3).resize(size, Image.Resampling.BICUBIC))
    height, width = image_HW3.shape[:2]
    top, left = (height - crop) // 2, (width - crop) // 2
    return np.ascontiguousarray(image_HW3[top : top + crop, left : left + crop].transpose(2, 0, 1))


def normalize(images_B3HW: Tensor) -> Tensor:
    """uint8 images to float32 with ImageNet's mean and standard deviation taken out, on their own device."""
    # One multiplication and one addition a pixel: (x / 255 - mean) / std = x * scale + shift.
    scale = torch.tensor([1 / (255 * std) for std in IMAGENET_STD], device=images_B3HW.device)
    pairs = zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)
    shift = torch.tensor([-mean / std for mean, std in pairs], device=images_B3HW.device)
    return torch.addcmul(shift[:, None, None], images_B3HW.float(), scale[:, None, None])
