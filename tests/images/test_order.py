"""The shuffled walk: exact permutations, anew each epoch, from any position, uniform, local where need be."""

import pickle
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from unlabeled.images.order import WINDOW, ShuffledOrder, permuted


def epoch_of(order: ShuffledOrder, epoch: int) -> np.ndarray:
    size = order.num_samples
    return order.indices(np.arange(epoch * size, (epoch + 1) * size))


@settings(max_examples=80, deadline=None)
@given(size=st.integers(1, 5000), seed=st.integers(0, 2**32), epoch=st.integers(0, 10**6))
def test_every_epoch_is_a_permutation(size: int, seed: int, epoch: int) -> None:
    order = epoch_of(ShuffledOrder(size, seed), epoch)
    assert order.dtype == np.int64
    np.testing.assert_array_equal(np.sort(order), np.arange(size))


@pytest.mark.parametrize("size", [1024, 1025, 4095, 4096, 4097, 65_535, 65_536, 65_537, 300_001])
def test_sizes_around_powers_of_two(size: int) -> None:
    order = permuted(np.arange(size), size, (0, 1))
    np.testing.assert_array_equal(np.sort(order), np.arange(size))


@settings(max_examples=80, deadline=None)
@given(data=st.data(), seed=st.integers(0, 100), window=st.integers(1, 400), epoch=st.integers(0, 1000))
def test_every_epoch_over_blocks_is_a_permutation(
    data: st.DataObject, seed: int, window: int, epoch: int
) -> None:
    sizes = data.draw(st.lists(st.integers(1, 200), min_size=1, max_size=30))
    starts = np.cumsum([0, *sizes[:-1]])
    order = ShuffledOrder(sum(sizes), seed, starts, window)
    np.testing.assert_array_equal(np.sort(epoch_of(order, epoch)), np.arange(sum(sizes)))


@pytest.mark.parametrize("starts", [None, np.arange(0, 5000, 70)])
def test_any_position_is_found_without_its_past(starts: np.ndarray | None) -> None:
    order = ShuffledOrder(5000, 3, starts, window=300)
    whole = order.indices(np.arange(20_000))
    rng = np.random.default_rng(0)
    for _ in range(20):
        positions = rng.integers(0, 20_000, 40)  # epochs mixed, in any order
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(order)).indices(positions), whole[positions])
        fresh = ShuffledOrder(5000, 3, starts, window=300)
        np.testing.assert_array_equal(fresh.indices(positions), whole[positions])
    epochs = whole.reshape(4, 5000)
    for first in range(4):
        for second in range(first):
            assert (epochs[first] == epochs[second]).mean() < 0.01
    assert (ShuffledOrder(5000, 4, starts, window=300).indices(np.arange(5000)) == epochs[0]).mean() < 0.01


@pytest.mark.parametrize("size", [3, 7, 60, 1500])
def test_every_image_is_equally_likely_everywhere(size: int) -> None:
    """Chi-squared over (place, image) and over (image, next image), for 3000 epochs."""
    order, epochs = ShuffledOrder(size, 11), 3000
    places = np.arange(0, size, max(1, size // 7))[:7]
    positions = np.arange(epochs)[:, None] * size + places
    drawn = order.indices(positions.ravel()).reshape(epochs, -1)
    bins = min(size, 30)
    for place in range(drawn.shape[1]):
        counts = np.bincount(drawn[:, place] * bins // size, minlength=bins)
        expected = np.bincount(np.arange(size) * bins // size, minlength=bins) * epochs / size
        assert stats.chisquare(counts, expected).pvalue > 1e-4
    pairs = order.indices((np.arange(epochs)[:, None] * size + [0, 1]).ravel()).reshape(-1, 2)
    step = (pairs[:, 1] - pairs[:, 0]) % size
    counts = np.bincount((step[step > 0] - 1) * bins // size, minlength=bins)
    expected = np.bincount(np.arange(size - 1) * bins // size, minlength=bins)
    assert stats.chisquare(counts[expected > 0], (expected * epochs / (size - 1))[expected > 0]).pvalue > 1e-4


@pytest.mark.parametrize("size", [900, 100_003])
def test_neighbours_in_the_source_are_no_neighbours_in_the_walk(size: int) -> None:
    order = epoch_of(ShuffledOrder(size, 5), 2)
    steps = np.diff(order)
    assert (np.abs(steps) == 1).mean() < 12 / size + 1e-3  # a uniform permutation has 2 / size
    correlation = np.corrcoef(order[:-1], order[1:])[0, 1]
    assert abs(correlation) < 5 / np.sqrt(size)
    assert abs(np.corrcoef(np.arange(size), order)[0, 1]) < 5 / np.sqrt(size)
    # Runs of 64, as batches are: their means spread as those of a sample without replacement do.
    means = order[: size // 64 * 64].reshape(-1, 64).mean(1)
    assert 0.6 < means.std() / (size / np.sqrt(12 * 64)) < 1.4


def test_a_walk_over_blocks_is_local_and_mixed() -> None:
    starts = np.arange(0, 20_000, 100)
    order = ShuffledOrder(20_000, 0, starts, window=2000)
    walk = epoch_of(order, 0)
    blocks = walk // 100
    for first in range(0, 20_000, 2000):
        window = blocks[first : first + 2000]
        assert len(np.unique(window)) <= 21
        assert (np.diff(window) == 0).mean() < 0.15  # blocks are mixed within a window
    # The blocks of a window come from all over the source.
    assert np.unique(blocks[:2000]).std() > 30
    assert not np.array_equal(np.unique(blocks[:2000]), np.unique(epoch_of(order, 1)[:2000] // 100))


def test_few_images_or_one_block_are_shuffled_as_a_whole() -> None:
    plain = ShuffledOrder(WINDOW, 0)
    blocks = ShuffledOrder(WINDOW, 0, np.arange(0, WINDOW, 128))
    np.testing.assert_array_equal(plain.indices(np.arange(100)), blocks.indices(np.arange(100)))
    np.testing.assert_array_equal(
        ShuffledOrder(10**6, 0, np.array([0])).indices(np.arange(100)),
        ShuffledOrder(10**6, 0).indices(np.arange(100)),
    )


def test_a_hundred_million_images_take_no_memory() -> None:
    tracemalloc.start()
    order = ShuffledOrder(10**8, 1)
    drawn = order.indices(np.arange(10**12, 10**12 + 1000))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(np.unique(drawn)) == 1000 and drawn.min() >= 0 and drawn.max() < 10**8
    assert peak < 10**6
