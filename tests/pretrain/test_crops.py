"""Crops: the distribution of every augmentation, and their pixels against Pillow's."""

import colorsys
import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps
from scipy import ndimage, stats

from unlabeled.pretrain.crops import (
    PARAMETERS,
    CropRecipe,
    Crops,
    apply_parameters,
    draw_parameters,
    make_crops,
    smallest_side,
)

RECIPE = CropRecipe()
DRAWS = 3000


@pytest.fixture(scope="module")
def drawn() -> np.ndarray:
    """(DRAWS, 10) crops of an image large enough that every box fits at once."""
    rng = np.random.default_rng(0)
    return np.stack([draw_parameters(3000, 3000, RECIPE, rng) for _ in range(DRAWS)])


def is_uniform(values: np.ndarray, low: float, high: float) -> None:
    assert values.min() >= low - 1e-6
    assert values.max() <= high + 1e-6
    assert stats.kstest((values.ravel() - low) / (high - low), "uniform").pvalue > 1e-4


def has_probability(flags: np.ndarray, probability: float) -> None:
    deviation = math.sqrt(probability * (1 - probability) / flags.size)
    assert abs(flags.mean() - probability) <= 4 * deviation + 1e-12


@pytest.mark.parametrize(("views", "low", "high"), [(slice(0, 2), 0.32, 1.0), (slice(2, 10), 0.05, 0.32)])
def test_scale_is_uniform_and_ratio_log_uniform(
    drawn: np.ndarray, views: slice, low: float, high: float
) -> None:
    crops = drawn[:, views].ravel()
    ratio = crops["width"] / crops["height"]
    area = crops["width"] * crops["height"] / 3000**2
    if (
        high < 0.9
    ):  # a box of nearly the whole image fits for few ratios: no longer uniform, as in torchvision
        is_uniform(area, low - 1e-3, high + 1e-3)
        is_uniform(np.log(ratio), math.log(3 / 4) - 2e-3, math.log(4 / 3) + 2e-3)
    assert area.min() >= low - 1e-3
    assert area.max() <= high + 1e-3
    assert ratio.min() >= 3 / 4 - 2e-3
    assert ratio.max() <= 4 / 3 + 2e-3


def test_place_is_uniform(drawn: np.ndarray) -> None:
    crops = drawn[:, 2:].ravel()
    is_uniform((crops["top"] + 0.5) / (3000 - crops["height"] + 1), 0, 1)
    is_uniform((crops["left"] + 0.5) / (3000 - crops["width"] + 1), 0, 1)


def test_colour_jitter(drawn: np.ndarray) -> None:
    has_probability(drawn["flip"], 0.5)
    has_probability(drawn["jitter"], 0.8)
    has_probability(drawn["grey"], 0.2)
    for name, low, high in (
        ("brightness", 0.6, 1.4),
        ("contrast", 0.6, 1.4),
        ("saturation", 0.8, 1.2),
        ("hue", -0.1, 0.1),
    ):
        is_uniform(drawn[name], low, high)
    orders = drawn["order"].reshape(-1, 4).astype(int) @ [64, 16, 4, 1]
    _, counts = np.unique(orders, return_counts=True)
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > 1e-4


def test_blur_and_solarise_by_view(drawn: np.ndarray) -> None:
    sigma = drawn["sigma"]
    assert (sigma[:, 0] == 0).all()  # what the released weights were trained with
    has_probability(sigma[:, 1] > 0, 0.9)
    has_probability(sigma[:, 2:] > 0, 0.5)
    is_uniform(sigma[sigma > 0], 0.1, 2.0)
    assert (np.delete(drawn["solarise"], 1, axis=1) == 0).all()
    has_probability(drawn["solarise"][:, 1] == 128, 0.2)


def test_the_papers_blur_can_be_asked_for() -> None:
    recipe = dataclasses.replace(RECIPE, blur=(1.0, 0.1, 0.5))
    rng = np.random.default_rng(1)
    sigma = np.stack([draw_parameters(300, 300, recipe, rng)["sigma"] for _ in range(1000)])
    assert (sigma[:, 0] > 0).all()
    has_probability(sigma[:, 1] > 0, 0.1)


def test_augmentations_are_independent(drawn: np.ndarray) -> None:
    columns = [drawn[name][:, 1] for name in ("flip", "jitter", "grey", "brightness", "hue", "contrast")]
    columns += [drawn["sigma"][:, 1] > 0, drawn["solarise"][:, 1], drawn["flip"][:, 2], drawn["flip"][:, 0]]
    correlation = np.corrcoef(np.array(columns, float)) - np.eye(len(columns))
    assert np.abs(correlation).max() < 4.5 / math.sqrt(DRAWS)


