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
from unlabeled.curate.routing import TILE, Router, routed
from unlabeled.errors import UserError

RECALL = 0.99  # of labels while the centroids still move
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
        recall: share of rows whose label is the one that brute force finds, measured on a sample; 1 for few clusters.
    """

    centroids_KD: Floats
    labels_N: NDArray[np.int32]
    similarities_N: Floats
    counts_K: Integers
    objectives: list[float]
    reseeded: int
    recall: float


@dataclass(frozen=True)
class _Step:
    """What a block needs: the rows, and where the centroids are."""

    rows: Rows
    router: Router
    before_N: NDArray[np.int32] | None


@dataclass(frozen=True)
class _State:
    """Centroids, those of before, and which of those each row was nearest to."""

    centroids_KD: Floats
    anchors_AD: Floats | None = None
    labels_N: NDArray[np.int32] | None = None


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
        "k": int(k),
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
        file = folder / "centroids.npz"
        if file.is_file():
            held = load_arrays(file)
            state = _State(held["centroids"], held["anchors"], held["labels"])
            objectives, reseeded, done = (
                held["objectives"].tolist(),
                int(held["reseeded"]),
                bool(held["done"]),
            )
        else:
            state = _State(_initial(training, k, init, generator))
            objectives, reseeded, done = [], 0, False
        while not done and len(objectives) < iterations:
            state, objective, empty = _iterate(training, state, spherical, resources)
            reseeded += empty
            objectives.append(objective)
            if len(objectives) > 1 and not empty:
                done = objectives[-1] - objectives[-2] <= tolerance * abs(objectives[-2])
            if resources.work:
                save_arrays(
                    file,
                    centroids=state.centroids_KD,
                    anchors=state.anchors_AD,
                    labels=state.labels_N,
                    objectives=objectives,
                    reseeded=reseeded,
                    done=done,
                )
    known = state if training is rows else _State(state.centroids_KD)
    labels, similarities, recall = assign(
        vectors,
        state.centroids_KD,
        spherical=spherical,
        anchors_AD=known.anchors_AD,
        before_N=known.labels_N,
        resources=resources,
    )
    centroids = state.centroids_KD
    counts = np.bincount(labels, minlength=k)
    return Clusters(centroids, labels, similarities, counts, objectives, reseeded, recall)


def assign(
    vectors: Any,
    centroids_KD: Floats,
    *,
    spherical: bool = True,
    recall: float = 0.99,
    anchors_AD: Floats | None = None,
    before_N: NDArray[np.int32] | None = None,
    resources: Resources = NO_LIMITS,
) -> tuple[NDArray[np.int32], Floats, float]:
    """Return the nearest centroid of each row, int32 (N,), the similarity to it, float32 (N,), and the recall.

    The similarity is the cosine if spherical, else minus the squared distance. recall: wanted, and as measured: the
        share of rows that get the centroid that brute force finds; 1 for few centroids, see `Router`. anchors_AD,
        before_N: centroids that are known to be near to the rows, and the one of each row, which saves time.
    """
    rows = Rows(vectors, unit=spherical)
    labels, similarities = np.empty(len(rows), np.int32), np.empty(len(rows), np.float32)
    router = routed(
        rows,
        centroids_KD,
        spherical=spherical,
        recall=recall,
        seed=resources.seed,
        anchors_AD=anchors_AD,
        before_N=before_N,
    )
    blocks, held = _blocks(rows, len(centroids_KD), resources)
    for (start, stop), (label, similarity) in zip(
        blocks, resources.map(_assign_block, _Step(rows, router, before_N), blocks, held), strict=True
    ):
        labels[start:stop], similarities[start:stop] = label, similarity
    return labels, similarities, router.recall


def _blocks(rows: Rows, k: int, resources: Resources) -> tuple[list[tuple[int, int]], int]:
    """Return spans of rows, and the bytes that a block of them holds."""
    row_bytes = 4 * 4 * rows.shape[1]
    # Each block returns (K, D) sums, so there are fewer blocks for many centroids.
    size = min(resources.block_rows(row_bytes), max(8192, 1 << (2 * k).bit_length()))
    return spans(len(rows), size), size * row_bytes + 2 * 4 * TILE * TILE + 12 * k * rows.shape[1]


def _nearest(step: _Step, span: tuple[int, int]) -> tuple[Floats, NDArray[np.int32], Floats]:
    """Rows of a block, the nearest centroid of each, and the similarity to it."""
    block = step.rows.between(*span)
    step.rows.release()
    before = None if step.before_N is None else step.before_N[slice(*span)]
    labels, scores = step.router.nearest(block, before)
    if step.router.half_squares_K is not None:
        scores = 2 * scores - np.square(block).sum(axis=1)
    return block, labels, scores


def _assign_block(step: _Step, span: tuple[int, int]) -> tuple[NDArray[np.int32], Floats]:
    return _nearest(step, span)[1:]


def _sum_block(
    step: _Step, span: tuple[int, int]
) -> tuple[NDArray[np.int32], Floats, Integers, float, Integers, Floats]:
    """Nearest centroids of a block, sums (K, D) and counts (K,) by them, the similarities' sum, the farthest rows."""
    block, labels, scores = _nearest(step, span)
    k = len(step.router.centroids_KD)
    ones = np.ones(len(block), np.float32)
    sums = csr_array((ones, (labels, np.arange(len(block)))), shape=(k, len(block))) @ block
    far = np.argsort(scores, kind="stable")[:FARTHEST]
    counts = np.bincount(labels, minlength=k)
    return labels, sums, counts, float(scores.sum(dtype=np.float64)), far + span[0], scores[far]


def _iterate(rows: Rows, state: _State, spherical: bool, resources: Resources) -> tuple[_State, float, int]:
    """Return new centroids, the mean similarity to the old ones, and how many clusters were empty."""
    centroids_KD = state.centroids_KD
    router = routed(
        rows,
        centroids_KD,
        spherical=spherical,
        recall=RECALL,
        seed=resources.seed,
        anchors_AD=state.anchors_AD,
        before_N=state.labels_N,
    )
    blocks, held = _blocks(rows, len(centroids_KD), resources)
    labels = np.empty(len(rows), np.int32)
    sums = np.zeros(centroids_KD.shape)
    counts = np.zeros(len(centroids_KD), np.int64)
    total = 0.0
    far_rows, far_scores = [], []
    step = _Step(rows, router, state.labels_N)
    for (start, stop), (label, part, count, similarity, far, scores) in zip(
        blocks, resources.map(_sum_block, step, blocks, held), strict=True
    ):
        labels[start:stop] = label
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
    return _State(means.astype(np.float32), centroids_KD, labels), total / len(rows), len(empty)


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
