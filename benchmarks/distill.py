"""CIFAR-10: a small student distilled from a trained teacher, against the same student trained from scratch.

    python benchmarks/distill.py TRAIN.parquet TEST.parquet --teacher RUN [--minutes 4] [--out TABLE.md]

RUN is one that benchmarks/cifar10.py kept (--run). Both students have half the teacher's depth and width, the same
crops and the same time of training: the number of steps of each comes from its own rate in a short run.
"""

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from cifar10 import EVALUATED, evaluate
from machine import device_name
from unlabeled.images.sources import open_source
from unlabeled.pretrain.loop import Run, distill, pretrain
from unlabeled.pretrain.parallel import Parallel
from unlabeled.pretrain.recipe import Recipe
from unlabeled.pretrain.recipes import read_recipe
from unlabeled.weights.load import load_model

NEVER = 10**9


def student_recipe(teacher: Recipe, seed: int) -> Recipe:
    """The teacher's recipe for a backbone of half its depth and width, 32 wide heads each."""
    config = teacher.vit_config()
    model = dataclasses.replace(
        teacher.model, width=config.width // 2, depth=config.depth // 2, num_heads=max(1, config.width // 64)
    )
    run = dataclasses.replace(
        teacher.run, seed=seed, eval_every=NEVER, checkpoint_every=NEVER, health_every=0
    )
    return dataclasses.replace(teacher, model=model, run=run)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("train")
    parser.add_argument("test")
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--minutes", type=float, default=4)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    sources = open_source(options.train), open_source(options.test)
    device = Parallel.start(options.device).device
    recipe = student_recipe(read_recipe(Path(options.teacher) / "recipe.toml"), options.seed)
    shape = {name: getattr(recipe.model, name) for name in ("width", "depth", "num_heads")}

    def train(kind: str, steps: int, folder: Path) -> Run:
        shared: dict[str, Any] = {
            "recipe": recipe, "steps": steps, "device": options.device, "console": Console(quiet=True)
        }  # fmt: skip
        if kind == "from scratch":
            return pretrain(options.train, folder, **shared)
        fields = {f"model.{name}": value for name, value in shape.items()}
        return distill(
            options.train,
            folder,
            teacher=options.teacher,
            student=recipe.model.size,
            overrides=fields,
            **shared,
        )

    rows: dict[str, dict[str, float]] = {
        "teacher": evaluate(load_model(options.teacher, str(device)), *sources, device)
    }
    lines = [
        f"CIFAR-10, students of {shape['depth']} blocks of width {shape['width']}, {options.minutes:g} minutes of "
        f"training each on {device_name(device)}; teacher: {options.teacher}.",
        "",
        "| | " + " | ".join(EVALUATED) + " |",
        "|---|---|---|---|",
    ]
    for kind in ("from scratch", "distilled"):
        with tempfile.TemporaryDirectory() as folder:
            probe = train(kind, 60, Path(folder) / "probe").metrics
            rate = float(np.median([row["images_per_second"] for row in probe[20:]]))
            steps = int(rate * options.minutes * 60 * 0.97 / recipe.run.batch_size)
            begun = time.perf_counter()
            run = train(kind, steps, Path(folder) / "run")
            seconds = time.perf_counter() - begun
            name = f"student {kind}, {steps} steps, {seconds:.0f} s"
            rows[name] = evaluate(run.model(str(device)), *sources, device)
        print(name, rows[name], flush=True)
    for name, found in rows.items():
        lines.append(f"| {name} | " + " | ".join(f"{found[column]:.4f}" for column in EVALUATED) + " |")
    print("\n".join(lines))
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
