"""Few labels on CIFAR-10: a frozen backbone, adapters, the whole backbone, and the same backbone from random numbers.

    python benchmarks/finetune.py TRAIN.parquet TEST.parquet --model MODEL [--train-images 3000]
        [--test-images 2000] [--epochs 8] [--only ROW...] [--out TABLE.md]

MODEL has never seen a label. Every row learns from the same images, of which a tenth is held out for choosing the
weights, and is measured on the same test images. Seconds are of everything but the test; those of the CPU hold on a
machine that does other work too. A head on a frozen backbone learns from tokens that are computed once, for 60 epochs;
the rows of as many epochs as the backbone's compare that with computing them for every image of every epoch.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from rich.console import Console

import unlabeled
from machine import device_name
from unlabeled.vit import VisionTransformer
from unlabeled.weights.huggingface import save_huggingface


def subset(path: str, count: int, out: Path) -> Path:
    """The first images of a Parquet file."""
    table = pq.read_table(path)
    pq.write_table(table.slice(0, count), out, row_group_size=500)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("train")
    parser.add_argument("test")
    parser.add_argument("--model", required=True)
    parser.add_argument("--train-images", type=int, default=3000)
    parser.add_argument("--test-images", type=int, default=2000)
    parser.add_argument("--epochs", type=float, default=8, help="of what trains the backbone")
    parser.add_argument("--only", nargs="*", default=[], help="rows whose name begins so")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train = subset(options.train, options.train_images, folder / "train.parquet")
        test = subset(options.test, options.test_images, folder / "test.parquet")
        model = unlabeled.load_model(options.model)
        torch.manual_seed(0)
        save_huggingface(VisionTransformer(model.config), folder / "random")
        epochs = {"epochs": options.epochs}
        uncached = epochs | {"cache": False}
        rows: list[tuple[str, str, dict[str, Any]]] = [
            ("frozen, k-NN", options.model, {"head": "knn"}),
            ("frozen, logistic regression", options.model, {"head": "logreg"}),
            ("frozen, linear", options.model, {}),
            ("frozen, linear, as many epochs", options.model, {"train": epochs}),
            ("frozen, linear, as many epochs, not cached", options.model, {"train": uncached}),
            ("adapters of rank 8", options.model, {"backbone": "lora", "train": epochs}),
            (
                "adapters of rank 8, FFN too",
                options.model,
                {"backbone": "lora", "train": epochs | {"lora_mlp": True}},
            ),
            ("whole backbone", options.model, {"backbone": "full", "train": epochs}),
            (
                "whole backbone, from random numbers",
                str(folder / "random"),
                {"backbone": "full", "train": epochs | {"layer_decay": 1.0}},
            ),
        ]
        config, machine = model.config, device_name(torch.device("cpu"))
        lines = [
            f"{options.train_images:,} training and {options.test_images:,} test images, {machine}; "
            f"a backbone of {config.depth} blocks of width {config.width}, patch {config.patch_size}; "
            f"what trains the backbone does so for {options.epochs:g} epochs.",
            "",
            "| what learns | test accuracy | validation accuracy | seconds | CPU seconds |",
            "|---|---|---|---|---|",
        ]
        print("\n".join(lines), flush=True)
        for number, (row, start, fields) in enumerate(rows):
            if options.only and not row.startswith(tuple(options.only)):
                continue
            begun, worked = time.perf_counter(), time.process_time()
            made = unlabeled.finetune(
                train,
                start,
                folder / f"head{number}",
                device=options.device,
                console=Console(quiet=True),
                **fields,
            )
            seconds, worked = time.perf_counter() - begun, time.process_time() - worked
            found = unlabeled.predict(
                test, made.head(options.device), folder / f"predictions{number}", pictures=False
            )
            figures = f"{found.figures['accuracy']:.4f} | {made.figures['accuracy']:.4f}"
            lines.append(f"| {row} | {figures} | {seconds:.1f} | {worked:.1f} |")
            print(lines[-1], flush=True)
            if made.saved:
                print(made.saved, flush=True)
        if options.out:
            options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
