"""Images of the same bytes, and images whose perceptual hashes differ in few bits.

Shape suffixes: N images, E pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import cv2
import numpy as np
from numpy.typing import NDArray

HASH_SIDE, HASH_BITS = 8, 64
SHRUNK = 32  # pixels; the transform is taken of 32 x 32
NO_CONTRAST = 2.0  # grey levels; below this standard deviation a hash would be noise
FEW = 4096  # hashes, up to which each is compared with each
BLOCK = 8192  # hashes looked up at once
_WEIGHTS = 1 << np.arange(HASH_BITS, dtype=np.uint64)


def perceptual_hash(grey_HW: NDArray[np.uint8]) -> int | None:
    """Return the 64-bit DCT hash of an image (Zauner 2010, section 3.2.1); None where it has no contrast.

    The image is shrunk to 32 x 32; bit u + 8v says whether the DCT coefficient of column frequency u and row frequency
    v, 0 to 7, is above the median of all 64.
    """
    shrunk = cv2.resize(grey_HW, (SHRUNK, SHRUNK), interpolation=cv2.INTER_AREA).astype(np.float32)
    if shrunk.std() < NO_CONTRAST:
        return None
    low = cv2.dct(shrunk)[:HASH_SIDE, :HASH_SIDE].ravel()
    return int(_WEIGHTS[low > np.median(low)].sum())


def first_of_each(values: NDArray[np.generic], rank_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return for each value the place of the equal one that has the smallest rank, int64 (N,)."""
    order = np.lexsort((rank_N, values))
    starts = np.flatnonzero(np.concatenate(([True], values[order[1:]] != values[order[:-1]])))
    sizes = np.diff(np.append(starts, len(values)))
    first = np.empty(len(values), np.int64)
    first[order] = np.repeat(order[starts], sizes) if len(values) else 0
    return first


