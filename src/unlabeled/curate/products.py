"""Products of vectors, many at a time, and which of them are above a threshold.

Shape suffixes: D width, n m rows of a product, P pairs.
"""

from __future__ import annotations

import numpy as np

from unlabeled.curate.blocks import Floats, Integers, Rows, spans
from unlabeled.curate.cells import TILE
from unlabeled.curate.sketch import SLACK

ROUNDING = 1e-6  # what the cosine of a vector with itself may lack
LOOKED_AT = 1 << 16  # pairs that are looked at in full together
DENSE = 64  # times as many products as are needed cost less at once than one by one


class Room:
    """Memory for one product of vectors after another: new memory would be mapped anew for each, a page at a time."""

    def __init__(self, size: int) -> None:
        self.products, self.is_above = np.empty(size, np.float32), np.empty(size, bool)
        self.shape = (0, 0)

    def product(self, left_nD: Floats, right_mD: Floats) -> Floats:
        """Products (n, m), there until the next ones."""
        self.shape = (len(left_nD), len(right_mD))
        size = len(left_nD) * len(right_mD)
        result: Floats = np.matmul(left_nD, right_mD.T, out=self.products[:size].reshape(self.shape))
        return result

    def above(self, threshold: float) -> tuple[Integers, Integers]:
        """Places in left and in right of the products above a threshold."""
        size = self.shape[0] * self.shape[1]
        limit = np.float32(threshold - SLACK)
        found = np.flatnonzero(np.greater_equal(self.products[:size], limit, out=self.is_above[:size]))
        left, right = np.divmod(found, self.shape[1]) if len(found) else (found, found)
        return left, right


def cosines_of(rows: Rows, left_P: Integers, right_P: Integers) -> Floats:
    """Cosines of pairs of rows, in full."""
    result = np.empty(len(left_P), np.float32)
    for start, stop in spans(len(left_P), LOOKED_AT):
        one, left = np.unique(left_P[start:stop], return_inverse=True)
        other, right = np.unique(right_P[start:stop], return_inverse=True)
        a, b = rows.at(one), rows.at(other)
        if len(one) * len(other) <= DENSE * (stop - start):
            result[start:stop] = (a @ b.T)[left, right]
        else:
            for first, last in spans(stop - start, TILE):
                pair = a[left[first:last]], b[right[first:last]]
                result[start + first : start + last] = np.einsum("pd,pd->p", *pair)
    return result
