"""The nearest of many centroids without a product with each: only those near to where a row was, or to its group.

Centroids are put in groups of about 64. A row belongs to the group of the centroid that it had before, or else of the
nearest group, and is compared with the m centroids that are nearest to any of the group. m is the smallest number at
which a sample gets the centroids that brute force finds, in the share wanted.

Shape suffixes: N rows, D width, K centroids, A anchors (the centroids of before), G groups, n rows of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from unlabeled.curate.blocks import Floats, Rows, spans

TILE = 2048  # rows and centroids in one matrix product: its scores stay near the cache
FEW = 1024  # centroids that each row is compared with, all of them
GROUP = 64  # anchors
SAMPLE = 4096  # rows: the first half chooses the number of candidates, the second measures
Labels = NDArray[np.int32]


@dataclass(frozen=True)
class Router:
    """Centroids, and where each row looks for its own; without groups it is compared with all.

    Attributes:
        centroids_KD: float32.
        half_squares_K: half their squared lengths, to compare by Euclidean distance; None to compare by product.
        groups_GD: centroids of groups.
        group_A: the group of each anchor.
        candidates_Gm: numbers of the centroids that the rows of each group are compared with.
        recall: share of rows that get their nearest centroid, measured on a sample against brute force.
    """

    centroids_KD: Floats
    half_squares_K: Floats | None
    groups_GD: Floats | None = None
    group_A: Labels | None = None
    candidates_Gm: Labels | None = None
    recall: float = 1.0

    def nearest(self, block_nD: Floats, before_n: Labels | None = None) -> tuple[Labels, Floats]:
        """Return the number of the nearest centroid of each row, int32 (n,), and the score of it, float32 (n,).

        The score is the product with the centroid, less half its squared length where Euclidean.
        before_n: the anchor of each row, where the router is made for those.
        """
        if self.candidates_Gm is None or self.groups_GD is None or self.group_A is None:
            return nearest(block_nD, self.centroids_KD, self.half_squares_K)
        if before_n is None:
            groups, _ = nearest(block_nD, self.groups_GD, _half(self.groups_GD, self.half_squares_K is None))
        else:
            groups = self.group_A[before_n]
        labels, best = np.empty(len(block_nD), np.int32), np.empty(len(block_nD), np.float32)
        by_group = np.argsort(groups, kind="stable")
        ends = np.cumsum(np.bincount(groups, minlength=len(self.groups_GD)))
        begin = 0
        for candidates, end in zip(self.candidates_Gm, ends.tolist(), strict=True):
            rows = by_group[begin:end]
            begin = end
            if len(rows):
                half = None if self.half_squares_K is None else self.half_squares_K[candidates]
                found, best[rows] = nearest(block_nD[rows], self.centroids_KD[candidates], half)
                labels[rows] = candidates[found]
        return labels, best


def routed(
    rows: Rows,
    centroids_KD: Floats,
    *,
    spherical: bool,
    recall: float,
    seed: int,
    anchors_AD: Floats | None = None,
    before_N: Labels | None = None,
) -> Router:
    """Return a way from rows to their nearest centroids with the recall wanted, as measured on a sample of them.

    anchors_AD, before_N: centroids of before, and the one of each row; without them a row looks for the nearest group.
    """
    k = len(centroids_KD)
    half = _half(centroids_KD, spherical)
    if k <= FEW:
        return Router(centroids_KD, half)
    generator = np.random.default_rng([seed, k, 5])
    anchors = centroids_KD if anchors_AD is None else anchors_AD
    groups, group_A = _grouped(anchors, max(1, len(anchors) // GROUP), spherical, generator)
    order = np.empty((len(groups), k), np.int32)
    for group in range(len(groups)):
        inside = anchors[group_A == group] if (group_A == group).any() else groups[group : group + 1]
        scores = centroids_KD @ inside.T
        if half is not None:
            scores -= np.square(inside).sum(axis=1) / 2 + half[:, None]
        order[group] = np.argsort(-scores.max(axis=1), kind="stable")
    drawn = np.sort(generator.choice(len(rows), min(len(rows), SAMPLE), replace=False))
    sample = rows.at(drawn)
    true, _ = nearest(sample, centroids_KD, half)
    if before_N is None:
        group_n, _ = nearest(sample, groups, _half(groups, spherical))
    else:
        group_n = group_A[before_N[drawn]]
    ranks = (order[group_n] == true[:, None]).argmax(axis=1)
    chooses = np.arange(len(ranks)) % 2 == 0
    place = int(np.ceil(recall * chooses.sum())) - 1
    wanted = int(np.sort(ranks[chooses])[place]) + 1
    if wanted > k // 2:
        return Router(centroids_KD, half)
    measured = float((ranks[~chooses] < wanted).mean())
    return Router(centroids_KD, half, groups, group_A, np.sort(order[:, :wanted], axis=1), measured)


def _half(centroids_KD: Floats, spherical: bool) -> Floats | None:
    return None if spherical else (np.square(centroids_KD).sum(axis=1) / 2).astype(np.float32)


def _grouped(
    anchors_AD: Floats, groups: int, spherical: bool, generator: np.random.Generator
) -> tuple[Floats, Labels]:
    """Return centroids (G, D) and labels (A,) of a few iterations of k-means of the anchors."""
    means = anchors_AD[np.sort(generator.choice(len(anchors_AD), groups, replace=False))]
    for _ in range(6):
        labels, _ = nearest(anchors_AD, means, _half(means, spherical))
        sums = np.zeros(means.shape)
        np.add.at(sums, labels, anchors_AD)
        counts = np.bincount(labels, minlength=groups)
        sums[counts == 0] = means[counts == 0]
        new = sums / np.maximum(counts, 1)[:, None]
        if spherical:
            new /= np.maximum(np.linalg.norm(new, axis=1, keepdims=True), 1e-30)
        means = new.astype(np.float32)
    return means, nearest(anchors_AD, means, _half(means, spherical))[0]


def nearest(
    block_nD: Floats, centroids_KD: Floats, half_squares_K: Floats | None = None
) -> tuple[Labels, Floats]:
    """Return the number of the nearest centroid of each row, int32 (n,), and the score of it, float32 (n,).

    By brute force, the first of equal ones.

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
