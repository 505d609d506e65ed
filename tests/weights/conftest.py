"""Random backbones, whose every weight matters, for the weight formats' tests."""

from collections.abc import Callable

import pytest
import torch

from unlabeled.vit import VisionTransformer, VitConfig

CONFIGS = {
    "plain": VitConfig(width=48, depth=3, num_heads=4, patch_size=14, image_size=518),
    "registers": VitConfig(width=48, depth=2, num_heads=3, patch_size=14, image_size=518, num_registers=4),
    "small images": VitConfig(width=24, depth=2, num_heads=2, patch_size=4, image_size=32),
    "small with registers": VitConfig(
        width=24, depth=2, num_heads=2, patch_size=4, image_size=32, num_registers=5
    ),
    "swiglu": VitConfig(width=40, depth=2, num_heads=2, patch_size=16, image_size=224, ffn="swiglu"),
    "swiglu with registers": VitConfig(
        width=64, depth=2, num_heads=1, patch_size=8, image_size=64, ffn="swiglu", num_registers=1
    ),
    "no qkv bias": VitConfig(
        width=24,
        depth=1,
        num_heads=2,
        patch_size=8,
        image_size=64,
        qkv_bias=False,
        mlp_ratio=3,
        in_channels=1,
    ),
}


def random_backbone(config: VitConfig, seed: int = 0) -> VisionTransformer:
    """A model in evaluation mode with every weight random, of a size that keeps activations near 1."""
    generator = torch.Generator().manual_seed(seed)
    model = VisionTransformer(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            random = torch.randn(parameter.shape, generator=generator)
            scale = parameter.shape[-1] ** -0.5 if parameter.dim() == 2 and "token" not in name else 0.3
            parameter.copy_(random * scale)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1)
    return model.eval()


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> VitConfig:
    return CONFIGS[request.param]


@pytest.fixture
def random_model() -> Callable[..., VisionTransformer]:
    return random_backbone


@pytest.fixture
def configs() -> dict[str, VitConfig]:
    return CONFIGS
