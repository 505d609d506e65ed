"""`curate train-copy-detector`."""

from __future__ import annotations

from typing import Annotated

import typer

from unlabeled.cli.curate import curate
from unlabeled.cli.options import DataArgument, Device, Json, console, print_json, say_next


@curate.command("train-copy-detector")
def train_copy_detector(
    data: DataArgument,
    out: Annotated[
        str, typer.Option(help="The DETECTOR's folder to make; one that was stopped is gone on with.")
    ],
    model: Annotated[
        str | None, typer.Option("--model", help="MODEL to go on from; by default a small one from scratch.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps, 2000 by default.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images a step, 64 by default.")] = None,
    size: Annotated[int | None, typer.Option(help="Pixels of what it sees, 160 by default.")] = None,
    patch_size: Annotated[int | None, typer.Option(help="Pixels, 16 by default; without --model.")] = None,
    backbone: Annotated[
        str | None, typer.Option(help="vit_tiny (default), vit_small, ...; without --model.")
    ] = None,
    depth: Annotated[
        int | None, typer.Option(help="Blocks, 4 by default; 0: the backbone's own; without --model.")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate, 1e-3 by default.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Of the contrastive loss.")] = None,
    entropy: Annotated[float | None, typer.Option(help="Weight of the entropy term.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything random.")] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Train a small copy detector on images. By self-supervision, as SSCD is."""
    from unlabeled.curate import copy_detector

    terminal = console(as_json)
    recipe = copy_detector.with_options(
        copy_detector.DetectorRecipe(), model=model, steps=steps, batch_size=batch_size, view_size=size,
        patch_size=patch_size, size=backbone, depth=depth, lr=lr, temperature=temperature, entropy=entropy, seed=seed,
    )  # fmt: skip
    folder = copy_detector.train_copy_detector(data, out, recipe=recipe, device=device, console=terminal)
    trained = f"{folder}: a copy detector of {recipe.steps:,} steps, which is a MODEL"
    terminal.print(trained, highlight=False, markup=False, soft_wrap=True)
    seen = recipe.views.size
    say_next(
        terminal, "unlabeled", "curate", "duplicates", data, "--model", str(folder), "--features.size", str(seen),
        "--features.shape", "stretch", "--out", "curated",
    )  # fmt: skip
    if as_json:
        print_json({"detector": str(folder), "steps": recipe.steps, "size": seen})
