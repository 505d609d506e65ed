"""What a copy detector learns from: two views of each image, copied as strongly as people copy.

Shape suffixes: B images, V = 2 views, I = B slots of a batch, H W pixels. Views are view-major, as crops are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from unlabeled.curate.copies import TRANSFORMATIONS, collage, composed, draw_names
from unlabeled.curate.overlays import Pixels, resized
from unlabeled.images.order import ShuffledOrder
from unlabeled.images.sources import Source
from unlabeled.pretrain.crops import CropRecipe, apply_parameters, draw_parameters, smallest_side
from unlabeled.pretrain.data import CropDataset

# What the crops do not bring themselves (they crop, resize, flip, blur, change colours and make grey).
BESIDE_CROPS = ("jpeg", "rotation", "quarter_turn", "perspective", "noise", "text", "emoji", "screenshot")


@dataclass(frozen=True)
class ViewRecipe:
    """How views are made; each is a copy, of which a crop is taken."""

    size: int = 160  # pixels of a view
    scale: tuple[float, float] = (0.2, 1.0)  # share of the area that is kept
    transformed: tuple[float, float] = (0.3, 0.8)  # probability of one or two transformations, by view
    collage: float = 0.15  # probability that others of the batch are put beside the second view

    def crops(self) -> CropRecipe:
        """Both views as global crops of an image."""
        return CropRecipe(
            global_size=self.size, num_locals=0, global_scale=self.scale, ratio=(2 / 3, 3 / 2), brightness=0.5,
            contrast=0.5, saturation=0.6, hue=0.15, blur=(0.3, 0.5, 0.0), solarise=0.0,
        )  # fmt: skip


@dataclass(frozen=True)
class ViewBatch:
    """What a worker hands over."""

    views_VB3HW: Tensor  # uint8, (2B, 3, size, size)
    shows_VBI: Tensor  # bool (2B, I): the images that each view shows
    bad: list[tuple[str, str]]  # files that could not be read


class ViewDataset(CropDataset):
    """Item p: two views of the image at position p of an endless shuffled walk; see CropDataset.

    Everything random comes from (seed, positions of the batch).
    """

    def __init__(self, source: Source, views: ViewRecipe, order: ShuffledOrder, seed: int) -> None:
        super().__init__(source, views.crops(), order, seed)
        self.views = views

    def __getitems__(self, positions: list[int]) -> ViewBatch:  # type: ignore[override]
        """One batch."""
        indices = self.order.indices(np.asarray(positions))
        bad: list[tuple[str, str]] = []
        rngs = [
            np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, position])))
            for position in positions
        ]
        images = [self._shrunk(int(index), rng, bad) for index, rng in zip(indices, rngs, strict=True)]
        _, column = np.unique(indices, return_inverse=True)  # an image met twice in a batch has one column
        count, size = len(positions), self.views.size
        views = np.empty((2, count, 3, size, size), np.uint8)
        shows = np.zeros((2, count, count), bool)
        for slot, rng in enumerate(rngs):
            for view in range(2):
                pixels, shown = self._copy(images, slot, view, rng)
                height, width = pixels.shape[:2]
                parameters = draw_parameters(height, width, self.recipe, rng)[view : view + 1]
                apply_parameters(pixels, parameters, size, views[view, slot][None])
                shows[view, slot, column[shown]] = True
        return ViewBatch(
            torch.from_numpy(views.reshape(-1, 3, size, size)),
            torch.from_numpy(shows.reshape(-1, count)),
            bad,
        )

    def _shrunk(self, index: int, rng: np.random.Generator, bad: list[tuple[str, str]]) -> Pixels:
        """An image no larger than its crops need: what is drawn on it then costs less."""
        pixels = self._image(index, rng, bad)
        height, width = pixels.shape[:2]
        scale = smallest_side(self.recipe) / min(height, width)
        return resized(pixels, round(height * scale), round(width * scale)) if scale < 1 else pixels

    def _copy(
        self, images: Sequence[Pixels], slot: int, view: int, rng: np.random.Generator
    ) -> tuple[Pixels, list[int]]:
        """A copy of the image in a slot, and the slots of all that it shows."""
        pixels, shown = images[slot], [slot]
        if view and len(images) > 1 and rng.random() < self.views.collage:
            other = (slot + int(rng.integers(1, len(images)))) % len(images)
            pixels = collage(pixels, rng, [images[other]])
            shown.append(other)
        if rng.random() < self.views.transformed[view]:
            pixels = composed(draw_names(rng, int(rng.integers(1, 3)), BESIDE_CROPS), pixels, rng)
        return pixels, shown


assert set(BESIDE_CROPS) <= TRANSFORMATIONS.keys()
