"""From DATA to the batches of a run: the same crops for a position whatever the ranks, workers or restarts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from unlabeled.errors import UserError
from unlabeled.images.bad_files import BadFiles
from unlabeled.images.decode import BadImage, decode, quiet_native_libraries
from unlabeled.images.order import ShuffledOrder
from unlabeled.images.sources import Source
from unlabeled.pretrain.crops import CropRecipe, Crops, make_crops, smallest_side
from unlabeled.pretrain.masks import block_masks
from unlabeled.pretrain.method import Batch
from unlabeled.pretrain.parallel import Parallel
from unlabeled.pretrain.recipe import Recipe

MAX_REPLACEMENTS = 100  # unreadable images met in a row before a run gives up


@dataclass(frozen=True)
class CropBatch:
    """What a worker hands over: uint8 crops, view-major, and the files it could not read."""

    globals_VB3HW: Tensor
    locals_VB3HW: Tensor
    bad: list[tuple[str, str]]

    def pin_memory(self) -> CropBatch:
        """The same in page-locked memory, for copies that overlap with compute."""
        return CropBatch(self.globals_VB3HW.pin_memory(), self.locals_VB3HW.pin_memory(), self.bad)


class CropDataset(Dataset[CropBatch]):
    """Item p: the crops of position p of an endless shuffled walk over the source.

    Everything random comes from (seed, position). An unreadable image is replaced by another, drawn from the same
    generator, and named in the batch.
    """

    def __init__(self, source: Source, recipe: CropRecipe, order: ShuffledOrder, seed: int) -> None:
        self.source, self.recipe, self.order, self.seed = source, recipe, order, seed

    def __getitems__(self, positions: list[int]) -> CropBatch:
        """One batch."""
        recipe, count = self.recipe, len(positions)
        size, local = recipe.global_size, recipe.local_size
        globals_VB3HW = np.empty((recipe.num_globals, count, 3, size, size), np.uint8)
        locals_VB3HW = np.empty((recipe.num_locals, count, 3, local, local), np.uint8)
        bad: list[tuple[str, str]] = []
        for slot, (position, index) in enumerate(
            zip(positions, self.order.indices(np.asarray(positions)), strict=True)
        ):
            rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, position])))
            place = Crops(globals_VB3HW[:, slot], locals_VB3HW[:, slot])
            make_crops(self._image(int(index), rng, bad), recipe, rng, out=place)
        return CropBatch(
            torch.from_numpy(globals_VB3HW.reshape(-1, 3, size, size)),
            torch.from_numpy(locals_VB3HW.reshape(-1, 3, local, local)),
            bad,
        )

    def _image(self, index: int, rng: np.random.Generator, bad: list[tuple[str, str]]) -> np.ndarray:
        for _ in range(MAX_REPLACEMENTS):
            try:
                sample = self.source.read(index)
            except OSError as error:
                bad.append((f"image {index}", f"unreadable: {error}"))
            else:
                try:
                    return decode(sample.data, smallest_side(self.recipe))
                except BadImage as error:
                    bad.append((sample.key, str(error)))
            index = int(rng.integers(len(self.source)))
        key, reason = bad[-1]
        raise UserError(
            f"{MAX_REPLACEMENTS} images in a row cannot be read (last: {key}: {reason}); see bad_files.jsonl"
        )


@dataclass(frozen=True)
class _Positions:
    """Positions of this rank's part of each step's batch: the global batch cut into equal runs."""

    start: int
    steps: int
    batch_size: int
    rank: int
    world: int

    def __len__(self) -> int:
        return self.steps - self.start

    def __iter__(self) -> Iterator[list[int]]:
        local = self.batch_size // self.world
        for step in range(self.start, self.steps):
            first = step * self.batch_size + self.rank * local
            yield list(range(first, first + local))


def start_worker(_: int) -> None:
    """One thread a worker, its libraries silent, and signals left to the main process."""
    import signal

    import cv2

    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    quiet_native_libraries()
    # The main process decides when a run stops: it finishes its step and tells the workers.
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)


def choose_workers(parallel: Parallel) -> int:
    """Processes that make crops, a rank: the cores' share, less one, at most 16; on a CPU that computes too, one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if parallel.device.type == "cpu":
        return 1
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(16, cores // local_world - 1))


def batches(
    source: Source, recipe: Recipe, parallel: Parallel, start: int, report: BadFiles
) -> Iterator[tuple[int, Batch]]:
    """(step, batch) from step `start` to the end of the run, for this rank, on its device.

    Raises:
        UserError: the batch does not divide by the ranks, or the source is all but unreadable.
    """
    run = recipe.run
    if run.batch_size % parallel.world:
        raise UserError(f"run.batch_size {run.batch_size} does not divide by {parallel.world} ranks")
    order = ShuffledOrder(len(source), run.seed, block_starts=source.block_starts, window=source.window)
    workers = choose_workers(parallel) if run.workers < 0 else run.workers
    loader = DataLoader(
        CropDataset(source, recipe.crops, order, run.seed),
        batch_sampler=_Positions(start, run.steps, run.batch_size, parallel.rank, parallel.world),
        num_workers=workers,
        collate_fn=_same,
        prefetch_factor=4 if workers else None,
        pin_memory=parallel.device.type == "cuda",
        worker_init_fn=start_worker,
    )
    local = run.batch_size // parallel.world
    for step, crops in enumerate(loader, start):
        for key, reason in crops.bad:
            report.add(key, reason)
        masks = step_masks(recipe, step, parallel.rank, parallel.world)
        batch = Batch(crops.globals_VB3HW, crops.locals_VB3HW, masks, local)
        yield step, batch.to(parallel.device)


def step_masks(recipe: Recipe, step: int, rank: int, world: int) -> Tensor | None:
    """This rank's masks of a step: bool (2B, N), or None without iBOT; of a frozen teacher every patch is compared.

    They are drawn for the whole global batch, so that they do not depend on the number of ranks.
    """
    loss, side = recipe.loss, recipe.crops.global_size // recipe.model.patch_size
    if loss.ibot == 0:
        return None
    if recipe.teacher.model:
        return torch.ones(2 * recipe.run.batch_size // world, side * side, dtype=torch.bool)
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([recipe.run.seed, step, 1])))
    size = recipe.run.batch_size
    masks = block_masks(2 * size, (side, side), loss.mask_probability, loss.mask_ratio, rng)
    local = size // world
    mine = masks.reshape(2, size, -1)[:, rank * local : (rank + 1) * local]
    return torch.from_numpy(np.ascontiguousarray(mine.reshape(2 * local, -1)))


def _same(batch: Any) -> Any:
    """The dataset makes whole batches: there is nothing to collate."""
    return batch
