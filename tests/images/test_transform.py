"""The evaluation transform against Pillow, and normalisation against its formula."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from unlabeled.images import transform
from unlabeled.images.transform import IMAGENET_MEAN, IMAGENET_STD, evaluation_transform, normalize


def reference(image: np.ndarray, resize: int, crop: int) -> np.ndarray:
    """torchvision's Resize(resize, BICUBIC) and CenterCrop(crop), on a Pillow image."""
    picture = Image.fromarray(image)
    width, height = picture.size
    short, long = min(width, height), max(width, height)
    new_long = int(resize * long / short)
    size = (resize, new_long) if width <= height else (new_long, resize)
    picture = picture.resize(size, Image.Resampling.BICUBIC)
    left, top = round((size[0] - crop) / 2.0), round((size[1] - crop) / 2.0)
    return np.asarray(picture.crop((left, top, left + crop, top + crop))).transpose(2, 0, 1)


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(2, 120),
    width=st.integers(2, 120),
    resize=st.integers(8, 64),
    less=st.integers(0, 7),
    seed=st.integers(0, 9),
)
def test_it_is_what_torchvision_does(height: int, width: int, resize: int, less: int, seed: int) -> None:
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    out = evaluation_transform(image, resize, resize - less)
    assert out.shape == (3, resize - less, resize - less) and out.dtype == np.uint8 and out.flags.c_contiguous
    expected = reference(image, resize, resize - less)
    if max(height, width) <= 16 * min(height, width):
        np.testing.assert_array_equal(out, expected)
    else:  # Pillow may do rows and columns in the other order, and rounds and clips between them
        assert np.abs(out.astype(int) - expected).mean() < 4


def test_defaults_on_a_photograph(photograph: np.ndarray) -> None:
    np.testing.assert_array_equal(evaluation_transform(photograph), reference(photograph, 256, 224))
    tall = np.ascontiguousarray(photograph.transpose(1, 0, 2))
    np.testing.assert_array_equal(evaluation_transform(tall), reference(tall, 256, 224))


def test_the_two_ways_agree(photograph: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = evaluation_transform(photograph)
    monkeypatch.setattr(transform, "_LONG", 0)
    assert np.abs(evaluation_transform(photograph).astype(int) - whole).max() <= 1


@pytest.mark.parametrize("shape", [(2, 5_000), (5_000, 2)])
def test_a_ribbon_takes_no_memory(shape: tuple[int, int], grown_by: Callable[..., int]) -> None:
    prepare = f"""
import numpy as np
import PIL.Image
from unlabeled.images.transform import evaluation_transform
evaluation_transform(np.zeros((30, 30, 3), np.uint8))
ramp = np.linspace(0, 255, 5_000).astype(np.uint8)
image = np.empty({(*shape, 3)}, np.uint8)
image[:] = ramp[None, :, None] if {shape[0]} == 2 else ramp[:, None, None]
"""
    work = """
out = evaluation_transform(image)
assert out.shape == (3, 224, 224) and set(np.unique(out).tolist()) <= {126, 127, 128}
"""
    assert grown_by(prepare, work) < 50_000


def test_normalize() -> None:
    images = torch.arange(256, dtype=torch.uint8).repeat(3, 1).reshape(1, 3, 16, 16)
    out = normalize(images)
    mean, std = (
        torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD)
    )
    torch.testing.assert_close(out.double(), (images.double() / 255 - mean) / std, atol=1e-6, rtol=0)
    assert out.dtype == torch.float32