def plain(height: int, width: int, **values: object) -> np.ndarray:
    row = np.zeros(1, PARAMETERS)
    row["radius"] = 4
    for name, value in {"height": height, "width": width, **values}.items():
        row[name] = value
    return row


def pixels(image: np.ndarray, size: int, **values: object) -> np.ndarray:
    defaults = {"top": 20, "left": 35} | values
    row = plain(int(defaults.pop("height", 200)), int(defaults.pop("width", 260)), **defaults)
    return apply_parameters(image, row, size)[0].transpose(1, 2, 0)


def close(found: np.ndarray, expected: np.ndarray, mean: float = 0.6, most: int = 3) -> None:
    difference = np.abs(found.astype(int) - np.asarray(expected).astype(int))
    assert difference.mean() < mean
    assert difference.max() <= most


@pytest.mark.parametrize("size", [8, 32, 98, 224, 400])
@pytest.mark.parametrize(("height", "width"), [(200, 260), (40, 30), (280, 7)])
def test_resampling_is_pillows_bicubic(photograph: np.ndarray, size: int, height: int, width: int) -> None:
    found = pixels(photograph, size, top=11, left=35, height=height, width=width)
    box = Image.fromarray(photograph).crop((35, 11, 35 + width, 11 + height))
    close(found, np.asarray(box.resize((size, size), Image.Resampling.BICUBIC)), most=4)
    flipped = pixels(photograph, size, top=11, left=35, height=height, width=width, flip=1)
    assert (flipped == found[:, ::-1]).all()


JITTER = {"jitter": 1, "brightness": 1, "contrast": 1, "saturation": 1, "hue": 0}


@pytest.mark.parametrize("factor", [0.6, 0.9, 1.3])
def test_brightness_contrast_saturation_are_pillows(photograph: np.ndarray, factor: float) -> None:
    base = Image.fromarray(pixels(photograph, 128))
    for operation, name, enhance in (
        (0, "brightness", ImageEnhance.Brightness),
        (1, "contrast", ImageEnhance.Contrast),
        (2, "saturation", ImageEnhance.Color),
    ):
        order = [operation, *({0, 1, 2} - {operation}), 3]
        found = pixels(photograph, 128, **(JITTER | {name: factor, "order": order, "hue": 0}))
        # A hue shift of 0 still passes through 8-bit HSV, in Pillow as here.
        expected = through_hsv(np.asarray(enhance(base).enhance(factor)), 0)
        close(found, expected, mean=1.0, most=6)


def through_hsv(image: np.ndarray, shift: float) -> np.ndarray:
    hsv = np.asarray(Image.fromarray(image).convert("HSV")).copy()
    hsv[..., 0] = (hsv[..., 0].astype(int) + int(shift * 255)) % 256
    return np.asarray(Image.fromarray(hsv, "HSV").convert("RGB"))


@pytest.mark.parametrize("shift", [-0.1, -0.03, 0.05, 0.1])
def test_hue_is_pillows(photograph: np.ndarray, shift: float) -> None:
    base = pixels(photograph, 128)
    found = pixels(photograph, 128, **(JITTER | {"hue": shift, "order": [3, 0, 1, 2]}))
    close(found, through_hsv(base, shift), mean=1.0, most=8)


def test_hue_keeps_value_and_turns_the_circle() -> None:
    image = np.zeros((64, 64, 3), np.uint8)
    image[..., 0] = 200  # pure red
    found = pixels(
        image, 16, top=0, left=0, height=64, width=64, **(JITTER | {"hue": 0.1, "order": [3, 0, 1, 2]})
    )
    hue, saturation, value = colorsys.rgb_to_hsv(*(found[8, 8] / 255))
    assert hue == pytest.approx(0.1, abs=0.01)
    assert saturation == pytest.approx(1, abs=0.01)
    assert value == pytest.approx(200 / 255, abs=0.01)


def test_order_of_jitter_matters_and_is_followed(photograph: np.ndarray) -> None:
    base = Image.fromarray(pixels(photograph, 96))
    values = {"jitter": 1, "brightness": 1.4, "contrast": 0.6, "saturation": 1, "hue": 0}
    for first, order in (("brightness", [0, 1, 2, 3]), ("contrast", [1, 0, 2, 3])):
        steps = [ImageEnhance.Brightness, ImageEnhance.Contrast]
        factors = [1.4, 0.6]
        if first == "contrast":
            steps, factors = steps[::-1], factors[::-1]
        expected = base
        for step, factor in zip(steps, factors, strict=True):
            expected = step(expected).enhance(factor)
        close(
            pixels(photograph, 96, **(values | {"order": order})),
            through_hsv(np.asarray(expected), 0),
            1.0,
            6,
        )


