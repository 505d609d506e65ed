"""A backbone and a head on images of any size: whole, or through a sliding window.

Shape suffixes: B images, C channels (classes, or 1 of depth), H W pixels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from unlabeled.dense.losses import resized
from unlabeled.vit import Tokens, fit_to_patches

if TYPE_CHECKING:
    from unlabeled.vit import VisionTransformer


class Head(Protocol):
    """What every head of this room has."""

    norm: bool

    def layers(self, depth: int) -> list[int]:
        """Return the blocks whose tokens it reads."""

    def __call__(self, layers: list[Tokens]) -> Tensor:
        """Return a map."""


def predict(
    model: VisionTransformer,
    head: Head,
    images_B3HW: Tensor,
    window: int | None = None,
    stride: int | None = None,
    windows_at_once: int = 8,
) -> Tensor:
    """Return the head's map at every pixel, (B, C, H, W): logits, or depth in metres.

    images: float, normalised; any sides. window: pixels of a square window that is moved over the images in steps of
    `stride` (two thirds of the window by default, as in the protocol), overlaps averaged; None: whole images.
    """
    if window is None or window >= max(images_B3HW.shape[2:]):
        return predict_whole(model, head, images_B3HW)
    B, _, H, W = images_B3HW.shape
    stride = stride or max(1, 2 * window // 3)
    height, width = min(window, H), min(window, W)
    places = [
        (b, y, x) for b in range(B) for y in starts(H, height, stride) for x in starts(W, width, stride)
    ]
    total = images_B3HW.new_zeros(())
    count = images_B3HW.new_zeros(B, 1, H, W)
    for first in range(0, len(places), windows_at_once):
        here = places[first : first + windows_at_once]
        parts = torch.stack([images_B3HW[b, :, y : y + height, x : x + width] for b, y, x in here])
        maps = predict_whole(model, head, parts)
        if not total.ndim:
            total = maps.new_zeros(B, maps.shape[1], H, W)
        for (b, y, x), one in zip(here, maps, strict=True):
            total[b, :, y : y + height, x : x + width] += one
            count[b, :, y : y + height, x : x + width] += 1
    return total / count


def predict_whole(model: VisionTransformer, head: Head, images_B3HW: Tensor) -> Tensor:
    """Return the head's map at every pixel of whole images, which are centre-padded to a multiple of the patch.

    The map is resized to the padded image and the padding is cut off. (Meta's release stretches the padded map over the
    image, which shifts it by up to half a patch.)
    """
    H, W = images_B3HW.shape[2:]
    padded = fit_to_patches(images_B3HW, model.config.patch_size, "pad")
    tokens = model.intermediate_layers(padded, head.layers(len(model.blocks)), norm=head.norm)
    maps = resized(head(tokens).float(), padded.shape[2:])
    top, left = (padded.shape[2] - H) // 2, (padded.shape[3] - W) // 2
    return maps[..., top : top + H, left : left + W]


def starts(length: int, window: int, stride: int) -> list[int]:
    """Return where windows begin, so that they cover a length; the last one ends with it."""
    if window >= length:
        return [0]
    return [*range(0, length - window, stride), length - window]
