"""From DATA to the batches of a run: the same crops for a position whatever the ranks, workers or restarts."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from unlabeled.errors import UserError
from unlabeled.images.bad_files import BadFiles, name_of
from unlabeled.images.decode import BadImage, decode, quiet_native_libraries
from unlabeled.images.order import ShuffledOrder
from unlabeled.images.sources import Source
from unlabeled.pretrain.batch import Batch, Masks
from unlabeled.pretrain.crops import CropRecipe, Crops, draw_parameters, make_crops, smallest_side
from unlabeled.pretrain.device_crops import Uncropped
from unlabeled.pretrain.masks import block_masks
from unlabeled.pretrain.parallel import Parallel
from unlabeled.pretrain.recipe import Recipe

Pixels = NDArray[np.uint8]  # (H, W, 3)

MAX_REPLACEMENTS = 100  # unreadable images met in a row before a run gives up


class _NothingReadable(Exception):  # noqa: N818  (a fact about a source)
    """MAX_REPLACEMENTS images in a row could not be read."""


@dataclass(frozen=True)
class CropBatch:
    """What a worker hands over: a batch on the CPU, and the files it could not read; no batch if none could be."""

    batch: Batch | Uncropped | None
    bad: list[tuple[str, str]]

    def pin_memory(self) -> CropBatch:
        """The same in page-locked memory, for copies that overlap with compute."""
        return CropBatch(self.batch and self.batch.pin_memory(), self.bad)


class CropDataset(Dataset[CropBatch]):
    """Item p: the crops of position p of an endless shuffled walk over the source; a batch has its masks too.

    Everything random comes from (seed, position) or (seed, step). An unreadable image is replaced by another, drawn
    from the same generator, and named in the batch.
    """

    def __init__(
        self,
        source: Source,
        recipe: CropRecipe,
        order: ShuffledOrder,
        seed: int,
        masks: Callable[[int], Masks | None] | None = None,
        on_device: bool = False,
    ) -> None:
        """masks: of the batch whose first position is given. on_device: crops are only drawn here, and made there."""
        self.source, self.recipe, self.order, self.seed = source, recipe, order, seed
        self.masks, self.on_device = masks, on_device

    def __getitems__(self, positions: list[int]) -> CropBatch:
        """One batch."""
        masks = self.masks and self.masks(positions[0])
        indices = self.order.indices(np.asarray(positions))
        bad: list[tuple[str, str]] = []
        rngs = [
            np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, position])))
            for position in positions
        ]
        images = (self._image(int(index), rng, bad) for index, rng in zip(indices, rngs, strict=True))
        make = _drawn if self.on_device else _cropped
        try:
            return CropBatch(make(images, rngs, self.recipe, masks), bad)
        except _NothingReadable:  # the main process says so, when it has noted the files
            return CropBatch(None, bad)

    def _image(self, index: int, rng: np.random.Generator, bad: list[tuple[str, str]]) -> Pixels:
        for _ in range(MAX_REPLACEMENTS):
            try:
                sample = self.source.read(index)
            except OSError as error:
                bad.append((name_of(self.source, index), f"unreadable: {error}"))
            else:
                try:
                    return decode(sample.data, smallest_side(self.recipe))
                except BadImage as error:
                    bad.append((sample.key, str(error)))
            index = int(rng.integers(len(self.source)))
        raise _NothingReadable


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


def _cropped(
    images: Iterable[Pixels], rngs: list[np.random.Generator], recipe: CropRecipe, masks: Masks | None
) -> Batch:
    """The crops of some images, made here."""
    count, size, local = len(rngs), recipe.global_size, recipe.local_size
    globals_VB3HW = np.empty((recipe.num_globals, count, 3, size, size), np.uint8)
    locals_VB3HW = np.empty((recipe.num_locals, count, 3, local, local), np.uint8)
    for slot, (image, rng) in enumerate(zip(images, rngs, strict=True)):
        make_crops(image, recipe, rng, out=Crops(globals_VB3HW[:, slot], locals_VB3HW[:, slot]))
    return Batch(
        torch.from_numpy(globals_VB3HW.reshape(-1, 3, size, size)),
        torch.from_numpy(locals_VB3HW.reshape(-1, 3, local, local)),
        masks,
        count,
    )


def _drawn(
    images: Iterable[Pixels], rngs: list[np.random.Generator], recipe: CropRecipe, masks: Masks | None
) -> Uncropped:
    """What is needed to make the same crops elsewhere."""
    held = list(images)
    parameters = [
        draw_parameters(image.shape[0], image.shape[1], recipe, rng)
        for image, rng in zip(held, rngs, strict=True)
    ]
    sizes = (recipe.global_size, recipe.local_size)
    return Uncropped.of(held, parameters, sizes, recipe.num_globals, masks)


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
        UserError: the source is all but unreadable.
    """
    run = recipe.run
    order = ShuffledOrder(len(source), run.seed, block_starts=source.block_starts, window=source.window)
    workers = choose_workers(parallel) if run.workers < 0 else run.workers
    masks = partial(_masks_at, recipe, parallel.rank, parallel.world)
    loader = DataLoader(
        CropDataset(source, recipe.crops, order, run.seed, masks, run.crops_on == "device"),
        batch_sampler=_Positions(start, run.steps, run.batch_size, parallel.rank, parallel.world),
        num_workers=workers,
        collate_fn=_same,
        prefetch_factor=4 if workers else None,
        pin_memory=parallel.device.type == "cuda",
        worker_init_fn=start_worker,
    )
    for step, crops in enumerate(loader, start):
        for key, reason in crops.bad:
            report.add(key, reason)
        if crops.batch is None:
            key, reason = crops.bad[-1]
            raise UserError(
                f"{MAX_REPLACEMENTS} images of {source.name} in a row cannot be read (last: {key}: {reason}); "
                f"see {report.path}, and resume the run when they are back"
            )
        yield step, crops.batch.to(parallel.device)


def step_masks(recipe: Recipe, step: int, rank: int, world: int) -> Masks | None:
    """This rank's masks of a step, or None without iBOT; of a frozen teacher every patch is compared.

    They are drawn for the whole global batch, so that they do not depend on the number of ranks.
    """
    loss, side = recipe.loss, recipe.crops.global_size // recipe.model.patch_size
    if loss.ibot == 0:
        return None
    size = recipe.run.batch_size
    local = size // world
    if recipe.teacher.model:
        return Masks.of(torch.ones(2 * local, side * side, dtype=torch.bool))
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([recipe.run.seed, step, 1])))
    mine = np.arange(rank * local, (rank + 1) * local)
    masks = block_masks(
        2 * size,
        (side, side),
        loss.mask_probability,
        loss.mask_ratio,
        rng,
        np.concatenate((mine, size + mine)),
    )
    return Masks.of(torch.from_numpy(masks))


def _masks_at(recipe: Recipe, rank: int, world: int, position: int) -> Masks | None:
    return step_masks(recipe, position // recipe.run.batch_size, rank, world)


def _same(batch: Any) -> Any:
    """The dataset makes whole batches: there is nothing to collate."""
    return batch
