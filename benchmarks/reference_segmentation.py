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
from typing import NamedTuple

import cv2
import numpy as np
import skimage
import torch
from numpy.typing import NDArray

from machine import device_name
from unlabeled.dense.masks import IGNORE, Labels, patch_shares
from unlabeled.dense.metrics import confusion_matrix, segmentation_scores
from unlabeled.dense.propagate import TEMPERATURE, Directions, Labelled, Propagation, normalised
from unlabeled.dense.propagate_data import RADIUS
from unlabeled.dense.reference import Prototypes, decided, dense_extractor, largest, prototypes_of
from unlabeled.dense.regions import video_scores
from unlabeled.dense.upsample import upsampled
from unlabeled.features.extractor import Extractor
from unlabeled.features.fitting import unit_rows
from unlabeled.features.inputs import as_pixels

CLASSES = 11
VOID = 11
OBJECTS = (0, 1, 3, 5, 8)  # sky, building, road, tree, car: each against the rest
POWERS = (0, 0.25, 0.5, 1)  # of a class's share of the marked patches
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
    rarer = with_prior(whole, grids, labels, 0.5)
    yield "ours, rare classes less", lambda grid, pixels: decided(rarer.similarity(grid), pixels)[0]
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


def with_prior(whole: Prototypes, grids: list[Grid], labels: Labels, power: float) -> Prototypes:
    """Prototypes whose classes weigh as a power of their share of the marked patches."""
    marked = np.array(
        [
            sum(
                float(patch_shares(one == number, grid.shape[:2]).sum())
                for one, grid in zip(labels.maps, grids, strict=True)
            )
            for number in whole.classes
        ]
    )
    totals = np.bincount(whole.owners, whole.weights)
    factors = (marked / marked.max()) ** power / totals
    return replace(whole, weights=(whole.weights * factors[whole.owners]).astype(np.float32))


def priors(train: Set, val: Set, counts: list[int], draws: int) -> list[str]:
    """Of n whole images with all of their labels: one object against the rest, or all classes, by the prior's power."""
    found: dict[tuple[str, float], dict[int, list[float]]] = {}

    def measure(kind: str, count: int, chosen: list[str], number: int | None) -> None:
        def mapped(labels_HW: NDArray[np.uint8]) -> NDArray[np.uint8]:
            if number is None:
                return labels_HW
            return np.where(labels_HW == IGNORE, IGNORE, labels_HW == number).astype(np.uint8)

        maps = [mapped(train.labels[stem]) for stem in chosen]
        present = np.unique(np.concatenate([np.unique(one) for one in maps]))
        labels = Labels(maps, tuple(int(one) for one in present if one != IGNORE), number is not None)
        grids = [train.grid(stem) for stem in chosen]
        whole = prototypes_of(grids, labels, val.extractor)
        for power in POWERS:
            made = with_prior(whole, grids, labels, power)
            confusion = np.zeros((CLASSES, CLASSES), np.int64)
            for stem in val.paths:
                places = decided(made.similarity(val.grid(stem)), val.pixels(stem), made.radius)[0]
                predicted = np.array(made.classes)[places]
                confusion += confusion_matrix(predicted, mapped(val.labels[stem]), CLASSES, IGNORE)
            scores = segmentation_scores(confusion)
            value = float(scores.miou if number is None else scores.iou[1])
            found.setdefault((kind, power), {}).setdefault(count, []).append(100 * value)

    for seed in range(draws):
        rng = np.random.default_rng(seed)
        for count in counts:
            measure("all classes, mIoU", count, rng.choice(list(train.labels), count, False).tolist(), None)
            for number in OBJECTS:
                covers = {stem: (labels == number).mean() for stem, labels in train.labels.items()}
                holds = [stem for stem, share in covers.items() if share >= 0.02]
                chosen = rng.choice(holds, min(count, len(holds)), False).tolist()
                measure("one object, IoU", count, chosen, number)
    lines = ["| whole images | power | " + " | ".join(map(str, counts)) + " |"]
    lines.append("|" + "---|" * (2 + len(counts)))
    for (kind, power), by_count in found.items():
        cells = [f"{np.mean(by_count[count]):.1f}" for count in counts]
        lines.append(f"| {kind} | {power:g} | " + " | ".join(cells) + " |")
    return lines


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
    """J&F, J and F of the first mask kept, of propagation in several ways, and of the truth itself through the grid."""
    grids = [extractor(pixels) for pixels, _ in frames]
    given = [
        np.stack([patch_shares(truth == one, (grid.shape[0], grid.shape[1])) for one in classes])
        for (_, truth), grid in zip(frames, grids, strict=True)
    ]
    truths = [truth for _, truth in frames]
    found = {"first mask kept": [truths[0]] * len(frames)}
    for name, way in WAYS.items():
        directions = (
            Directions.of(grids[0]) if way.whitened else lambda grid: unit_rows(grid).reshape(grid.shape)
        )
        propagation = Propagation(neighbourhood=way.neighbourhood, temperature=way.temperature)
        propagation.begin(Labelled(directions(grids[0]), given[0]))
        labels = [given[0], *(propagation.next(directions(grid)).labels for grid in grids[1:])]
        found[name] = [
            decided_by(maps, pixels, way.radius, classes)
            for maps, (pixels, _) in zip(labels, frames, strict=True)
        ]
    found["truth, as patches' shares"] = [
        decided_by(maps, pixels, RADIUS, classes) for maps, (pixels, _) in zip(given, frames, strict=True)
    ]
    objects = [one for one in classes if one or len(classes) > 2]
    scored = {name: video_scores(masks, truths, objects) for name, masks in found.items()}
    return {name: (100 * one.jf, 100 * one.j, 100 * one.f) for name, one in scored.items()}


