"""Cells of a k-means against the formula for every row."""

import numpy as np
import pytest

from unlabeled.curate import blocks
from unlabeled.curate.blocks import Resources, Rows
from unlabeled.curate.cells import lay_out, stored_by_cell


def test_rows_by_cell(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "LARGEST_BLOCK", 64)  # several blocks
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(301, 6)).astype(np.float32)
    centroids = generator.normal(size=(9, 6)).astype(np.float32)
    centroids /= np.linalg.norm(centroids, axis=1, keepdims=True)
    cells = lay_out(Rows(vectors), centroids, tmp_path, Resources())
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    own = (unit.astype(np.float64) @ centroids.T).argmax(axis=1)
    assert (cells.cells_N == own[cells.order_N]).all()
    assert (np.sort(cells.order_N) == np.arange(301)).all()
    assert (cells.starts == np.concatenate(([0], np.bincount(own, minlength=9).cumsum()))).all()
    stored = stored_by_cell(Rows(vectors), cells, tmp_path, Resources())
    assert stored.between(0, 301) == pytest.approx(unit[cells.order_N], abs=1e-6)
