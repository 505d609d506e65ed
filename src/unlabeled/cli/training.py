"""`pretrain`, `distill`, `demo`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unlabeled.cli.options import DataArgument, Device, Json, app, console, print_json, say_next

if TYPE_CHECKING:
    from rich.console import Console

    from unlabeled.pretrain.loop import Run


@app.command()
def pretrain(
    context: typer.Context,
    data: Annotated[
        str | None, typer.Argument(help="The images: folder, tar shards, Parquet, list, hf:NAME.")
    ] = None,
    out: Annotated[str | None, typer.Option(help="The run folder to make.")] = None,
    recipe: Annotated[
        str, typer.Option(help="A recipe's name or TOML file; `unlabeled info recipes` lists them.")
    ] = "auto",
    steps: Annotated[int | None, typer.Option(help="Optimizer steps, over the recipe's.")] = None,
    start: Annotated[
        str | None, typer.Option("--from", help="MODEL to train on from; of a run folder, its heads too.")
    ] = None,
    eval: Annotated[str | None, typer.Option(help="Labelled DATA, for a k-NN figure on the way.")] = None,
    eval_dense: Annotated[
        str | None, typer.Option(help="Folder of images/ and labels/, for a patch k-NN figure on the way.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything random.")] = None,
    device: Device = "auto",
    resume: Annotated[str | None, typer.Option(help="A run folder to go on with.")] = None,
    as_json: Json = False,
) -> None:
    """Learn a backbone from unlabelled images. Any recipe field can follow: --optimizer.lr 1e-3."""
    from unlabeled.pretrain.loop import pretrain as run_pretrain

    terminal = console(as_json)
    run = run_pretrain(
        data, out, recipe=recipe, steps=steps, start=start, eval=eval, eval_dense=eval_dense, seed=seed,
        device=device, resume=resume, overrides=context.obj, console=terminal,
    )  # fmt: skip
    _report(run, terminal, as_json)


@app.command()
def distill(
    context: typer.Context,
    data: DataArgument,
    teacher: Annotated[str, typer.Option(help="MODEL that stays as it is and is learned from.")],
    out: Annotated[str, typer.Option(help="The run folder to make.")],
    student: Annotated[str, typer.Option(help="Size of the student: vit_tiny, vit_small, ...")] = "vit_small",
    recipe: Annotated[
        str, typer.Option(help="A recipe's name or TOML file; `unlabeled info recipes` lists them.")
    ] = "auto",
    steps: Annotated[int | None, typer.Option(help="Optimizer steps, over the recipe's.")] = None,
    eval: Annotated[str | None, typer.Option(help="Labelled DATA, for a k-NN figure on the way.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything random.")] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Learn a smaller backbone from a trained one. Any recipe field can follow: --optimizer.lr 1e-3."""
    from unlabeled.pretrain.loop import distill as run_distill

    terminal = console(as_json)
    run = run_distill(
        data, out, teacher=teacher, student=student, recipe=recipe, steps=steps, eval=eval, seed=seed,
        device=device, overrides=context.obj, console=terminal,
    )  # fmt: skip
    _report(run, terminal, as_json)


def _report(run: Run, terminal: Console, as_json: bool) -> None:
    """What a finished run has made, on rank 0."""
    from unlabeled.pretrain.pictures import write_pictures

    if int(os.environ.get("RANK", "0")):
        return
    rows = run.metrics
    pictures = write_pictures(run.path)
    terminal.print(
        f"pictures: {run.path / 'pictures'} ({', '.join(path.name for path in pictures)})",
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip
    say_next(terminal, "unlabeled", "info", str(run.path))
    if as_json:
        speeds = sorted(row["images_per_second"] for row in rows)
        result: dict[str, Any] = {
            "run": str(run.path),
            "steps": len(rows),
            "loss": rows[-1]["loss"],
            "images_per_second": speeds[len(speeds) // 2],
        }
        for row in rows:  # the last of each evaluation counts
            result |= {name: value for name, value in row.items() if "knn" in name}
        print_json(result)


@app.command()
def demo(
    out: Annotated[str, typer.Option(help="The run folder to make.")] = "runs/demo",
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """See it work in minutes: pretrain, and compare with no training. The photographs need no download."""
    from unlabeled.demo import run_demo

    result = run_demo(out, seed=seed, device=device, console=console(as_json))
    if as_json:
        print_json(result)
