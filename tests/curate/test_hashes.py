"""Hashes against brute force."""

import cv2
import numpy as np
import pytest
import scipy.fft

from unlabeled.curate import hashes


def planted(rng: np.random.Generator, count: int) -> np.ndarray:
    """Random hashes, and some that differ from them in 1 to 9 bits."""
    first = rng.integers(0, 2**64, count, dtype=np.uint64)
    near = first[: count // 3].copy()
    for place in range(len(near)):
        for bit in rng.choice(64, rng.integers(1, 10), replace=False):
            near[place] ^= np.uint64(1) << np.uint64(bit)
    return np.unique(np.concatenate((first, near)))


@pytest.mark.parametrize("few", [16, 4096])  # by parts, and each with each
@pytest.mark.parametrize("distance", [0, 1, 4, 7])
def test_all_pairs_within_a_distance_once(monkeypatch: pytest.MonkeyPatch, few: int, distance: int) -> None:
    monkeypatch.setattr(hashes, "FEW", few)
    values = planted(np.random.default_rng(distance), 300)
    bits = np.array([[bin(int(a) ^ int(b)).count("1") for b in values] for a in values])
    found = [
        (left, right, apart)
        for pairs, differ in hashes.near_pairs(values, distance)
        for (left, right), apart in zip(pairs.tolist(), differ.tolist(), strict=True)
    ]
    left, right = np.nonzero(np.triu(bits <= distance, 1))
    wanted = set(zip(left.tolist(), right.tolist(), bits[left, right].tolist(), strict=True))
    assert len(found) == len(wanted)
    assert set(found) == wanted


@pytest.mark.parametrize("few", [16, 4096])
@pytest.mark.parametrize("distance", [0, 4])
def test_the_nearest_of_others(monkeypatch: pytest.MonkeyPatch, few: int, distance: int) -> None:
    monkeypatch.setattr(hashes, "FEW", few)
    rng = np.random.default_rng(distance)
    values = rng.permutation(planted(rng, 300))
    own, others = values[:260], np.concatenate((values[200:], values[380:]))  # some in both, some twice
    bits = np.array([[bin(int(a) ^ int(b)).count("1") for b in others] for a in own])
    best = bits.argmin(1)
    near = bits.min(1) <= distance
    places, differ = hashes.nearest_hashes(own, others, distance)
    assert near.any() and not near.all()
    assert places.tolist() == np.where(near, best, -1).tolist()
    assert differ.tolist() == np.where(near, bits.min(1), 64).tolist()
    nothing, _ = hashes.nearest_hashes(own, others[:0], distance)
    assert (nothing == -1).all()


def test_copies_do_not_chain() -> None:
    values = np.array(
        [0, 0b111, 0b111111, 0], np.uint64
    )  # each 3 bits from the one before, the last as the first
    best, bits, nearest = hashes.near_copies(values, np.array([0, 1, 2, 3]), 3)
    assert best.tolist() == [0, 0, 2, 0]  # 2 is near to 1, which is a copy, but not to 0
    assert bits.tolist() == [0, 3, 0, 0]
    assert nearest.tolist() == [0, 3, 3, 0]


def test_first_of_each() -> None:
    values = np.array(["b", "a", "b", "c", "a"])
    assert hashes.first_of_each(values, np.array([4, 1, 0, 2, 3])).tolist() == [2, 1, 2, 3, 1]


def test_the_hash_is_that_of_the_formula(photograph: np.ndarray) -> None:
    grey = cv2.cvtColor(photograph, cv2.COLOR_RGB2GRAY)
    shrunk = cv2.resize(grey, (32, 32), interpolation=cv2.INTER_AREA).astype(np.float64)
    low = scipy.fft.dctn(shrunk, norm="ortho")[:8, :8]
    wanted = sum(1 << (u + 8 * v) for v in range(8) for u in range(8) if low[v, u] > np.median(low))
    found = hashes.perceptual_hash(grey)
    assert found is not None
    assert bin(found ^ wanted).count("1") <= 1  # float32 against float64 at the median
    small = cv2.resize(grey, (grey.shape[1] // 2, grey.shape[0] // 2), interpolation=cv2.INTER_AREA)
    again = hashes.perceptual_hash(small)
    assert again is not None and bin(found ^ again).count("1") <= 4
    assert hashes.perceptual_hash(np.full((40, 50), 7, np.uint8)) is None
