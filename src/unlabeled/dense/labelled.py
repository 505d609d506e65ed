"""Images with a class or a depth for every pixel: a folder of images/ beside labels/ or depth/.

Shape suffixes: H W pixels, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from unlabeled.errors import UserError
from unlabeled.images.bad_files import BadFiles
from unlabeled.images.decode import BadImage, decode
from unlabeled.images.sources import IMAGE_SUFFIXES

Target = Literal["labels", "depth"]
TARGET_SUFFIXES = {"labels": (".png", ".bmp", ".tif", ".tiff"), "depth": (".png", ".npy", ".tif", ".tiff")}
THREADS = 8
NAMED = 3  # files that a line names before it counts the rest


class Pair(NamedTuple):
    """An image, what is known of its pixels, and the name they share."""

    key: str
    image: Path
    target: Path


class Example(NamedTuple):
    """A pair as it is read."""

    key: str
    pixels: NDArray[np.uint8]  # (H, W, 3) RGB
    target: NDArray[Any]  # (H, W): int64 classes, or float32 metres, 0 where it is not known


@dataclass(frozen=True)
class DenseData:
    """Pairs that can be read by number, all of whose targets have been looked at.

    Attributes:
        name: what the user called it.
        target: labels or depth.
        pairs: the good ones, in the order of their names.
        bad: (key, reason) of those that are left out.
        notes: one line for each thing a user should know, of bad pairs too.
        class_names: of labels; their numbers as text where there is no classes.txt.
        class_pixels: (C,) of labels, over all good pairs.
        ignore: the label that does not count.
        depth_scale: what one metre is in an integer depth file.
        depth_range: least and largest valid depth in metres.
    """

    name: str
    target: Target
    pairs: tuple[Pair, ...]
    bad: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()
    class_pixels: tuple[int, ...] = ()
    ignore: int = 255
    depth_scale: float = 1000.0
    depth_range: tuple[float, float] = (0.0, 0.0)

    def __len__(self) -> int:
        """Number of good pairs."""
        return len(self.pairs)

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 of depth."""
        return len(self.class_names)

    @property
    def fill(self) -> int:
        """The target's value where nothing is known."""
        return self.ignore if self.target == "labels" else 0

    def read(self, index: int) -> Example:
        """Return one pair.

        Raises:
            BadImage: the image cannot be decoded (targets have been read before), or a file is gone.
        """
        pair = self.pairs[index]
        try:
            pixels = decode(pair.image.read_bytes())
        except OSError as error:
            raise BadImage(f"{pair.image} cannot be read: {error.strerror or error}") from error
        if self.target == "labels":
            return Example(pair.key, pixels, read_labels(pair.target).astype(np.int64))
        return Example(pair.key, pixels, read_depth(pair.target, self.depth_scale))

    def subset(self, indices: Sequence[int] | NDArray[np.integer]) -> DenseData:
        """Return some of the pairs, with the classes of all."""
        return replace(self, pairs=tuple(self.pairs[index] for index in indices))

    def report(self, path: Path) -> None:
        """Add the bad pairs to a bad_files.jsonl."""
        bad_files = BadFiles(path)
        for key, reason in self.bad:
            bad_files.add(key, reason)


def labelled_images(
    folder: str | Path, *, num_classes: int | None = None, ignore: int = 255, class_names: Sequence[str] = ()
) -> DenseData:
    """Open images/ and labels/ (PNG of class numbers in one channel, or a palette's), matched by name without ending.

    num_classes: labels from 0; by default as many as classes.txt has lines (one name a line), or else up to the
        largest label. class_names: take the place of classes.txt, so that a test set has those of its training set.
    ignore: label of pixels that do not count.

    A pair is left out, and named in `bad`, where its labels have another size than its image, are outside of the
    classes, have several channels, or are all `ignore`; so is a file without its partner.

    Raises:
        UserError: a folder is missing, or no pair is good.
    """
    folder = Path(folder)
    names = list(class_names) or _class_names(folder)
    if names and num_classes is not None and num_classes != len(names):
        raise UserError(f"{folder} has {len(names)} class names, not {num_classes}.")
    known = len(names) or num_classes
    pairs, bad = matched(folder, "labels")

    def look(pair: Pair) -> NDArray[np.int64]:
        labels_HW = read_labels(pair.target)
        _check_size(pair, labels_HW.shape)
        counts = np.bincount(labels_HW.reshape(-1))
        if len(counts) > ignore:
            counts[ignore] = 0
        if not counts.any():
            raise BadImage(f"all of its pixels have the label to ignore, {ignore}")
        largest = int(np.flatnonzero(counts)[-1])
        if known is not None and largest >= known:
            raise BadImage(f"label {largest} is outside of the {known} classes (0 to {known - 1})")
        return counts[: largest + 1]

    good, looks, bad = _looked_at(pairs, bad, look, folder)
    num = known or max(len(counts) for counts in looks)
    class_pixels = np.zeros(num, np.int64)
    for counts in looks:
        class_pixels[: len(counts)] += counts
    names = names or [str(number) for number in range(num)]
    notes = _bad_notes(folder, bad, len(good))
    empty = [names[number] for number in np.flatnonzero(class_pixels == 0) if number != ignore]
    if empty:
        verb = "class has" if len(empty) == 1 else "classes have"
        said = f"{folder}: {len(empty)} {verb} no pixel: {_listed(empty)}."
        if not known:  # a stray label makes classes of all numbers below it
            key = next(pair.key for pair, counts in zip(good, looks, strict=True) if len(counts) == num)
            said += f" There is no classes.txt, and label {num - 1} is the largest, in {key}; --ignore leaves one out."
        notes.append(said)
    return DenseData(
        str(folder), "labels", tuple(good), tuple(bad), tuple(notes), tuple(names),
        tuple(class_pixels.tolist()), ignore,
    )  # fmt: skip


