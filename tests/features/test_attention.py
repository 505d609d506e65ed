"""CLS attention against transformers, masks against brute force and the DINO code's formula, and the fit to patches."""

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import unlabeled
from unlabeled.errors import UserError
from unlabeled.features.attention import attention, mass_mask
from unlabeled.features.fitting import fitted, patch_features, patch_grid
from unlabeled.vit import VisionTransformer, VitConfig

Make = Callable[..., VisionTransformer]


@pytest.mark.parametrize("registers", [0, 3])
@pytest.mark.parametrize(("size", "grid"), [(None, (14, 21)), (50, (6, 9)), (16, (2, 3))])
def test_it_is_what_transformers_computes(
    registers: int, size: int | None, grid: tuple[int, int], photograph: np.ndarray, tmp_path: Path
) -> None:
    from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    shape = {
        "hidden_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "patch_size": 8,
        "image_size": 32,
    }
    torch.manual_seed(0)
    if registers:
        config = Dinov2WithRegistersConfig(
            **shape, num_register_tokens=registers, attn_implementation="eager"
        )
        theirs = Dinov2WithRegistersModel(config).eval()
    else:
        theirs = Dinov2Model(Dinov2Config(**shape, attn_implementation="eager")).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    model = unlabeled.load_model(str(tmp_path))

    wanted = (grid[1] * 8, grid[0] * 8)
    resized = np.asarray(Image.fromarray(photograph).resize(wanted, Image.Resampling.BICUBIC))
    normal = (resized / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    with torch.no_grad():
        out = theirs(torch.from_numpy(normal.transpose(2, 0, 1))[None].float(), output_attentions=True)
    for layer in (-1, 0, 1, -3):
        expected = out.attentions[layer][0, :, 0, 1 + registers :].numpy().reshape(2, *grid)
        found = unlabeled.attention(model, photograph, layer=layer, size=size)
        assert found.heads.dtype == np.float32
        np.testing.assert_allclose(found.heads, expected, atol=2e-6, rtol=0)
        np.testing.assert_allclose(found.mean, expected.mean(0), atol=2e-6, rtol=0)
        assert found.mask.shape == grid and found.head_masks.shape == (2, *grid)
        np.testing.assert_array_equal(found.mask, mass_mask(found.mean, 0.6))
        np.testing.assert_array_equal(found.head_masks[1], mass_mask(found.heads[1], 0.6))


def test_one_row_is_computed_of_one_block(make_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(registers=2)
    images = torch.randn(2, 3, 32, 48)
    torch.testing.assert_close(model.cls_attention(images, 0), model.attention(images, 0)[:, :, 0])
    softmax, shapes = torch.Tensor.softmax, []

    def watched(self: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        shapes.append(tuple(self.shape))
        return softmax(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.Tensor, "softmax", watched)
    model.cls_attention(images)
    assert shapes == [(2, 3, 1, 27)]


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.integers(0, 9), min_size=1, max_size=7).filter(any),
    mass=st.sampled_from([0.1, 0.5, 0.6, 0.9, 1.0]),
)
def test_no_smaller_set_holds_the_mass(weights: list[int], mass: float) -> None:
    mask = mass_mask(np.array(weights, np.float32)[None], mass)[0]
    wanted = mass * sum(weights) - 1e-9
    smallest = min(
        count
        for count in range(1, len(weights) + 1)
        for some in itertools.combinations(weights, count)
        if sum(some) >= wanted
    )
    assert mask.sum() == smallest and np.array(weights)[mask].sum() >= wanted


def test_the_mask_is_that_of_the_dino_code() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        weights = rng.exponential(size=(5, 9)).astype(np.float32)
        order = np.argsort(weights.ravel())
        share = weights.ravel()[order] / weights.sum()
        theirs = (np.cumsum(share) > 1 - 0.6)[np.argsort(order)].reshape(5, 9)
        np.testing.assert_array_equal(mass_mask(weights, 0.6), theirs)


@settings(max_examples=200, deadline=None)
@given(
    height=st.integers(14, 3000),
    width=st.integers(14, 3000),
    patch=st.sampled_from([8, 14, 16]),
    size=st.integers(16, 1600),
)
def test_a_grid_keeps_the_aspect_within_half_a_patch(height: int, width: int, patch: int, size: int) -> None:
    if max(height, width) / min(height, width) * (size / patch) ** 2 > 60000 or min(height, width) < patch:
        return
    h, w = patch_grid(height, width, patch, size)
    scale = size / min(height, width)
    for count, side in ((h, height), (w, width)):
        assert count >= 1 and abs(count * patch - side * scale) <= patch / 2 + 1e-6


def test_the_whole_image_is_seen_at_its_own_place(local_model: VisionTransformer) -> None:
    """Each patch of an enlarged mosaic has the features that its tile alone has."""
    colours = np.random.default_rng(0).integers(0, 256, (3, 5, 3), dtype=np.uint8)
    image = np.kron(colours, np.ones((40, 40, 1), np.uint8))
    features = patch_features(local_model, image, size=24)
    for row in range(3):
        for column in range(5):
            tile = np.broadcast_to(colours[row, column], (8, 8, 3)).copy()
            alone = patch_features(local_model, tile, size=8)[0, 0]
            # Bicubic resizing mixes a little of the neighbours in.
            assert np.corrcoef(features[row, column], alone)[0, 1] > 0.95


def test_a_training_model_stays_one_and_dropout_is_off(photograph: np.ndarray, make_model: Make) -> None:
    quiet = make_model()
    model = VisionTransformer(quiet.config, drop_path=0.9)
    model.load_state_dict(quiet.state_dict())
    model.train()
    found, expected = attention(model, photograph), attention(quiet, photograph)
    np.testing.assert_array_equal(found.heads, expected.heads)
    assert model.training and not quiet.training


def test_half_precision(photograph: np.ndarray, make_model: Make) -> None:
    exact = attention(make_model(), photograph)
    near = attention(make_model().bfloat16(), photograph)
    assert near.heads.dtype == np.float32
    np.testing.assert_allclose(near.heads, exact.heads, atol=0.02)


def test_bad_use(photograph: np.ndarray, make_model: Make, tmp_path: Path) -> None:
    model = make_model()
    with pytest.raises(UserError, match=r"no layer 2: this model has blocks 0 to 1, or -2 to -1"):
        attention(model, photograph, layer=2)
    with pytest.raises(UserError, match="no layer -3"):
        attention(model, photograph, layer=-3)
    for mass in (0, 1.1, float("nan")):
        with pytest.raises(UserError, match="A mask holds a mass"):
            attention(model, photograph, mass=mass)
    with pytest.raises(UserError, match="short side of 7 pixels is smaller than one patch of 8"):
        attention(model, photograph, size=7)
    with pytest.raises(UserError, match="451 x 300 pixels has 752 x 500 patches"):
        attention(model, photograph, size=4000)
    Image.fromarray(photograph[:7]).save(tmp_path / "flat.png")
    with pytest.raises(
        UserError, match=r"flat\.png: An image of 451 x 7 pixels is smaller than one patch of 8"
    ):
        attention(model, tmp_path / "flat.png")
    torch.nn.init.constant_(model.cls_token, float("inf"))
    with pytest.raises(UserError, match="infinities or NaN"):
        attention(model, photograph)
    grey = VisionTransformer(
        VitConfig(width=24, depth=1, num_heads=3, patch_size=8, image_size=32, in_channels=1)
    )
    with pytest.raises(UserError, match="1 channels"):
        fitted(grey, photograph, 32)
