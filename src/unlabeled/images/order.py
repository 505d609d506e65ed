"""In which order images are seen: an endless shuffled walk, computed at any position without its past."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 6
WINDOW = 16_384  # images; what shuffle buffers usually hold
_SMALL = 1024  # permutations up to this size are drawn outright


def permuted(index: NDArray[np.int64], size: int, key: tuple[int, ...]) -> NDArray[np.int64]:
    """Where a pseudo-random permutation of range(size) sends each index, without holding the permutation.

    A Feistel network over the smallest even number of bits that covers `size`; values beyond it walk on until
    they fall inside (Black and Rogaway, 2002). Small ones, where the few states of a network show, are drawn.

    Args:
        index: int64, each in [0, size).
        size: at least 1.
        key: what the permutation depends on.
    """
    if size <= _SMALL:
        return np.random.default_rng(list(key)).permutation(size)[index]
    half = max(1, (max(1, size - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    words = np.random.SeedSequence(list(key)).generate_state(_ROUNDS, np.uint64)

    def network(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = value >> np.uint64(half), value & mask
        for word in words:
            left, right = right, left ^ (_mixed(right + word) & mask)
        return (left << np.uint64(half)) | right

    with np.errstate(over="ignore"):
        result = network(index.astype(np.uint64))
        while (outside := result >= np.uint64(size)).any():
            result[outside] = network(result[outside])
    return result.astype(np.int64)


def _mixed(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele, Lea, Flood, 2014)."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


class ShuffledOrder:
    """Global position -> image: position p lies in epoch p // N, and each epoch is a permutation of its own.

    Where reading in any order is equally cheap, the permutation is over all images and takes no memory. Where
    images come in blocks (shards, row groups), blocks are permuted and their images shuffled in windows, as a
    stream with a shuffle buffer would do, so that reads stay local; that takes 16 bytes a block.

    Args:
        num_samples: N, at least 1.
        seed: of all epochs.
        block_starts: increasing starts of the blocks, the first 0, or None.
        window: images shuffled among each other where there are blocks; None: WINDOW.
    """

    def __init__(
        self,
        num_samples: int,
        seed: int,
        block_starts: NDArray[np.int64] | None = None,
        window: int | None = None,
    ) -> None:
        self.num_samples, self.seed, self.window = num_samples, seed, window or WINDOW
        blocks = block_starts is not None and len(block_starts) > 1 and num_samples > self.window
        self.starts = block_starts if blocks else None
        self._epoch: tuple[int, NDArray[np.int64], NDArray[np.int64]] | None = None

    def indices(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Image of each global position, int64."""
        result = np.empty(len(positions), np.int64)
        epochs, within = np.divmod(positions.astype(np.int64), self.num_samples)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            if self.starts is None:
                result[chosen] = permuted(within[chosen], self.num_samples, (self.seed, int(epoch)))
            else:
                result[chosen] = self._local(within[chosen], int(epoch))
        return result

    def _local(self, positions: NDArray[np.int64], epoch: int) -> NDArray[np.int64]:
        starts, ends = self._blocks(epoch)
        shuffled = np.empty_like(positions)
        windows = positions // self.window
        for number in np.unique(windows):
            chosen = windows == number
            first = int(number) * self.window
            size = min(self.window, self.num_samples - first)
            key = (self.seed, epoch, int(number))
            shuffled[chosen] = first + permuted(positions[chosen] - first, size, key)
        block = np.searchsorted(ends, shuffled, side="right")
        before = np.where(block > 0, ends[block - 1], 0)
        return starts[block] + shuffled - before

    def _blocks(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Starts of the blocks in this epoch's order, and the positions their runs end at."""
        if self._epoch is None or self._epoch[0] != epoch:
            assert self.starts is not None
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.starts))
            sizes = np.diff(self.starts, append=self.num_samples)
            self._epoch = (epoch, self.starts[order], np.cumsum(sizes[order]))
        return self._epoch[1:]
