"""How well copies are found: DISC21's protocol (2106.09672), all pairs of queries and references pooled.

Shape suffixes: Q queries, R references, P pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class CopyScores:
    """Figures of one way to score pairs; where scores are equal, wrong pairs come first.

    Attributes:
        micro_ap: micro-average precision, over all pairs.
        recall: largest share of the copies found at a threshold where the wanted precision holds.
        threshold: that score; infinite where there is none.
        recall_at_1: share of the copies whose original scores higher than every other reference.
        found_Q: whether a query's own pair is at or above the threshold.
        first_Q: whether it scores higher than all others.
    """

    micro_ap: float
    recall: float
    threshold: float
    recall_at_1: float
    found_Q: NDArray[np.bool_]
    first_Q: NDArray[np.bool_]


def copy_scores(scores_QR: NDArray[Any], original_Q: ArrayLike, precision: float = 0.9) -> CopyScores:
    """Score a matrix of similarities, higher is more alike.

    scores: (Q, R). original: each query's reference, -1 where it has none. precision: wanted.
    """
    originals = np.asarray(original_Q, np.int64)
    rows = np.flatnonzero(originals >= 0)
    right_QR = np.zeros(scores_QR.shape, bool)
    right_QR[rows, originals[rows]] = True
    own_Q = np.full(len(originals), -np.inf)
    own_Q[rows] = scores_QR[rows, originals[rows]]
    others_Q = np.where(right_QR, -np.inf, scores_QR).max(1)
    micro_ap, recall, threshold = pooled(scores_QR.ravel(), right_QR.ravel(), precision)
    has = originals >= 0
    first_Q = has & (own_Q > others_Q)
    return CopyScores(
        micro_ap, recall, threshold, float(first_Q[has].mean()), has & (own_Q >= threshold), first_Q
    )


def pooled(
    scores_P: NDArray[Any], right_P: NDArray[np.bool_], precision: float
) -> tuple[float, float, float]:
    """Return average precision, recall at a precision and its threshold, of pairs in one list.

    Average precision is the mean, over the right pairs, of the precision down to each.
    """
    order = np.lexsort((right_P, -scores_P))  # of equal scores the wrong pairs first
    right = right_P[order]
    hits = np.cumsum(right)
    precisions = hits / np.arange(1, len(right) + 1)
    count = max(1, int(hits[-1]))
    good = np.flatnonzero(precisions >= precision)
    average = float(precisions[right].sum() / count)
    if not len(good):
        return average, 0.0, np.inf
    return average, float(hits[good[-1]] / count), float(scores_P[order[good[-1]]])


def background_normalised(
    scores_QR: NDArray[Any], background_QB: NDArray[Any], nearest: int = 3
) -> NDArray[Any]:
    """Take from each query's scores the mean of its highest with images that are no references (SSCD, section 5.3).

    A query that is like everything then needs a higher score than one that is like nothing. Those images must be like
    the references in kind: a query near to a kind that only the references have would rise above all others.

    background: (Q, B), scores with those images.
    """
    k = min(nearest, background_QB.shape[1])
    highest = np.partition(background_QB, -k, axis=1)[:, -k:]
    result: NDArray[Any] = scores_QR - highest.mean(1, keepdims=True)
    return result


def wrong_pair_surprise(scores_QR: NDArray[Any], background_QB: NDArray[Any]) -> NDArray[np.float64]:
    """Return -log of the share of pairs of different images that score at least as much: comparable between scores.

    Sums of several kinds of scores rank pairs by all of them. background: (Q, B), scores of pairs of different images.
    """
    wrong = np.sort(background_QB, axis=None)
    above = len(wrong) - np.searchsorted(wrong, scores_QR, side="left")
    return -np.log((above + 1) / (len(wrong) + 1))
