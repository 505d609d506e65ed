"""Copy detection: a perceptual hash, features of a MODEL, and a copy detector trained on images of the same kind.

    python benchmarks/copies.py photos.tar CIFAR10-TEST.parquet --model MODEL [--steps 400] [--out TABLE.md]

Photographs are split: 200 to train on, 200 that nothing has seen. Of the latter, each by 17 kinds of copies (queries),
half have their original among the references; these are 100 originals, 100 training photographs and 2,000 images of
CIFAR-10. All pairs are pooled (DISC21). The detector is trained on the 200 photographs, their short side shrunk to 192
pixels, and 2,000 other images of CIFAR-10; whitening is fitted to these, and normalised scores have them as background,
but for the photographs among the references. Collages are filled with 100 of the training photographs. The MODEL has
been trained on whatever it has been trained on.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from machine import device_name
from unlabeled.curate.copies import TRANSFORMATIONS, collage, composition
from unlabeled.curate.copy_detector import DetectorRecipe, load_detector, train_copy_detector
from unlabeled.curate.copy_scores import CopyScores, background_normalised, copy_scores, wrong_pair_surprise
from unlabeled.curate.hashes import perceptual_hash
from unlabeled.curate.overlays import Pixels
from unlabeled.curate.views import ViewRecipe
from unlabeled.curate.whitening import fit_whitening
from unlabeled.features.extractor import Extractor, Kind
from unlabeled.images.decode import decode
from unlabeled.images.sources import Source, open_source

KINDS = (*TRANSFORMATIONS, "collage", "composition")
BATCH, DEPTH = 64, 4
SHORT_SIDE = 192  # pixels, of the photographs that are trained on
KINDS_OF_FEATURES: dict[Kind, str] = {"cls": "CLS", "cls+mean": "CLS and mean"}
HASH = "perceptual hash, 64 bits"
Images = NDArray[np.uint8]


def hash_signs(pixels_HW3: Pixels) -> NDArray[np.float32]:
    """The 64 bits of the perceptual hash as -1 and 1, 0 where an image has too little contrast for one."""
    found = perceptual_hash(cv2.cvtColor(pixels_HW3, cv2.COLOR_RGB2GRAY))
    if found is None:
        return np.zeros(64, np.float32)
    return np.array([1 if found >> bit & 1 else -1 for bit in range(64)], np.float32)


def copies_of(photos: list[Pixels], others: list[Pixels], seed: int) -> Iterator[tuple[int, int, Pixels]]:
    """(photograph, kind, pixels) of every copy."""
    for number, pixels in enumerate(photos):
        for kind, name in enumerate(KINDS):
            rng = np.random.default_rng([seed, number, kind])
            if name == "collage":
                yield number, kind, collage(pixels, rng, others)
            else:
                yield number, kind, (TRANSFORMATIONS | {"composition": composition})[name](pixels, rng)


def unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def vectors_of(extractor: Extractor, images: Images) -> NDArray[np.float32]:
    """Descriptors of prepared images (N, 3, size, size)."""
    result: list[NDArray[np.float32]] = [np.empty(0, np.float32)] * len(images)
    for places, rows in extractor.run(iter(enumerate(images))):
        for place, row in zip(places, rows, strict=True):
            result[place] = row
    return unit(np.stack(result))


def decoded(source: Source, indices: NDArray[np.int64] | range) -> list[Pixels]:
    return [decode(source.read(int(index)).data) for index in indices]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("photos")
    parser.add_argument("cifar")
    parser.add_argument("--steps", type=int, default=400, help="of the detector, 64 images each")
    parser.add_argument("--size", type=int, default=96, help="pixels")
    parser.add_argument("--patch-size", type=int, default=16, help="pixels")
    parser.add_argument("--temperature", type=float, default=DetectorRecipe.temperature)
    parser.add_argument("--entropy", type=float, default=DetectorRecipe.entropy)
    parser.add_argument("--lr", type=float, default=DetectorRecipe.lr)
    parser.add_argument("--kind", default=DetectorRecipe.kind)
    parser.add_argument(
        "--detector", type=Path, help="trained into this folder, or taken from it if it is there"
    )
    parser.add_argument("--model", help="MODEL, compared too")
    parser.add_argument("--distractors", type=int, default=2000, help="of CIFAR-10")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="also write the tables here")
    options = parser.parse_args()
    console = Console(stderr=True)
    source, cifar = open_source(options.photos), open_source(options.cifar)
    order = np.random.default_rng(options.seed).permutation(len(source))
    train, test = order[:200], order[200:400]
    recipe = DetectorRecipe(
        depth=DEPTH, patch_size=options.patch_size, views=ViewRecipe(size=options.size), steps=options.steps,
        batch_size=BATCH, temperature=options.temperature, entropy=options.entropy, lr=options.lr, seed=options.seed,
        kind=options.kind,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "train").mkdir()
        for index in train.tolist():
            write_small(root / "train" / f"{index:04}.jpg", decode(source.read(index).data))
        others = range(options.distractors, 2 * options.distractors)
        for index in others:
            (root / "train" / f"cifar_{index:05}.png").write_bytes(cifar.read(index).data)
        folders = {"detector after 1 step": root / "start", "detector": options.detector or root / "detector"}
        train_copy_detector(root / "train", root / "start", recipe=replace(recipe, steps=1), console=console)
        if folders["detector"].exists():
            note = "the detector one that was there"
        else:
            begun = time.perf_counter()
            train_copy_detector(root / "train", folders["detector"], recipe=recipe, console=console)
            note = (
                f"the detector {options.steps} steps of {BATCH} images in {time.perf_counter() - begun:.0f} s"
            )
        extractors = {
            (name, kind): Extractor(load_detector(path).model, kind, size=options.size, shape="stretch")
            for name, path in folders.items()
            for kind in KINDS_OF_FEATURES
        }
        if options.model:
            own = {
                ("MODEL", kind): Extractor(options.model, kind, size=options.size, shape="stretch")
                for kind in KINDS_OF_FEATURES
            }
            extractors = own | extractors
        scores, kinds = measure(
            extractors, decoded(source, train), decoded(source, test), decoded(cifar, range(options.distractors)),
            decoded(cifar, others), options.seed,
        )  # fmt: skip
    text = tables(scores, kinds, f"{device_name(torch.device('cpu'))}; {note}.")
    print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")


def write_small(path: Path, pixels: Pixels) -> None:
    scale = min(1, SHORT_SIDE / min(pixels.shape[:2]))
    small = cv2.resize(pixels, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    cv2.imwrite(str(path), small[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])


def measure(
    extractors: dict[tuple[str, Kind], Extractor], train: list[Pixels], test: list[Pixels], cifar: list[Pixels],
    others: list[Pixels], seed: int,
) -> tuple[dict[str, CopyScores], NDArray[np.int64]]:  # fmt: skip
    """Scores by way of comparing, and the kind of each query; others: images of CIFAR-10 that are no references."""
    prepare = next(iter(extractors.values())).prepare
    with_original, shown = len(test) // 2, 100
    references = [*test[:with_original], *train[:shown], *cifar]
    background = [*train, *others]
    queries, hashes, kinds, originals = [], [], [], []
    for number, kind, pixels in copies_of(test, train[shown:], seed):
        queries.append(prepare(pixels))
        hashes.append(hash_signs(pixels))
        kinds.append(kind)
        originals.append(number if number < with_original else -1)
    parts = {
        "references": np.stack([prepare(one) for one in references]),
        "queries": np.stack(queries),
        "background": np.stack([prepare(one) for one in background]),
    }
    signs = np.stack(hashes)
    hashed = signs @ np.stack([hash_signs(one) for one in references]).T
    hash_surprise = wrong_pair_surprise(
        hashed, signs @ np.stack([hash_signs(one) for one in background[shown:]]).T
    )
    scores = {HASH: copy_scores(hashed, originals)}
    for (model, features), extractor in extractors.items():
        name = f"{model}, {KINDS_OF_FEATURES[features]}"
        found = {part: vectors_of(extractor, images) for part, images in parts.items()}
        scores[name] = copy_scores(found["queries"] @ found["references"].T, originals)
        whiten = fit_whitening(found["background"])
        white = {part: whiten(vectors) for part, vectors in found.items()}
        cosines = white["queries"] @ white["references"].T
        beside = white["queries"] @ white["background"][shown:].T
        scores[f"{name}, whitened"] = copy_scores(cosines, originals)
        scores[f"{name}, whitened, normalised"] = copy_scores(
            background_normalised(cosines, beside), originals
        )
        both = hash_surprise + wrong_pair_surprise(cosines, beside)
        scores[f"hash and {name}, whitened"] = copy_scores(both, originals)
    return scores, np.where(np.asarray(originals) >= 0, kinds, -1)


def tables(scores: dict[str, CopyScores], kind_Q: NDArray[np.int64], heading: str) -> str:
    lines = [
        heading,
        "",
        "| | micro-AP | recall at 90% precision | recall@1 | threshold |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {one.micro_ap:.3f} | {one.recall:.3f} | {one.recall_at_1:.3f} | {one.threshold:.3g} |"
        for name, one in scores.items()
    ]
    shown = {
        name: one for name, one in scores.items() if name == HASH or ("mean" in name and "1 step" not in name)
    }
    for title, field in (("Recall at 90% precision", "found_Q"), ("Recall@1", "first_Q")):
        lines += ["", f"{title}, by transformation:", "", "| | " + " | ".join(shown) + " |"]
        lines.append("|---" * (len(shown) + 1) + "|")
        for kind, name in enumerate(KINDS):
            means = [f"{getattr(one, field)[kind_Q == kind].mean():.2f}" for one in shown.values()]
            lines.append(f"| {name} | " + " | ".join(means) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
