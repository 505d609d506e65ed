"""Segmentation by reference on CamVid, beside the plain method; and a first mask through a video.

    python benchmarks/reference_segmentation.py camvid MODEL [--size 240] [--draws 3] [--every 8] [--out TABLE.md]

References: for each class, n training images are drawn at random among those in which it covers 0.2% of the pixels or
more (all of them, where there are fewer), and of each only that class's pixels are marked; nothing else is known. So a
class has exactly n references, and an image can be one of several classes. Targets: every eighth image of val, at full
size; class 11 (void) does not count. The plain method: one mean vector a class of the patches that are marked, each
weighed by the share that is; cosine; nearest-neighbour upsampling.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import skimage
import torch
from numpy.typing import NDArray

from machine import device_name
from unlabeled.dense.masks import IGNORE, Labels, patch_shares
from unlabeled.dense.metrics import confusion_matrix, segmentation_scores
from unlabeled.dense.propagate import Labelled, Propagation, normalised
from unlabeled.dense.reference import Prototypes, decided, dense_extractor, largest, prototypes_of
from unlabeled.dense.regions import video_scores
from unlabeled.dense.upsample import enlarged, upsampled
from unlabeled.features.extractor import Extractor
from unlabeled.features.fitting import unit_rows
from unlabeled.features.inputs import as_pixels

CLASSES = 11
VOID = 11
Grid = NDArray[np.float32]
Method = Callable[[list[Grid], list[NDArray[np.uint8]], Extractor], Callable[[str], NDArray[np.integer]]]


class Set:
    """Images of one half of CamVid, their labels, and features that are computed once."""

    def __init__(self, folder: Path, extractor: Extractor, every: int = 1) -> None:
        self.paths = {path.stem: path for path in sorted((folder / "images").iterdir())[::every]}
        self.labels = {stem: read_labels(folder / "labels" / f"{stem}.png") for stem in self.paths}
        self.extractor = extractor
        self.grids: dict[str, Grid] = {}
        self.seconds = 0.0

    def pixels(self, stem: str) -> NDArray[np.uint8]:
        return as_pixels(self.paths[stem])

    def grid(self, stem: str) -> Grid:
        if stem not in self.grids:
            begun = time.perf_counter()
            self.grids[stem] = self.extractor(self.pixels(stem))
            self.seconds += time.perf_counter() - begun
        return self.grids[stem]


def read_labels(path: Path) -> NDArray[np.uint8]:
    labels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    return np.where(labels == VOID, IGNORE, labels).astype(np.uint8)


def draw(train: Set, count: int, seed: int) -> list[tuple[str, int]]:
    """(image, class) of each reference."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(CLASSES):
        holds = [stem for stem, labels in train.labels.items() if (labels == number).mean() >= 0.002]
        chosen = rng.choice(holds, min(count, len(holds)), replace=False)
        found += [(str(stem), number) for stem in chosen]
    return found


def marked(train: Set, references: list[tuple[str, int]]) -> tuple[list[Grid], Labels]:
    maps = [
        np.where(train.labels[stem] == number, number, IGNORE).astype(np.uint8) for stem, number in references
    ]
    return [train.grid(stem) for stem, _ in references], Labels(maps, tuple(range(CLASSES)), False)


def plain_means(grids: list[Grid], labels: Labels) -> NDArray[np.float32]:
    sums = np.zeros((CLASSES, grids[0].shape[-1]))
    for grid, labels_HW in zip(grids, labels.maps, strict=True):
        number = int(labels_HW[labels_HW != IGNORE][0])
        shares = patch_shares(labels_HW == number, (grid.shape[0], grid.shape[1]))
        sums[number] += (grid * shares[..., None]).sum((0, 1))
    return unit_rows(sums.astype(np.float32))


def plain(means_CD: NDArray[np.float32], grid: Grid, pixels: NDArray[np.uint8]) -> NDArray[np.integer]:
    similar = (unit_rows(grid) @ means_CD.T).argmax(1).reshape(grid.shape[:2])
    return cv2.resize(similar.astype(np.uint8), pixels.shape[1::-1], interpolation=cv2.INTER_NEAREST)


def hard(prototypes: Prototypes, grid: Grid) -> Grid:
    """The largest cosine in place of the soft maximum."""
    white = ((grid - prototypes.mean) @ prototypes.whitening).astype(np.float32)
    cosines = unit_rows(white) @ prototypes.vectors.T
    return np.stack([cosines[:, prototypes.owners == c].max(1) for c in range(CLASSES)]).reshape(
        -1, *grid.shape[:2]
    )


