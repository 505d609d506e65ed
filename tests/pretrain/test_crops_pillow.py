"""The whole pipeline against the one written with Pillow, as the release runs it through torchvision."""

import math
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps
from scipy import stats

from unlabeled.pretrain.crops import CropRecipe, apply_parameters, draw_parameters, make_crops

RECIPE = CropRecipe()
NAMES = ("brightness", "contrast", "saturation", "hue")
ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


@pytest.fixture(scope="module")
def photographs() -> list[np.ndarray]:
    """Real photographs of several sizes, uint8."""
    import skimage
    import sklearn

    skimage_data = Path(skimage.__file__).parent / "data"
    sklearn_data = Path(sklearn.__file__).parent / "datasets" / "images"
    names = ("chelsea.png", "astronaut.png", "coffee.png")
    paths = [*(skimage_data / name for name in names), *sorted(sklearn_data.glob("*.jpg"))]
    return [np.asarray(Image.open(path).convert("RGB")) for path in paths]


def drawn_box(width: int, height: int, scale: tuple[float, float]) -> tuple[int, int, int, int]:
    """Left, top, width, height, as torchvision's RandomResizedCrop draws them."""
    for _ in range(10):
        area = width * height * random.uniform(*scale)
        aspect = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return random.randint(0, width - w), random.randint(0, height - h), w, h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return (width - w) // 2, (height - h) // 2, w, h


def drawn_values(view: int, width: int, height: int) -> dict[str, object]:
    """One crop's parameters, one by one from Python's generator."""
    left, top, w, h = drawn_box(width, height, RECIPE.local_scale if view == 2 else RECIPE.global_scale)
    order = [0, 1, 2, 3]
    random.shuffle(order)
    return {
        "left": left,
        "top": top,
        "width": w,
        "height": h,
        "order": order,
        "flip": random.random() < 0.5,
        "jitter": random.random() < 0.8,
        **{
            name: random.uniform(1 - half, 1 + half)
            for name, half in zip(NAMES, (0.4, 0.4, 0.2), strict=False)
        },
        "hue": random.uniform(-0.1, 0.1),
        "grey": random.random() < 0.2,
        "sigma": random.uniform(0.1, 2) if random.random() < (0.0, 0.9, 0.5)[view] else 0,
        "solarise": 128 if view == 1 and random.random() < 0.2 else 0,
    }


def blurred(image: np.ndarray, sigma: float) -> np.ndarray:
    taps = np.exp(-0.5 * (np.arange(-4, 5) / sigma) ** 2)
    taps /= taps.sum()
    size = len(image)
    padded = np.pad(image.astype(np.float64), ((4, 4), (4, 4), (0, 0)), mode="reflect")
    down = sum(taps[k] * padded[k : k + size] for k in range(9))
    return np.rint(sum(taps[k] * down[:, k : k + size] for k in range(9))).astype(np.uint8)


def by_pillow(image: np.ndarray, values: dict[str, object] | np.ndarray, size: int) -> np.ndarray:
    """One crop, uint8 (size, size, 3)."""
    left, top, width, height = (int(values[name]) for name in ("left", "top", "width", "height"))
    box = Image.fromarray(image).crop((left, top, left + width, top + height))
    crop = box.resize((size, size), Image.Resampling.BICUBIC)
    if values["flip"]:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for step in values["order"] if values["jitter"] else ():
        if step < 3:
            crop = ENHANCERS[int(step)](crop).enhance(float(values[NAMES[int(step)]]))
        else:
            hue, *rest = crop.convert("HSV").split()
            turned = (np.asarray(hue).astype(int) + int(float(values["hue"]) * 255)) % 256
            crop = Image.merge("HSV", (Image.fromarray(turned.astype(np.uint8)), *rest)).convert("RGB")
    if values["grey"]:
        crop = crop.convert("L").convert("RGB")
    if values["sigma"] > 0:
        crop = Image.fromarray(blurred(np.asarray(crop), float(values["sigma"])))
    if values["solarise"]:
        crop = ImageOps.solarize(crop, int(values["solarise"]))
    return np.asarray(crop)


def test_pixels_are_pillows_for_the_same_draws(photographs: list[np.ndarray]) -> None:
    rng = np.random.default_rng(5)
    means, near = [], []
    for image in photographs * 4:
        parameters = draw_parameters(*image.shape[:2], RECIPE, rng)
        for number, row in enumerate(parameters):
            size = RECIPE.global_size if number < 2 else RECIPE.local_size
            found = apply_parameters(image, parameters[number : number + 1], size)[0].transpose(1, 2, 0)
            difference = np.abs(found.astype(int) - by_pillow(image, row, size))
            # A level across the threshold of solarisation is inverted in one of the two only.
            limit = np.quantile(difference, 0.99) if row["solarise"] else difference.max()
            means.append(difference.mean())
            near.append((difference <= 2).mean())
            assert limit <= 24
    assert np.mean(means) < 0.6
    assert np.max(means) < 1.2
    assert np.mean(near) > 0.98


def described(crop: np.ndarray) -> list[float]:
    """Channel means, spread and gradient energy of a crop (H, W, 3)."""
    crop = crop.astype(np.float64)
    down, across = np.diff(crop, axis=0), np.diff(crop, axis=1)
    return [*crop.mean((0, 1)), crop.std(), math.log1p((down**2).mean() + (across**2).mean())]


@pytest.mark.parametrize("view", [0, 1, 2])
def test_crops_are_distributed_as_pillows(photographs: list[np.ndarray], view: int) -> None:
    random.seed(view)
    rng = np.random.default_rng(view)
    size = RECIPE.local_size if view == 2 else RECIPE.global_size
    recipe = CropRecipe(num_locals=4)
    found, expected = [], []
    for number in range(160):
        image = photographs[number % len(photographs)]
        crops = make_crops(image, recipe, rng)
        ours = crops.locals if view == 2 else crops.globals[view : view + 1]
        found += [described(crop.transpose(1, 2, 0)) for crop in ours]
        for _ in ours:
            values = drawn_values(view, image.shape[1], image.shape[0])
            expected.append(described(by_pillow(image, values, size)))
    for ours, theirs in zip(np.transpose(found), np.transpose(expected), strict=True):
        error = math.sqrt((ours.var() + theirs.var()) / len(ours))
        assert abs(ours.mean() - theirs.mean()) < 4.5 * error
        assert stats.ks_2samp(ours, theirs).pvalue > 1e-4
