"""k-means against scikit-learn, and its trees."""

import tracemalloc

import numpy as np
import pytest
from sklearn.cluster import KMeans

from unlabeled.curate.blocks import Resources
from unlabeled.curate.hierarchy import closest, hierarchical_kmeans
from unlabeled.curate.kmeans import assign, kmeans, spread
from unlabeled.errors import UserError

from .made import clustered


def test_from_the_same_centroids_as_scikit_learn():
    vectors, *_ = clustered(2000)
    init = vectors[::50].copy()
    ours = kmeans(vectors, 40, init=init, spherical=False, iterations=300, tolerance=0)
    theirs = KMeans(40, init=init, n_init=1, max_iter=300, tol=0, algorithm="lloyd").fit(
        vectors.astype(np.float64)
    )
    assert (ours.labels_N == theirs.labels_).all()
    assert ours.centroids_KD == pytest.approx(theirs.cluster_centers_, abs=1e-5)
    assert -ours.similarities_N.sum() == pytest.approx(theirs.inertia_, rel=1e-5)
    assert ours.counts_K.sum() == 2000


def test_spherical_centroids_are_the_directions_of_the_sums():
    vectors, *_ = clustered(3000)
    found = kmeans(3 * vectors, 20, tolerance=0, iterations=200)
    assert found.objectives == sorted(found.objectives)
    for cluster in range(20):
        total = vectors[found.labels_N == cluster].astype(np.float64).sum(axis=0)
        assert found.centroids_KD[cluster] == pytest.approx(total / np.linalg.norm(total), abs=1e-4)
    assert (found.labels_N == (vectors @ found.centroids_KD.T).argmax(axis=1)).all()


def test_spread_start_is_better_than_a_random_one():
    vectors, *_ = clustered(3000)
    spread_out, random = (
        np.mean(
            [
                kmeans(
                    vectors, 30, init=init, iterations=1, resources=Resources(seed=s)
                ).similarities_N.mean()
                for s in range(5)
            ]
        )
        for init in ("k-means++", "random")
    )
    assert spread_out > random


def test_fewer_different_rows_than_clusters():
    vectors = np.repeat(np.eye(3, dtype=np.float32), 5, axis=0)
    found = kmeans(vectors, 7)
    assert found.similarities_N == pytest.approx(1)
    assert len(spread(vectors, 7, np.random.default_rng(0))) == 7


def test_empty_clusters_are_given_new_centroids():
    vectors, *_ = clustered(2000)
    found = kmeans(vectors, 10, init=np.repeat(vectors[:1], 10, axis=0), iterations=30)
    assert found.reseeded > 0
    assert (found.counts_K > 0).all()


@pytest.mark.parametrize("spherical", [True, False])
@pytest.mark.parametrize(("count", "width", "k"), [(20_000, 32, 200), (5001, 33, 700)])
def test_workers_do_not_matter(count, width, k, spherical):
    vectors, *_ = clustered(count, width)
    first, *others = (
        kmeans(vectors, k, iterations=4, spherical=spherical, resources=Resources(workers=n))
        for n in (1, 2, 4)
    )
    for other in others:
        assert (first.labels_N == other.labels_N).all()
        assert (first.centroids_KD == other.centroids_KD).all()
        assert first.objectives == other.objectives


@pytest.mark.parametrize("spherical", [True, False])
def test_rows_get_the_centroid_that_brute_force_finds(spherical):
    vectors, *_ = clustered(6000)
    centroids = 1.1 * vectors[:600]
    labels, similarities = assign(
        vectors, centroids, spherical=spherical, resources=Resources(memory=1 << 20)
    )
    exact, centers = vectors.astype(np.float64), centroids.astype(np.float64)
    true = exact @ centers.T
    if not spherical:
        true = 2 * true - np.square(exact).sum(axis=1)[:, None] - np.square(centers).sum(axis=1)
    assert (labels == true.argmax(axis=1)).mean() > 0.999  # two may be as near to the last bit
    assert similarities == pytest.approx(true.max(axis=1), abs=2e-6)


