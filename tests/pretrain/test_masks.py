"""Masks: how many, how large, of which shape."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unlabeled.pretrain.masks import block_masks, rectangle_mask


@settings(max_examples=60, deadline=None)
@given(
    crops=st.integers(0, 40),
    height=st.integers(1, 20),
    width=st.integers(1, 20),
    seed=st.integers(0, 999),
)
def test_counts(crops: int, height: int, width: int, seed: int) -> None:
    masks = block_masks(crops, (height, width), 0.5, (0.1, 0.5), np.random.default_rng(seed))
    assert masks.shape == (crops, height * width)
    counts = masks.sum(1)
    assert (counts > 0).sum() == int(crops * 0.5)
    assert counts.max(initial=0) <= max(1, int(0.5 * height * width))


def test_ratios_are_stratified_and_nearly_reached() -> None:
    crops = 64
    masks = block_masks(crops, (16, 16), 0.5, (0.1, 0.5), np.random.default_rng(0))
    shares = np.sort(masks.mean(1)[masks.any(1)])
    edges = np.linspace(0.1, 0.5, crops // 2 + 1)
    # The released procedure may stop short of a share, by little; never beyond it.
    assert (shares <= edges[1:] + 1e-9).all()
    assert (edges[:-1] - shares < 0.06).all()
    assert np.abs(shares - (edges[:-1] + edges[1:]) / 2).mean() < 0.015


def test_masks_are_shuffled_over_the_batch() -> None:
    rng = np.random.default_rng(0)
    masked = np.array([block_masks(10, (8, 8), 0.5, (0.1, 0.5), rng).any(1) for _ in range(400)])
    assert np.abs(masked.mean(0) - 0.5).max() < 0.1


def test_first_rectangle_is_a_rectangle_of_the_allowed_aspect() -> None:
    found = 0
    for seed in range(2000):
        mask = rectangle_mask((16, 16), 30, np.random.default_rng(seed))
        rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
        h, w = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
        if mask.sum() == h * w:  # a single rectangle
            found += 1
            assert 0.2 <= h / w <= 5  # 0.3 to 1/0.3 before rounding to patches
    assert found > 20


def test_the_generator_decides() -> None:
    first, second, other = (
        block_masks(6, (8, 8), 0.5, (0.1, 0.5), np.random.default_rng(s)) for s in (1, 1, 2)
    )
    assert (first == second).all()
    assert (first != other).any()


@pytest.mark.parametrize("grid", [(2, 2), (4, 4), (3, 7)])
def test_small_grids(grid: tuple[int, int]) -> None:
    masks = block_masks(8, grid, 0.5, (0.1, 0.5), np.random.default_rng(0))
    assert (masks.any(1)).sum() == 4
