"""Labelled images as training takes them: pixels and a target by number, augmented or as in prediction.

Shape suffixes: N examples, H W pixels.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from unlabeled.dense.augment import DenseAugmentation, resize_pair
from unlabeled.dense.labelled import DenseData
from unlabeled.errors import UserError
from unlabeled.features.fitting import patch_grid
from unlabeled.features.preprocessing import Preprocessing
from unlabeled.images.bad_files import name_of
from unlabeled.images.decode import BadImage, decode
from unlabeled.images.order import ShuffledOrder
from unlabeled.images.sources import Source
from unlabeled.vit import VitConfig

GRID = 28  # patches along the short side that a map has at least, where nothing is said of its size
CROP_AREA = (0.35, 1.0)  # of the image, of a training crop of classification
CROP_RATIO = (3 / 4, 4 / 3)  # width over height of it


class Example(NamedTuple):
    """One labelled image, ready for a model."""

    key: str
    pixels: NDArray[np.uint8]  # (3, H, W)
    target: NDArray[Any]  # int64 () of classification; int64 (H, W) of segmentation; float32 (1, H, W) metres


class Examples(Protocol):
    """Labelled images by number."""

    def __len__(self) -> int:
        """How many."""

    def load(self, index: int, rng: np.random.Generator | None) -> Example:
        """Return one, augmented by the generator, or as in prediction without one.

        Raises:
            BadImage: it cannot be read or used; the message begins with its key.
        """

    def order(self, seed: int) -> ShuffledOrder:
        """Return an endless shuffled walk over them."""


class ClassExamples:
    """Some images of a source and their classes.

    indices: in the source, increasing. labels_N: of these, int64 from 0.
    """

    def __init__(
        self,
        source: Source,
        indices: NDArray[np.int64],
        labels_N: NDArray[np.int64],
        preprocessing: Preprocessing,
    ) -> None:
        self.source, self.indices, self.labels_N = source, indices, labels_N
        self.preprocessing = preprocessing

    def __len__(self) -> int:
        """How many."""
        return len(self.indices)

    def load(self, index: int, rng: np.random.Generator | None) -> Example:
        """Return one image and its class; augmented: a random part of random shape, mirrored half of the time."""
        place = int(self.indices[index])
        key = name_of(self.source, place)
        try:
            sample = self.source.read(place)
            key = sample.key
            if rng is None:
                pixels = self.preprocessing(decode(sample.data))
            else:
                pixels = random_crop(decode(sample.data), self.preprocessing.size, rng)
        except (BadImage, OSError, UserError) as error:
            raise BadImage(f"{key}\t{error}") from error
        return Example(key, pixels, np.array(self.labels_N[index], np.int64))

    def order(self, seed: int) -> ShuffledOrder:
        """Return a shuffled walk that reads shards and row groups in runs, as the source wants it."""
        starts = self.source.block_starts
        if starts is not None:
            starts = np.unique(np.searchsorted(self.indices, starts))
            starts = starts[starts < len(self.indices)]
        return ShuffledOrder(len(self), seed, block_starts=starts, window=self.source.window)


class DenseExamples:
    """Images with a class or a depth for every pixel.

    As in prediction: the whole image, its short side about `size` pixels, both sides whole patches. Augmented: a
    square of about `size` pixels of it; at a random scale too where pixels are classes.
    """

    def __init__(self, data: DenseData, size: int, patch_size: int) -> None:
        self.data, self.size, self.patch_size = data, size, patch_size
        side = max(1, size // patch_size) * patch_size
        scale = (0.5, 2.0) if data.target == "labels" else (1.0, 1.0)
        self.augmentation = DenseAugmentation((side, side), scale)

    def __len__(self) -> int:
        """How many."""
        return len(self.data)

    def load(self, index: int, rng: np.random.Generator | None) -> Example:
        """Return one image and what is known of its pixels."""
        key = self.data.pairs[index].key
        try:
            key, pixels, target = self.data.read(index)
            rows, columns = patch_grid(target.shape[0], target.shape[1], self.patch_size, self.size)
        except (BadImage, UserError) as error:
            raise BadImage(f"{key}\t{error}") from error
        pixels, target = resize_pair(pixels, target, (rows * self.patch_size, columns * self.patch_size))
        if rng is not None:
            pixels, target = self.augmentation(pixels, target, self.data.fill, rng)
        planar = np.ascontiguousarray(pixels.transpose(2, 0, 1))
        return Example(key, planar, target if self.data.target == "labels" else target[None])

    def order(self, seed: int) -> ShuffledOrder:
        """Return a shuffled walk over all."""
        return ShuffledOrder(len(self), seed)


def map_preprocessing(config: VitConfig, size: int = 0) -> Preprocessing:
    """Return how a model sees images whose pixels it maps: whole, the short side about `size` pixels.

    size: 0: what the model was trained at, and GRID patches at least.
    """
    return Preprocessing(size or max(config.image_size, GRID * config.patch_size), "keep", config.patch_size)


def random_crop(pixels_HW3: NDArray[np.uint8], side: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Return a random part of an image as uint8 (3, side, side), mirrored half of the time; bicubic, antialiased.

    Its area is uniform in CROP_AREA of the image, its shape log-uniform in CROP_RATIO, as far as the image has room.
    """
    height, width = pixels_HW3.shape[:2]
    area = height * width * rng.uniform(*CROP_AREA)
    ratio = float(np.exp(rng.uniform(*np.log(CROP_RATIO))))
    w, h = min(width, (area * ratio) ** 0.5), min(height, (area / ratio) ** 0.5)
    left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
    box = (left, top, left + w, top + h)
    image = Image.fromarray(pixels_HW3).resize((side, side), Image.Resampling.BICUBIC, box=box)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