def miou(val: Set, predict: Callable[[Grid, NDArray[np.uint8]], NDArray[np.integer]]) -> tuple[float, float]:
    """Mean IoU in %, and seconds an image without the features."""
    confusion, seconds = np.zeros((CLASSES, CLASSES), np.int64), 0.0
    for stem in val.paths:
        grid, pixels = val.grid(stem), val.pixels(stem)
        begun = time.perf_counter()
        predicted = predict(grid, pixels)
        seconds += time.perf_counter() - begun
        confusion += confusion_matrix(predicted, val.labels[stem], CLASSES, IGNORE)
    return 100 * float(segmentation_scores(confusion).miou), seconds / len(val.paths)


def ways(grids: list[Grid], labels: Labels, extractor: Extractor, all_of_them: bool) -> Iterator[tuple]:
    """(name, prediction), the plain method first and ours second, then ours without one part at a time."""
    means = plain_means(grids, labels)
    yield "plain: one mean, nearest", lambda grid, pixels: plain(means, grid, pixels)
    whole = prototypes_of(grids, labels, extractor)
    yield "ours", lambda grid, pixels: decided(whole.similarity(grid), pixels, whole.radius)[0]
    if not all_of_them:
        return
    yield (
        "ours, bilinear only",
        lambda grid, pixels: decided(whole.similarity(grid), pixels, 0)[0],
    )
    yield (
        "ours, nearest",
        lambda grid, pixels: cv2.resize(
            whole.similarity(grid).argmax(0).astype(np.uint8),
            pixels.shape[1::-1],
            interpolation=cv2.INTER_NEAREST,
        ),
    )
    yield "ours, largest cosine", lambda grid, pixels: decided(hard(whole, grid), pixels, whole.radius)[0]
    totals = np.bincount(whole.owners, whole.weights)
    even = replace(whole, weights=(whole.weights / totals[whole.owners]).astype(np.float32))
    yield "ours, all classes alike", lambda grid, pixels: decided(even.similarity(grid), pixels)[0]
    for count in (1, 8, 32):
        few = prototypes_of(grids, labels, extractor, num_prototypes=count)
        yield (
            f"ours, {count} a class",
            lambda grid, pixels, few=few: decided(few.similarity(grid), pixels)[0],
        )
    D = grids[0].shape[-1]
    shifted = [
        grid - np.mean([one.mean((0, 1)) for one in grids], 0) for grid in grids
    ]  # whitening that is none
    bare = prototypes_without_whitening(shifted, labels, extractor, D, grids)
    yield "ours, not whitened", lambda grid, pixels: decided(bare.similarity(grid), pixels)[0]


def prototypes_without_whitening(
    shifted: list[Grid], labels: Labels, extractor: Extractor, width: int, grids: list[Grid]
) -> Prototypes:
    from unittest import mock

    from unlabeled.dense import reference

    mean = np.mean([one.mean((0, 1)) for one in grids], 0).astype(np.float32)
    with mock.patch.object(reference, "whitened", lambda _: (mean, np.eye(width, dtype=np.float32))):
        return prototypes_of(grids, labels, extractor)


