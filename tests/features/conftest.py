"""Small models of which it is known what they see."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from unlabeled.vit import VisionTransformer, VitConfig

PATCH = 8


def random_model(registers: int = 0, seed: int = 0) -> VisionTransformer:
    torch.manual_seed(seed)
    config = VitConfig(
        width=24, depth=2, num_heads=3, patch_size=PATCH, image_size=32, num_registers=registers
    )
    model = VisionTransformer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture
def make_model() -> Callable[..., VisionTransformer]:
    return random_model


@pytest.fixture
def local_model() -> VisionTransformer:
    """No blocks and no positions: a patch's features are those of its own pixels, wherever it is."""
    torch.manual_seed(0)
    model = VisionTransformer(VitConfig(width=64, depth=0, num_heads=1, patch_size=PATCH, image_size=32))
    torch.nn.init.zeros_(model.pos_embed)
    return model.eval()


def tokens_of(model: VisionTransformer, pixels: np.ndarray) -> np.ndarray:
    """Patch tokens of an image whose sides are whole patches, float64 (h, w, D); normalised by the formula."""
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    planar = ((pixels / 255 - mean) / std).transpose(2, 0, 1)
    with torch.no_grad():
        tokens = model(torch.from_numpy(planar)[None].float())
    return tokens.patches[0].double().numpy().reshape(*tokens.grid, -1)
