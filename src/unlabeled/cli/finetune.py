"""`finetune`, `predict`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from unlabeled.cli.options import DataArgument, Device, Json, app, console, print_json, say_next
from unlabeled.errors import UserError


@app.command()
def finetune(
    context: typer.Context,
    data: Annotated[
        str | None,
        typer.Argument(help="Labelled DATA; of maps a folder of images/ beside labels/ or depth/."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="A MODEL: run folder, Hugging Face folder or name, .pth, timm.")
    ] = None,
    out: Annotated[str | None, typer.Option(help="The folder to make: the head and its backbone.")] = None,
    task: Annotated[str, typer.Option(help="classify, segment or depth.")] = "classify",
    freeze: Annotated[bool, typer.Option("--freeze", help="Train the head alone (the default).")] = False,
    lora: Annotated[
        int | None, typer.Option(metavar="RANK", help="Train low-rank adapters too, merged at the end.")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Train the whole backbone too.")] = False,
    head: Annotated[
        str,
        typer.Option(
            help="classify: linear, linear4, logreg, knn; segment: linear4, linear; "
            "depth: linear4, linear, dpt, regression."
        ),
    ] = "",
    val: Annotated[
        str, typer.Option(help="Labelled DATA to choose the weights by; a part of DATA if left out.")
    ] = "",
    held_out: Annotated[float, typer.Option(help="That part of DATA, a share of each class.")] = 0.1,
    shots: Annotated[int, typer.Option(help="Learn from so many images of each class; 0: all.")] = 0,
    size: Annotated[int, typer.Option(help="Pixels, of the crop or of a map's short side.")] = 0,
    ignore: Annotated[int, typer.Option(help="Label of pixels that do not count.")] = 255,
    depth_scale: Annotated[float, typer.Option(help="What one metre is in an integer depth file.")] = 1000.0,
    no_copy: Annotated[
        bool, typer.Option("--no-copy", help="Refer to a frozen backbone, do not copy it into the folder.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    device: Device = "auto",
    resume: Annotated[str | None, typer.Option(help="A folder to go on with.")] = None,
    as_json: Json = False,
) -> None:
    """Train a head on labelled images. --lora, --full: its backbone too. Any number can follow: --train.epochs 10."""
    from unlabeled.finetune.tune import finetune as run_finetune

    if freeze + (lora is not None) + full > 1:
        raise UserError("--freeze, --lora and --full exclude each other; choose one.")
    fields = _train_fields(context.obj)
    if lora is not None:
        fields["lora_rank"] = lora
    terminal = console(as_json)
    made = run_finetune(
        data, model, out, task=task, backbone="lora" if lora is not None else "full" if full else "freeze",  # type: ignore[arg-type]
        head=head, val=val, held_out=held_out, shots=shots, size=size, seed=seed, ignore=ignore,
        depth_scale=depth_scale, train=fields, copy_backbone=not no_copy, resume=resume, device=device,
        console=terminal,
    )  # fmt: skip
    result: dict[str, Any] = {
        "head": str(made.path),
        "steps": made.steps,
        "kept_step": made.step,
        **made.figures,
        "seconds": round(made.seconds, 1),
        "bad_files": made.bad_files,
    }
    said = [f"{made.path}: trained in {made.seconds:.0f} s" + _listed(made.figures, "; on validation ")]
    if made.saved:
        said.append(made.saved)
        result["cache"] = made.saved
    if made.bad_files:
        said.append(f"{made.bad_files} images could not be used: {made.path / 'bad_files.jsonl'}")
    for line in said:
        terminal.print(line, highlight=False, markup=False, soft_wrap=True)
    say_next(terminal, "unlabeled", "predict", "DATA", "--head", str(made.path), "--out", "predictions")
    if as_json:
        print_json(result)


@app.command()
def predict(
    data: DataArgument,
    head: Annotated[str, typer.Option(help="A folder that finetune made, or one of Meta's heads (.pth).")],
    out: Annotated[str, typer.Option(help="The folder to make; one that was begun is gone on with.")],
    model: Annotated[
        str | None, typer.Option(help="The head's backbone, where it does not lie beside it.")
    ] = None,
    no_pictures: Annotated[bool, typer.Option("--no-pictures", help="Write no pictures.")] = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Classes, masks or depth of images, by a trained head. Figures too where DATA has labels."""
    from unlabeled.finetune.predict import predict as run_predict

    terminal = console(as_json)
    made = run_predict(
        data, head, out, model=model, device=device, pictures=not no_pictures, console=terminal
    )
    said = [*(f"note: {note}" for note in made.notes), f"{made.path}: {made.images:,} images predicted"]
    said[-1] += _listed(made.figures, "; against the labels ")
    if made.by_class:
        worst = sorted(made.by_class.items(), key=lambda one: one[1])[:5]
        said.append(_listed(dict(worst), "lowest by class: "))
    if made.bad_files:
        said.append(f"{made.bad_files} files could not be read: {made.path / 'bad_files.jsonl'}")
    for line in said:
        terminal.print(line, highlight=False, markup=False, soft_wrap=True)
    if as_json:
        print_json(
            {
                "out": str(made.path),
                "images": made.images,
                "bad_files": made.bad_files,
                **made.figures,
                "by_class": made.by_class,
            }
        )


def _train_fields(given: dict[str, str] | None) -> dict[str, Any]:
    """The --train.FIELD options; raises UserError for fields of anything else."""
    fields = {}
    for name, value in (given or {}).items():
        section, _, field = name.partition(".")
        if section != "train":
            raise UserError(f"finetune has no --{name}; its numbers are --train.epochs, --train.lr, ...")
        fields[field] = value
    return fields


def _listed(figures: dict[str, float], before: str) -> str:
    if not figures:
        return ""
    return before + ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