def test_grey_and_solarise_are_pillows(photograph: np.ndarray) -> None:
    base = Image.fromarray(pixels(photograph, 96))
    close(pixels(photograph, 96, grey=1), np.asarray(base.convert("L").convert("RGB")), most=1)
    assert (pixels(photograph, 96, solarise=128) == np.asarray(ImageOps.solarize(base, 128))).all()


@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
@pytest.mark.parametrize("size", [3, 9, 98])
def test_blur_is_a_gaussian_of_nine_taps(photograph: np.ndarray, sigma: float, size: int) -> None:
    base = pixels(photograph, size).astype(np.float64)
    taps = np.exp(-0.5 * (np.arange(-4, 5) / sigma) ** 2)
    taps /= taps.sum()
    index = np.abs(np.arange(-4, size + 4))
    while (index >= size).any() or (index < 0).any():
        index = np.where(index >= size, 2 * (size - 1) - index, index)
        index = np.abs(index)
    rows = base[index]
    down = sum(taps[k] * rows[k : k + size] for k in range(9))
    columns = down[:, index]
    expected = sum(taps[k] * columns[:, k : k + size] for k in range(9))
    close(pixels(photograph, size, sigma=sigma), np.rint(expected), mean=0.1, most=1)


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    size=st.integers(1, 40),
    local=st.integers(1, 20),
    num_locals=st.integers(0, 3),
    seed=st.integers(0, 999),
)
def test_any_shape(height: int, width: int, size: int, local: int, num_locals: int, seed: int) -> None:
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    recipe = CropRecipe(global_size=size, local_size=local, num_locals=num_locals)
    first = make_crops(image, recipe, np.random.default_rng(seed))
    second = make_crops(image, recipe, np.random.default_rng(seed))
    assert first.globals.shape == (2, 3, size, size)
    assert first.locals.shape == (num_locals, 3, local, local)
    assert (first.globals == second.globals).all()
    assert (first.locals == second.locals).all()


@pytest.mark.parametrize(("height", "width"), [(3, 5), (98, 98), (375, 500), (900, 1200)])
@pytest.mark.parametrize("size", [8, 98, 224])
def test_a_flat_image_stays_flat(height: int, width: int, size: int) -> None:
    for value in range(0, 256, 5):
        image = np.full((height, width, 3), value, np.uint8)
        for sigma in (0, 1.3):
            assert (apply_parameters(image, plain(height, width, sigma=sigma), size) == value).all()


def test_a_wider_blur_is_not_cut(photograph: np.ndarray) -> None:
    image = np.zeros((65, 65, 3), np.uint8)
    image[32, 32] = 255
    image[31:34, 31:34] = 255
    found = apply_parameters(image, plain(65, 65, sigma=2, radius=8), 65)[0, 0].astype(float)
    expected = ndimage.gaussian_filter(image[..., 0].astype(float), 2, radius=8)
    assert np.abs(found - expected).max() <= 0.6


def test_crops_can_be_written_into_a_batch(photograph: np.ndarray) -> None:
    recipe = CropRecipe(global_size=32, local_size=17, num_locals=3)
    batch = Crops(np.zeros((2, 4, 3, 32, 32), np.uint8), np.zeros((3, 4, 3, 17, 17), np.uint8))
    slot = Crops(batch.globals[:, 2], batch.locals[:, 2])
    make_crops(photograph, recipe, np.random.default_rng(3), slot)
    expected = make_crops(photograph, recipe, np.random.default_rng(3))
    assert (batch.globals[:, 2] == expected.globals).all()
    assert (batch.locals[:, 2] == expected.locals).all()
    assert not batch.globals[:, [0, 1, 3]].any()
    with pytest.raises(ValueError, match="match"):
        apply_parameters(photograph, plain(20, 20), 16, batch.globals[:1, 2, :, ::2, ::2])


def test_reduced_decoding_leaves_every_box_larger_than_its_crop() -> None:
    recipe = CropRecipe()
    side = smallest_side(recipe)
    rng = np.random.default_rng(0)
    for height, width in ((side, side), (side, 2 * side), (3 * side, side)):
        for _ in range(200):
            parameters = draw_parameters(height, width, recipe, rng)
            sizes = np.where(np.arange(10) < 2, recipe.global_size, recipe.local_size)
            assert (np.minimum(parameters["height"], parameters["width"]) > 1.49 * sizes).all()


def test_a_box_outside_the_image_is_refused(photograph: np.ndarray) -> None:
    with pytest.raises(ValueError, match="outside"):
        apply_parameters(photograph, plain(400, 20), 8)