def near_pairs(
    hashes_N: NDArray[np.uint64], distance: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Give ((E, 2) places, (E,) bits that differ) of all pairs of hashes within a distance, each pair once.

    hashes: each once. distance: 0 to 7 bits, exact: hashes that differ in d bits have one of d + 1 parts in common
    (pigeonhole; Norouzi et al. 2012), so each is compared with those that share a part with it.
    """
    if len(hashes_N) <= FEW:
        yield from _pairs_within(hashes_N, np.arange(len(hashes_N)), distance)
        return
    ends = np.linspace(0, HASH_BITS, distance + 2).round().astype(int)
    masks = [np.uint64(sum(1 << bit for bit in range(first, end))) for first, end in pairwise(ends.tolist())]
    for number, mask in enumerate(masks):
        part = hashes_N & mask
        order = np.argsort(part, kind="stable")
        starts = np.flatnonzero(np.concatenate(([True], part[order[1:]] != part[order[:-1]])))
        sizes = np.diff(np.append(starts, len(order)))
        for start, size in zip(starts[sizes > 1].tolist(), sizes[sizes > 1].tolist(), strict=True):
            for pairs, bits in _pairs_within(hashes_N, order[start : start + size], distance):
                differs = hashes_N[pairs[:, 0]] ^ hashes_N[pairs[:, 1]]
                new = np.ones(len(pairs), bool)
                for earlier in masks[:number]:  # found there already
                    new &= (differs & earlier) != 0
                yield pairs[new], bits[new]


def _pairs_within(
    hashes_N: NDArray[np.uint64], places: NDArray[np.int64], distance: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Pairs among the hashes at some places, each compared with each."""
    import faiss

    codes = np.ascontiguousarray(hashes_N[places]).view(np.uint8).reshape(-1, HASH_BITS // 8)
    index = faiss.IndexBinaryFlat(HASH_BITS)
    if len(codes):
        index.add(codes)
    for start in range(0, len(codes), BLOCK):
        # faiss finds what is nearer than the radius.
        limits, bits, right = index.range_search(codes[start : start + BLOCK], distance + 1)
        left = np.repeat(np.arange(start, start + len(limits) - 1), np.diff(limits.astype(np.int64)))
        once = left < right
        pairs = np.stack((places[left[once]], places[right[once]]), 1).astype(np.int64)
        yield np.sort(pairs, axis=1), bits[once].astype(np.int64)


def nearest_hashes(
    hashes_N: NDArray[np.uint64], others_M: NDArray[np.uint64], distance: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return for each hash the place of the nearest of others within a distance, the first of equally near ones, and
    the bits they differ in; -1 and 64 where none is near.

    distance: 0 to 7 bits, exact; see `near_pairs`.
    """
    codes = np.unique(np.concatenate((hashes_N, others_M)))
    names, first = np.unique(others_M, return_index=True)
    other = np.full(len(codes), -1, np.int64)  # place in others of each code that is there
    other[np.searchsorted(codes, names)] = first
    left, right = [np.searchsorted(codes, names)], [first]
    bits = [np.zeros(len(names), np.int64)]
    for pairs, apart in near_pairs(codes, distance):
        for here, there in ((0, 1), (1, 0)):
            to_other = other[pairs[:, there]] >= 0
            left.append(pairs[to_other, here])
            right.append(other[pairs[to_other, there]])
            bits.append(apart[to_other])
    codes_E, places_E, bits_E = np.concatenate(left), np.concatenate(right), np.concatenate(bits)
    order = np.lexsort((places_E, bits_E, codes_E))
    found, best = np.unique(codes_E[order], return_index=True)
    place, differs = np.full(len(codes), -1, np.int64), np.full(len(codes), HASH_BITS, np.int64)
    place[found], differs[found] = places_E[order][best], bits_E[order][best]
    own = np.searchsorted(codes, hashes_N)
    return place[own], differs[own]


def near_copies(
    hashes_N: NDArray[np.uint64], rank_N: NDArray[np.int64], distance: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return for each image the place of the one it is a copy of (itself where kept), the bits they differ in, and
    the fewest bits it differs from any other in, 64 where none is near.

    Images are taken by rank: one that no kept one is near to is kept, and all that are near to it are its copies. So
    each copy is near to what is kept for it, and copies of copies do not chain.

    hashes: perceptual, of images that have one. rank: distinct, smallest first. distance: 0 to 7.
    """
    unique, inverse = np.unique(hashes_N, return_inverse=True)
    first = first_of_each(hashes_N, rank_N)
    best = np.empty(len(unique), np.int64)  # place of the best image of each distinct hash
    best[inverse] = first
    found = list(near_pairs(unique, distance))
    pairs = np.concatenate([pair for pair, _ in found]) if found else np.empty((0, 2), np.int64)
    bits = np.concatenate([one for _, one in found]) if found else np.empty(0, np.int64)
    both = np.concatenate((pairs, pairs[:, ::-1]))
    bits = np.concatenate((bits, bits))
    order = np.lexsort((rank_N[best[both[:, 1]]], both[:, 0]))
    both, bits = both[order], bits[order]
    nearest = np.full(len(unique), HASH_BITS, np.int64)
    np.minimum.at(nearest, both[:, 0], bits)
    starts = np.searchsorted(both[:, 0], np.arange(len(unique) + 1))
    representative, differs = np.arange(len(unique)), np.zeros(len(unique), np.int64)
    free = np.ones(len(unique), bool)
    members = np.unique(both[:, 0])
    for code in members[np.argsort(rank_N[best[members]], kind="stable")]:
        if not free[code]:
            continue
        span = slice(starts[code], starts[code + 1])
        near, apart = both[span, 1], bits[span]
        taken = free[near]
        representative[near[taken]], differs[near[taken]] = code, apart[taken]
        free[near[taken]] = free[code] = False
    copies = np.bincount(inverse, minlength=len(unique))
    nearest[copies > 1] = 0
    return best[representative[inverse]], differs[inverse], nearest[inverse]