def test_centroids_of_a_sample_that_the_memory_holds():
    vectors, *_ = clustered(8000)
    whole = kmeans(vectors, 20, init="random")
    little = kmeans(
        vectors, 20, init="random", resources=Resources(memory=1 << 19)
    )  # a quarter holds 1,024 rows
    assert len(little.labels_N) == 8000
    assert (little.centroids_KD != whole.centroids_KD).any()
    assert little.similarities_N.mean() > 0.9 * whole.similarities_N.mean()


def test_stopped_between_iterations(tmp_path, monkeypatch):
    from unlabeled.curate import kmeans as module

    vectors, *_ = clustered(3000)
    whole = kmeans(vectors, 50, iterations=8, tolerance=0)
    count, iterate = 0, module._iterate

    def stopped(*args):
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        return iterate(*args)

    monkeypatch.setattr(module, "_iterate", stopped)
    with pytest.raises(KeyboardInterrupt):
        kmeans(vectors, 50, iterations=8, tolerance=0, resources=Resources(work=tmp_path))
    again = kmeans(vectors, 50, iterations=8, tolerance=0, resources=Resources(work=tmp_path))
    assert count == 4 + 5
    assert (again.centroids_KD == whole.centroids_KD).all()
    assert again.objectives == whole.objectives


@pytest.mark.parametrize("k", [0, 11])
def test_a_number_of_clusters_that_cannot_be(k):
    with pytest.raises(UserError, match="between 1"):
        kmeans(np.ones((10, 2), np.float32), k)


def test_closest_rows_of_each_cluster():
    labels = np.array([0, 1, 0, 1, 0, 2], np.int32)
    similarities = np.array([0.1, 0.5, 0.3, 0.4, 0.2, 0.9], np.float32)
    assert closest(labels, similarities, 2).tolist() == [1, 2, 3, 4, 5]


def test_a_tree(tmp_path):
    vectors, *_ = clustered(5000)
    tree = hierarchical_kmeans(vectors, (200, 30, 5), resources=Resources(work=tmp_path))
    assert [level.k for level in tree.levels] == [200, 30, 5]
    assert [len(level.labels_N) for level in tree.levels] == [5000, 200, 30]
    top = tree.clusters_of(2)
    assert (top == tree.levels[2].labels_N[tree.levels[1].labels_N[tree.levels[0].labels_N]]).all()
    again = hierarchical_kmeans(vectors, (200, 30, 5), resources=Resources(workers=1))
    assert (tree.clusters_of(0) == again.clusters_of(0)).all()
    assert (tree.levels[2].centroids_KD == again.levels[2].centroids_KD).all()


def test_resampling_spreads_centroids_over_rare_kinds():
    """Nine of ten rows are of one kind: with resampling the other kinds get more of the centroids."""
    generator = np.random.default_rng(0)
    kind = np.minimum(generator.geometric(0.9, 20000) - 1, 3)
    centers = 4 * np.eye(4, 16)
    vectors = (centers[kind] + generator.normal(size=(20000, 16))).astype(np.float32)
    shares = []
    for rounds in (0, 3):
        tree = hierarchical_kmeans(vectors, (100,), rounds=rounds)
        shares.append((tree.levels[0].centroids_KD.argmax(axis=1) > 0).mean())
    assert shares[1] > shares[0]


def test_levels_that_do_not_fall():
    with pytest.raises(UserError, match="must fall"):
        hierarchical_kmeans(np.ones((10, 2), np.float32), (5, 6))


def test_memory_is_a_budget(tmp_path):
    """A hundred megabytes on disk are clustered within sixteen."""
    vectors = np.lib.format.open_memmap(tmp_path / "vectors.npy", "w+", np.float32, (100_000, 256))
    for start in range(0, len(vectors), 10_000):
        vectors[start : start + 10_000] = np.random.default_rng(start).random((10_000, 256), np.float32)
    vectors.flush()
    mapped = np.load(tmp_path / "vectors.npy", mmap_mode="r")
    tracemalloc.start()
    try:
        kmeans(mapped, 4, init="random", iterations=2, resources=Resources(memory=16 << 20, workers=4))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16 << 20