def moving_object(
    photograph: NDArray[np.uint8], texture: NDArray[np.uint8], count: int
) -> list[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
    """Frames (240, 320) of a textured ellipse that crosses a photograph, grows by half, and passes behind a post."""
    background = cv2.resize(photograph, (320, 240), interpolation=cv2.INTER_AREA)
    skin = cv2.resize(texture, (160, 160), interpolation=cv2.INTER_AREA)
    y, x = np.mgrid[:240, :320].astype(np.float32)
    frames = []
    for number in range(count):
        share = number / (count - 1)
        scale = 1 + 0.5 * share
        centre_x, centre_y = 70 + 180 * share, 130 - 30 * np.sin(3 * share)
        u, v = (x - centre_x) / scale + 80, (y - centre_y) / scale + 80
        skinned = cv2.remap(skin, u.astype(np.float32), v.astype(np.float32), cv2.INTER_LINEAR)
        mask = ((u - 80) / 42) ** 2 + ((v - 80) / 30) ** 2 <= 1
        mask &= ~((x > 165) & (x < 185))
        frames.append((np.where(mask[..., None], skinned, background), mask.astype(np.uint8)))
    return frames


def propagate(
    frames: list[tuple[NDArray[np.uint8], NDArray[np.uint8]]], extractor: Extractor, classes: tuple[int, ...]
) -> dict[str, tuple[float, float, float]]:
    """J&F, J and F of masks made from the same labels of patches in several ways, and of the first mask kept."""
    propagation = Propagation()
    found: dict[str, list[NDArray[np.uint8]]] = {name: [] for name in ("first mask kept", *WAYS)}
    for number, (pixels, truth) in enumerate(frames):
        grid = extractor(pixels)
        unit = unit_rows(grid).reshape(grid.shape)
        if number:
            labels = propagation.next(unit).labels
        else:
            labels = np.stack([patch_shares(truth == one, (grid.shape[0], grid.shape[1])) for one in classes])
            propagation.begin(Labelled(unit, labels))
        for name, way in WAYS.items():
            found[name].append(np.array(classes, np.uint8)[way(labels, pixels)])
        found["first mask kept"].append(frames[0][1])
    objects = [one for one in classes if one or len(classes) > 2]
    truths = [truth for _, truth in frames]
    scored = {name: video_scores(masks, truths, objects) for name, masks in found.items()}
    return {name: (100 * one.jf, 100 * one.j, 100 * one.f) for name, one in scored.items()}


def protocol(labels: Grid, pixels: NDArray[np.uint8]) -> NDArray[np.integer]:
    """DINO's: bilinear, each class from 0 to 1, the largest."""
    maps = (enlarged(one, (pixels.shape[0], pixels.shape[1])) for one in labels)
    return largest(normalised(one) for one in maps)[0]


def filtered(radius: float) -> Callable[[Grid, NDArray[np.uint8]], NDArray[np.integer]]:
    return lambda labels, pixels: largest(normalised(one) for one in upsampled(labels, pixels, radius))[0]


WAYS = {
    "protocol": protocol,
    "not normalised": lambda labels, pixels: decided(labels, pixels, 0)[0],
    "guided, half a patch": filtered(0.5),
    "guided, one patch": filtered(1.0),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("camvid", type=Path)
    parser.add_argument("model")
    parser.add_argument("--size", type=int, default=240)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--every", type=int, default=8)
    parser.add_argument("--counts", type=int, nargs="*", default=[1, 5, 20])
    parser.add_argument("--frames", type=int, default=20)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    extractor = dense_extractor(options.model, options.size, -1, "cpu")
    train = Set(options.camvid / "train", extractor)
    val = Set(options.camvid / "val", extractor, options.every)
    begun = time.perf_counter()
    scores: dict[tuple[int, str], list[float]] = {}
    times: dict[str, list[float]] = {}
    for seed in range(options.draws):
        for count in options.counts:
            grids, labels = marked(train, draw(train, count, seed))
            for name, predict in ways(grids, labels, extractor, all_of_them=count == options.counts[-2]):
                value, seconds = miou(val, predict)
                scores.setdefault((count, name), []).append(value)
                times.setdefault(name, []).append(seconds)
                print(f"{count:3} {name:28} {value:5.1f}  {time.perf_counter() - begun:.0f} s", flush=True)
    per_image = val.seconds / len(val.paths)
    names = list(dict.fromkeys(name for _, name in scores))
    lines = [
        f"{len(val.paths)} images of val, 480 x 360, {CLASSES} classes; {options.draws} draws of references, mean and "
        f"standard deviation of mIoU in %. Short side {extractor.preprocessing.size} pixels. Features take "
        f"{1000 * per_image:.0f} ms an image. {device_name(torch.device('cpu'))}.",
        "",
        "| references a class | " + " | ".join(map(str, options.counts)) + " | ms an image beside features |",
        "|---|" + "---|" * (len(options.counts) + 1),
    ]
    for name in names:
        cells = [scores.get((count, name)) for count in options.counts]
        shown = [f"{np.mean(cell):.1f} +- {np.std(cell):.1f}" if cell else "" for cell in cells]
        lines.append(f"| {name} | " + " | ".join(shown) + f" | {1000 * np.mean(times[name]):.0f} |")
    if options.frames:
        lines += ["", "| J&F (J, F) in % | " + " | ".join(["first mask kept", *WAYS]) + " |"]
        lines.append("|---|" + "---|" * (len(WAYS) + 1))
        whole = Set(options.camvid / "val", extractor)
        stems = list(whole.paths)
        cat = as_pixels(Path(skimage.__file__).parent / "data" / "chelsea.png")
        moving = moving_object(whole.pixels(stems[0]), cat, options.frames)
        street = [(whole.pixels(stem), whole.labels[stem]) for stem in stems[: options.frames]]
        present = tuple(int(one) for one in np.unique(street[0][1]) if one != IGNORE)
        for name, frames, classes in (
            ("textured object", moving, (0, 1)),
            ("CamVid, 0016E5", street, present),
        ):
            found = propagate(frames, extractor, classes)
            cells = [f"{jf:.1f} ({j:.1f}, {f:.1f})" for jf, j, f in found.values()]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    text = "\n".join(lines) + "\n"
    print(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
