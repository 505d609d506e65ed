"""Near-duplicates against brute force and a plain loop."""

import numpy as np
import pytest

from unlabeled.curate.blocks import Resources
from unlabeled.curate.duplicates import near_duplicates
from unlabeled.curate.neighbours import pairs_above
from unlabeled.errors import UserError


def clustered(count, width=32, seed=0, copies=0.1, noise=0.2):
    """Unit vectors in clusters, some of which are copies of others, with the numbers of those."""
    generator = np.random.default_rng(seed)
    centers = generator.normal(size=(max(2, count // 100), width))
    vectors = 0.8 * centers[generator.integers(len(centers), size=count)] + generator.normal(
        size=(count, width)
    )
    number = int(copies * count)
    pick = generator.permutation(count)
    copy, original = pick[:number], pick[number : 2 * number]
    vectors[copy] = vectors[original] + noise * generator.normal(size=(number, width))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32), copy, original


def test_pairs_are_those_of_brute_force():
    vectors, *_ = clustered(3000)
    true = np.argwhere(np.triu(vectors @ vectors.T >= 0.9, 1))
    found = [np.stack((pairs.left_P, pairs.right_P), 1) for pairs in pairs_above(vectors, 0.9)]
    assert sorted(map(tuple, np.concatenate(found).tolist())) == sorted(map(tuple, true.tolist()))


def test_cells_find_the_recall_they_report():
    vectors, *_ = clustered(12000)
    true = set(map(tuple, np.argwhere(np.triu(vectors @ vectors.T >= 0.9, 1)).tolist()))
    found = [
        pair for pairs in pairs_above(vectors, 0.9) for pair in zip(pairs.left_P, pairs.right_P, strict=True)
    ]
    assert len(set(found)) == len(found)
    assert set(found) <= true
    assert len(found) >= 0.97 * len(true)


def test_a_chain_is_split():
    angles = np.arange(7) * np.pi / 18  # ten degrees apart
    vectors = np.stack((np.cos(angles), np.sin(angles)), 1).astype(np.float32)
    found = near_duplicates(vectors, np.cos(np.pi / 17), quality=[0, 5, 0, 0, 4, 0, 0])
    assert found.component_N.tolist() == [0] * 7
    assert found.representative_N.tolist() == [1, 1, 1, 4, 4, 4, 6]
    assert found.similarity_N == pytest.approx(
        [np.cos(np.pi / 18)] + [1] + [np.cos(np.pi / 18)] * 2 + [1, np.cos(np.pi / 18), 1]
    )


def test_workers_do_not_matter():
    vectors, *_ = clustered(12000)
    one, two = (near_duplicates(vectors, 0.9, resources=Resources(workers=n)) for n in (1, 2))
    assert (one.representative_N == two.representative_N).all()
    assert (one.similarity_N == two.similarity_N).all()


def test_out_of_range():
    with pytest.raises(UserError, match="above 0 and up to 1"):
        near_duplicates(np.eye(3, dtype=np.float32), 1.5)
