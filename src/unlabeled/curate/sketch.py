"""Short vectors whose cosines are upper bounds of those of the long ones.

In the basis of the directions in which vectors are largest, x = (x1, x2) with the first d values in x1. By the
inequality of Cauchy and Schwarz x . y <= x1 . y1 + |x2| |y2|, and that is the cosine of (x1, |x2|) with (y1, |y2|),
which have length 1 as x and y have. So whatever is near is near among the sketches, which cost a part of the products;
the few pairs near there are looked at in full. No pair is lost by it.

Shape suffixes: N vectors, D width, d values kept, S vectors of a sample, n rows of a block.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from unlabeled.curate.blocks import Floats, Parts, Resources, Rows, save_array, spans

SAMPLE = 16384  # vectors that the directions are found with, and that the width is chosen on
QUERIES = 2048  # of them, compared with all of the sample
SHARES = (1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2)  # of the width, that a sketch may have
MOST_PAIRS = 0.01  # times the root of N, as products grow: near each sketch and looked at in full in vain
ROUNDED_UP = 1e-6  # of a squared length
SLACK = 1e-5  # what rounding may take from a bound


def sketched(rows: Rows, threshold: float, folder: Path, resources: Resources) -> Rows | None:
    """Write sketches (N, d + 1) of the rows, float32, and return them; None where none would be short enough.

    threshold: cosine, above which few pairs of sketches must be.
    """
    basis = _basis(rows, threshold, folder, resources)
    if not basis.shape[1]:
        return None
    size = resources.block_rows(12 * rows.shape[1])
    context, held = (rows, basis, folder), 16 * size * rows.shape[1]
    blocks = spans(len(rows), size)
    files = resources.written(_write_block, context, folder, "sketch-{:06d}.npy", blocks, held)
    parts = Parts([np.load(file, mmap_mode="r") for file in files])
    stays = 4 * len(rows) * parts.shape[1] <= resources.memory // 4
    return Rows(parts, is_ready=True, stays=stays)


def sketches(block_nD: Floats, basis_Dd: Floats) -> Floats:
    """Return (x1, |x2|) of vectors x of length 1, (n, d + 1)."""
    result = np.empty((len(block_nD), basis_Dd.shape[1] + 1), np.float32)
    first = np.matmul(block_nD, basis_Dd, out=result[:, :-1])
    # The root of a difference near 0 would be too small by more than rounding: |x2| is rounded up.
    result[:, -1] = np.sqrt(np.maximum(1 - np.einsum("nd,nd->n", first, first), 0) + ROUNDED_UP)
    return result


def _write_block(context: tuple[Rows, Floats, Path], item: tuple[int, tuple[int, int]]) -> None:
    rows, basis, folder = context
    number, span = item
    save_array(folder / f"sketch-{number:06d}.npy", sketches(rows.between(*span), basis))
    rows.release()


def _basis(rows: Rows, threshold: float, folder: Path, resources: Resources) -> Floats:
    """Return directions (D, d): the fewest that leave few pairs to look at; (D, 0) where half of them do not."""
    file = folder / "basis.npy"
    if file.is_file():
        found: Floats = np.load(file)
        return found
    generator = np.random.default_rng([resources.seed, 8])
    drawn = generator.choice(len(rows), min(SAMPLE, len(rows)), replace=False)
    sample = rows.at(drawn)
    rows.release()
    width = rows.shape[1]
    with threadpool_limits(1):  # the same to the last bit on any number of cores
        _, directions = np.linalg.eigh((sample.T @ sample).astype(np.float64))
        directions = np.ascontiguousarray(directions[:, ::-1], np.float32)
        chosen = directions[:, :0]
        for share in SHARES:
            some = directions[:, : round(share * width)]
            most = MOST_PAIRS / len(rows) ** 0.5
            if some.shape[1] and _has_few_pairs(sample, sketches(sample, some), threshold, most):
                chosen = some
                break
    save_array(file, np.ascontiguousarray(chosen))
    return np.ascontiguousarray(chosen)


def _has_few_pairs(sample_SD: Floats, short_Sd: Floats, threshold: float, most: float) -> bool:
    """Whether the sketches of at most a share `most` of the pairs are near although they are not."""
    queries = min(QUERIES, len(sample_SD))
    limit, false = most * queries * len(sample_SD), 0
    for start, stop in spans(len(sample_SD), QUERIES):
        left, right = np.nonzero(short_Sd[:queries] @ short_Sd[start:stop].T >= threshold - SLACK)
        for first, last in spans(len(left), 16384):
            a, b = left[first:last], right[first:last] + start
            false += int((np.einsum("nd,nd->n", sample_SD[a], sample_SD[b]) < threshold).sum())
            if false > limit:
                return False
    return True
