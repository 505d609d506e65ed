"""What is measured against plain loops, and both sides of each limit."""

import cv2
import numpy as np
import pytest

from unlabeled.curate.quality import colour, criteria, failed, fails, measure, shrunk_grey
from unlabeled.curate.recipe import QualityRecipe


def test_measures_are_those_of_plain_loops() -> None:
    rng = np.random.default_rng(0)
    grey = np.repeat(rng.integers(0, 256, (12, 5)), 3, axis=1).astype(np.uint8)
    grey[:6] = 200
    h, w = grey.shape
    padded = np.pad(grey.astype(float), 1, mode="reflect")
    edge = np.pad(grey.astype(int), 1, mode="edge")
    laplacian = np.array(
        [
            [
                padded[y, x + 1] + padded[y + 2, x + 1] + padded[y + 1, x] + padded[y + 1, x + 2]
                - 4 * padded[y + 1, x + 1]
                for x in range(w)
            ]
            for y in range(h)
        ]
    )  # fmt: skip
    span = np.array([[np.ptp(edge[y : y + 3, x : x + 3]) for x in range(w)] for y in range(h)])
    shares = [np.mean(grey == level) for level in range(256)]
    plain, hard = np.mean(span <= 8), np.mean(span >= 96)
    found = measure(grey)
    assert found.blur == pytest.approx(laplacian.var(), rel=1e-5)
    assert found.mean == pytest.approx(grey.mean() / 255)
    assert found.clipped == pytest.approx(np.mean((grey <= 5) | (grey >= 250)))
    assert found.entropy == pytest.approx(-sum(one * np.log2(one) for one in shares if one))
    assert found.plain == pytest.approx(plain)
    assert found.text == pytest.approx(plain * hard / (1 - plain))


def test_a_photograph_is_kept_and_what_is_none_is_not(photograph: np.ndarray) -> None:
    page = np.full((300, 400, 3), 255, np.uint8)
    for row in range(20, 290, 22):
        cv2.putText(
            page, "the quick brown fox jumps over", (8, row), cv2.FONT_HERSHEY_SIMPLEX, 0.7, (0, 0, 0), 2
        )
    images = {
        "": photograph,
        "dark": photograph // 40,
        "blank": np.full((100, 100, 3), 120, np.uint8),
        "noise": np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8),
        "text": page,
        "blurred": cv2.GaussianBlur(photograph, (0, 0), 3),
    }
    for reason, pixels in images.items():
        columns = {
            name: np.array([value], np.float32)
            for name, value in measure(shrunk_grey(pixels))._asdict().items()
        }
        columns |= {"side": np.array([200]), "aspect": np.array([1.5])}
        number = failed(QualityRecipe(), columns)[0]
        assert (criteria(QualityRecipe())[number][0].name if number >= 0 else "") == reason


def test_colour_is_the_mean_difference_of_channels(photograph: np.ndarray) -> None:
    small = photograph[:60, :40]
    apart = [int(max(pixel)) - int(min(pixel)) for row in small for pixel in row]
    assert colour(small) == pytest.approx(sum(apart) / len(apart))
    assert colour(photograph) == pytest.approx(np.ptp(photograph, axis=2).mean(), rel=0.05)
    assert colour(np.full((500, 2, 3), 9, np.uint8)) == 0


def test_grain_is_sharpness_over_that_at_half_the_size(photograph: np.ndarray) -> None:
    grey = shrunk_grey(photograph)[:64, :80]
    half = grey.reshape(32, 2, 40, 2).mean((1, 3)).round().astype(np.uint8)
    assert measure(grey).grain == pytest.approx(measure(grey).blur / measure(half).blur, rel=0.02)
    assert measure(np.full((8, 8), 9, np.uint8)).grain == 0


def test_a_value_at_the_limit_is_kept_and_nan_is_not() -> None:
    limits = {one.field: one for one, _ in criteria(QualityRecipe())}
    values = np.array([0.1, np.nextafter(np.float32(0.1), np.float32(0)), 0.2, np.nan], np.float32)
    assert fails(limits["min_mean"], 0.1, values).tolist() == [False, True, False, True]
    assert fails(limits["max_mean"], 0.1, values).tolist() == [False, False, True, True]
