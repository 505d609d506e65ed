"""The demonstration in several seeds: k-NN of pixels, the untrained and the trained backbone, and the time.

    python benchmarks/demo.py [--seeds 0 1 2 3 4] [--out TABLE.md] [--runs FOLDER] [--field optimizer.lr=1e-3 ...]

Each seed is the whole of `unlabeled demo`, in a folder of its own; a field given is set over the demo's recipe.
Rows are added to a TABLE.md that is there.
"""

import argparse
import tempfile
import time
from pathlib import Path

from rich.console import Console

from machine import device_name, report
from unlabeled.demo import run_demo
from unlabeled.pretrain.parallel import Parallel


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--field", action="append", default=[], help="NAME=VALUE of the recipe")
    parser.add_argument("--runs", type=Path, help="the run of seed 0 is kept in FOLDER/0, and so on")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = Parallel.start(options.device).device
    overrides = dict(field.split("=", 1) for field in options.field)
    if not (options.out and options.out.exists()):
        report(
            [
                "# The demonstration",
                "",
                f"`python benchmarks/demo.py{''.join(f' --field {field}' for field in options.field)}`",
                "",
                f"Which of 16 photographs is a tile of? k-NN accuracy (k = 20); {device_name(device)}.",
                "",
                "| seed | raw pixels | untrained backbone | trained backbone | training, s | all of it, s |",
                "|---|---|---|---|---|---|",
            ],
            options.out,
        )
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as temporary:
            begun = time.perf_counter()
            result = run_demo(
                (options.runs or Path(temporary)) / str(seed),
                seed=seed,
                device=options.device,
                console=Console(quiet=True),
                overrides=overrides,
            )
            seconds = time.perf_counter() - begun
        accuracies = " | ".join(f"{result['knn'][name]:.1%}" for name in ("pixels", "untrained", "trained"))
        report([f"| {seed} | {accuracies} | {result['seconds']:.0f} | {seconds:.0f} |"], options.out)


if __name__ == "__main__":
    main()
