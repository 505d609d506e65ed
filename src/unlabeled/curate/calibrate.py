"""The threshold of copies for a wanted precision, from copies made of one's own images.

Copies are searched for among the originals. A pair of a copy and its own original is right, and one with any other
is wrong; the precision at a threshold is that of all pairs above it, pooled (DISC21's protocol). It holds for as
many images as were searched: false pairs grow with the pool, so their rate is given too, with its bound.

Shape suffixes: N originals, M copies, B bins of cosines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import betaincinv

from unlabeled.curate.blocks import Integers, Resources, Rows, spans
from unlabeled.curate.kmeans import NO_LIMITS
from unlabeled.errors import UserError

BINS = 20_000  # of cosines from -1 to 1: a threshold is a multiple of 0.0001
Image = TypeVar("Image")


@dataclass(frozen=True)
class OperatingPoint:
    """A threshold, and what it does to the pairs that were seen.

    Attributes:
        wanted: precision.
        threshold: the lowest cosine from which on the precision is at least that; above 1 where none has it.
        precision: of the pairs at or above it.
        precision_bound: what that is at least, at 95% confidence (Clopper-Pearson).
        recall: share of the copies' pairs at or above it.
        true_pairs, false_pairs: at or above it.
        false_rate_bound: what share of pairs of different images is at or above it at most, at 95% confidence.
    """

    wanted: float
    threshold: float
    precision: float
    precision_bound: float
    recall: float
    true_pairs: int
    false_pairs: int
    false_rate_bound: float

    def precision_among(self, images: int, copies_per_image: float) -> float:
        """Precision at least expected among so many images, of which each has so many copies on average."""
        right = copies_per_image * self.recall
        return right / (right + images * self.false_rate_bound) if right else 0.0


@dataclass(frozen=True)
class Calibration:
    """Thresholds for wanted precisions.

    Attributes:
        points: one for each precision wanted, in that order.
        positives, negatives: pairs seen.
        edges_B, right_B, wrong_B: lower edges of the bins of cosines, and the pairs of either kind in each.
    """

    points: list[OperatingPoint]
    positives: int
    negatives: int
    edges_B: NDArray[np.float64]
    right_B: Integers
    wrong_B: Integers

    @property
    def micro_ap(self) -> float:
        """Mean, over the right pairs, of the precision down to each; in a bin the wrong pairs come first."""
        bins = np.repeat(np.arange(len(self.right_B)), self.right_B[::-1])  # of each right pair, from the top
        hits, misses = np.arange(1, len(bins) + 1), self.wrong_B[::-1].cumsum()[bins]
        return float((hits / (hits + misses)).sum() / max(1, len(bins)))


def calibrate(
    originals: Any,
    copies: Any,
    source_M: ArrayLike,
    *,
    precisions: Sequence[float] = (0.9, 0.99),
    groups: ArrayLike | None = None,
    resources: Resources = NO_LIMITS,
) -> Calibration:
    """Find the lowest thresholds with the wanted precisions.

    originals: vectors (N, D). copies: (M, D). source_M: row of the original that each was made of. groups: (N,), the
        same number for originals known to be copies of each other, whose pairs count neither way.
    Raises UserError without a copy or a second original, or for precisions that are not above 0 and up to 1.
    """
    rows, queries = Rows(originals), Rows(copies)
    sources = np.asarray(source_M, np.int64)
    kinds = np.arange(len(rows)) if groups is None else np.asarray(groups)
    if len(rows) < 2 or not len(queries) or sources.shape != (len(queries),):
        raise UserError(f"{len(queries)} copies of {len(rows)} images; it takes one of two at least.")
    right, wrong = np.zeros(BINS + 1, np.int64), np.zeros(BINS + 1, np.int64)
    blocks = spans(len(queries), 512)
    held = 512 * len(rows) * 12
    for one, other in resources.map(_histograms, (rows, queries, sources, kinds), blocks, held):
        right += one
        wrong += other
    return _calibrated(right, wrong, precisions)


def from_cosines(
    positives: ArrayLike, negatives: ArrayLike, precisions: Sequence[float] = (0.9, 0.99)
) -> Calibration:
    """Find the thresholds from cosines of copies with their originals, and of pairs of different images."""
    right, wrong = (
        np.bincount(_bins(np.asarray(values)), minlength=BINS + 1) for values in (positives, negatives)
    )
    return _calibrated(right, wrong, precisions)


def calibrate_on(
    images: Sequence[Image],
    copy: Callable[[Image, np.random.Generator], Image],
    embed: Callable[[Sequence[Image]], Any],
    *,
    copies_of_each: int = 1,
    precisions: Sequence[float] = (0.9, 0.99),
    resources: Resources = NO_LIMITS,
) -> Calibration:
    """Make copies of images and find the thresholds; see `calibrate`.

    copy: from an image and a generator to a copy. embed: from images to vectors (n, D).
    """
    source = np.repeat(np.arange(len(images)), copies_of_each)
    made = [
        copy(images[row], np.random.default_rng([resources.seed, number]))
        for number, row in enumerate(source.tolist())
    ]
    return calibrate(embed(images), embed(made), source, precisions=precisions, resources=resources)


def _bins(cosines: NDArray[Any]) -> Integers:
    bins: Integers = np.clip(np.floor((cosines.astype(np.float64) + 1) * (BINS / 2)), 0, BINS).astype(
        np.int64
    )
    return bins


def _histograms(
    context: tuple[Rows, Rows, Integers, NDArray[Any]], span: tuple[int, int]
) -> tuple[Integers, Integers]:
    rows, queries, sources, kinds = context
    source = sources[span[0] : span[1]]
    block = queries.between(*span)
    right, wrong = np.zeros(BINS + 1, np.int64), np.zeros(BINS + 1, np.int64)
    for start, stop in spans(len(rows), 8192):
        bins = _bins(block @ rows.between(start, stop).T)
        same = kinds[source][:, None] == kinds[start:stop]
        own = source[:, None] == np.arange(start, stop)
        right += np.bincount(bins[own], minlength=BINS + 1)
        wrong += np.bincount(bins[~same], minlength=BINS + 1)
    return right, wrong


def _calibrated(right: Integers, wrong: Integers, precisions: Sequence[float]) -> Calibration:
    edges = np.arange(BINS + 1) / (BINS / 2) - 1
    true_pairs, false_pairs = right[::-1].cumsum()[::-1], wrong[::-1].cumsum()[::-1]
    precision = true_pairs / np.maximum(true_pairs + false_pairs, 1)
    positives, negatives = int(right.sum()), int(wrong.sum())
    points = []
    for wanted in precisions:
        if not 0 < wanted <= 1:
            raise UserError(f"A precision is above 0 and up to 1, not {wanted:g}.")
        good = np.flatnonzero((precision >= wanted) & (true_pairs > 0))
        if not len(good):
            bound = float(betaincinv(1, negatives, 0.95)) if negatives else 1.0
            points.append(OperatingPoint(wanted, float("inf"), 0.0, 0.0, 0.0, 0, 0, bound))
            continue
        place = int(good[0])
        hits, misses = int(true_pairs[place]), int(false_pairs[place])
        points.append(
            OperatingPoint(
                wanted=wanted,
                threshold=float(edges[place]),
                precision=float(precision[place]),
                precision_bound=float(betaincinv(hits, misses + 1, 0.05)),
                recall=hits / positives,
                true_pairs=hits,
                false_pairs=misses,
                false_rate_bound=float(betaincinv(misses + 1, negatives - misses, 0.95))
                if negatives > misses
                else 1.0,
            )
        )
    return Calibration(points, positives, negatives, edges, right, wrong)
