"""`info`, `export`."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from unlabeled.cli.options import Json, app, console, print_json
from unlabeled.errors import reading

if TYPE_CHECKING:
    from unlabeled.vit import Interpolation


@app.command()
def info(
    what: Annotated[str, typer.Argument(help="A MODEL, a run folder, or the word recipes.")] = "recipes",
    as_json: Json = False,
) -> None:
    """What a model is made of; or all recipes and their fields."""
    if what == "recipes":
        _info_recipes(as_json)
        return
    from unlabeled.weights.glance import glance

    seen = glance(what)
    shape = {item.name: getattr(seen.config, item.name) for item in fields(seen.config)}
    shape["parameters"] = seen.num_parameters
    if as_json:
        print_json({"model": what} | shape | {"notes": seen.notes})
        return
    for name, value in shape.items():
        print(f"{name:20} {value:,}" if type(value) is int else f"{name:20} {value}")
    for note in seen.notes:
        print(f"{'note':20} {note}")


@app.command()
def export(
    what: Annotated[
        str,
        typer.Argument(
            help="A MODEL (run folder, Hugging Face folder or name, .pth, timm), or a feature table."
        ),
    ],
    to: Annotated[
        str,
        typer.Option(
            help="hf, meta, timm, onnx, openvino or pt2 (torch.export); of a table parquet, csv or npz."
        ),
    ],
    out: Annotated[str, typer.Option(help="The file or folder to write.")],
    int8: Annotated[bool, typer.Option("--int8", help="onnx, openvino: 8 bits, for CPUs.")] = False,
    calibrate: Annotated[str | None, typer.Option(help="DATA that --int8 is calibrated on.")] = None,
    push: Annotated[str | None, typer.Option(help="hf: USER/NAME on the Hugging Face hub.")] = None,
    interpolation: Annotated[
        str,
        typer.Option(help="How positions are resized: size, antialias or scale; else as MODEL's makers do."),
    ] = "",
    as_json: Json = False,
) -> None:
    """Write a model in another format, or a table as one file. A model's file is checked against the model itself."""
    from unlabeled.weights.export import as_dict, describe
    from unlabeled.weights.export import export as run_export
    from unlabeled.weights.load import expanded

    with reading(what):
        is_table = (expanded(what) / "table.json").exists()
    if is_table:
        _export_table(what, to, out, as_json)
        return
    mode = cast("Interpolation", interpolation)  # load_model checks it
    result = run_export(what, to, out, int8=int8, calibrate=calibrate, push=push, interpolation=mode)
    for line in describe(result):
        console(as_json).print(line, highlight=False, markup=False, soft_wrap=True)
    if as_json:
        print_json(as_dict(result))


def _export_table(table: str, to: str, out: str, as_json: bool) -> None:
    from unlabeled.features.convert import convert

    written = convert(table, to, out)
    console(as_json).print(
        f"{written}: {written.stat().st_size:,} bytes", highlight=False, markup=False, soft_wrap=True
    )
    if as_json:
        print_json({"table": table, "format": to, "out": str(written)})


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
        print_json(rows)
        return
    print("auto (the default) reads the data and the machine, and prints its choice with a reason each.")
    print("highres is the recipe of the model that --from names, with global crops of 518 pixels.\n")
    print(f"{'field':32}" + "".join(f"{name:>16}" for name in recipes))
    for name, values in rows.items():
        print(f"{name:32}" + "".join(f"{_short(value):>16}" for value in values.values()))


def _short(value: Any) -> str:
    if isinstance(value, float):  # as few digits as tell it: 4 / 3 has a column's width
        return f"{value:.6g}"
    return ",".join(map(_short, value)) if isinstance(value, tuple) else str(value)
