"""k-means of matrices that do not fit in memory: blocks of matrix products on every core.

Shape suffixes: N rows, D width, K centroids, n rows of a block.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from unlabeled.curate.blocks import Floats, Integers, Resources, Rows, load_arrays, save_arrays, spans
from unlabeled.errors import UserError

TILE = 2048  # centroids in one matrix product: its scores stay in the cache
FARTHEST = 64  # rows a block offers for empty clusters
NO_LIMITS = Resources()


@dataclass(frozen=True)
class Clusters:
    """Result of k-means.

    Attributes:
        centroids_KD: float32; of length 1 if spherical.
        labels_N: int32, the nearest centroid of each row.
        similarities_N: float32, cosine to it if spherical, else minus the squared distance.
        counts_K: int64, rows of each.
        objectives: mean similarity after each iteration.
        reseeded: empty clusters that were given a new centroid.
    """

    centroids_KD: Floats
    labels_N: NDArray[np.int32]
    similarities_N: Floats
    counts_K: Integers
    objectives: list[float]
    reseeded: int


@dataclass(frozen=True)
class _Centroids:
    """What a block needs: the rows, the centroids, and half their squared lengths (none if spherical)."""

    rows: Rows
    centroids_KD: Floats
    half_squares_K: Floats | None


def kmeans(
    vectors: Any,
    k: int,
    *,
    iterations: int = 20,
    tolerance: float = 1e-4,
    spherical: bool = True,
    init: str | Floats = "k-means++",
    sample: int | None = None,
    resources: Resources = NO_LIMITS,
) -> Clusters:
    """Cluster rows by Lloyd's algorithm.

    vectors: (N, D). k: number of clusters. iterations: at most; it stops before where the mean similarity improves by
        less than `tolerance` of itself. spherical: rows and centroids of length 1, by cosine; else by Euclidean
        distance. init: "k-means++", "random" rows, or (K, D) centroids. sample: rows drawn to find the centroids;
        all rows get a label in any case.
    Raises UserError where there are fewer rows than clusters.
    """
    rows = Rows(vectors, unit=spherical)
    if not 1 <= k <= len(rows):
        raise UserError(f"{k} clusters of {len(rows)} vectors; between 1 and that many can be made.")
    given = init if isinstance(init, str) else "given"
    identity = {
        "rows": rows.fingerprint(),
        "k": k,
        "iterations": iterations,
        "tolerance": tolerance,
        "spherical": spherical,
        "init": given if isinstance(init, str) else Rows(init, unit=False).fingerprint(),
        "sample": sample,
        "seed": resources.seed,
        "memory": resources.memory,
    }
    generator = np.random.default_rng([resources.seed, k])
    training = rows
    if sample is not None and sample < len(rows):
        drawn = np.sort(generator.choice(len(rows), max(k, sample), replace=False))
        training = Rows(rows.at(drawn), unit=spherical)
    with resources.folder("kmeans", identity) as folder:
        state = folder / "centroids.npz"
        if state.is_file():
            held = load_arrays(state)
            centroids, done = held["centroids"], bool(held["done"])
            objectives, reseeded = held["objectives"].tolist(), int(held["reseeded"])
        else:
            centroids = _initial(training, k, init, generator)
            objectives, reseeded, done = [], 0, False
        while not done and len(objectives) < iterations:
            centroids, objective, empty = _iterate(training, centroids, spherical, resources)
            reseeded += empty
            objectives.append(objective)
            if len(objectives) > 1 and not empty:
                done = objectives[-1] - objectives[-2] <= tolerance * abs(objectives[-2])
            save_arrays(state, centroids=centroids, objectives=objectives, reseeded=reseeded, done=done)
    labels, similarities = assign(vectors, centroids, spherical=spherical, resources=resources)
    counts = np.bincount(labels, minlength=k)
    return Clusters(centroids, labels, similarities, counts, objectives, reseeded)


def assign(
    vectors: Any, centroids_KD: Floats, *, spherical: bool = True, resources: Resources = NO_LIMITS
) -> tuple[NDArray[np.int32], Floats]:
    """Return the nearest centroid of each row, int32 (N,), and the similarity to it, float32 (N,).

    The similarity is the cosine if spherical, else minus the squared distance.
    """
    rows = Rows(vectors, unit=spherical)
    labels, similarities = np.empty(len(rows), np.int32), np.empty(len(rows), np.float32)
    context = _centroids(rows, centroids_KD, spherical)
    blocks, held = _blocks(rows, len(centroids_KD), resources)
    for (start, stop), (label, similarity) in zip(
        blocks, resources.map(_assign_block, context, blocks, held), strict=True
    ):
        labels[start:stop], similarities[start:stop] = label, similarity
    return labels, similarities


def nearest(block_nD: Floats, centroids_KD: Floats, half_squares_K: Floats | None = None) -> Any:
    """Return the number of the nearest centroid of each row, int32 (n,), and the score of it, float32 (n,).

    The score is the product with the centroid, less half its squared length where that is given.
    """
    labels = np.zeros(len(block_nD), np.int32)
    best = np.full(len(block_nD), -np.inf, np.float32)
    for start, stop in spans(len(centroids_KD), TILE):
        for first, last in spans(len(block_nD), TILE):
            scores = block_nD[first:last] @ centroids_KD[start:stop].T
            if half_squares_K is not None:
                scores -= half_squares_K[start:stop]
            tops = scores.argmax(axis=1)
            score = scores[np.arange(len(scores)), tops]
            better = score > best[first:last]
            labels[first:last][better] = tops[better] + start
            best[first:last][better] = score[better]
    return labels, best


def _centroids(rows: Rows, centroids_KD: Floats, spherical: bool) -> _Centroids:
    half = None if spherical else (np.square(centroids_KD).sum(axis=1) / 2).astype(np.float32)
    return _Centroids(rows, centroids_KD, half)


def _blocks(rows: Rows, k: int, resources: Resources) -> tuple[list[tuple[int, int]], int]:
    """Return spans of rows, and the bytes that a block of them holds."""
    row_bytes = 3 * 4 * rows.shape[1]
    size = min(8192, resources.block_rows(row_bytes))
    return spans(len(rows), size), size * row_bytes + 2 * 4 * TILE * TILE + 12 * k * rows.shape[1]


def _assign_block(context: _Centroids, span: tuple[int, int]) -> tuple[NDArray[np.int32], Floats]:
    block = context.rows.between(*span)
    labels, scores = nearest(block, context.centroids_KD, context.half_squares_K)
    if context.half_squares_K is not None:
        scores = 2 * scores - np.square(block).sum(axis=1)
    context.rows.release()
    return labels, scores


def _sum_block(
    context: _Centroids, span: tuple[int, int]
) -> tuple[NDArray[np.float64], Integers, float, Integers, Floats]:
    """Sums (K, D) and counts (K,) of a block by nearest centroid, its similarities' sum, and its farthest rows."""
    block = context.rows.between(*span)
    k = len(context.centroids_KD)
    labels, scores = nearest(block, context.centroids_KD, context.half_squares_K)
    if context.half_squares_K is not None:
        scores = 2 * scores - np.square(block).sum(axis=1)
    ones = np.ones(len(block), np.float32)
    sums = csr_array((ones, (labels, np.arange(len(block)))), shape=(k, len(block))) @ block
    far = np.argsort(scores, kind="stable")[:FARTHEST]
    context.rows.release()
    return (
        sums,
        np.bincount(labels, minlength=k),
        float(scores.sum(dtype=np.float64)),
        far + span[0],
        scores[far],
    )


