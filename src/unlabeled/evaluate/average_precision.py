"""Average precision of ranked lists, two ways.

Shape suffixes: N ranked images, P those that are relevant.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def average_precision(similarities_N: NDArray[np.floating], relevant_N: NDArray[np.bool_]) -> float:
    """Mean over the relevant images of the precision among all that are as similar or more; of ties the whole group.

    The step-wise area under the precision-recall curve, as scikit-learn defines it. NaN where none is relevant.
    """
    if not relevant_N.any():
        return float("nan")
    everything = np.sort(similarities_N)
    hits = np.sort(similarities_N[relevant_N])
    as_similar = len(everything) - np.searchsorted(everything, hits, side="left")
    as_similar_hits = len(hits) - np.searchsorted(hits, hits, side="left")
    return float((as_similar_hits / as_similar).mean())


def trapezoid_average_precision(ranks_P: NDArray[np.int64]) -> float:
    """Area under the precision-recall curve by trapezoids, as Oxford's and Paris's evaluations have it.

    ranks: places of the relevant images in the list, from 0, increasing; images that do not count are not in it.
    NaN where there are none.
    """
    if not len(ranks_P):
        return float("nan")
    found = np.arange(len(ranks_P))
    before = np.where(ranks_P == 0, 1.0, found / np.maximum(ranks_P, 1))
    return float(((before + (found + 1) / (ranks_P + 1)) / 2).mean())
