"""Features of the images of a source, in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unlabeled.errors import UserError
from unlabeled.images.bad_files import name_of
from unlabeled.images.decode import BadImage, decode
from unlabeled.images.transform import evaluation_transform, normalize

if TYPE_CHECKING:
    from unlabeled.images.sources import Source
    from unlabeled.vit import Tokens, VisionTransformer

Pooled = Literal["cls", "mean", "cls+mean"]


@dataclass(frozen=True)
class Extracted:
    """Features of the images that could be read.

    Attributes:
        features: float32 (N, D).
        labels: int64 (N,), or None where the source has none.
        keys: names of the N images.
        bad: (key, reason) of the images left out.
    """

    features: NDArray[np.float32]
    labels: NDArray[np.int64] | None
    keys: list[str]
    bad: list[tuple[str, str]]


@torch.no_grad()
def extract(
    model: VisionTransformer,
    source: Source,
    *,
    kind: Pooled = "cls",
    indices: Sequence[int] | NDArray[np.int64] | None = None,
    resize: int = 256,
    crop: int = 224,
    batch_size: int = 128,
    device: str | torch.device = "cpu",
) -> Extracted:
    """Run a model over a source.

    Args:
        model: a backbone; it is left in the mode it was in.
        source: images.
        kind: the CLS token, the mean patch token, or both side by side (D doubles); after the last norm.
        indices: which images, all by default.
        resize: short side in pixels before the crop.
        crop: side in pixels of the centre crop.
        batch_size: images at once.
        device: where the model is.

    Raises:
        UserError: no image could be read.
    """
    was_training = model.training
    model.eval()
    features, labels, keys = [], [], []
    bad: list[tuple[str, str]] = []
    wanted = range(len(source)) if indices is None else indices
    for tokens, part_labels, part_keys in token_batches(
        model, source, wanted, resize=resize, crop=crop, batch_size=batch_size, device=device, bad=bad
    ):
        features.append(features_of(tokens, kind).float().cpu().numpy())
        labels += part_labels
        keys += part_keys
    model.train(was_training)
    if not features:
        raise UserError(f"{source.name} holds no image that can be read ({len(bad)} tried; first {bad[:1]})")
    known = None if any(label is None for label in labels) else np.array(labels, np.int64)
    return Extracted(np.concatenate(features), known, keys, bad)


@torch.no_grad()
def token_batches(
    model: VisionTransformer,
    source: Source,
    indices: Sequence[int] | NDArray[np.int64] | range,
    *,
    resize: int,
    crop: int,
    device: str | torch.device,
    bad: list[tuple[str, str]],
    batch_size: int = 128,
) -> Iterator[tuple[Tokens, list[int | None], list[str]]]:
    """Tokens, labels and keys of the images at some indices, a batch at a time; arguments as `extract`'s.

    What cannot be read is added to `bad`, as (key, reason).
    """
    for images, labels, keys in _batches(source, indices, resize, crop, batch_size, bad):
        yield model(normalize(images.to(device))), labels, keys


def features_of(tokens: Tokens, kind: Pooled) -> Tensor:
    """(B, D) of one kind, from a model's tokens; (B, 2D) for "cls+mean"."""
    if kind == "cls":
        return tokens.cls
    mean = tokens.patches.mean(1)
    return mean if kind == "mean" else torch.cat((tokens.cls, mean), 1)


def pixels_of(
    source: Source, side: int, indices: Sequence[int] | NDArray[np.int64] | None = None
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Raw pixels as features, the baseline that a model has to beat: (N, 3 * side * side) float32 in [0, 1], labels."""
    wanted = range(len(source)) if indices is None else indices
    bad: list[tuple[str, str]] = []
    rows, labels = [], []
    for images, part_labels, _ in _batches(source, wanted, side, side, 512, bad):
        rows.append(images.flatten(1).numpy().astype(np.float32) / 255)
        labels += part_labels
    return np.concatenate(rows), np.array(labels, np.int64)


def _batches(
    source: Source,
    indices: Sequence[int] | NDArray[np.int64],
    resize: int,
    crop: int,
    batch_size: int,
    bad: list[tuple[str, str]],
) -> Iterator[tuple[Tensor, list[int | None], list[str]]]:
    """uint8 (B, 3, crop, crop), labels and keys; what cannot be read goes to `bad`."""
    images: list[NDArray[np.uint8]] = []
    labels: list[int | None] = []
    keys: list[str] = []
    for index in indices:
        try:
            sample = source.read(int(index))
        except OSError as error:
            bad.append((name_of(source, int(index)), f"unreadable: {error}"))
            continue
        try:
            pixels = decode(sample.data)
        except BadImage as error:
            bad.append((sample.key, str(error)))
            continue
        images.append(evaluation_transform(pixels, resize, crop))
        labels.append(sample.label)
        keys.append(sample.key)
        if len(images) == batch_size:
            yield torch.from_numpy(np.stack(images)), labels, keys
            images, labels, keys = [], [], []
    if images:
        yield torch.from_numpy(np.stack(images)), labels, keys
