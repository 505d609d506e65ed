"""Vectors as small integers, whose products cost a fourth of those of floating-point numbers.

A vector of length 1 is turned by a random rotation, which makes its W values alike in size, and divided by a scale s so
that the largest of them becomes 63; the integers a nearest to the quotients are its codes. For a vector y with scale t
and integers b, x . y is s t (a . b) but for what was rounded away.

That is at most s / 2 in each value, so that |x . y - s t (a . b)| <= (s + t) sqrt(W) / 2 (1 + s sqrt(W) / 2) by Cauchy
and Schwarz. Roundings are as often up as down: the difference has a deviation of sqrt((s^2 + t^2) / 12), of which s + t
is 4.9 times where both scales are alike. One pair in two million of those just at the threshold is farther off.

Shape suffixes: N vectors, D width of them, W width of the codes, n rows of a block, Q queries, T targets, P pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from unlabeled.curate._near import near_rows
from unlabeled.curate.blocks import Floats, Integers, Resources, Rows, load_arrays, save_arrays, spans

LARGEST = 63  # of an integer; its code is 63 more
WIDTHS = 8  # multiples of which the C code can do
TARGETS = 512  # rows that stay in the cache while the queries pass
ROOM = 1 << 17  # pairs that are given at a time
NOTHING = np.float32(1e6)  # inverse scale of a row of zeros, so that it is near to none


@dataclass(frozen=True)
class Codes:
    """Codes of the vectors of a matrix.

    Attributes:
        codes_NW: uint8, 0 to 126.
        inverse_N: float32, 1 / scale.
        slack: scales that a cosine may be lower than the codes say.
    """

    codes_NW: NDArray[np.uint8]
    inverse_N: Floats
    slack: float

    def taken(self, order_N: Integers) -> Codes:
        """Return the same in another order of the rows."""
        return Codes(self.codes_NW[order_N], self.inverse_N[order_N], self.slack)

    def near(
        self, queries_Q: Integers, targets_T: Integers, threshold: float
    ) -> Iterator[tuple[Integers, Integers]]:
        """Give the pairs of queries and targets whose cosine may be at least the threshold, some at a time.

        That is s t (a . b) + slack (s + t) >= threshold, or a . b >= threshold / (s t) - slack (1 / s + 1 / t).
        queries_Q, targets_T: rows. Gives their places, int64 (P,) each.
        """
        left, right = np.empty(ROOM, np.int32), np.empty(ROOM, np.int32)
        for first, last in spans(len(targets_T), TARGETS):
            targets, following = np.ascontiguousarray(targets_T[first:last]), 0
            while following < len(queries_Q):
                count, following = near_rows(
                    self.codes_NW,
                    self.inverse_N,
                    queries_Q,
                    following,
                    targets,
                    threshold,
                    self.slack,
                    left,
                    right,
                )
                yield left[:count].astype(np.int64), right[:count].astype(np.int64) + first


def coded(rows: Rows, is_exact: bool, folder: Path, resources: Resources) -> Codes:
    """Write the codes of rows of length 1 into the folder, what is not yet there, and return them.

    is_exact: no pair at all may be lost by them.
    """
    width = rows.shape[1]
    padded = -(-width // WIDTHS) * WIDTHS
    with threadpool_limits(1):  # the same to the last bit on any number of cores
        drawn = np.random.default_rng([resources.seed, 9]).normal(size=(width, width))
        turn = np.ascontiguousarray(np.linalg.qr(drawn)[0], np.float32)
    size = resources.block_rows(12 * width)
    blocks = spans(len(rows), size)
    context, held = (rows, turn, folder), 16 * size * width
    files = resources.written(_write_block, context, folder, "codes-{:06d}.npz", blocks, held)
    codes, inverse = np.empty((len(rows), padded), np.uint8), np.empty(len(rows), np.float32)
    for (start, stop), file in zip(blocks, files, strict=True):
        part = load_arrays(file)
        codes[start:stop, :width], codes[start:stop, width:] = part["codes"], LARGEST
        inverse[start:stop] = part["inverse"]
    # 1.1: what two errors have with each other, of scales up to .2 / sqrt(W), and rounding of the products.
    return Codes(codes, inverse, 1.1 * float(np.sqrt(width)) / 2 if is_exact else 1.0)


def codes_of(block_nD: Floats, turn_DD: Floats) -> tuple[NDArray[np.uint8], Floats]:
    """Return the codes (n, D) of vectors of length 1, or 0, and the inverses (n,) of their scales."""
    turned = block_nD @ turn_DD
    largest = np.abs(turned).max(axis=1)
    inverse = np.where(largest > 0, LARGEST / np.where(largest > 0, largest, 1), NOTHING).astype(np.float32)
    turned *= inverse[:, None]
    return (np.rint(turned) + LARGEST).astype(np.uint8), inverse


def _write_block(context: tuple[Rows, Floats, Path], item: tuple[int, tuple[int, int]]) -> None:
    rows, turn, folder = context
    number, span = item
    codes, inverse = codes_of(rows.between(*span), turn)
    rows.release()
    save_arrays(folder / f"codes-{number:06d}.npz", codes=codes, inverse=inverse)
