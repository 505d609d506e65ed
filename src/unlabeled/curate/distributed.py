"""Curation on a Ray cluster: the same blocks as on one machine, run by Ray's workers, with the same results.

    with cluster("auto") as executor:
        near_duplicates(vectors, 0.8, resources=Resources(work=Path("/shared/work"), executor=executor))

The vectors must be files, and they and the work folder must be at the same place on every machine. A worker that dies
takes only its block with it, which is run again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from threadpoolctl import threadpool_limits

from unlabeled.curate.blocks import Context, Item, Result
from unlabeled.errors import UserError
from unlabeled.ray_cluster import LOCAL, connected

RETRIES = 3  # of a block whose worker died


class RayExecutor:
    """Runs blocks on the workers of the Ray cluster that this process is connected to, see `Resources`.

    Args:
        waiting: blocks that are given out at once; 0 is two for each core of the cluster.
    """

    def __init__(self, waiting: int = 0) -> None:
        self.waiting = waiting

    def map(
        self, function: Callable[[Context, Item], Result], context: Context, items: Sequence[Item]
    ) -> Iterator[Result]:
        """Give function(context, item) of each item, in order.

        Raises:
            UserError: a block's workers died again and again; or what the function raises.
        """
        import ray

        limit = self.waiting or 2 * int(ray.cluster_resources().get("CPU", 1))
        shared = ray.put(context)  # once for each machine, not for each block
        call = ray.remote(_call).options(num_cpus=1, max_retries=RETRIES)
        waiting: deque[Any] = deque()
        try:
            for item in items:
                waiting.append(call.remote(function, shared, item))
                if len(waiting) >= limit:
                    yield _result(waiting.popleft())
            while waiting:
                yield _result(waiting.popleft())
        finally:
            for block in waiting:
                ray.cancel(block)


def _call(function: Callable[[Context, Item], Result], context: Context, item: Item) -> Result:
    """One core to each block, as with threads, so that its sums are the same to the last bit."""
    with threadpool_limits(1):
        return function(context, item)


def _result(block: Any) -> Any:
    import ray

    try:
        return ray.get(block)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except ray.exceptions.WorkerCrashedError as error:
        raise UserError(
            f"A block of work was lost {RETRIES + 1} times with the process that ran it; most often that is for want "
            "of memory: give each worker more, or make the memory of the step less."
        ) from error


@contextmanager
def cluster(address: str = LOCAL, workers: int = 0) -> Iterator[RayExecutor]:
    """Give an executor on a Ray cluster; address, workers, raises: see `connected`."""
    with connected(address, workers):
        yield RayExecutor()
