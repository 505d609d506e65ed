"""The command `unlabeled`: one thin function per command: parse, call one library function, print what it did."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unlabeled.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from unlabeled.pretrain.loop import Run

app = typer.Typer(
    help="DINOv2, complete: learn image features without labels and put them to work.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
show = typer.Typer(help="Pictures of what happens to images.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(show, name="show")

Json = Annotated[
    bool, typer.Option("--json", help="One JSON object on standard output; the rest on standard error.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")]
DataArgument = Annotated[
    str, typer.Argument(help="A folder, tar shards, Parquet, a text or CSV list of paths, or hf:NAME.")
]


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

    console = _console(as_json)
    run = run_pretrain(
        data, out, recipe=recipe, steps=steps, start=start, eval=eval, eval_dense=eval_dense, seed=seed,
        device=device, resume=resume, overrides=context.obj, console=console,
    )  # fmt: skip
    _report(run, console, as_json)


@app.command()
def distill(
    context: typer.Context,
    data: Annotated[str, typer.Argument(help="The images: folder, tar shards, Parquet, list, hf:NAME.")],
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

    console = _console(as_json)
    run = run_distill(
        data, out, teacher=teacher, student=student, recipe=recipe, steps=steps, eval=eval, seed=seed,
        device=device, overrides=context.obj, console=console,
    )  # fmt: skip
    _report(run, console, as_json)


def _report(run: Run, console: Console, as_json: bool) -> None:
    """What a finished run has made, on rank 0."""
    from unlabeled.pretrain.pictures import write_pictures

    if int(os.environ.get("RANK", "0")):
        return
    rows = run.metrics
    pictures = write_pictures(run.path)
    console.print(
        f"pictures: {run.path / 'pictures'} ({', '.join(path.name for path in pictures)})", highlight=False
    )
    console.print(f"next: unlabeled info {run.path}", highlight=False)
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
        _print_json(result)


@app.command()
def demo(
    out: Annotated[str, typer.Option(help="The run folder to make.")] = "runs/demo",
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Pretrain a small backbone on photographs that need no download, in minutes, and show that it learned."""
    from unlabeled.demo import run_demo

    result = run_demo(out, seed=seed, device=device, console=_console(as_json))
    if as_json:
        _print_json(result)


