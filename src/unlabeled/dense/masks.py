"""Masks as users have them, as class numbers; and how much of each patch is of each class.

Shape suffixes: H W pixels, h w patches, C classes.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from unlabeled.errors import UserError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

MaskLike: TypeAlias = "str | Path | bytes | Image.Image | NDArray[Any] | Tensor"
IGNORE = 255  # a pixel of which nothing is known
OBJECT = 255  # the object's pixels of a mask that has no other values than 0 and 255


class Labels(NamedTuple):
    """The classes of the pixels of some images."""

    maps: list[NDArray[np.uint8]]  # (H, W): class numbers, IGNORE where nothing is known
    classes: tuple[int, ...]  # those that occur, in ascending order
    is_binary: bool  # object 1 and background 0, given, and to be written, as 255 and 0


def read_mask(mask: MaskLike, name: str = "The mask") -> NDArray[np.uint8]:
    """Return a mask's values, (H, W): of a palette image the palette's numbers, of True 255.

    mask: a PNG or other lossless file, its bytes, a Pillow image, an array or a tensor (H, W); grey with equal
        channels is taken too.
    Raises UserError, naming the mask, for what cannot be read, is in colour, or has other values than 0 to 255.
    """
    from PIL import Image

    if isinstance(mask, str | Path):
        name = str(mask)
        try:
            mask = Path(mask).expanduser().read_bytes()
        except OSError as error:
            raise UserError(f"{name} cannot be read: {error.strerror or error}.") from error
    if isinstance(mask, bytes):
        try:
            mask = Image.open(io.BytesIO(mask))
            mask.load()
        # Pillow's plugins meet broken bytes with errors of every kind.
        except Exception as error:
            raise UserError(f"{name} cannot be read: {' '.join(str(error).split())}.") from error
    if isinstance(mask, Image.Image) and mask.format == "JPEG":
        raise UserError(f"{name} is a JPEG, which does not keep a mask's numbers; save it as PNG.")
    values: NDArray[Any] = mask.detach().cpu().numpy() if hasattr(mask, "detach") else np.asarray(mask)
    if values.ndim == 3:
        values = _one_channel(values, name)
    if values.ndim != 2 or not values.size:
        raise UserError(f"{name} has the shape {values.shape}; a mask is (H, W).")
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * np.uint8(OBJECT)
    low, high = values.min(), values.max()
    if not (values.dtype.kind in "ui" or (values.dtype.kind == "f" and (values == np.round(values)).all())):
        raise UserError(f"{name} has values that are no whole numbers; a mask has class numbers.")
    if low < 0 or high > 255:
        raise UserError(
            f"{name} has values from {low:g} to {high:g}; class numbers are 0 to 254, and 255 is unknown."
        )
    return values.astype(np.uint8)


def _one_channel(values: NDArray[Any], name: str) -> NDArray[Any]:
    """A grey image's values, alpha dropped."""
    colours = values[:, :, : {2: 1, 4: 3}.get(values.shape[2], values.shape[2])]
    if not (colours == colours[:, :, :1]).all():
        raise UserError(
            f"{name} is in colour; a mask has class numbers in one channel, or a palette (PNG of mode P)."
        )
    first: NDArray[Any] = colours[:, :, 0]
    return first


