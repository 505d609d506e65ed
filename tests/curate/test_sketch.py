"""Sketches: cosines that are bounds, and pairs that are those of brute force."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unlabeled.curate import neighbours, products, sketch
from unlabeled.curate.blocks import Resources, Rows
from unlabeled.curate.neighbours import pairs_above
from unlabeled.curate.products import cosines_of


def falling(count, width=64, seed=0):
    """Vectors whose directions are of falling size, as those of features are; a tenth are near to others."""
    generator = np.random.default_rng(seed)
    vectors = generator.normal(size=(count, width)) / np.arange(1, width + 1)
    copies = count // 10
    vectors[:copies] = vectors[copies : 2 * copies] + 0.1 * generator.normal(size=(copies, width)) / np.sqrt(
        width
    )
    return vectors.astype(np.float32)


@given(st.integers(0, 99), st.integers(1, 11))
def test_cosines_of_sketches_are_bounds(seed, kept):
    generator = np.random.default_rng(seed)
    rows = Rows(generator.normal(size=(20, 12)).astype(np.float32)).between(0, 20)
    basis = np.linalg.qr(generator.normal(size=(12, 12)))[0][:, :kept].astype(np.float32)
    short = sketch.sketches(rows, basis)
    assert np.square(short).sum(1) == pytest.approx(np.ones(20), abs=1e-5)
    assert (short @ short.T >= rows @ rows.T - sketch.SLACK).all()


def test_pairs_are_those_of_brute_force(tmp_path):
    vectors = falling(9000)
    unit = Rows(vectors).between(0, 9000)
    true = set(map(tuple, np.argwhere(np.triu(unit @ unit.T >= 0.99, 1)).tolist()))
    assert len(true) > 500
    with neighbours.prepared(vectors, 0.99, 1, Resources()) as (join, _):
        assert join.cells.codes.codes_NW.shape[1] < 40  # sketched
    parts = list(pairs_above(vectors, 0.99, recall=1))
    left, right, cosines = (np.concatenate(column) for column in zip(*parts, strict=True))
    assert len(left) == len(true) and set(zip(left.tolist(), right.tolist(), strict=True)) == true
    assert cosines == pytest.approx(np.einsum("pd,pd->p", unit[left], unit[right]), abs=1e-5)


def test_vectors_alike_in_all_directions_are_not_sketched(tmp_path):
    vectors = np.random.default_rng(0).normal(size=(9000, 16)).astype(np.float32)
    assert sketch.sketched(Rows(vectors), 0.7, tmp_path, Resources()) is None
    again = sketch.sketched(Rows(vectors), 0.7, tmp_path, Resources())
    assert again is None


@pytest.mark.parametrize("dense", [0, 1 << 30])
def test_cosines_of_pairs(dense, monkeypatch):
    monkeypatch.setattr(products, "DENSE", dense)
    rows = Rows(falling(500))
    generator = np.random.default_rng(0)
    left, right = generator.integers(500, size=(2, 3000))
    unit = rows.between(0, 500)
    assert cosines_of(rows, left, right) == pytest.approx(
        np.einsum("pd,pd->p", unit[left], unit[right]), abs=1e-5
    )
