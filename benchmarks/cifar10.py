"""CIFAR-10 without labels: k-NN (k = 20) of a backbone pretrained for a given time, and what each part brings.

    python benchmarks/cifar10.py TRAIN.parquet TEST.parquet [--minutes 20] [--parts 4] [--run RUN] [--out TABLE.md]

The number of steps is chosen from the rate of a short run, so that training takes the minutes asked for; evaluations
are not counted. Rows: raw pixels (mean removed, cosine), the untrained backbone, the trained one at intervals.
--parts N trains the whole for N minutes, and as many steps with one part left out or added at a time.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from machine import device_name
from unlabeled.evaluate.knn import knn_accuracy
from unlabeled.features.extract import extract, pixels_of
from unlabeled.images.sources import Source, open_source
from unlabeled.pretrain.auto import small_images
from unlabeled.pretrain.loop import pretrain
from unlabeled.pretrain.method import Network
from unlabeled.pretrain.parallel import Parallel
from unlabeled.pretrain.recipe import Recipe, override
from unlabeled.vit import VisionTransformer

SIDE = 32
PARTS: dict[str, dict[str, Any]] = {
    "all": {},
    "without iBOT": {"loss.ibot": 0.0},
    "without KoLeo": {"loss.koleo": 0.0},
    "centering for Sinkhorn-Knopp": {"loss.targets": "centering", "teacher.temperature": 0.04},
    "with 4 registers": {"model.num_registers": 4},
    "without local crops": {"crops.num_locals": 0},
}
EVALUATED = ("k-NN, CLS", "k-NN, mean patch", "k-NN, both")


def evaluate(model: VisionTransformer, train: Source, test: Source, device: torch.device) -> dict[str, float]:
    model.eval()
    with torch.no_grad(), Parallel(device).autocast("auto"):
        found = [
            extract(model, source, kind="cls+mean", resize=SIDE, crop=SIDE, batch_size=500, device=device)
            for source in (train, test)
        ]
    width = model.config.width
    columns = (slice(0, width), slice(width, 2 * width), slice(0, 2 * width))
    labels = [part.labels for part in found]
    assert labels[0] is not None and labels[1] is not None
    return {
        name: knn_accuracy(
            found[0].features[:, column], labels[0], found[1].features[:, column], labels[1], device=device
        )
        for name, column in zip(EVALUATED, columns, strict=True)
    }


def train_once(
    recipe: Recipe,
    data: str,
    sources: tuple[Source, Source],
    device: str,
    console: Console,
    kept: Path | None = None,
) -> tuple[list[dict[str, Any]], float]:
    """Metrics rows with an evaluation, and the seconds of training; the run folder stays at `kept`."""
    spent, target = 0.0, Parallel.start(device).device

    def evaluation(model: VisionTransformer) -> dict[str, float]:
        nonlocal spent
        begun = time.perf_counter()
        result = evaluate(model, *sources, target)
        spent += time.perf_counter() - begun
        console.print("  ".join(f"{name} {value:.4f}" for name, value in result.items()), highlight=False)
        return result

    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        run = pretrain(
            data,
            kept or Path(folder) / "run",
            recipe=recipe,
            device=device,
            evaluation=evaluation,
            console=console,
        )
        seconds = time.perf_counter() - begun - spent
        return [row for row in run.metrics if EVALUATED[0] in row], seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("train")
    parser.add_argument("test")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parts", type=float, default=0, metavar="MINUTES", help="only compare the parts")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="recipe fields")
    parser.add_argument("--run", type=Path, help="keep the run folder here")
    parser.add_argument("--out", type=Path, help="also write the table here")
    options = parser.parse_args()
    console = Console(stderr=True)
    sources = open_source(options.train), open_source(options.test)
    fields = dict(text.split("=", 1) for text in options.set)
    base = override(small_images(SIDE), {"run.seed": options.seed} | fields, "--set")

    probe = override(base, {"run.steps": 60, "run.eval_every": 10**9, "run.checkpoint_every": 10**9}, "probe")
    with tempfile.TemporaryDirectory() as folder:
        rows = pretrain(options.train, Path(folder) / "run", recipe=probe, device=options.device,
                        console=Console(quiet=True)).metrics  # fmt: skip
    rate = float(np.median([row["images_per_second"] for row in rows[20:]]))
    minutes = options.parts or options.minutes
    # A twentieth is left for checkpoints and figures.
    steps = max(1, int(rate * minutes * 60 * 0.95 / base.run.batch_size))
    every = steps if options.parts else max(1, steps // 10)
    fields = {"run.steps": steps, "run.checkpoint_every": max(1, steps // 4), "run.eval_every": every}
    base = override(base, fields, "benchmark")

    pixels = [pixels_of(source, SIDE) for source in sources]
    mean = pixels[0][0].mean(0)
    raw = knn_accuracy(pixels[0][0] - mean, pixels[0][1], pixels[1][0] - mean, pixels[1][1])
    torch.manual_seed(options.seed)
    device = Parallel.start(options.device).device
    untrained = evaluate(Network(base, drop_path=0.0).backbone.to(device), *sources, device)
    lines = [
        f"CIFAR-10, {minutes:g} minutes of training on {device_name(device)}: "
        f"{steps} steps of {base.run.batch_size} images, {rate:.0f} images/s.",
        "",
        "| features | " + " | ".join(EVALUATED) + " |",
        "|---|---|---|---|",
        f"| raw pixels | {raw:.4f} | | |",
        "| untrained | " + " | ".join(f"{untrained[name]:.4f}" for name in EVALUATED) + " |",
    ]
    print("\n".join(lines), flush=True)
    for name, changes in PARTS.items() if options.parts else [("all", {})]:
        recipe = override(base, changes, name)
        kept = options.run if name == "all" else None
        found, seconds = train_once(recipe, options.train, sources, options.device, console, kept)
        for row in found[-1:] if options.parts else found:
            figures = " | ".join(f"{row[column]:.4f}" for column in EVALUATED)
            lines.append(f"| {name}, step {row['step'] + 1} | {figures} |")
            print(lines[-1], flush=True)
        lines.append(f"| {name}: {seconds:.0f} s of training | | | |")
        print(lines[-1], flush=True)
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
