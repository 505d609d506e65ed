"""Near-duplicates: groups in which every image was compared with the one it is a copy of.

Images that a chain of pairs joins need not be alike (A~B~C with A unlike C). So in each connected component the best
image is kept, what is near enough to it is its copy, and the rest goes on with the best of those that are left.

Shape suffixes: N images, M members of some components, D width.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from unlabeled.curate.blocks import Floats, Integers, Resources, Rows, spans
from unlabeled.curate.kmeans import NO_LIMITS, train, without_work
from unlabeled.curate.neighbours import components
from unlabeled.curate.products import ROUNDING
from unlabeled.curate.recall import Recall
from unlabeled.errors import UserError

ROUNDS = 8  # of choosing one image in all components at once, before large ones are taken each by itself
LARGEST = 65536  # members; more are first cut by k-means
TOGETHER = 512  # images of one large component that are tried as representatives at once


@dataclass(frozen=True)
class Duplicates:
    """Which image each image is a copy of.

    Attributes:
        threshold: cosine.
        representative_N: int64, the image it is a copy of; itself where it is kept.
        similarity_N: float32, cosine to that, not below the threshold; 1 where it is kept.
        component_N: int64, the smallest row of those that chains of pairs join to it.
        pairs: above the threshold that were found.
        compared: cosines computed to find them.
        cut: components too large to be taken whole, which k-means cut into parts first.
        recall: of the pairs, measured against brute force.
        seconds: of each part of the work.
    """

    threshold: float
    representative_N: Integers
    similarity_N: Floats
    component_N: Integers
    pairs: int
    compared: int
    cut: int
    recall: Recall
    seconds: dict[str, float] = field(compare=False)

    @property
    def is_kept(self) -> NDArray[np.bool_]:
        """Whether each image is kept."""
        kept: NDArray[np.bool_] = self.representative_N == np.arange(len(self.representative_N))
        return kept

    @property
    def chained(self) -> int:
        """Number of images kept although a chain of pairs joins them to another that is kept."""
        kept = self.component_N[self.is_kept]
        return len(kept) - len(np.unique(kept))

    def groups(self) -> Iterator[Integers]:
        """Give the images of each group of two or more, the kept one first, then by similarity; largest first."""
        rows = np.flatnonzero(np.bincount(self.representative_N, minlength=len(self.representative_N)) > 1)
        inside = np.flatnonzero(np.isin(self.representative_N, rows))
        representatives = self.representative_N[inside]
        order = np.lexsort((inside, -self.similarity_N[inside], inside != representatives, representatives))
        inside = inside[order]
        parts = (
            np.split(inside, np.flatnonzero(np.diff(self.representative_N[inside])) + 1)
            if len(inside)
            else []
        )
        yield from sorted(parts, key=lambda part: -len(part))


def near_duplicates(
    vectors: Any,
    threshold: float,
    quality: ArrayLike | None = None,
    *,
    recall: float = 0.99,
    resources: Resources = NO_LIMITS,
) -> Duplicates:
    """Find near-duplicates: of each group the image of best quality is kept, and the others are copies of it.

    vectors: (N, D), float16 or float32, of any length. threshold: cosine, above 0 and up to 1. quality: (N,), higher is
        better, the first of equal ones is kept. recall: wanted, of pairs.
    Raises UserError for a threshold out of range, or values that are not finite.
    """
    begun = time.perf_counter()
    size = len(vectors)
    scores = np.zeros(size) if quality is None else np.asarray(quality, np.float64)
    if scores.shape != (size,):
        raise UserError(f"{len(scores)} values of quality for {size} vectors.")
    if not np.isfinite(scores).all():
        raise UserError(f"The quality of row {int((~np.isfinite(scores)).argmax())} is not finite.")
    found = components(vectors, threshold, recall=recall, resources=resources)
    joined = time.perf_counter()
    rows = Rows(vectors)
    representative, similarity, cut = representatives(rows, found.labels_N, scores, threshold, resources)
    seconds = {"pairs": joined - begun, "groups": time.perf_counter() - joined}
    return Duplicates(
        threshold,
        representative,
        similarity,
        found.labels_N,
        found.pairs,
        found.compared,
        cut,
        found.recall,
        seconds,
    )


def representatives(
    rows: Rows, component_N: Integers, quality_N: NDArray[np.float64], threshold: float, resources: Resources
) -> tuple[Integers, Floats, int]:
    """Return the representative of each image, its cosine to it, and how many components were cut.

    In each component: the best image is kept, those at least as near as the threshold are its copies, and again
    with the rest until none is left.
    """
    count = len(component_N)
    representative = np.arange(count)
    similarity = np.ones(count, np.float32)
    sizes = np.bincount(component_N, minlength=count)
    members = np.flatnonzero(sizes[component_N] > 1)
    part = component_N.copy()
    oversized = np.flatnonzero(sizes > LARGEST)
    for component in oversized:
        inside = np.flatnonzero(component_N == component)
        labels = _cut(rows, inside, resources)
        for label in np.unique(labels):
            part[inside[labels == label]] = inside[labels == label].min()
    members = members[np.lexsort((members, -quality_N[members], part[members]))]
    for _ in range(ROUNDS):
        if not len(members):
            break
        first = np.concatenate(([True], part[members[1:]] != part[members[:-1]]))
        best = members[first][np.cumsum(first) - 1]
        cosines = np.empty(len(members), np.float32)
        size = resources.block_rows(8 * rows.shape[1])
        blocks = spans(len(members), size)
        for (start, stop), values in zip(
            blocks,
            resources.map(_cosines, (rows, members, best), blocks, 12 * size * rows.shape[1]),
            strict=True,
        ):
            cosines[start:stop] = values
        near = ~first & (cosines >= threshold - ROUNDING)
        representative[members[near]] = best[near]
        similarity[members[near]] = cosines[near]
        members = members[~near & ~first]
    ends = np.flatnonzero(np.diff(part[members], append=-1)) + 1
    items = (
        list(zip(np.concatenate(([0], ends[:-1])).tolist(), ends.tolist(), strict=True))
        if len(members)
        else []
    )
    held = 8 * TOGETHER * rows.shape[1] * 4
    for inside, best, values in resources.map(_cover, (rows, members, threshold), items, held):
        representative[inside], similarity[inside] = best, values
    return representative, np.minimum(similarity, 1), len(oversized)


def _cut(rows: Rows, inside: Integers, resources: Resources) -> NDArray[np.int32]:
    """Return labels of the parts, none much larger than half of LARGEST, of a component that is too large."""
    some = inside if len(inside) <= 2 * LARGEST else inside[:: len(inside) // LARGEST]
    k = -(-2 * len(inside) // LARGEST)
    found = train(rows.at(some), k, init="random", resources=without_work(resources))
    labels = [
        (rows.at(inside[start:stop]) @ found.centroids_KD.T).argmax(axis=1)
        for start, stop in spans(len(inside), 8192)
    ]
    return np.concatenate(labels).astype(np.int32)


def _cosines(context: tuple[Rows, Integers, Integers], span: tuple[int, int]) -> Floats:
    rows, members, best = context
    start, stop = span
    result: Floats = np.einsum("md,md->m", rows.at(members[start:stop]), rows.at(best[start:stop]))
    rows.release()
    return result


def _cover(context: tuple[Rows, Integers, float], span: tuple[int, int]) -> tuple[Integers, Integers, Floats]:
    """One component by itself: rows, best first, with the representative of each and the cosine to it."""
    rows, members, threshold = context
    inside = members[span[0] : span[1]]
    best = inside.copy()
    cosines = np.ones(len(inside), np.float32)
    left = np.arange(len(inside))  # places still without a representative
    while len(left):
        tried, left = left[:TOGETHER], left[TOGETHER:]
        block = rows.at(inside[tried])
        alike = block @ block.T
        is_free = np.ones(len(tried), bool)
        kept = []
        for place in range(len(tried)):
            if not is_free[place]:
                continue
            kept.append(place)
            near = is_free & (alike[place] >= threshold - ROUNDING)
            near[: place + 1] = False
            is_free[near] = False
            best[tried[near]], cosines[tried[near]] = inside[tried[place]], alike[place][near]
        remaining = []
        for start, stop in spans(len(left), 4096):
            others = left[start:stop]
            similarities = rows.at(inside[others]) @ block[kept].T
            is_near = similarities >= threshold - ROUNDING
            taken = is_near.any(axis=1)
            which = is_near[taken].argmax(axis=1)
            best[others[taken]] = inside[tried[np.array(kept)[which]]]
            cosines[others[taken]] = similarities[taken, which]
            remaining.append(others[~taken])
        left = np.concatenate(remaining) if remaining else left[:0]
    return inside, best, cosines
