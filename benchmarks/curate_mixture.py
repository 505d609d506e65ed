"""Does curation help? Pretraining on a skewed pile, on a random part of it, and on what curation makes of it.

    python benchmarks/curate_mixture.py TRAIN.parquet TEST.parquet --work FOLDER [--seeds 3] [--out TABLE.md]

The pile of CIFAR-10 images: classes in a long-tailed ratio of 100:1, copies of some (the same bytes, compressed,
cropped, shifted), and noise (random pixels, flat colours, text). All backbones are trained for the same steps; the
features that curation works on are those of the backbone that was trained on the whole pile: no label is used.
k-NN (k = 20) searches 5,000 labelled images that are not in the pile, over the balanced test set. With another seed
everything is drawn anew: which classes are common, images, copies, the random part, the training. A stopped run goes
on in the same --work.

    all                  the pile
    random               as many images of it as curation is asked for, at random
    curated              unlabeled.curate with its default steps: quality, duplicates, cluster
    curated with seeds   the same with 10 images of each class, not in the pile, as seeds: retrieve, too
    balanced             as evenly from the classes as there are images, no copies, no noise: by the labels, as a bound
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from rich.console import Console

from cifar10 import EVALUATED, SIDE
from machine import device_name
from unlabeled.curate.output import image_suffix
from unlabeled.curate.pipeline import curate
from unlabeled.curate.sampling import share
from unlabeled.evaluate.knn import knn_accuracy
from unlabeled.features.extract import extract
from unlabeled.images.decode import decode
from unlabeled.images.sources import Source, open_source
from unlabeled.pretrain.auto import small_images
from unlabeled.pretrain.loop import pretrain
from unlabeled.pretrain.recipe import override
from unlabeled.vit import VisionTransformer

COMMONEST, RATIO, CLASSES = (
    2000,
    100,
    10,
)  # images of the commonest class, and how many of the rarest's that is
COPIES, NOISE = 6000, 3000
WANTED = 3000  # images of the random part, and of the curated one
SEED_IMAGES, BANK = 10, 500  # of each class
ARMS = ("all", "random", "curated", "curated with seeds", "balanced")
# A run takes some ten minutes of one core; local crops bring little to so short a run (results/cifar10.md).
SMALL = {
    "model.width": 96, "model.num_heads": 3, "crops.num_locals": 0, "run.eval_every": 10**9,
    "run.health_every": 10**9, "run.checkpoint_every": 200,
}  # fmt: skip
Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Pile:
    """The images in the order of their files, and what curation is not told of them.

    class_N: -1 for noise. original_N: the image that it is, or is a copy of; a number of its own for noise.
    """

    files: list[Path]
    class_N: NDArray[np.int64]
    original_N: NDArray[np.int64]

    def counted(self, chosen: NDArray[np.int64]) -> dict[str, Any]:
        """Different images by class, the commonest first; copies beside those; noise."""
        clean = chosen[self.class_N[chosen] >= 0]
        _, first = np.unique(self.original_N[clean], return_index=True)
        counts = np.bincount(self.class_N[clean[first]], minlength=CLASSES)
        return {
            "images": len(chosen), "classes": counts.tolist(), "copies": len(clean) - len(first),
            "noise": len(chosen) - len(clean),
        }  # fmt: skip


def png(pixels: Pixels) -> bytes:
    return cv2.imencode(".png", pixels[:, :, ::-1])[1].tobytes()


def jpeg(pixels: Pixels, rng: np.random.Generator) -> bytes:
    quality = int(rng.integers(30, 91))
    return cv2.imencode(".jpg", pixels[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()


def cropped(pixels: Pixels, rng: np.random.Generator) -> bytes:
    side = int(rng.integers(24, 31))
    top, left = rng.integers(0, SIDE - side + 1, 2)
    return png(cv2.resize(pixels[top : top + side, left : left + side], (SIDE, SIDE)))


def shifted(pixels: Pixels, rng: np.random.Generator) -> bytes:
    down, right = rng.integers(-4, 5, 2).tolist()
    matrix = np.array([[1, 0, right], [0, 1, down]], np.float32)
    return png(cv2.warpAffine(pixels, matrix, (SIDE, SIDE), borderMode=cv2.BORDER_REPLICATE))


def random_pixels(rng: np.random.Generator) -> Pixels:
    return rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)


def flat(rng: np.random.Generator) -> Pixels:
    return np.full((SIDE, SIDE, 3), rng.integers(0, 256, 3), np.uint8)


def written(rng: np.random.Generator) -> Pixels:
    canvas = np.full((SIDE, SIDE, 3), 255 if rng.random() < 0.5 else rng.integers(160, 256, 3), np.uint8)
    ink = rng.integers(0, 80, 3).tolist()
    for line in range(int(rng.integers(2, 5))):
        words = "".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz     "), 12))
        cv2.putText(
            canvas, words, (int(rng.integers(-4, 3)), 7 + 8 * line), cv2.FONT_HERSHEY_SIMPLEX, 0.25, ink, 1
        )
    return canvas


def make_pile(train: Source, folder: Path, seed: int) -> tuple[Pile, NDArray[np.int64], NDArray[np.int64]]:
    """The pile; the images of TRAIN that are seeds, and those that k-NN searches."""
    rng = np.random.default_rng([seed, 0])
    labels = train.labels()
    assert labels is not None
    of_class = [rng.permutation(np.flatnonzero(labels == one)) for one in rng.permutation(CLASSES)]
    sizes = [round(COMMONEST * RATIO ** (-rank / (CLASSES - 1))) for rank in range(CLASSES)]
    seeds = np.concatenate([own[-SEED_IMAGES:] for own in of_class])
    bank = np.concatenate([own[-SEED_IMAGES - BANK : -SEED_IMAGES] for own in of_class])
    rows = np.concatenate([own[:size] for own, size in zip(of_class, sizes, strict=True)])
    class_of = np.repeat(np.arange(CLASSES), sizes)
    data = [train.read(int(row)).data for row in rows]
    # Few images are copied often and most never, as on the web.
    popular = rng.pareto(1.2, len(rows))
    sources = rng.choice(len(rows), COPIES, p=popular / popular.sum())
    ways: tuple[Callable[[Pixels, np.random.Generator], bytes], ...] = (jpeg, cropped, shifted)
    for place in sources.tolist():
        way = int(rng.integers(len(ways) + 1))
        data.append(data[place] if way == len(ways) else ways[way](decode(data[place]).copy(), rng))
    kinds = (random_pixels, flat, written)
    data += [png(kinds[number % len(kinds)](rng)) for number in range(NOISE)]
    truth = np.concatenate((class_of, class_of[sources], np.full(NOISE, -1)))
    originals = np.concatenate((np.arange(len(rows)), sources, len(rows) + np.arange(NOISE)))
    order = rng.permutation(len(data))
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for number, place in enumerate(order.tolist()):
        files.append(folder / f"{number:05}{image_suffix(data[place])}")
        files[-1].write_bytes(data[place])
    return Pile(files, truth[order], originals[order]), seeds, bank


def write_list(path: Path, files: list[Path]) -> Path:
    path.write_text("\n".join(map(str, files)) + "\n")
    return path


def balanced(pile: Pile, rng: np.random.Generator) -> NDArray[np.int64]:
    """Images as evenly from the classes as there are different ones."""
    order = rng.permutation(len(pile.files))
    _, first = np.unique(pile.original_N[order], return_index=True)
    clean = order[first]
    clean = rng.permutation(clean[pile.class_N[clean] >= 0])
    sizes = np.bincount(pile.class_N[clean], minlength=CLASSES)
    taken = share(WANTED, sizes, rng)
    return np.sort(np.concatenate([clean[pile.class_N[clean] == one][:n] for one, n in enumerate(taken)]))


def evaluate(model: VisionTransformer, train: Source, bank: NDArray[np.int64], test: Source) -> list[float]:
    """k-NN accuracies, by the columns of cifar10.py."""
    size: dict[str, Any] = {"kind": "cls+mean", "resize": SIDE, "crop": SIDE, "batch_size": 500}
    known, asked = extract(model, train, indices=bank, **size), extract(model, test, **size)
    assert known.labels is not None and asked.labels is not None
    width = model.config.width
    parts = (slice(0, width), slice(width, None), slice(0, None))
    return [
        knn_accuracy(known.features[:, one], known.labels, asked.features[:, one], asked.labels)
        for one in parts
    ]


def lineage_steps(curated: Path, pile: Pile) -> dict[str, Any]:
    """What is left after each step of a curation."""
    table = pq.read_table(curated / "report" / "lineage.parquet")
    by = np.array([step or "" for step in table.column("step").to_pylist()])
    left = np.arange(len(by))
    found: dict[str, Any] = {"pile": pile.counted(left)}
    for step in json.loads((curated / "curation.json").read_text())["counts"]:
        left = left[by[left] != step]
        found[step] = pile.counted(left)
    return found


def one_seed(
    train: Source, test: Source, root: Path, seed: int, steps: int, arms: list[str]
) -> dict[str, Any]:
    """Figures of each arm; those that an earlier run left are not made again."""
    console = Console(stderr=True)
    pile, seeds, bank = make_pile(train, root / "pile", seed)
    rng = np.random.default_rng([seed, 1])
    chosen = {
        "all": np.arange(len(pile.files)),
        "random": np.sort(rng.choice(len(pile.files), WANTED, replace=False)),
        "balanced": balanced(pile, rng),
    }
    seed_folder = root / "seeds"
    seed_folder.mkdir(exist_ok=True)
    for row in seeds.tolist():
        (seed_folder / f"{row:05}.png").write_bytes(train.read(row).data)
    recipe = override(
        small_images(SIDE),
        SMALL | {"run.steps": steps, "run.seed": seed},
        "the benchmark",
    )
    result: dict[str, Any] = {}
    for arm in arms:
        name = arm.replace(" ", "_")
        figures = root / f"{name}.json"
        if not figures.is_file():
            if arm.startswith("curated"):
                out = root / name
                options = {"seeds": seed_folder} if arm.endswith("seeds") else {}
                curate(
                    root / "pile", out, model=root / "run_all", count=WANTED, console=console,
                    overrides={"run.seed": seed}, **options,
                )  # fmt: skip
                data, counts = out, lineage_steps(out, pile)
            else:
                data = write_list(root / f"{name}.txt", [pile.files[one] for one in chosen[arm]])
                counts = {"pile": pile.counted(chosen["all"]), arm: pile.counted(chosen[arm])}
            kept = root / f"run_{name}"
            resume = (
                {"resume": kept}
                if (kept / "checkpoints").is_dir()
                else {"data": data, "out": kept, "recipe": recipe}
            )
            run = pretrain(console=console, **resume)
            accuracies = evaluate(run.model(), train, bank, test)
            figures.write_text(json.dumps({"knn": accuracies, "counts": counts}))
            console.print(arm, [round(one, 4) for one in accuracies], list(counts.values())[-1])
        result[arm] = json.loads(figures.read_text())
    return result


def table(found: list[dict[str, Any]], steps: int) -> list[str]:
    arms = list(found[0])
    lines = [
        f"{steps} steps of 64 images each on {device_name(torch.device('cpu'))}; k-NN, in percent, "
        f"{len(found)} seeds (mean, standard deviation, each).",
        "",
        f"| | images | {EVALUATED[0]} | std | each | {EVALUATED[2]} | std | each |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arm in arms:
        cells = []
        for column in (0, 2):
            values = 100 * np.array([one[arm]["knn"][column] for one in found])
            spread = values.std(ddof=1) if len(values) > 1 else 0.0
            cells += [f"{values.mean():.1f}", f"{spread:.1f}", ", ".join(f"{value:.1f}" for value in values)]
        images = round(np.mean([list(one[arm]["counts"].values())[-1]["images"] for one in found]))
        lines.append(f"| {arm} | {images:,} | " + " | ".join(cells) + " |")
    lines += ["", "Points over `random`, of the same seed (k-NN, CLS; both):", ""]
    for arm in arms:
        if arm != "random" and "random" in arms:
            gains = [
                [100 * (one[arm]["knn"][column] - one["random"]["knn"][column]) for one in found]
                for column in (0, 2)
            ]
            lines.append(f"- {arm}: " + "; ".join(", ".join(f"{gain:+.1f}" for gain in own) for own in gains))
    lines += [
        "", "What is in them, and what each step left (seed 0): different images by class from the commonest to the "
        "rarest, copies beside them, noise:", "",
        "| | images | " + " | ".join(map(str, range(1, CLASSES + 1))) + " | copies | noise |",
        "|---|---|" + "---|" * (CLASSES + 2),
    ]  # fmt: skip
    for arm in arms:
        for step, one in list(found[0][arm]["counts"].items())[0 if arm == "all" else 1 :]:
            if arm == "all" and step == "pile":
                continue
            name = arm if step == arm else f"{arm}, after {step}"
            cells = [one["images"], *one["classes"], one["copies"], one["noise"]]
            lines.append(f"| {name} | " + " | ".join(f"{cell:,}" for cell in cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("train")
    parser.add_argument("test")
    parser.add_argument(
        "--work", type=Path, required=True, help="piles, runs and figures, and where to go on from"
    )
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=ARMS)
    parser.add_argument("--out", type=Path, help="also write the table here")
    options = parser.parse_args()
    train, test = open_source(options.train), open_source(options.test)
    found = [
        one_seed(train, test, options.work / f"seed_{seed}", seed, options.steps, options.arms)
        for seed in range(options.first_seed, options.first_seed + options.seeds)
    ]
    text = "\n".join(table(found, options.steps))
    print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
