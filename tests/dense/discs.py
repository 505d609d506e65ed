"""Models of which it is known what they see, and images of two textures."""

import numpy as np
import torch

from unlabeled.vit import VisionTransformer, VitConfig

PATCH = 8


def make_local_model(depth: int = 0) -> VisionTransformer:
    """Without blocks and positions a patch's features are those of its own pixels, wherever it is."""
    torch.manual_seed(0)
    model = VisionTransformer(VitConfig(width=48, depth=depth, num_heads=2, patch_size=PATCH, image_size=32))
    torch.nn.init.zeros_(model.pos_embed)
    return model.eval()


def scene(seed: int, height: int = 96, width: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """An orange disc on blue, both a little noisy, and where it is: uint8 (H, W, 3), bool (H, W)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    centre = rng.uniform(0.35, 0.65, 2) * (height, width)
    inside = (y - centre[0]) ** 2 + (x - centre[1]) ** 2 <= (0.28 * min(height, width)) ** 2
    pixels = np.where(inside[..., None], (230, 130, 30), (30, 60, 160)) + rng.normal(
        0, 12, (height, width, 3)
    )
    return pixels.clip(0, 255).astype(np.uint8), inside


def moving(count: int, height: int = 96, width: int = 128) -> list[tuple[np.ndarray, np.ndarray]]:
    """Frames of a disc that moves 3 pixels to the right each, and where it is."""
    background = np.random.default_rng(7).normal(0, 12, (height, width, 3))
    y, x = np.mgrid[:height, :width]
    frames = []
    for number in range(count):
        inside = (y - 48) ** 2 + (x - 40 - 3 * number) ** 2 <= 22**2
        pixels = np.where(inside[..., None], (230, 130, 30), (30, 60, 160)) + background
        frames.append((pixels.clip(0, 255).astype(np.uint8), inside))
    return frames
