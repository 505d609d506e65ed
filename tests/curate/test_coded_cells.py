"""Cells of codes: whose members, and who probes them, against the formula for every row and cell."""

import numpy as np
import pytest

from unlabeled.curate import blocks, coded_cells, codes
from unlabeled.curate.blocks import Resources, Rows
from unlabeled.curate.coded_cells import Reach, find_centroids, lay_out
from unlabeled.curate.codes import coded

from .made import clustered


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Cells in several regions of 400 rows, in several blocks."""
    monkeypatch.setattr(coded_cells, "FEW", 100)
    monkeypatch.setattr(coded_cells, "CELLS_OF_A_REGION", 8)
    monkeypatch.setattr(blocks, "LARGEST_BLOCK", 256)
    rows = Rows(clustered(400, width=12)[0])
    centroids = find_centroids(rows, 0.95, tmp_path, Resources())
    encoded = coded(rows, False, tmp_path, Resources())
    return rows, centroids, lay_out(rows, encoded, centroids, False, tmp_path, Resources())


def test_rows_lie_in_the_cell_of_a_near_centroid(made):
    rows, centroids, cells = made
    unit = rows.between(0, 400)
    assert (np.sort(cells.order_N) == np.arange(400)).all()
    assert (np.diff(cells.cells_N) >= 0).all()
    assert (
        cells.starts == np.concatenate(([0], np.bincount(cells.cells_N, minlength=cells.count).cumsum()))
    ).all()
    assert (cells.places()[cells.order_N] == np.arange(400)).all()
    scores = unit[cells.order_N] @ centroids.vectors_KD.T
    own = scores[np.arange(400), cells.cells_N]
    assert cells.best_N == pytest.approx(own, abs=0.02)
    assert (own == scores.max(axis=1)).mean() > 0.9
    assert len(centroids.starts) > 4
    for begin, end in zip(centroids.starts[:-1], centroids.starts[1:], strict=True):
        assert end > begin


@pytest.mark.parametrize(("share", "least"), [(2, 1), (1, 1), (100, 3), (100, 1)])
def test_no_cell_of_a_near_region_is_nearer(made, tmp_path, monkeypatch, share, least):
    monkeypatch.setattr(coded_cells, "NEAREST", share)
    monkeypatch.setattr(coded_cells, "LEAST", least)
    monkeypatch.setattr(coded_cells, "TOGETHER", 150)
    rows, centroids, _ = made
    folder = tmp_path / "again"
    folder.mkdir()
    cells = lay_out(rows, coded(rows, False, folder, Resources()), centroids, False, folder, Resources())
    own, vectors = cells.cells_N[cells.places()], rows.between(0, 400)
    every = np.arange(cells.count)
    by_codes = np.array(
        [cells.codes.cosines(np.full(len(every), row), cells.centers, every) for row in cells.places()]
    )
    assert (cells.best_N[cells.places()] == by_codes[np.arange(400), own]).all()
    count = max(least, (len(centroids.starts) - 1) // share)
    chosen = np.argsort(-(vectors @ centroids.regions.T), axis=1)[:, :count]
    region = np.searchsorted(centroids.starts, every, side="right") - 1
    is_near = (region[None, None] == chosen[:, :, None]).any(axis=1)
    assert (by_codes[np.arange(400), own] == np.where(is_near, by_codes, -1).max(axis=1)).all()


@pytest.mark.parametrize("reach", [Reach(0.1, np.inf), Reach(0.1, 0.9), Reach(0.0, np.inf)])
def test_who_probes(made, reach, monkeypatch):
    monkeypatch.setattr(coded_cells, "LOOKED_AT", 32)
    monkeypatch.setattr(coded_cells, "VISITS", 50)
    monkeypatch.setattr(codes, "TARGETS", 4)
    *_, cells = made
    count = cells.count
    integers = cells.centers.codes_NW.astype(np.float64) - 63
    centers = integers / cells.centers.inverse_N[:, None]
    vectors = (cells.codes.codes_NW.astype(np.float64) - 63) / cells.codes.inverse_N[:, None]
    between = np.linalg.norm(centers[:, None] - centers[None], axis=2)[cells.cells_N]
    gap = cells.best_N[:, None] - vectors @ centers.T
    is_other = cells.cells_N[:, None] != np.arange(count)
    expected = (gap <= reach.plane * between) & (between <= reach.centroid) & is_other
    certain = (np.abs(gap - reach.plane * between) > 1e-5) & (np.abs(between - reach.centroid) > 1e-5)
    found = np.zeros((400, count), int)
    for span in cells.tasks:
        for cell, rows in cells.probing(span, reach):
            found[rows, cell] += 1
    assert found.max() <= 1
    assert (found == expected)[certain].all()
    rows, numbers = np.divmod(np.arange(400 * count), count)
    assert (cells.has_probe(rows, numbers, reach) == found.ravel()).all()
    planes, distances = (part.reshape(400, count) for part in cells.distances(rows, numbers))
    assert distances == pytest.approx(between * is_other, abs=1e-3)
    assert planes[is_other] == pytest.approx(np.maximum(gap, 0)[is_other] / between[is_other], abs=1e-4)
    assert not planes[~is_other].any()


def test_copies_of_one_image_are_one_cell(tmp_path, monkeypatch):
    """Thousands of them would draw many centroids, and each probe all of those."""
    monkeypatch.setattr(coded_cells, "FEW", 100)
    vectors = clustered(700, width=12)[0]
    vectors[::2] = vectors[0]
    rows = Rows(vectors + 0.01 * np.random.default_rng(0).normal(size=vectors.shape).astype(np.float32))
    centroids = find_centroids(rows, 0.9, tmp_path, Resources())
    cells = lay_out(rows, coded(rows, False, tmp_path, Resources()), centroids, False, tmp_path, Resources())
    assert len(np.unique(cells.cells_N[cells.places()[::2]])) == 1


def test_one_cell_of_few(tmp_path):
    rows = Rows(clustered(300, width=12)[0])
    centroids = find_centroids(rows, 0.9, tmp_path, Resources())
    cells = lay_out(rows, coded(rows, False, tmp_path, Resources()), centroids, False, tmp_path, Resources())
    assert cells.count == 1 and cells.tasks == [(0, 1)]
    assert not list(cells.probing((0, 1), Reach(1.0, np.inf)))
