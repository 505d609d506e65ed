"""Small backbones and tokens of which nothing is known but their shapes."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.dense.discs import make_local_model, moving, scene
from unlabeled.vit import Tokens, VisionTransformer, VitConfig
from unlabeled.weights.huggingface import save_huggingface


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


@pytest.fixture(scope="session")
def local_model() -> VisionTransformer:
    return make_local_model(depth=1)


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, two references with masks, targets of several shapes, a broken one, and frames of a moving disc."""
    folder = tmp_path_factory.mktemp("segment")
    save_huggingface(make_local_model(depth=1), folder / "model")
    for name in ("a", "b"):
        pixels, inside = scene(ord(name))
        Image.fromarray(pixels).save(folder / f"{name}.png")
        Image.fromarray(inside.astype(np.uint8) * 255).save(folder / f"{name}_mask.png")
    (folder / "targets" / "deep").mkdir(parents=True)
    for number, shape in enumerate(((96, 128), (150, 70), (64, 64))):
        pixels, _ = scene(number, *shape)
        Image.fromarray(pixels).save(folder / "targets" / "deep" / f"{number}.png")
    (folder / "targets" / "broken.jpg").write_bytes(b"\xff\xd8\xff and no more")
    Image.fromarray(scene(0)[0][:5]).save(folder / "targets" / "flat.png")
    (folder / "frames").mkdir()
    for number, (pixels, _) in enumerate(moving(9)):
        Image.fromarray(pixels).save(folder / "frames" / f"{number:02}.png")
    Image.fromarray(moving(1)[0][1].astype(np.uint8) * 255).save(folder / "first.png")
    return folder
