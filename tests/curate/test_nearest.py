"""Neighbours, retrieval and decontamination against brute force."""

import numpy as np
import pytest

from unlabeled.curate.blocks import Resources
from unlabeled.curate.decontaminate import decontaminate
from unlabeled.curate.kmeans import kmeans
from unlabeled.curate.nearest import nearest_rows
from unlabeled.curate.retrieve import from_seed_clusters, nearest_to_seeds
from unlabeled.errors import UserError

from .made import clustered


def brute_force(pool, queries, k):
    cosines = queries @ pool.T
    order = np.lexsort((np.broadcast_to(np.arange(len(pool)), cosines.shape), -cosines), axis=1)[:, :k]
    return order, np.take_along_axis(cosines, order, 1)


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("memory", [1 << 30, 1 << 20])
def test_few_queries_are_compared_with_all(k, memory):
    vectors, *_ = clustered(9000)
    found = nearest_rows(vectors, vectors[:100], k, resources=Resources(memory=memory))
    rows, cosines = brute_force(vectors, vectors[:100], k)
    assert found.cosines_Qk == pytest.approx(cosines, abs=1e-6)
    assert (found.rows_Qk == rows).mean() > 0.999  # two rows may be as near to the last bit
    assert found.recall.value == 1


def test_many_queries_in_cells(tmp_path):
    vectors, *_ = clustered(16000)
    pool, queries = vectors[:12000], vectors[12000:]
    one, two, four = (
        nearest_rows(pool, queries, 4, resources=Resources(workers=n, work=tmp_path / str(n)))
        for n in (1, 2, 4)
    )
    rows, _ = brute_force(pool, queries, 4)
    recall = np.mean(
        [len(set(a) & set(b)) / 4 for a, b in zip(one.rows_Qk.tolist(), rows.tolist(), strict=True)]
    )
    assert recall > 0.98
    assert abs(one.recall.value - recall) < 0.01
    assert (one.rows_Qk == two.rows_Qk).all()
    assert (one.rows_Qk == four.rows_Qk).all()
    next((tmp_path / "1").glob("nearest-*/nearest-*.npz")).unlink()
    again = nearest_rows(pool, queries, 4, resources=Resources(work=tmp_path / "1"))
    assert (again.rows_Qk == one.rows_Qk).all()


def test_what_is_below_does_not_count():
    vectors, *_ = clustered(12000)
    found = nearest_rows(vectors[:10000], vectors[10000:], 3, above=0.9)
    true = np.sort(np.where((c := vectors[10000:] @ vectors[:10000].T) >= 0.9, c, -np.inf), axis=1)[:, ::-1][
        :, :3
    ]
    assert found.cosines_Qk[found.rows_Qk >= 0].min() >= 0.9 - 1e-6
    assert (found.rows_Qk >= 0).sum() >= 0.97 * np.isfinite(true).sum()


def test_each_image_is_retrieved_once_with_the_seed_it_is_like():
    vectors, *_ = clustered(3000)
    pool, seeds = vectors[:2000], vectors[2000:2200]
    found = nearest_to_seeds(pool, seeds, 4)
    rows, _ = brute_force(pool, seeds, 4)
    assert found.images_R.tolist() == sorted(set(rows.ravel().tolist()))
    for image, seed, cosine in zip(found.images_R, found.sources_R, found.similarities_R, strict=True):
        asked = np.flatnonzero((rows == image).any(axis=1))
        assert seed == asked[(seeds[asked] @ pool[image]).argmax()]
        assert cosine == pytest.approx(float(seeds[seed] @ pool[image]), abs=1e-5)


def test_clusters_with_seeds_give_images():
    vectors, *_ = clustered(4000)
    clusters = kmeans(vectors, 30)
    seeds = vectors[np.isin(clusters.labels_N, [3, 4])][:60]
    counts = np.bincount(clusters.labels_N[np.isin(clusters.labels_N, [3, 4])][:60], minlength=30)
    found = from_seed_clusters(clusters, seeds, per_cluster=20, more_than=3)
    chosen = np.flatnonzero(counts > 3)
    assert set(found.sources_R.tolist()) == set(chosen.tolist())
    assert (np.bincount(found.sources_R)[chosen] == np.minimum(clusters.counts_K[chosen], 20)).all()
    assert (clusters.labels_N[found.images_R] == found.sources_R).all()
    assert len(from_seed_clusters(clusters, seeds, per_cluster=20, most=7).images_R) == 7
    assert len(from_seed_clusters(clusters, vectors[:3], more_than=3).images_R) == 0


def test_contamination_takes_the_whole_group():
    vectors, *_ = clustered(3000, copies=0)
    evaluation = {"first": vectors[:5] + 1e-3, "second": vectors[3:8]}
    groups = np.arange(3000)
    groups[[7, 100, 200]] = 7
    found = decontaminate(vectors, evaluation, 0.99, groups=groups)
    assert np.flatnonzero(found.is_dropped).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 100, 200]
    assert found.cause_N[[0, 7, 100, 200]].tolist() == [0, 7, 7, 7]
    assert found.set_N[[0, 2, 3, 7, 100]].tolist() == [0, 0, 1, 1, -1]
    assert found.image_N[[2, 3, 7, 100]].tolist() == [2, 0, 4, -1]
    assert found.similarity_N[7] == pytest.approx(1, abs=1e-5)
    assert np.isnan(found.similarity_N[100])


def test_large_evaluation_sets_are_searched_in_cells():
    vectors, *_ = clustered(24000)
    pool, other = vectors[:12000], vectors[12000:]
    found = decontaminate(pool, {"test": other}, 0.9)
    true = (pool @ other.T >= 0.9).any(axis=1)
    assert not (found.is_dropped & ~true).any()
    assert found.is_dropped.sum() > 0.97 * true.sum()
    assert found.recall.pairs > 50


def test_mistakes_are_named():
    vectors = np.eye(4, dtype=np.float32)
    with pytest.raises(UserError, match="of 4 and of 3 values"):
        nearest_rows(vectors, vectors[:, :3], 2)
    with pytest.raises(UserError, match="one at least"):
        nearest_to_seeds(vectors, vectors, 0)
    with pytest.raises(UserError, match="another model"):
        decontaminate(vectors, {"a": vectors[:, :2]}, 0.5)
    with pytest.raises(UserError, match="above 0"):
        decontaminate(vectors, {"a": vectors}, -0.5)