def _iterate(
    rows: Rows, centroids_KD: Floats, spherical: bool, resources: Resources
) -> tuple[Floats, float, int]:
    """Return new centroids, the mean similarity to the old ones, and how many clusters were empty."""
    context = _centroids(rows, centroids_KD, spherical)
    blocks, held = _blocks(rows, len(centroids_KD), resources)
    sums = np.zeros(centroids_KD.shape)
    counts = np.zeros(len(centroids_KD), np.int64)
    total = 0.0
    far_rows, far_scores = [], []
    for part, count, similarity, far, scores in resources.map(_sum_block, context, blocks, held):
        sums += part
        counts += count
        total += similarity
        far_rows.append(far)
        far_scores.append(scores)
    means = sums / np.maximum(counts, 1)[:, None]
    empty = np.flatnonzero(counts == 0)
    if len(empty):
        farthest = np.concatenate(far_rows)[np.argsort(np.concatenate(far_scores), kind="stable")]
        means[empty] = centroids_KD[empty]
        empty = empty[: len(farthest)]
        means[empty] = rows.at(farthest[: len(empty)])
    if spherical:
        lengths = np.linalg.norm(means, axis=1, keepdims=True)
        means = np.where(lengths > 0, means / np.maximum(lengths, 1e-30), centroids_KD)
    return means.astype(np.float32), total / len(rows), len(empty)


def _initial(rows: Rows, k: int, init: str | Floats, generator: np.random.Generator) -> Floats:
    if not isinstance(init, str):
        if init.shape != (k, rows.shape[1]):
            raise ValueError(f"initial centroids {init.shape}, not {(k, rows.shape[1])}")
        return np.array(init, np.float32)
    if init == "random":
        return rows.at(np.sort(generator.choice(len(rows), k, replace=False)))
    if init != "k-means++":
        raise UserError(f"k-means starts from k-means++, random or centroids, not from {init!r}.")
    # Of a sample: k passes over all rows would cost more than the iterations.
    some = np.sort(generator.choice(len(rows), min(len(rows), max(16 * k, 1024), 65536), replace=False))
    return spread(rows.at(some), k, generator) if len(some) >= k else rows.at(some)


def spread(block_nD: Floats, k: int, generator: np.random.Generator) -> Floats:
    """Return k rows drawn one after another in proportion to the squared distance from those before (k-means++)."""
    chosen = [int(generator.integers(len(block_nD)))]
    squares = np.square(block_nD).sum(axis=1, dtype=np.float64)
    distances = np.full(len(block_nD), np.inf)
    for _ in range(k - 1):
        row = chosen[-1]
        distance = squares + squares[row] - 2 * (block_nD @ block_nD[row])
        np.minimum(distances, np.maximum(distance, 0), out=distances)
        distances[chosen] = 0
        total = distances.cumsum()
        if total[-1] > 0:
            chosen.append(int(np.searchsorted(total, generator.random() * total[-1], side="right")))
        else:  # fewer different rows than k
            left = np.setdiff1d(np.arange(len(block_nD)), chosen)
            chosen.append(int(generator.choice(left)))
    return block_nD[chosen]


def without_work(resources: Resources) -> Resources:
    """The same resources with nothing kept on disk, for steps that are short or whose caller keeps the result."""
    return replace(resources, work=None)