def decided_by(
    labels: Grid, pixels: NDArray[np.uint8], radius: float, classes: tuple[int, ...]
) -> NDArray[np.uint8]:
    maps = upsampled(labels, pixels, radius)
    return np.array(classes, np.uint8)[largest(normalised(one) for one in maps)[0]]


class Way(NamedTuple):
    """How a mask goes through a video; by default as `unlabeled segment` does it."""

    whitened: bool = True
    neighbourhood: int | None = None
    temperature: float = TEMPERATURE
    radius: float = RADIUS


WAYS = {
    "ours": Way(),
    "not whitened": Way(whitened=False),
    "temperature 0.1": Way(temperature=0.1),
    "12 rows and columns": Way(neighbourhood=12),
    "bilinear only": Way(radius=0),
    "DINO's protocol": Way(False, 12, 0.1, 0),
}
WINDOWS = (0, 40, 80)  # frames of the film that a mask is given for


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("camvid", type=Path)
    parser.add_argument("model")
    parser.add_argument("--size", type=int, default=240)
    parser.add_argument("--draws", type=int, default=3, help="of references; 0: videos alone")
    parser.add_argument("--every", type=int, default=8)
    parser.add_argument("--counts", type=int, nargs="*", default=[1, 5, 20])
    parser.add_argument(
        "--priors", type=int, nargs="*", default=[1, 5], help="whole images; none: not measured"
    )
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
    per_image = val.seconds / max(len(val.grids), 1)
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
    if options.priors and options.draws:
        lines += ["", *priors(train, val, options.priors, options.draws)]
    if options.frames:
        names = ["first mask kept", *WAYS, "truth, as patches' shares"]
        lines += ["", "| J&F (J, F) in % | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
        whole = Set(options.camvid / "val", extractor)
        stems = list(whole.paths)
        street = [(whole.pixels(stem), whole.labels[stem]) for stem in stems]
        cat = as_pixels(Path(skimage.__file__).parent / "data" / "chelsea.png")
        films = {"textured object": [moving_object(street[0][0], cat, options.frames)]}
        films[f"CamVid, {len(WINDOWS)} first masks"] = [
            street[first : first + options.frames] for first in WINDOWS
        ]
        for name, parts in films.items():
            rows = []
            for frames in parts:
                present = tuple(int(one) for one in np.unique(frames[0][1]) if one != IGNORE)
                rows.append(list(propagate(frames, extractor, present).values()))
            cells = [f"{jf:.1f} ({j:.1f}, {f:.1f})" for jf, j, f in np.mean(rows, axis=0)]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    text = "\n".join(lines) + "\n"
    print(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
