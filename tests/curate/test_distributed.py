"""The same results on a local Ray of two workers, one of which is killed at its work."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np
import pytest

from unlabeled.curate.blocks import Resources
from unlabeled.curate.distributed import RayExecutor, cluster
from unlabeled.curate.duplicates import near_duplicates
from unlabeled.curate.kmeans import kmeans
from unlabeled.curate.nearest import nearest_rows
from unlabeled.errors import UserError

from .made import clustered

ray = pytest.importorskip("ray", reason="Ray is not installed (the extra scale)")


@pytest.fixture(scope="module")
def executor() -> Iterator[RayExecutor]:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with ExitStack() as stack:
        try:
            found = stack.enter_context(cluster(workers=2))
        except UserError as error:
            if "did not start" not in str(error):
                raise
            pytest.skip(str(error))
        yield found
    assert not ray.is_initialized()


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
    """Loses a worker in every step."""

    def __init__(self, folder):
        super().__init__()
        self.folder, self.steps = folder, 0

    def map(self, function, context, items):
        self.steps += 1
        return super().map(dies_once, (function, context, self.folder / str(self.steps)), items)


def test_the_same_near_duplicates_with_workers_killed(executor, tmp_path):
    vectors, *_ = clustered(12000)
    np.save(tmp_path / "vectors.npy", vectors)
    mapped = np.load(tmp_path / "vectors.npy", mmap_mode="r")
    here = near_duplicates(mapped, 0.9)
    for runner in (executor, Dying(tmp_path)):
        there = near_duplicates(
            mapped, 0.9, resources=Resources(work=tmp_path / type(runner).__name__, executor=runner)
        )
        assert (here.representative_N == there.representative_N).all()
        assert (here.similarity_N == there.similarity_N).all()
        assert (here.recall, here.pairs) == (there.recall, there.pairs)
    assert len([file for file in tmp_path.iterdir() if file.name.isdigit()]) > 3


def test_the_same_clusters_and_neighbours(executor):
    vectors, *_ = clustered(12000)
    here, there = (
        kmeans(vectors, 50, iterations=3, resources=Resources(executor=one)) for one in (None, executor)
    )
    assert (here.labels_N == there.labels_N).all()
    assert (here.centroids_KD == there.centroids_KD).all()
    near, far = (
        nearest_rows(vectors[:10000], vectors[10000:], 3, resources=Resources(executor=one))
        for one in (None, executor)
    )
    assert (near.rows_Qk == far.rows_Qk).all()


def test_mistakes_come_back_as_they_are(executor):
    vectors, *_ = clustered(9000)
    vectors[8500] = np.nan
    with pytest.raises(UserError, match=r"^Row 8500 of the vectors is not finite"):
        near_duplicates(vectors, 0.9, resources=Resources(executor=executor))


def test_a_block_that_always_kills_its_worker(executor):
    with pytest.raises(UserError, match="lost 4 times"):
        list(executor.map(lambda context, item: os.kill(os.getpid(), signal.SIGKILL), None, [1]))
