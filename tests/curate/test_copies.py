"""The transformations that copies are made by: what they keep, what they may be given, and their seeds."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unlabeled.curate import copies
from unlabeled.curate.copies import TRANSFORMATIONS, collage, composition, make_copy
from unlabeled.curate.overlays import Pixels

ALL = {
    **TRANSFORMATIONS,
    "composition": composition,
    "make_copy": make_copy,
    "collage": lambda pixels, rng: collage(pixels, rng, [np.full((5, 9, 3), 7, np.uint8)]),
}


def places(height: int, width: int) -> Pixels:
    """An image whose pixels say where they are: red is the row, green the column, both below 256."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack((rows, columns, np.zeros_like(rows)), 2).astype(np.uint8)


@pytest.mark.parametrize("name", ALL)
def test_a_copy_is_an_image_that_differs_and_depends_on_the_seed_alone(
    name: str, photograph: np.ndarray
) -> None:
    before = photograph.copy()
    one, again, other = (ALL[name](photograph, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert one.dtype == np.uint8 and one.ndim == 3 and one.shape[2] == 3 and min(one.shape[:2]) >= 2
    np.testing.assert_array_equal(one, again)
    assert one.shape != before.shape or (one != before).mean() > 0.01
    if name not in ("flip", "quarter_turn", "jpeg", "greyscale"):  # of these two seeds can give the same
        assert one.shape != other.shape or (one != other).any()
    np.testing.assert_array_equal(photograph, before)
    assert not np.shares_memory(one, photograph)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(ALL)), st.integers(2, 70), st.integers(2, 70), st.integers(0, 2**32), st.booleans()
)
def test_any_size_will_do(name: str, height: int, width: int, seed: int, thin: bool) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (height, 2 if thin else width, 3), np.uint8)
    copy = ALL[name](pixels, np.random.default_rng(seed))
    assert copy.dtype == np.uint8 and copy.shape[2] == 3 and min(copy.shape[:2]) >= 2


@pytest.mark.parametrize("shape", [(200, 200), (120, 240), (250, 100)])
def test_a_crop_is_a_box_of_the_image_and_takes_away_what_it_says(shape: tuple[int, int]) -> None:
    pixels = places(*shape)
    removed = []
    for seed in range(300):
        copy = copies.crop(pixels, np.random.default_rng(seed))
        top, left = int(copy[0, 0, 0]), int(copy[0, 0, 1])
        h, w = copy.shape[:2]
        np.testing.assert_array_equal(copy, pixels[top : top + h, left : left + w])
        aspect = (w / h) / (shape[1] / shape[0])
        assert 0.72 < aspect < 1.39
        removed.append(1 - h * w / (shape[0] * shape[1]))
    assert 0.08 < min(removed) < 0.15 and 0.75 < max(removed) < 0.82
    assert abs(np.mean(removed) - 0.45) < 0.04


def test_flips_turns_and_greys_move_or_grey_the_same_pixels() -> None:
    pixels = places(30, 50)
    for seed in range(30):
        rng = np.random.default_rng(seed)
        flipped = copies.flip(pixels, rng)
        assert any(np.array_equal(flipped, other) for other in (pixels[:, ::-1], pixels[::-1]))
        turned = copies.quarter_turn(pixels, rng)
        assert any(np.array_equal(turned, np.rot90(pixels, turn)) for turn in (1, 2, 3))
        grey = copies.greyscale(pixels, rng).astype(float)
        assert np.corrcoef(grey.reshape(-1, 3).T).min() > 0.99  # but for rounding, a factor apart


def test_a_rotation_loses_no_corner() -> None:
    pixels = np.zeros((60, 90, 3), np.uint8)
    corners = ((0, 0), (0, 85), (55, 0), (55, 85))
    colours = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0))
    for (top, left), colour in zip(corners, colours, strict=True):
        pixels[top : top + 5, left : left + 5] = colour
    for seed in range(20):
        turned = copies.rotation(pixels, np.random.default_rng(seed)).astype(int)
        for colour in colours:
            near = (np.abs(turned - colour).sum(2) < 90).sum()
            assert near >= 12  # of 25 pixels, edges blend


def test_jpeg_qualities_span_copydays(photograph: np.ndarray) -> None:
    pixels = photograph[100:200, 100:200]
    errors = [
        float(np.abs(copies.jpeg(pixels, np.random.default_rng(seed)).astype(int) - pixels).mean())
        for seed in range(60)
    ]
    assert len({round(error, 6) for error in errors}) == len(copies.QUALITIES)
    assert max(errors) > 2 * min(errors)


def test_a_collage_shows_the_image_and_another_in_its_own_size() -> None:
    red, blue = np.full((90, 120, 3), (255, 0, 0), np.uint8), np.full((50, 40, 3), (0, 0, 255), np.uint8)
    for seed in range(60):
        made = collage(red, np.random.default_rng(seed), [blue])
        assert made.shape == red.shape
        shares = [(made == colour).all(2).mean() for colour in ((255, 0, 0), (0, 0, 255))]
        assert shares[0] >= 0.17 and shares[1] >= 0.17 and sum(shares) > 0.9  # 0.2 less the gap


def test_a_screenshot_holds_every_pixel_of_the_image(photograph: np.ndarray) -> None:
    small = np.ascontiguousarray(photograph[:40, :60])
    for seed in range(20):
        shot = copies.screenshot(small, np.random.default_rng(seed))
        windows = np.lib.stride_tricks.sliding_window_view(shot, small.shape)[:, :, 0]
        assert (windows[:, :, 0, 0] == small[0, 0]).all(-1).any()
        assert any(
            np.array_equal(windows[y, x], small)
            for y, x in np.argwhere((windows[:, :, 0, 0] == small[0, 0]).all(-1))
        )