def depth_images(folder: str | Path, *, depth_scale: float = 1000.0) -> DenseData:
    """Open images/ and depth/ (16-bit PNG, or .npy of metres), matched by name without ending.

    depth_scale: integers of one metre; 1000 of NYU Depth and of our scenes, 256 of KITTI. 0, negative values, NaN and
        infinity are depths that are not known.

    A pair is left out, and named in `bad`, where its depth has another size than its image or is known nowhere; so is
    a file without its partner.

    Raises:
        UserError: a folder is missing, or no pair is good.
    """
    folder = Path(folder)
    pairs, bad = matched(folder, "depth")

    def look(pair: Pair) -> tuple[float, float, int]:
        raw = _raw_depth(pair.target)
        _check_size(pair, raw.shape)
        depth_HW = to_metres(raw, depth_scale)
        valid = depth_HW[depth_HW > 0]
        if not valid.size:
            raise BadImage("no pixel has a valid depth")
        not_finite = 0 if raw.dtype.kind in "ui" else int((~np.isfinite(raw)).sum())
        return float(valid.min()), float(valid.max()), not_finite

    good, looks, bad = _looked_at(pairs, bad, look, folder)
    notes = _bad_notes(folder, bad, len(good))
    odd = [(pair.key, count) for pair, (_, _, count) in zip(good, looks, strict=True) if count]
    if odd:
        pixels = sum(count for _, count in odd)
        notes.append(
            f"{folder}: {pixels} depths that are NaN or infinite do not count, in {_listed([key for key, _ in odd])}."
        )
    depth_range = (min(low for low, _, _ in looks), max(high for _, high, _ in looks))
    return DenseData(
        str(folder), "depth", tuple(good), tuple(bad), tuple(notes), depth_scale=depth_scale,
        depth_range=depth_range,
    )  # fmt: skip


def matched(folder: str | Path, target: Target) -> tuple[list[Pair], list[tuple[str, str]]]:
    """Return the pairs of a folder in the order of their names, and (key, reason) of files without a partner.

    Raises:
        UserError: images/ or the target's folder is missing, or no two names match.
    """
    folder = Path(folder)
    found = []
    for part, suffixes in (("images", tuple(IMAGE_SUFFIXES)), (target, TARGET_SUFFIXES[target])):
        if not (folder / part).is_dir():
            raise UserError(
                f"{folder} has no {part}/: images/ and {target}/ with files of the same names are needed."
            )
        found.append(dict(_files(folder / part, suffixes)))
    images, targets = found
    pairs = [Pair(key, path, targets[key]) for key, path in images.items() if key in targets]
    if not pairs:
        raise UserError(
            f"{folder}: none of {len(images)} images has a file of the same name in {target}/ ({len(targets)} files)."
        )
    alone = [(f"images/{key}", f"no file of that name in {target}/") for key in images if key not in targets]
    alone += [(f"{target}/{key}", "no image of that name") for key in targets if key not in images]
    return pairs, alone


def _files(root: Path, suffixes: tuple[str, ...]) -> Iterator[tuple[str, Path]]:
    """(path below the folder without its ending, path) in the order of the paths."""
    for path in sorted(root.rglob("*")):
        if path.suffix.lower() in suffixes and not path.name.startswith(".") and path.is_file():
            yield path.relative_to(root).with_suffix("").as_posix(), path


