"""Cosines of pairs of rows.

Shape suffixes: P pairs.
"""

from __future__ import annotations

import numpy as np

from unlabeled.curate.blocks import Floats, Integers, Rows, spans
from unlabeled.curate.cells import TILE

ROUNDING = 1e-6  # what the cosine of a vector with itself may lack
LOOKED_AT = 1 << 14  # pairs that are looked at in full together
DENSE = 64  # times as many products as are needed cost less at once than one by one


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
