"""The evaluation transform, and the normalisation every model expects."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_LONG = 16  # from this aspect ratio on, only the part that is kept is resized


def evaluation_transform(
    image_HW3: NDArray[np.uint8], resize: int = 256, crop: int = 224
) -> NDArray[np.uint8]:
    """Short side to `resize` pixels (Pillow's bicubic, antialiased), then the centre `crop` x `crop`.

    Sizes and centre are rounded as torchvision's Resize and CenterCrop round them. Small images are enlarged.

    Args:
        image_HW3: uint8 RGB, any size.
        resize: pixels; at least crop.
        crop: pixels.

    Returns:
        uint8 (3, crop, crop), contiguous.
    """
    from PIL import Image

    height, width = image_HW3.shape[:2]
    if height <= width:
        new_height, new_width = resize, int(resize * width / height)
    else:
        new_height, new_width = int(resize * height / width), resize
    top, left = round((new_height - crop) / 2), round((new_width - crop) / 2)
    image = Image.fromarray(image_HW3)
    if max(height, width) > _LONG * min(height, width):
        # The whole of a 2 x 100,000 image at 256 pixels would take 10 GB.
        scale_y, scale_x = height / new_height, width / new_width
        box = (left * scale_x, top * scale_y, (left + crop) * scale_x, (top + crop) * scale_y)
        kept = np.asarray(image.resize((crop, crop), Image.Resampling.BICUBIC, box=box))
    else:
        if (new_width, new_height) != (width, height):
            image = image.resize((new_width, new_height), Image.Resampling.BICUBIC)
        kept = np.asarray(image)[top : top + crop, left : left + crop]
    return np.ascontiguousarray(kept.transpose(2, 0, 1))


def normalize(images_B3HW: Tensor) -> Tensor:
    """uint8 images to float32 with ImageNet's mean and standard deviation taken out, on their own device."""
    # One multiplication and one addition a pixel: (x / 255 - mean) / std = x * scale + shift.
    pairs = zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)
    scale = _filled([1 / (255 * std) for std in IMAGENET_STD], images_B3HW.device)
    shift = _filled([-mean / std for mean, std in pairs], images_B3HW.device)
    return torch.addcmul(shift, images_B3HW.float(), scale)


def _filled(values: list[float], device: torch.device) -> Tensor:
    """(3, 1, 1) float32, written on the device itself: a copy from the host would wait for it."""
    return torch.stack([torch.full((1, 1), value, device=device) for value in values])
