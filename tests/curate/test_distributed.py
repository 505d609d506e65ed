"""The same results on a local Ray of two workers, some of which are killed at their work."""

import os
import signal
import sys

import numpy as np
import pytest

import unlabeled
from unlabeled.curate.blocks import Resources
from unlabeled.curate.distributed import RayExecutor
from unlabeled.curate.duplicates import near_duplicates
from unlabeled.curate.kmeans import kmeans
from unlabeled.curate.nearest import nearest_rows
from unlabeled.curate.whitening import fit_whitening
from unlabeled.errors import UserError
from unlabeled.ray_cluster import connected, on_workers

from .made import clustered

ray = pytest.importorskip("ray", reason="Ray is not installed (the extra scale)")
pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture(autouse=True, scope="module")
def functions_of_this_file(local_ray):
    """Travel to the workers as they are, which cannot import this file."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


def dies_once(context, item):
    """Kills the process that runs it, the first time that it is called."""
    function, inner, marker = context
    try:
        marker.touch(exist_ok=False)
    except FileExistsError:
        return function(inner, item)
    os.kill(os.getpid(), signal.SIGKILL)
    return None


class Dying(RayExecutor):
    """Loses a worker where rows are written by cells, and where cells are joined."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def map(self, function, context, items):
        if function.__name__ not in ("_assign_block", "_connect_cells"):
            return super().map(function, context, items)
        return super().map(dies_once, (function, context, self.folder / function.__name__), items)


def test_the_same_near_duplicates_with_workers_killed(tmp_path):
    vectors, *_ = clustered(9000)
    np.save(tmp_path / "vectors.npy", vectors)
    mapped = np.load(tmp_path / "vectors.npy", mmap_mode="r")
    here = near_duplicates(mapped, 0.9)
    resources = Resources(work=tmp_path / "work", executor=Dying(tmp_path))
    there = near_duplicates(mapped, 0.9, resources=resources)
    assert (here.representative_N == there.representative_N).all()
    assert (here.similarity_N == there.similarity_N).all()
    assert (here.recall, here.pairs) == (there.recall, there.pairs)
    assert (tmp_path / "_assign_block").exists() and (tmp_path / "_connect_cells").exists()


def test_the_same_clusters_neighbours_and_whitening():
    vectors, *_ = clustered(9400)
    here, there = (
        kmeans(vectors, 50, iterations=2, resources=Resources(executor=one)) for one in (None, RayExecutor())
    )
    assert (here.labels_N == there.labels_N).all()
    assert (here.centroids_KD == there.centroids_KD).all()
    near, far = (
        nearest_rows(vectors[:8400], vectors[8400:], 3, resources=Resources(executor=one))
        for one in (None, RayExecutor())
    )
    assert (near.rows_Qk == far.rows_Qk).all()
    own, other = (fit_whitening(vectors, resources=Resources(executor=one)) for one in (None, RayExecutor()))
    assert (own.matrix_DK == other.matrix_DK).all()


def test_mistakes_come_back_as_they_are():
    vectors, *_ = clustered(9000)
    vectors[8500] = np.nan
    with pytest.raises(UserError, match=r"^Row 8500 of the vectors is not finite"):
        kmeans(vectors, 2, sample=100, resources=Resources(executor=RayExecutor()))


def test_a_block_that_always_kills_its_worker():
    with pytest.raises(UserError, match="lost 4 times"):
        list(RayExecutor().map(lambda context, item: os.kill(os.getpid(), signal.SIGKILL), None, [1]))


def squares_but_dies_once(marker):
    def square(number):
        if number == 3 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if number == 9:
            raise UserError("nine")
        return number * number

    return square


def test_numbered_work_with_a_worker_killed(tmp_path):
    marker = tmp_path / "marker"
    done = on_workers(squares_but_dies_once, (marker,), [1, 3, 5, 6])
    assert sorted(done) == [1, 9, 25, 36]
    assert marker.exists()
    with pytest.raises(UserError, match=r"^nine$"):
        list(on_workers(squares_but_dies_once, (marker,), [9]))
    assert list(on_workers(squares_but_dies_once, (marker,), [])) == []


def test_the_command_on_ray(tile_folder, tmp_path):
    import pyarrow.parquet as pq

    here, there = (
        unlabeled.curate(tile_folder, tmp_path / (ray or "here"), model="none", ray=ray)
        for ray in (None, "local")
    )
    assert here.counts == there.counts
    assert pq.read_table(here.lineage).equals(pq.read_table(there.lineage))


def test_a_cluster_that_is_not_there(monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(UserError, match="No Ray cluster at elsewhere"), connected("elsewhere"):
        pass
