"""Recall of a step that looks at some candidates only, measured on a sample against brute force."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaincinv

from unlabeled.curate.blocks import Integers


@dataclass(frozen=True)
class Recall:
    """Recall of an approximate step, measured on a sample against brute force.

    Attributes:
        found: of the sample's pairs, how many the step found.
        pairs: that brute force found.
        queries: vectors of the sample.
    """

    found: int
    pairs: int
    queries: int

    @property
    def value(self) -> float:
        """Share found; 1 where there was none to find."""
        return self.found / self.pairs if self.pairs else 1.0

    @property
    def bound(self) -> float:
        """What the recall is at least, at 95% confidence (Clopper-Pearson); 0 where there was no pair."""
        return float(lower_bounds(np.array([self.found]), self.pairs)[0])

    def __str__(self) -> str:
        counts = f"{self.found} of {self.pairs} pairs of {self.queries} vectors"
        return f"{self.value:.4f} (at least {self.bound:.4f} at 95% confidence; {counts})"


def lower_bounds(hits: Integers, trials: int) -> NDArray[np.float64]:
    """Return what a share is at least, at 95% confidence, one-sided (Clopper-Pearson), for numbers of hits."""
    result: NDArray[np.float64] = np.where(
        hits > 0, betaincinv(np.maximum(hits, 1), trials - hits + 1, 0.05), 0
    )
    return result


def is_enough(pairs: int, recall: float) -> bool:
    """Whether so many pairs, were all of them found, would say that the recall is the wanted one."""
    return bool(lower_bounds(np.array([pairs]), pairs)[0] >= recall)
