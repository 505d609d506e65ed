"""A Ray cluster, and numbered pieces of work done by its workers with Ray Data."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from unlabeled.errors import UserError

LOCAL = "local"  # as an address: a Ray that is started here, and ends with the work


@contextmanager
def connected(address: str = LOCAL, workers: int = 0) -> Iterator[None]:
    """Connect this process to a Ray cluster; one that it is connected to already stays so.

    address: "local" starts Ray here; "auto" is the cluster that this machine is part of; else HOST:PORT.
    workers: of one started here; 0 is one for each core.
    Raises UserError where Ray is not installed or the cluster cannot be reached.
    """
    try:
        import ray
    except ImportError as error:
        raise UserError("Ray is not installed: pip install 'unlabeled[scale]'.") from error
    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {"num_cpus": workers or None} if address == LOCAL else {"address": address}
    # Ray's default of 15 starves its workers beside whatever else the machine does; they do the work here.
    os.environ.setdefault("RAY_worker_niceness", "0")
    try:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR, **options)
    except (ConnectionError, ValueError) as error:
        raise UserError(f"No Ray cluster at {address}: {error}") from error
    except Exception as error:  # Ray raises no class of its own where its processes do not answer in time
        if "timed out" not in str(error).lower():
            raise
        raise UserError(
            "Ray did not start in its 30 seconds; this machine is too busy or short of memory."
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def on_workers(
    make: Callable[..., Callable[[int], int]],
    arguments: tuple[Any, ...],
    numbers: Sequence[int],
    gpu: bool = False,
) -> Iterator[int]:
    """Give make(*arguments)(number) of each number, as they are done, by the cluster that this process is connected to.

    Each worker makes its function once, as one that loads a model should. A worker that dies is started again, and what
    it was at is done again.

    gpu: give each worker a GPU of the cluster, if it has any.
    Raises what the function raises, where that is a UserError.
    """
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    if not numbers:
        return
    DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0)) if gpu else 0
    count = min(len(numbers), gpus or max(1, int(resources.get("CPU", 1))))
    items = ray.data.from_items(
        [{"number": int(number)} for number in numbers], override_num_blocks=len(numbers)
    )
    done = items.map_batches(
        _Worker, batch_size=1, compute=ActorPoolStrategy(size=count), fn_constructor_args=(make, arguments),
        num_cpus=1, num_gpus=1 if gpus else None,
    )  # fmt: skip
    for row in done.iter_rows():
        if row["mistake"]:
            raise UserError(row["mistake"])
        yield int(row["result"])


class _Worker:
    """What an actor of Ray Data does with a block of one number."""

    def __init__(self, make: Callable[..., Callable[[int], int]], arguments: tuple[Any, ...]) -> None:
        self.function = make(*arguments)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        (number,) = batch["number"]
        try:
            return {"result": [self.function(int(number))], "mistake": [""]}
        except UserError as error:  # what Ray Data makes of an exception has lost its class
            return {"result": [0], "mistake": [str(error)]}
