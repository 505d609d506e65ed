"""From patches to pixels."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unlabeled.dense.upsample import enlarged, guided_filter, upsampled


def windowed(guide: np.ndarray, values: np.ndarray, radius: int, epsilon: float) -> np.ndarray:
    """He et al. 2010, one window after the other, in float64."""
    height, width = guide.shape
    slopes, offsets = np.zeros(guide.shape), np.zeros(guide.shape)

    def window(y: int, x: int) -> tuple[slice, slice]:
        return (
            slice(max(0, y - radius), min(height, y + radius + 1)),
            slice(max(0, x - radius), min(width, x + radius + 1)),
        )

    for y in range(height):
        for x in range(width):
            i, p = guide[window(y, x)].astype(np.float64), values[window(y, x)].astype(np.float64)
            slopes[y, x] = ((i * p).mean() - i.mean() * p.mean()) / (i.var() + epsilon)
            offsets[y, x] = p.mean() - slopes[y, x] * i.mean()
    result = np.zeros(guide.shape)
    for y in range(height):
        for x in range(width):
            result[y, x] = slopes[window(y, x)].mean() * guide[y, x] + offsets[window(y, x)].mean()
    return result


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 14),
    st.integers(1, 14),
    st.integers(0, 4),
    st.sampled_from([1e-4, 1e-2]),
    st.integers(0, 99),
)
def test_guided_filter_is_that_of_a_window_loop(
    height: int, width: int, radius: int, epsilon: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    guide, values = rng.random((height, width)), rng.normal(size=(height, width))
    expected = windowed(guide, values, radius, epsilon) if radius else values
    np.testing.assert_allclose(guided_filter(guide, values, radius, epsilon), expected, atol=2e-4)


def test_guided_filter_keeps_small_differences_of_a_bright_guide(photograph: np.ndarray) -> None:
    guide = 0.97 + 0.03 * photograph[:60, :80, 0] / 255
    values = (photograph[:60, :80, 1] > 120).astype(np.float32)
    np.testing.assert_allclose(
        guided_filter(guide, values, 3, 1e-5), windowed(guide, values, 3, 1e-5), atol=2e-3
    )


def test_a_grid_of_the_images_own_size_without_a_filter_stays(photograph: np.ndarray) -> None:
    pixels = photograph[:20, :30]
    maps = np.random.default_rng(0).normal(size=(3, 20, 30)).astype(np.float32)
    np.testing.assert_array_equal(np.stack(list(upsampled(maps, pixels, radius=0))), maps)


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 40), st.integers(1, 9), st.integers(1, 9), st.sampled_from([0.0, 1.0])
)
def test_a_constant_stays_a_constant_at_any_size(
    height: int, width: int, h: int, w: int, radius: float
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    (found,) = upsampled(np.full((1, h, w), 0.7, np.float32), pixels, radius)
    assert found.shape == (height, width)
    np.testing.assert_allclose(found, 0.7, atol=1e-5)


def test_bilinear_between_centres() -> None:
    found = enlarged(np.array([[0.0, 1.0]]), (1, 8))
    np.testing.assert_allclose(found[0], [0, 0, 0.125, 0.375, 0.625, 0.875, 1, 1], atol=1e-6)


def test_edges_follow_the_image() -> None:
    """An edge of the image a few pixels from that of the patches draws the map's edge to it."""
    pixels = np.zeros((32, 64, 3), np.uint8)
    pixels[:, 35:] = 200
    coarse = np.repeat(np.array([[0, 0, 0, 0, 1, 1, 1, 1]], np.float32), 4, 0)[None]

    def wrong(radius: float) -> float:
        """Share of the pixels on the wrong side of the map's edge, where it crosses a half."""
        (found,) = upsampled(coarse, pixels, radius)
        return float(((found > 0.5) != (pixels[:, :, 0] > 0)).mean())

    assert wrong(0) == pytest.approx(3 / 64)
    assert wrong(1.0) == 0


def test_a_radius_of_nothing_is_bilinear(photograph: np.ndarray) -> None:
    maps = np.random.default_rng(0).random((1, 4, 6)).astype(np.float32)
    (found,) = upsampled(maps, photograph[:40, :60], radius=0.01)
    assert found == pytest.approx(enlarged(maps[0], (40, 60)))
