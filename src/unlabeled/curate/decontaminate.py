"""Decontamination: what is too near to an evaluation set leaves the pool (DINOv2, appendix A.3).

Shape suffixes: N images of the pool, M images of an evaluation set.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unlabeled.curate.blocks import Floats, Integers, Resources, Rows
from unlabeled.curate.kmeans import NO_LIMITS
from unlabeled.curate.nearest import nearest_rows
from unlabeled.curate.recall import Recall
from unlabeled.errors import UserError


@dataclass(frozen=True)
class Contamination:
    """Which images of a pool are too near to evaluation sets.

    Attributes:
        threshold: cosine.
        names: of the evaluation sets.
        set_N: int32, the set of the nearest evaluation image at least as near as the threshold; -1 where there is none.
        image_N: int64, its row in that set; -1 where there is none.
        similarity_N: float32, cosine to it; nan where there is none.
        cause_N: int64, the image of the pool for which each is dropped: itself, or the nearest one of its group to an
            evaluation image; -1 where it is kept.
        recall: of the pairs.
    """

    threshold: float
    names: list[str]
    set_N: NDArray[np.int32]
    image_N: Integers
    similarity_N: Floats
    cause_N: Integers
    recall: Recall

    @property
    def is_dropped(self) -> NDArray[np.bool_]:
        """Whether each image is dropped."""
        return self.cause_N >= 0


def decontaminate(
    pool: Any,
    evaluation: Mapping[str, Any],
    threshold: float,
    *,
    groups: Integers | None = None,
    recall: float = 0.99,
    resources: Resources = NO_LIMITS,
) -> Contamination:
    """Find the images of a pool that are too near to an evaluation set, and all that hang together with them.

    pool: (N, D). evaluation: vectors (M, D) by the set's name. threshold: cosine, above 0 and up to 1. groups: (N,),
        the same number for those that are dropped together, such as `Duplicates.component_N`; else each by itself.
    recall: wanted, of the matches.
    Raises UserError for a threshold out of range or vectors of another width.
    """
    if not 0 < threshold <= 1:
        raise UserError(f"A threshold of decontamination is a cosine above 0 and up to 1, not {threshold:g}.")
    rows = Rows(pool)
    best = np.full(len(rows), -np.inf, np.float32)
    which = np.full(len(rows), -1, np.int32)
    image = np.full(len(rows), -1, np.int64)
    measured = []
    for number, (name, vectors) in enumerate(evaluation.items()):
        if vectors.shape[1] != rows.shape[1]:
            raise UserError(
                f"The vectors of {name} have {vectors.shape[1]} values and the pool's {rows.shape[1]}: another model."
            )
        step = replace(resources, work=resources.work / f"set-{number}") if resources.work else resources
        found = nearest_rows(vectors, pool, 1, above=threshold, recall=recall, resources=step)
        better = found.cosines_Qk[:, 0] > best
        best[better], image[better] = found.cosines_Qk[better, 0], found.rows_Qk[better, 0]
        which[better] = number
        measured.append(found.recall)
    matched = which >= 0
    best[~matched], image[~matched], which[~matched] = np.nan, -1, -1
    cause = np.where(matched, np.arange(len(rows)), -1)
    if groups is not None:
        hits = np.flatnonzero(matched)
        hits = hits[np.lexsort((hits, -best[hits]))]
        cause = np.where(matched, cause, first_of_groups(hits, groups))
    total = Recall(*(sum(getattr(one, name) for one in measured) for name in ("found", "pairs", "queries")))
    return Contamination(threshold, list(evaluation), which, image, np.minimum(best, 1), cause, total)


def first_of_groups(hits: Integers, group_N: Integers) -> Integers:
    """Return for each image the first of some hits that is of its group, int64 (N,); -1 where none is."""
    result = np.full(len(group_N), -1, np.int64)
    if len(hits):
        names, first = np.unique(group_N[hits], return_index=True)
        place = np.minimum(np.searchsorted(names, group_N), len(names) - 1)
        together = names[place] == group_N
        result[together] = hits[first][place[together]]
    return result
