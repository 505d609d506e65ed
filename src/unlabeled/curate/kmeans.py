"""k-means of matrices that do not fit in memory: centroids of a sample, then the nearest of each row, in blocks.

Shape suffixes: N rows, S rows of the sample, D width, K centroids, n rows of a block.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from threadpoolctl import threadpool_limits

from unlabeled.curate.blocks import Floats, Integers, Resources, Rows, load_arrays, save_arrays, spans
from unlabeled.errors import UserError

ROWS_OF_A_CLUSTER = (
    256  # that the centroids are found with, at most; more change them little (faiss's number too)
)
SPREAD_OVER = 65536  # rows that k-means++ draws from, at most
ONE_BY_ONE = 128  # centroids of k-means++, beyond which several are drawn at once
COMPARED = 4096  # rows whose distances are computed together
SUMMED = 65536  # rows summed in float32 before their sums are added up in float64
NO_LIMITS = Resources()


@dataclass(frozen=True)
class Trained:
    """Centroids of k-means.

    Attributes:
        centroids_KD: float32; of length 1 if spherical.
        objectives: mean similarity of the sample to its nearest centroids, before each iteration moves these.
        reseeded: empty clusters that were given the row farthest from its own.
    """

    centroids_KD: Floats
    objectives: list[float]
    reseeded: int


@dataclass(frozen=True)
class Clusters:
    """Centroids, and the nearest one of each row.

    Attributes:
        centroids_KD, objectives, reseeded: see `Trained`.
        labels_N: int32.
        similarities_N: float32, cosine to it if spherical, else minus the squared distance.
        counts_K: int64, rows of each.
    """

    centroids_KD: Floats
    labels_N: NDArray[np.int32]
    similarities_N: Floats
    counts_K: Integers
    objectives: list[float]
    reseeded: int


def kmeans(
    vectors: Any, k: int, *, spherical: bool = True, resources: Resources = NO_LIMITS, **settings: Any
) -> Clusters:
    """Cluster rows: centroids by `train`, which takes the same arguments, and the nearest one of each row."""
    found = train(vectors, k, spherical=spherical, resources=resources, **settings)
    labels, similarities = assign(vectors, found.centroids_KD, spherical=spherical, resources=resources)
    counts = np.bincount(labels, minlength=k)
    return Clusters(found.centroids_KD, labels, similarities, counts, found.objectives, found.reseeded)


def train(
    vectors: Any,
    k: int,
    *,
    iterations: int = 20,
    tolerance: float = 1e-4,
    spherical: bool = True,
    init: str | Floats = "k-means++",
    sample: int | None = None,
    resources: Resources = NO_LIMITS,
) -> Trained:
    """Find centroids by Lloyd's algorithm, on a sample in memory.

    The result does not depend on the number of workers, so faiss does the products a block and a core at a time: those
    of its own k-means differ in the last bit from one number of threads to another.

    vectors: (N, D). k: number of clusters. iterations: at most; it stops before where the mean similarity improves by
        less than `tolerance` of itself. spherical: rows and centroids of length 1, by cosine; else by Euclidean
        distance. init: "k-means++", "random" rows, or (K, D) centroids. sample: rows drawn; 256 a cluster by default,
        and never more than a quarter of the memory holds.
    Raises UserError where there are fewer rows than clusters.
    """
    rows = Rows(vectors, unit=spherical)
    if not 1 <= k <= len(rows):
        raise UserError(f"{k} clusters of {len(rows)} vectors; between 1 and that many can be made.")
    identity = {
        "rows": rows.fingerprint(),
        "k": int(k),
        "iterations": iterations,
        "tolerance": tolerance,
        "spherical": spherical,
        "init": init if isinstance(init, str) else Rows(init, unit=False).fingerprint(),
        "sample": sample,
        "seed": resources.seed,
        "memory": resources.memory,
    }
    generator = np.random.default_rng([resources.seed, k])
    block_SD = _drawn(rows, k, sample, generator, resources)
    with resources.folder("kmeans", identity) as folder:
        file = folder / "centroids.npz"
        if file.is_file():
            held = load_arrays(file)
            found = Trained(held["centroids"], held["objectives"].tolist(), int(held["reseeded"]))
            done = bool(held["done"])
        else:
            found, done = Trained(_initial(block_SD, k, init, generator), [], 0), False
        while not done and len(found.objectives) < iterations:
            found, empty = _iterate(block_SD, found, spherical, resources)
            last = found.objectives[-2:]
            done = len(last) == 2 and not empty and last[1] - last[0] <= tolerance * abs(last[0])
            if resources.work:
                save_arrays(
                    file,
                    centroids=found.centroids_KD,
                    objectives=found.objectives,
                    reseeded=found.reseeded,
                    done=done,
                )
    return found


def _drawn(
    rows: Rows, k: int, sample: int | None, generator: np.random.Generator, resources: Resources
) -> Floats:
    wanted = ROWS_OF_A_CLUSTER * k if sample is None else sample
    count = max(k, min(wanted, resources.memory // 4 // (4 * rows.shape[1])))
    if count >= len(rows):
        return rows.between(0, len(rows))
    block_SD = rows.at(np.sort(generator.choice(len(rows), count, replace=False)))
    rows.release()
    return block_SD


def _iterate(block_SD: Floats, before: Trained, spherical: bool, resources: Resources) -> tuple[Trained, int]:
    """Move the centroids once; and how many clusters were empty: these get the rows that are farthest from theirs."""
    k, (size, width) = len(before.centroids_KD), block_SD.shape
    labels, similarities = assign(block_SD, before.centroids_KD, spherical=spherical, resources=resources)
    sums = np.zeros((k, width))
    for start, stop in spans(size, SUMMED):
        ones, place = np.ones(stop - start, np.float32), np.arange(stop - start)
        sums += csr_array((ones, (labels[start:stop], place)), shape=(k, stop - start)) @ block_SD[start:stop]
    counts = np.bincount(labels, minlength=k)
    means = sums / np.maximum(counts, 1)[:, None]
    empty = np.flatnonzero(counts == 0)
    means[empty] = block_SD[np.argsort(similarities, kind="stable")[: len(empty)]]
    if spherical:
        lengths = np.linalg.norm(means, axis=1, keepdims=True)
        means = np.where(lengths > 0, means / np.maximum(lengths, 1e-30), before.centroids_KD)
    objective = float(similarities.mean(dtype=np.float64))
    moved = Trained(means.astype(np.float32), [*before.objectives, objective], before.reseeded + len(empty))
    return moved, len(empty)


def assign(
    vectors: Any, centroids_KD: Floats, *, spherical: bool = True, resources: Resources = NO_LIMITS
) -> tuple[NDArray[np.int32], Floats]:
    """Return the nearest centroid of each row, int32 (N,), and the similarity to it, float32 (N,).

    vectors: (N, D). The similarity is the cosine if spherical, else minus the squared distance.
    """
    rows = Rows(vectors, unit=spherical)
    labels, similarities = np.empty(len(rows), np.int32), np.empty(len(rows), np.float32)
    row_bytes = 3 * 4 * rows.shape[1]
    size = resources.block_rows(row_bytes)
    blocks, held = spans(len(rows), size), size * row_bytes
    context = (rows, np.ascontiguousarray(centroids_KD), spherical)
    for (start, stop), (label, similarity) in zip(
        blocks, resources.map(_assign_block, context, blocks, held), strict=True
    ):
        labels[start:stop], similarities[start:stop] = label, similarity
    return labels, similarities


def _assign_block(
    context: tuple[Rows, Floats, bool], span: tuple[int, int]
) -> tuple[NDArray[np.int32], Floats]:
    rows, centroids_KD, spherical = context
    block = rows.between(*span)
    rows.release()
    metric = faiss.METRIC_INNER_PRODUCT if spherical else faiss.METRIC_L2
    scores, labels = faiss.knn(block, centroids_KD, 1, metric=metric)
    return labels[:, 0].astype(np.int32), scores[:, 0] if spherical else -scores[:, 0]


def _initial(block_SD: Floats, k: int, init: str | Floats, generator: np.random.Generator) -> Floats:
    if not isinstance(init, str):
        if init.shape != (k, block_SD.shape[1]):
            raise ValueError(f"initial centroids {init.shape}, not {(k, block_SD.shape[1])}")
        return np.array(init, np.float32)
    if init == "random":
        return block_SD[np.sort(generator.choice(len(block_SD), k, replace=False))]
    if init != "k-means++":
        raise UserError(f"k-means starts from k-means++, random or centroids, not from {init!r}.")
    # Of fewer: k passes over all rows would cost more than the iterations.
    count = min(len(block_SD), max(16 * k, 1024), max(k, SPREAD_OVER))
    some = block_SD[np.sort(generator.choice(len(block_SD), count, replace=False))]
    return spread(some, k, generator)


def spread(block_nD: Floats, k: int, generator: np.random.Generator) -> Floats:
    """Return k rows drawn one after another in proportion to the squared distance from those before (k-means++).

    Of more than ONE_BY_ONE a number is drawn at once each time, without putting back: a pass over all rows for each
    of 10,000 would take longer than the iterations.
    """
    chosen: Integers = generator.integers(len(block_nD), size=1)
    squares = np.square(block_nD).sum(axis=1, dtype=np.float64)
    distances = np.full(len(block_nD), np.inf)
    drawn, most = chosen, -(-k // ONE_BY_ONE)
    with threadpool_limits(1):  # the same to the last bit on any number of cores
        while len(chosen) < k:
            for start, stop in spans(len(block_nD), COMPARED):
                products = block_nD[start:stop] @ block_nD[drawn].T
                nearest = (squares[start:stop, None] + squares[drawn] - 2 * products).min(axis=1)
                distances[start:stop] = np.minimum(distances[start:stop], np.maximum(nearest, 0))
            distances[chosen] = 0
            far = int(np.count_nonzero(distances))
            wanted = min(most, k - len(chosen))
            if far:
                chances = distances / distances.sum()
                drawn = generator.choice(len(block_nD), min(wanted, far), replace=False, p=chances)
            else:  # fewer different rows than k
                left = np.setdiff1d(np.arange(len(block_nD)), chosen)
                drawn = generator.choice(left, wanted, replace=False)
            chosen = np.concatenate((chosen, drawn))
    return block_nD[chosen]


def without_work(resources: Resources) -> Resources:
    """The same resources with nothing kept on disk, for steps that are short or whose caller keeps the result."""
    return replace(resources, work=None)
