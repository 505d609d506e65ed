"""Whole images and sliding windows, with a head of which it is known where everything comes from."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from unlabeled.dense.heads import SegmentationHead
from unlabeled.dense.inference import predict, starts
from unlabeled.vit import Tokens, VisionTransformer, VitConfig

PATCH = 4


class MeanModel(nn.Module):
    """Patch tokens are the mean colours of the patches; nothing else is known of the image."""

    config = VitConfig(width=3, depth=1, num_heads=1, patch_size=PATCH, image_size=8)
    blocks = (None,)

    def intermediate_layers(self, images: Tensor, layers: list[int], norm: bool) -> list[Tokens]:
        maps = F.avg_pool2d(images, PATCH)
        tokens = maps.flatten(2).transpose(1, 2)
        return [Tokens(tokens.mean(1), tokens[:, :0], tokens, tuple(maps.shape[2:]))]


class Colours(nn.Module):
    norm = True

    def layers(self, depth: int) -> list[int]:
        return [0]

    def forward(self, layers: list[Tokens]) -> Tensor:
        return layers[0].patches.unflatten(1, layers[0].grid).permute(0, 3, 1, 2)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.one_of(st.none(), st.integers(4, 40)))
def test_a_constant_image_away_from_padding(height: int, width: int, window: int | None) -> None:
    images = torch.ones(2, 3, height, width)
    found = predict(MeanModel(), Colours(), images, window)
    assert found.shape == images.shape
    if height % PATCH == 0 and width % PATCH == 0 and (window is None or window % PATCH == 0):
        torch.testing.assert_close(found, images)


def test_the_padding_is_cut_off_where_it_was_added() -> None:
    """14 pixels are padded to 16: the first of them is the second of the padded image."""
    images = torch.rand(1, 3, 14, 14)
    padded = F.pad(images, (1, 1, 1, 1))
    maps = F.interpolate(F.avg_pool2d(padded, PATCH), size=(16, 16), mode="bilinear")
    torch.testing.assert_close(predict(MeanModel(), Colours(), images), maps[..., 1:15, 1:15])


def test_windows_are_averaged_where_they_overlap() -> None:
    images = torch.rand(1, 3, 8, 20)
    found = predict(MeanModel(), Colours(), images, window=8, stride=4, windows_at_once=2)
    total, count = torch.zeros_like(images), torch.zeros_like(images)
    for left in (0, 4, 8, 12):
        part = images[..., left : left + 8]
        total[..., left : left + 8] += predict(MeanModel(), Colours(), part)
        count[..., left : left + 8] += 1
    torch.testing.assert_close(found, total / count)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 90), st.integers(1, 50), st.integers(1, 50))
def test_windows_cover_everything(length: int, window: int, stride: int) -> None:
    places = starts(length, window, min(stride, window))
    covered = {pixel for start in places for pixel in range(start, start + window)}
    assert set(range(length)) <= covered
    assert all(start + min(window, length) <= length for start in places)


@pytest.mark.parametrize("norm", [True, False])
def test_a_backbone_and_a_head(backbone: VisionTransformer, norm: bool) -> None:
    head = SegmentationHead(32, 5, 4, norm=norm).eval()
    found = predict(backbone, head, torch.randn(1, 3, 21, 35))
    assert found.shape == (1, 5, 21, 35)
