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
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from unlabeled.curate._near import near_rows
from unlabeled.curate.blocks import Floats, Integers, Resources, Rows, load_arrays, save_arrays, spans

LARGEST = 63  # of an integer; its code is 63 more
WIDTHS = 8  # multiples of which the C code can do
TARGETS = 512  # rows that stay in the cache while the queries pass
ROOM = 1 << 15  # pairs that are given at a time
PAIRS = 4096  # whose products are computed one by one together
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

    def between(self, start: int, stop: int) -> Codes:
        """Return those of rows start to stop - 1."""
        return Codes(self.codes_NW[start:stop], self.inverse_N[start:stop], self.slack)

    def near(
        self, queries_Q: Integers, targets_T: Integers, threshold: float
    ) -> Iterator[tuple[Integers, Integers]]:
        """Give the pairs of queries and targets whose cosine may be at least the threshold, some at a time.

        That is s t (a . b) + slack (s + t) >= threshold, or a . b >= (threshold / s - slack) / t - slack / s.
        queries_Q, targets_T: rows. Gives their places, int64 (P,) each.
        """
        inverse_Q, slack = self.inverse_N[queries_Q], np.float32(self.slack)
        slope, less = np.float32(threshold) * inverse_Q - slack, slack * inverse_Q
        ones = np.ones(len(targets_T), np.float32)
        queries = Queries(self.codes_NW, queries_Q, slope, less)
        return near(queries, Targets(self.codes_NW, targets_T, self.inverse_N[targets_T], ones))

    def products(self, rows_P: Integers, others: Codes, others_P: Integers) -> Floats:
        """Products (P,) of integers of some rows with those of rows of others; exact."""
        result = np.empty(len(rows_P), np.float32)
        for start, stop in spans(len(rows_P), PAIRS):
            one = self.codes_NW[rows_P[start:stop]].astype(np.float32) - LARGEST
            other = others.codes_NW[others_P[start:stop]].astype(np.float32) - LARGEST
            result[start:stop] = np.einsum("pw,pw->p", one, other)
        return result

    def cosines(self, rows_P: Integers, others: Codes, others_P: Integers) -> Floats:
        """Cosines (P,) of some rows with rows of others, by the codes."""
        products = self.products(rows_P, others, others_P)
        products /= self.inverse_N[rows_P] * others.inverse_N[others_P]
        return products


class Queries(NamedTuple):
    """Rows of codes, each with two float32: see `near`."""

    codes_NW: NDArray[np.uint8]
    rows_Q: Integers
    slope_Q: Floats
    less_Q: Floats


class Targets(NamedTuple):
    """Rows of codes, each with two float32: see `near`."""

    codes_NW: NDArray[np.uint8]
    rows_T: Integers
    scale_T: Floats
    weight_T: Floats


def near(queries: Queries, targets: Targets) -> Iterator[tuple[Integers, Integers]]:
    """Give the pairs whose product of integers is at least slope scale - less weight, some at a time, by queries.

    Gives their places among queries and targets, int64 (P,) each.
    """
    for first, last in spans(len(targets.rows_T), TARGETS):
        some = (targets.rows_T[first:last], targets.scale_T[first:last], targets.weight_T[first:last])
        following = 0
        while following < len(queries.rows_Q):
            left, right = np.empty(ROOM, np.int32), np.empty(ROOM, np.int32)
            count, following = near_rows(
                targets.codes_NW.shape[1], *queries, following, targets.codes_NW, *some, left, right
            )
            if count:
                yield left[:count].astype(np.int64), right[:count].astype(np.int64) + first


def coded(rows: Rows, is_exact: bool, folder: Path, resources: Resources) -> Codes:
    """Write the codes of rows of length 1 into the folder, what is not yet there, and return them.

    is_exact: no pair at all may be lost by them.
    """
    width = rows.shape[1]
    turn = turn_of(width, resources.seed)
    size = resources.block_rows(12 * width)
    blocks = spans(len(rows), size)
    context, held = (rows, turn, folder), 16 * size * width
    files = resources.written(_write_block, context, folder, "codes-{:06d}.npz", blocks, held)
    codes = np.empty((len(rows), -(-width // WIDTHS) * WIDTHS), np.uint8)
    inverse = np.empty(len(rows), np.float32)
    for (start, stop), file in zip(blocks, files, strict=True):
        part = load_arrays(file)
        codes[start:stop], inverse[start:stop] = part["codes"], part["inverse"]
    # 1.1: what two errors have with each other, of scales up to .2 / sqrt(W), and rounding of the products.
    return Codes(codes, inverse, 1.1 * float(np.sqrt(width)) / 2 if is_exact else 1.0)


def codes_of_rows(vectors_ND: Floats, seed: int) -> Codes:
    """Return the codes of vectors of length 1 that are held."""
    with threadpool_limits(1):  # the same to the last bit on any number of cores
        return Codes(*codes_of(vectors_ND, turn_of(vectors_ND.shape[1], seed)), 1.0)


def turn_of(width: int, seed: int) -> Floats:
    """Return the random rotation (D, D) of vectors of a width."""
    with threadpool_limits(1):  # the same to the last bit on any number of cores
        drawn = np.random.default_rng([seed, 9]).normal(size=(width, width))
        return np.ascontiguousarray(np.linalg.qr(drawn)[0], np.float32)


def codes_of(block_nD: Floats, turn_DD: Floats) -> tuple[NDArray[np.uint8], Floats]:
    """Return the codes (n, W) of vectors of length 1, or 0, and the inverses (n,) of their scales."""
    turned = block_nD @ turn_DD
    largest = np.abs(turned).max(axis=1)
    inverse = np.where(largest > 0, LARGEST / np.where(largest > 0, largest, 1), NOTHING).astype(np.float32)
    turned *= inverse[:, None]
    width = turned.shape[1]
    codes = np.full((len(turned), -(-width // WIDTHS) * WIDTHS), LARGEST, np.uint8)
    codes[:, :width] = np.rint(turned) + LARGEST
    return codes, inverse


def _write_block(context: tuple[Rows, Floats, Path], item: tuple[int, tuple[int, int]]) -> None:
    rows, turn, folder = context
    number, span = item
    codes, inverse = codes_of(rows.between(*span), turn)
    rows.release()
    save_arrays(folder / f"codes-{number:06d}.npz", codes=codes, inverse=inverse)
