"""`show ...`: pictures."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from unlabeled.cli.options import Json, app, print_json
from unlabeled.errors import UserError

show = typer.Typer(
    help="Pictures of images and of what a model sees.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(show, name="show")


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
        print_json({"picture": out})
