"""Which patches of the global crops the student does not see (iBOT; DINOv2 section 4)."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

MIN_PATCHES = 4  # of one rectangle, where the target allows
MIN_ASPECT = 0.3  # of a rectangle; the largest is its inverse
MAX_TRIES = 10  # rectangles drawn in vain before a mask is taken as it is


def block_masks(
    num_crops: int,
    grid: tuple[int, int],
    probability: float,
    ratio: tuple[float, float],
    rng: np.random.Generator,
    wanted: NDArray[np.int64] | None = None,
) -> NDArray[np.bool_]:
    """Masks of a batch of crops, each a union of random rectangles.

    int(num_crops * probability) crops are masked. [low, high] is cut into as many equal strata, one mask's share of
    patches is drawn uniformly from each, and the masks are shuffled over the batch.

    Args:
        num_crops: of the whole batch.
        grid: (h, w) patches of a crop.
        probability: share of crops masked.
        ratio: (low, high) share of patches masked in such a crop.
        rng: of everything random here.
        wanted: the crops whose masks are made, all if None: a rank spends no time on the others', and gets for its own
            what they are in the whole batch.

    Returns:
        (len(wanted), h * w) bool; a masked crop has at least one patch masked, and no more than its share asks for
        (but for that one).
    """
    height, width = grid
    num_masked = int(num_crops * probability)
    edges = np.linspace(*ratio, num_masked + 1)
    shares = rng.uniform(edges[:-1], edges[1:])
    seeds = rng.integers(2**63, size=num_masked)
    numbers = rng.permutation(num_crops)  # of each crop's mask; from num_masked on there is none
    if wanted is not None:
        numbers = numbers[wanted]
    masks = np.zeros((len(numbers), height * width), bool)
    for mask, number in zip(masks, numbers, strict=True):
        if number < num_masked:
            own = np.random.Generator(np.random.PCG64(int(seeds[number])))
            mask[:] = rectangle_mask(grid, max(1, int(shares[number] * height * width)), own).ravel()
    return masks


def rectangle_mask(grid: tuple[int, int], target: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    """A union of random rectangles of at most `target` patches, (h, w) bool, near `target` as far as they fit."""
    height, width = grid
    mask = np.zeros(grid, bool)
    missing, tries = target, 0
    while missing > 0 and tries < MAX_TRIES:
        tries += 1
        area = rng.uniform(min(MIN_PATCHES, missing), missing)
        aspect = math.exp(rng.uniform(math.log(MIN_ASPECT), -math.log(MIN_ASPECT)))
        h, w = max(1, round(math.sqrt(area * aspect))), max(1, round(math.sqrt(area / aspect)))
        if h > height or w > width:
            continue
        top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
        window = mask[top : top + h, left : left + w]
        fresh = h * w - int(window.sum())
        if 0 < fresh <= missing:
            window[:] = True
            missing -= fresh
            tries = 0
    if not mask.any():
        mask[rng.integers(height), rng.integers(width)] = True
    return mask