def _class_names(folder: Path) -> list[str]:
    """Of classes.txt in the folder or above it, one a line; [] without one."""
    for place in (folder / "classes.txt", folder.parent / "classes.txt"):
        if place.is_file():
            return [line.strip() for line in place.read_text(encoding="utf-8").splitlines() if line.strip()]
    return []


def read_labels(path: Path) -> NDArray[np.integer]:
    """Return the class numbers (H, W) of an image file of one channel; of a palette image, the palette's indices.

    Raises:
        BadImage: it cannot be read, or has several channels.
    """
    array = _read_image(path)
    if array.dtype == np.bool_:
        return array.astype(np.uint8)
    if array.dtype.kind not in "ui":
        raise BadImage(f"labels are whole numbers, not {array.dtype}")
    return array


def read_depth(path: Path, depth_scale: float = 1000.0) -> NDArray[np.float32]:
    """Return depth (H, W) in metres, 0 where it is not known.

    Raises:
        BadImage: it cannot be read, or holds no depth.
    """
    return to_metres(_raw_depth(path), depth_scale)


def to_metres(raw_HW: NDArray[Any], depth_scale: float) -> NDArray[np.float32]:
    """Return depth as stored (integers of 1 / depth_scale metres, or floats in metres) in metres, 0 for invalid."""
    metres = raw_HW.astype(np.float32)
    if raw_HW.dtype.kind in "ui":
        return metres / np.float32(depth_scale)
    metres[~(np.isfinite(metres) & (metres > 0))] = 0
    return metres


def _raw_depth(path: Path) -> NDArray[Any]:
    if path.suffix.lower() != ".npy":
        image = _read_image(path)
        if image.dtype in (np.uint8, np.bool_):
            raise BadImage("depth of 8 bits; 16-bit PNG or .npy of metres is needed")
        return image
    try:
        array: NDArray[Any] = np.load(path, allow_pickle=False)
    # A damaged header raises errors of every kind; numpy's own words advise unsafe loading.
    except Exception as error:
        raise BadImage(f"{path.name} is no array of numbers, or damaged") from error
    array = array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array
    if array.ndim != 2 or array.dtype.kind not in "uif" or not array.size:
        raise BadImage(f"{array.dtype} of shape {array.shape}; depth is an array (H, W) of numbers")
    return array


def _read_image(path: Path) -> NDArray[Any]:
    try:
        with Image.open(path) as opened:
            array: NDArray[Any] = np.asarray(opened)
    # Pillow's plugins meet broken bytes with errors of every kind.
    except Exception as error:
        raise BadImage(f"{path.name} cannot be read: {' '.join(str(error).split())}") from error
    if array.ndim != 2:
        raise BadImage(f"{path.name} has {array.shape[-1]} channels; one is needed")
    return array


def _check_size(pair: Pair, shape: tuple[int, ...]) -> None:
    """Raise BadImage unless an image, turned upright, has this shape; only its header is read."""
    try:
        with Image.open(pair.image) as opened:
            width, height = opened.size
            if opened.getexif().get(0x0112, 1) in (5, 6, 7, 8):
                width, height = height, width
    # Pillow's plugins meet broken bytes with errors of every kind.
    except Exception as error:
        raise BadImage(f"{pair.image.name} cannot be read: {' '.join(str(error).split())}") from error
    if (height, width) != tuple(shape):
        raise BadImage(f"{pair.target.name} has {shape[1]} x {shape[0]} pixels, its image {width} x {height}")


def _looked_at(
    pairs: list[Pair], bad: list[tuple[str, str]], look: Any, folder: Path
) -> tuple[list[Pair], list[Any], list[tuple[str, str]]]:
    """Return the good pairs, what was seen of each, and all bad ones; in the order of the pairs."""

    def attempt(pair: Pair) -> tuple[Any, str]:
        try:
            return look(pair), ""
        except (BadImage, OSError) as error:
            return None, str(error)

    with ThreadPoolExecutor(THREADS) as pool:
        results = list(pool.map(attempt, pairs))
    good = [(pair, seen) for pair, (seen, reason) in zip(pairs, results, strict=True) if not reason]
    bad = bad + [(pair.key, reason) for pair, (_, reason) in zip(pairs, results, strict=True) if reason]
    if not good:
        key, reason = bad[-1]
        raise UserError(f"{folder} has no good pair of {len(pairs)}; {key}: {reason}.")
    return [pair for pair, _ in good], [seen for _, seen in good], bad


def _bad_notes(folder: Path, bad: list[tuple[str, str]], num_good: int) -> list[str]:
    if not bad:
        return []
    named = "; ".join(f"{key}: {reason}" for key, reason in bad[:NAMED])
    more = f"; and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
    return [f"{folder}: {len(bad)} left out, {num_good} pairs are good ({named}{more})."]


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
