"""From examples to batches: the same images for a step, whatever came before it.

Shape suffixes: B images, N patches, D width, L layers read, H W pixels.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from unlabeled.ahead import ahead
from unlabeled.errors import UserError
from unlabeled.finetune.examples import Example, Examples
from unlabeled.images.bad_files import BadFiles
from unlabeled.images.decode import BadImage
from unlabeled.vit import Tokens

MAX_REPLACEMENTS = 100  # unreadable images met in a row before a training gives up

Report = Callable[[str, str], None]  # is told the key of a bad image, and the reason
Item = TypeVar("Item")


class Group(NamedTuple):
    """Examples of one shape."""

    inputs: Tensor | list[Tokens]  # uint8 (B, 3, H, W), or the tokens that a head reads
    targets: Tensor  # (B, ...)


def report_to(bad: BadFiles | None, named: list[tuple[str, str]] | None = None) -> Report:
    """Return what notes bad images in a file, where there is one, and in a list."""

    def note(key: str, reason: str) -> None:
        if bad is not None:
            bad.add(key, reason)
        if named is not None:
            named.append((key, reason))

    return note


def training_batches(
    examples: Examples, batch_size: int, steps: range, seed: int, augment: bool, report: Report
) -> Iterator[list[Group]]:
    """Give the batches of some steps.

    Example p of the walk, and everything random about it, depend on (seed, p) alone. A bad image is reported, and
    replaced by one that is drawn from its own generator.
    Raises UserError where all but everything is bad.
    """
    order = examples.order(seed)

    def load(position: int) -> tuple[Example, list[tuple[str, str]]]:
        rng = np.random.default_rng([seed, position])
        index, bad = int(order.indices(np.array([position]))[0]), list[tuple[str, str]]()
        while len(bad) < MAX_REPLACEMENTS:
            try:
                return examples.load(index, rng if augment else None), bad
            except BadImage as error:
                bad.append(split(error))
                index = int(rng.integers(len(examples)))
        key, reason = bad[-1]
        raise UserError(f"{len(bad)} images in a row cannot be used (last: {key}: {reason})")

    positions = range(steps.start * batch_size, steps.stop * batch_size)
    with ThreadPoolExecutor(num_threads()) as pool:
        waiting: list[Example] = []
        for example, bad in ahead(pool, load, positions):
            for key, reason in bad:
                report(key, reason)
            waiting.append(example)
            if len(waiting) == batch_size:
                yield grouped(waiting)
                waiting = []


def all_batches(
    examples: Examples, batch_size: int, report: Report, views: int = 1, seed: int = 0
) -> Iterator[Group]:
    """Give all examples in their order, neighbours of one shape together; bad ones are reported and left out.

    views: how often; the first time as in prediction, then augmented by generators of (seed, view, index).
    """

    def load(place: tuple[int, int]) -> Example | tuple[str, str]:
        view, index = place
        rng = np.random.default_rng([seed, view, index]) if view else None
        try:
            return examples.load(index, rng)
        except BadImage as error:
            return split(error)

    def good(pool: ThreadPoolExecutor) -> Iterator[Example]:
        places = ((view, index) for view in range(views) for index in range(len(examples)))
        for found in ahead(pool, load, places):
            if isinstance(found, Example):
                yield found
            else:
                report(*found)

    with ThreadPoolExecutor(num_threads()) as pool:
        yield from map(stacked, of_one_shape(good(pool), lambda one: one.pixels.shape, batch_size))


def of_one_shape(items: Iterable[Item], shape: Callable[[Item], object], most: int) -> Iterator[list[Item]]:
    """Give items in their order, neighbours of one shape together, at most so many."""
    waiting: list[Item] = []
    for one in items:
        if waiting and shape(one) != shape(waiting[0]):
            yield waiting
            waiting = []
        waiting.append(one)
        if len(waiting) == most:
            yield waiting
            waiting = []
    if waiting:
        yield waiting


def split(error: BadImage) -> tuple[str, str]:
    """Return the key and the reason of a bad example."""
    key, _, reason = str(error).partition("\t")
    return key, reason


def num_threads() -> int:
    """Return how many threads decode."""
    return min(16, (os.cpu_count() or 1) + 1)


def grouped(examples: Iterable[Example]) -> list[Group]:
    """Return a batch, examples of one shape together, in the order of their first."""
    groups: dict[tuple[int, ...], list[Example]] = {}
    for example in examples:
        groups.setdefault(example.pixels.shape, []).append(example)
    return [stacked(group) for group in groups.values()]


def stacked(examples: Sequence[Example]) -> Group:
    """Return examples of one shape side by side."""
    pixels = torch.from_numpy(np.stack([example.pixels for example in examples]))
    return Group(pixels, torch.from_numpy(np.stack([example.target for example in examples])))


def mixed_up(images_B3HW: Tensor, targets_B: Tensor, num_classes: int, alpha: float) -> tuple[Tensor, Tensor]:
    """Return lambda x + (1 - lambda) x' and targets likewise, lambda of Beta(alpha, alpha) (1710.09412, equation 1)."""
    share = float(torch.distributions.Beta(alpha, alpha).sample())
    other = torch.randperm(len(images_B3HW), device=images_B3HW.device)
    one_hot_BC = one_hot(targets_B, num_classes).float()
    images = images_B3HW.lerp(images_B3HW[other], 1 - share)
    return images, one_hot_BC.lerp(one_hot_BC[other], 1 - share)