@app.command()
def info(
    what: Annotated[str, typer.Argument(help="A MODEL, a run folder, or the word recipes.")] = "recipes",
    as_json: Json = False,
) -> None:
    """What a model is made of; or all recipes and their fields."""
    if what == "recipes":
        _info_recipes(as_json)
        return
    from unlabeled.weights.load import load_model

    model = load_model(what)
    shape = {item.name: getattr(model.config, item.name) for item in fields(model.config)}
    shape["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    if as_json:
        _print_json({"model": what} | shape | {"notes": model.notes})
        return
    for name, value in shape.items():
        print(f"{name:20} {value:,}" if type(value) is int else f"{name:20} {value}")
    for note in model.notes:
        print(f"{'note':20} {note}")


@app.command()
def export(
    model: Annotated[
        str, typer.Argument(help="A MODEL: run folder, Hugging Face folder or name, .pth, timm.")
    ],
    to: Annotated[str, typer.Option(help="hf, meta, timm, onnx, openvino or pt2 (torch.export).")],
    out: Annotated[str, typer.Option(help="The file or folder to write.")],
    int8: Annotated[bool, typer.Option("--int8", help="onnx, openvino: 8 bits, for CPUs.")] = False,
    calibrate: Annotated[str | None, typer.Option(help="DATA that --int8 is calibrated on.")] = None,
    push: Annotated[str | None, typer.Option(help="hf: USER/NAME on the Hugging Face hub.")] = None,
    as_json: Json = False,
) -> None:
    """Write a model in another format, checked against the model itself."""
    from unlabeled.weights.export import as_dict, describe
    from unlabeled.weights.export import export as run_export

    result = run_export(model, to, out, int8=int8, calibrate=calibrate, push=push)
    for line in describe(result):
        _console(as_json).print(line, highlight=False, markup=False, soft_wrap=True)
    if as_json:
        _print_json(as_dict(result))


def _info_recipes(as_json: bool) -> None:
    from unlabeled.pretrain.recipes import FITTED, RECIPE_NAMES, named_recipe

    recipes = {name: named_recipe(name) for name in RECIPE_NAMES if name not in FITTED}
    rows: dict[str, dict[str, Any]] = {}
    for name, recipe in recipes.items():
        for section in fields(recipe):
            part = getattr(recipe, section.name)
            if is_dataclass(part):
                for item in fields(part):
                    rows.setdefault(f"{section.name}.{item.name}", {})[name] = getattr(part, item.name)
    if as_json:
        _print_json(rows)
        return
    print("auto (the default) reads the data and the machine, and prints its choice with a reason each.")
    print("highres is the recipe of the model that --from names, with global crops of 518 pixels.\n")
    print(f"{'field':32}" + "".join(f"{name:>16}" for name in recipes))
    for name, values in rows.items():
        print(f"{name:32}" + "".join(f"{_short(value):>16}" for value in values.values()))


def _short(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


@show.command("crops")
def show_crops(
    context: typer.Context,
    image: Annotated[str, typer.Argument(help="An image file.")],
    out: Annotated[str, typer.Option(help="The PNG to write.")] = "crops.png",
    recipe: Annotated[str, typer.Option(help="A recipe's name or TOML file.")] = "vits14",
    seed: Annotated[int, typer.Option(help="Of the crops.")] = 0,
    as_json: Json = False,
) -> None:
    """One image and the crops a recipe makes of it."""
    from unlabeled.images.decode import BadImage, decode
    from unlabeled.pretrain.recipe import override
    from unlabeled.pretrain.recipes import named_recipe, read_recipe
    from unlabeled.pretrain.show_crops import write_crops

    plan = read_recipe(Path(recipe)) if recipe.endswith(".toml") else named_recipe(recipe)
    plan = override(plan, context.obj, "the command line")
    try:
        pixels = decode(Path(image).read_bytes())
    except OSError as error:
        raise UserError(f"{image} cannot be read: {error.strerror}") from error
    except BadImage as error:
        raise UserError(f"{image} cannot be read: {error}") from error
    write_crops(pixels, plan.crops, seed, Path(out))
    print(f"crops: {out}", file=sys.stderr if as_json else sys.stdout)
    if as_json:
        _print_json({"picture": out})


def _split(arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    """Recipe fields (--optimizer.lr 1e-3 or --optimizer.lr=1e-3) apart from the rest of a command line.

    They are taken out before the command is parsed: the parser does not know them, and would take their values for
    its own arguments.
    """
    rest: list[str] = []
    fields: dict[str, str] = {}
    waiting = list(arguments)
    while waiting:
        word = waiting.pop(0)
        name, joined, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or "." not in name or "/" in name:
            rest.append(word)
            continue
        if not joined:
            if not waiting:
                raise UserError(f"--{name} needs a value")
            value = waiting.pop(0)
        fields[name.replace("-", "_")] = value
    return rest, fields


def _console(as_json: bool) -> Console:
    from rich.console import Console

    return Console(stderr=as_json)


def _print_json(result: dict[str, Any]) -> None:
    print(json.dumps(result), flush=True)


def main() -> None:
    """Run the command; an error of use is one line on standard error and exit status 2."""
    try:
        arguments, recipe_fields = _split(sys.argv[1:])
        app(arguments, standalone_mode=False, obj=recipe_fields)
    except UserError as error:
        sys.exit(_said(str(error)))
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        # typer and click each have their own class for an error of use.
        if hasattr(error, "format_message"):
            sys.exit(_said(error.format_message()))
        if hasattr(error, "number"):
            print(error, file=sys.stderr)
            sys.exit(128 + error.number)
        raise


def _said(text: str) -> int:
    print(f"unlabeled: {' '.join(text.split())}", file=sys.stderr)
    return 2
