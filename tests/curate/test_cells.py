"""Cells: whose members and who probes them, against the formula for every row and cell."""

import numpy as np
import pytest

from unlabeled.curate import blocks
from unlabeled.curate.blocks import Resources, Rows
from unlabeled.curate.cells import lay_out, stored_by_cell


@pytest.mark.parametrize("reach", [0.0, 0.2])
def test_rows_by_cell(reach, tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "LARGEST_BLOCK", 64)  # several blocks
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(301, 6)).astype(np.float32)
    centroids = generator.normal(size=(9, 6)).astype(np.float32)
    centroids /= np.linalg.norm(centroids, axis=1, keepdims=True)
    cells = lay_out(Rows(vectors), centroids, reach, tmp_path, Resources())
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    scores = unit.astype(np.float64) @ centroids.T
    own = scores.argmax(axis=1)
    assert (cells.cells_N == own[cells.order_N]).all()
    assert (np.sort(cells.order_N) == np.arange(301)).all()
    assert (cells.starts == np.concatenate(([0], np.bincount(own, minlength=9).cumsum()))).all()
    between = np.linalg.norm(centroids[:, None] - centroids[None], axis=2)
    gap = scores.max(axis=1, keepdims=True) - scores
    probes = (gap <= reach * between[own]) & (np.arange(9) != own[:, None]) & (reach > 0)
    assert probes.any() == (reach > 0)
    for cell in range(9):
        assert cells.probing(cell).tolist() == np.flatnonzero(probes[cells.order_N, cell]).tolist()
    rows, numbers = np.divmod(np.arange(301 * 9), 9)
    assert (cells.has_probe(rows, numbers) == probes[cells.order_N][rows, numbers]).all()
    sizes = np.bincount(own, minlength=9)
    assert cells.compared == (sizes * (sizes + 1) // 2 + sizes * probes.sum(axis=0)).sum()
    stored = stored_by_cell(Rows(vectors), cells, tmp_path, Resources())
    assert stored.between(0, 301) == pytest.approx(unit[cells.order_N], abs=1e-6)