def labels_of(
    masks: Sequence[MaskLike | Sequence[MaskLike]],
    shapes: Sequence[tuple[int, int]],
    image_names: Sequence[str],
    class_names: Sequence[str] | None = None,
) -> Labels:
    """Return what masks say of the pixels of some images.

    masks: one an image, of class numbers (255 is unknown) or, if no mask has other values than 0 and 255, of one
        object; or for each image a list of masks of one object each: the first is class 1, the second class 2, the
        rest is class 0, and pixels of two objects are unknown.
    shapes: (height, width) of the images. image_names: for messages. class_names: where given, numbers beyond
        them are refused.

    Raises UserError for a mask of another size than its image, masks that leave an object or all else empty, and
    numbers outside of the classes.
    """
    if len(masks) != len(shapes):
        raise UserError(
            f"{len(shapes)} references have {len(masks)} masks; each needs its own, in the same order."
        )
    maps, names = [], []
    lists = [isinstance(mask, list | tuple) for mask in masks]
    for number, (mask, shape, image) in enumerate(zip(masks, shapes, image_names, strict=True)):
        name = _name(mask, f"mask {number + 1}")
        if isinstance(mask, list | tuple):
            parts = [
                _sized(part, _name(part, f"{name}, {i}"), shape, image) for i, part in enumerate(mask, 1)
            ]
            maps.append(_of_objects(parts))
        else:
            maps.append(_sized(cast("MaskLike", mask), name, shape, image))
        names.append(name)
    values = np.unique(np.concatenate([np.unique(labels) for labels in maps]))
    is_binary = not any(lists) and set(values.tolist()) <= {0, OBJECT}
    if is_binary:
        maps = [(labels == OBJECT).astype(np.uint8) for labels in maps]
    for labels, name in zip(maps, names, strict=True):
        _check(labels, name, is_binary, class_names)
    classes = tuple(int(value) for value in np.unique(np.concatenate([np.unique(one) for one in maps])))
    classes = tuple(value for value in classes if value != IGNORE)
    if len(classes) < 2:
        what = "the object" if is_binary else f"class {classes[0]}"
        raise UserError(
            f"{', '.join(names)}: all pixels are of {what}, and nothing is left to tell it from; mark less, or add a "
            "reference with something else."
        )
    return Labels(maps, classes, is_binary)


def _name(mask: Any, other: str) -> str:
    return str(mask) if isinstance(mask, str | Path) else other


def _sized(mask: MaskLike, name: str, shape: tuple[int, int], image: str) -> NDArray[np.uint8]:
    values = read_mask(mask, name)
    if values.shape != tuple(shape):
        raise UserError(
            f"{name} has {values.shape[1]} x {values.shape[0]} pixels and its reference {image} {shape[1]} x "
            f"{shape[0]}; they must be the same."
        )
    return values


def _of_objects(parts: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Masks of one object each as class numbers."""
    if not 0 < len(parts) < IGNORE:
        raise UserError(f"A reference has 1 to {IGNORE - 1} masks of one object each, not {len(parts)}.")
    labels = np.zeros(parts[0].shape, np.uint8)
    for number, part in enumerate(parts, 1):
        labels[part > 0] = number
    labels[sum((part > 0).astype(np.uint8) for part in parts) > 1] = IGNORE
    return labels


def _check(labels: NDArray[np.uint8], name: str, is_binary: bool, class_names: Sequence[str] | None) -> None:
    found = np.unique(labels)
    known = found[found != IGNORE]
    if is_binary and 1 not in found:
        raise UserError(f"{name} is empty: no pixel is of the object; mark it with 255.")
    if not len(known):
        raise UserError(f"{name} is empty: all pixels are {IGNORE}, unknown.")
    if class_names is not None and not is_binary and known[-1] >= len(class_names):
        raise UserError(
            f"{name} has the number {known[-1]}, outside of the {len(class_names)} classes (0 to "
            f"{len(class_names) - 1}); {IGNORE} is for pixels that are not known."
        )


def patch_shares(inside_HW: NDArray[np.bool_], grid: tuple[int, int]) -> NDArray[np.float32]:
    """Return how much of each patch's area is inside, (h, w) in [0, 1].

    Patch (row, column) is the rectangle from (column W / w, row H / h) to ((column + 1) W / w, (row + 1) H / h), cut
    pixels counted by their part.
    """
    rows = _means(inside_HW.astype(np.float64), grid[0])
    return np.ascontiguousarray(_means(np.ascontiguousarray(rows.T), grid[1]).T, dtype=np.float32)


def _means(values: NDArray[np.float64], parts: int) -> NDArray[np.float64]:
    """Means along the first axis over equal parts of it."""
    side = len(values)
    sums = np.concatenate((np.zeros((1, values.shape[1])), np.cumsum(values, 0)))
    edges = np.arange(parts + 1) * side / parts
    whole = np.minimum(edges.astype(int), side - 1)
    below = sums[whole] + (edges - whole)[:, None] * values[whole]
    means: NDArray[np.float64] = np.diff(below, axis=0) * parts / side
    return means
