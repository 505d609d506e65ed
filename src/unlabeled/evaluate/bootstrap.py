"""How sure a figure is: percentile bootstrap over test items, and whether two models differ on the same ones.

A statistic here is a function of the mean over items: of (R, ...) means it returns (R,) figures, so that all
replicates are computed at once. An accuracy is the mean itself; mIoU is a function of the mean confusion matrix.

Shape suffixes: M test items, R replicates, C classes, S draws of a training set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from unlabeled.errors import UserError

REPLICATES = 1000
CHUNK_BYTES = 2**26  # of the weights of replicates held at once

Values = NDArray[Any]
Floats = NDArray[np.float64]
Statistic = Callable[[Floats], Floats]


def mean(means_R: Floats) -> Floats:
    """The mean of the items' values (R,)."""
    return means_R


def root(means_R: Floats) -> Floats:
    """The root of the mean of the items' squares (R,), as in RMSE."""
    roots: Floats = np.sqrt(means_R)
    return roots


def ratio(means_R2: Floats) -> Floats:
    """The sum of the first column over that of the second (R, 2): a mean over the items that count."""
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios: Floats = means_R2[:, 0] / means_R2[:, 1]
    return ratios


def over_draws(means_RS: Floats) -> Floats:
    """The mean over items and over draws of a training set (R, S); replicates resample the draws as well."""
    shape = means_RS.shape
    rng = np.random.default_rng(1)
    drawn = rng.integers(0, shape[1], shape) if shape[0] > 1 else np.arange(shape[1])[None]
    means: Floats = np.take_along_axis(means_RS, drawn, 1).mean(1)
    return means


def class_ious(confusion_RCC: Floats) -> Floats:
    """Intersection over union of each class (R, C), NaN where it has no union; matrices are [truth, prediction]."""
    hits = np.diagonal(confusion_RCC, axis1=1, axis2=2)
    union = confusion_RCC.sum(1) + confusion_RCC.sum(2) - hits
    with np.errstate(invalid="ignore"):
        ious: Floats = hits / union
    return ious


def miou(confusion_RCC: Floats) -> Floats:
    """Mean over the classes that are there, in truth or in prediction, of their intersection over union (R,)."""
    ious = class_ious(confusion_RCC)
    counted = ~np.isnan(ious)
    means: Floats = np.where(counted, ious, 0).sum(1) / np.maximum(counted.sum(1), 1)
    return means


def pixel_accuracy(confusion_RCC: Floats) -> Floats:
    """Share of the pixels on the diagonal of confusion matrices [truth, prediction] (R,)."""
    pixels = np.maximum(confusion_RCC.sum((1, 2)), 1e-300)
    shares: Floats = np.trace(confusion_RCC, axis1=1, axis2=2) / pixels
    return shares


STATISTICS: dict[str, Statistic] = {
    function.__name__: function for function in (mean, root, ratio, over_draws, miou, pixel_accuracy)
}


def figure(values_M: Values, statistic: str = "mean") -> float:
    """The statistic over all items; values: (M, ...), one entry an item."""
    return float(STATISTICS[statistic](_float(values_M).mean(0)[None])[0])


def replicates(
    values_M: Values, statistic: str = "mean", *, count: int = REPLICATES, seed: int = 0
) -> Floats:
    """The statistic over resampled items (R,): as many as there are, drawn with replacement.

    The draws depend on the number of items and the seed only: two models' replicates are pairs.
    """
    flat = _float(values_M).reshape(len(values_M), -1)
    means = np.concatenate([weights @ flat for weights in _weights(len(flat), count, seed)]) / len(flat)
    return STATISTICS[statistic](means.reshape(count, *np.shape(values_M)[1:]))


def interval(
    values_M: Values,
    statistic: str = "mean",
    *,
    level: float = 0.95,
    count: int = REPLICATES,
    seed: int = 0,
) -> tuple[float, float]:
    """The interval that holds the middle `level` of the replicates (Efron 1979)."""
    return _middle(replicates(values_M, statistic, count=count, seed=seed), level)


class Difference(NamedTuple):
    """How much b exceeds a.

    difference: b - a. low, high: its 95% interval. p_value: twice the share of replicates beyond zero.
    """

    difference: float
    low: float
    high: float
    p_value: float

    @property
    def is_clear(self) -> bool:
        """Whether zero is outside of the interval."""
        return self.low > 0 or self.high < 0


def compare(
    a_M: Values,
    b_M: Values,
    statistic: str = "mean",
    *,
    level: float = 0.95,
    count: int = REPLICATES,
    seed: int = 0,
) -> Difference:
    """Paired bootstrap of two models on the same items, in the same order: both are resampled alike.

    What is hard for both models then cancels, so that differences far smaller than either interval can be told.

    Raises:
        UserError: the items are not as many.
    """
    if np.shape(a_M) != np.shape(b_M):
        raise UserError(
            f"Two models are compared on the same test items; one has {len(a_M)}, the other {len(b_M)}."
        )
    drawn = [replicates(values, statistic, count=count, seed=seed) for values in (a_M, b_M)]
    differences = drawn[1] - drawn[0]
    low, high = _middle(differences, level)
    sides = min((differences <= 0).sum(), (differences >= 0).sum())
    # Of R replicates none is evidence for less than 1 / R.
    p_value = min(1.0, 2 * (sides + 1) / (count + 1))
    return Difference(figure(b_M, statistic) - figure(a_M, statistic), low, high, float(p_value))


def _weights(num_items: int, count: int, seed: int) -> Iterator[Floats]:
    """How often each item is drawn (r, M), a few replicates at a time."""
    rng = np.random.default_rng(seed)
    at_once = max(1, CHUNK_BYTES // (8 * num_items))
    for start in range(0, count, at_once):
        rows = min(at_once, count - start)
        drawn = rng.integers(0, num_items, (rows, num_items))
        drawn += num_items * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * num_items).reshape(rows, num_items).astype(float)


def _middle(values_R: Floats, level: float) -> tuple[float, float]:
    low, high = np.nanquantile(values_R, ((1 - level) / 2, (1 + level) / 2))
    return float(low), float(high)


def _float(values: Values) -> Floats:
    if not len(values):
        raise UserError("There is no test item to measure on.")
    return np.asarray(values, np.float64)
