"""Small backbones and tokens of which nothing is known but their shapes."""

from collections.abc import Callable

import pytest
import torch

from unlabeled.vit import Tokens, VisionTransformer, VitConfig


def random_tokens(
    width: int, grid: tuple[int, int], count: int = 1, batch: int = 2, seed: int = 0
) -> list[Tokens]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    h, w = grid
    return [
        Tokens(draw(batch, width), draw(batch, 0, width), draw(batch, h * w, width), grid)
        for _ in range(count)
    ]


@pytest.fixture
def backbone() -> VisionTransformer:
    torch.manual_seed(0)
    config = VitConfig(width=32, depth=4, num_heads=2, patch_size=8, image_size=32, layer_scale=1.0)
    return VisionTransformer(config).eval()


@pytest.fixture
def make_tokens() -> Callable[..., list[Tokens]]:
    return random_tokens
