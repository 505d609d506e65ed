"""`show crops`, `attention`, `pca`, `match`, `similar`: pictures."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unlabeled.cli.options import Device, Json, ModelOption, app, print_json
from unlabeled.errors import UserError

if TYPE_CHECKING:
    from unlabeled.vit import VisionTransformer

show = typer.Typer(
    help="Pictures of images and of what a model sees.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(show, name="show")

Images = Annotated[list[str], typer.Argument(metavar="IMAGE...", help="Image files, 16 at most.")]
Size = Annotated[
    int | None,
    typer.Option(
        help="Short side in pixels that the model sees; by default that of its training images, or 14 patches."
    ),
]
Width = Annotated[int, typer.Option(help="Width of the picture in pixels, 400 to 2000.")]


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


@show.command("attention")
def show_attention(
    images: Images,
    model: ModelOption,
    out: Annotated[str, typer.Option(help="The PNG to write.")] = "attention.png",
    layer: Annotated[int, typer.Option(help="The block: 0 is the first, -1 the last.")] = -1,
    mass: Annotated[float, typer.Option(help="Share of the attention that the mask holds.")] = 0.6,
    size: Size = None,
    width: Width = 1600,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Where the CLS token looks. Every head, their mean, and the fewest patches that hold most of it."""
    from unlabeled.features.show import write_attention

    result = write_attention(
        _loaded(model, device), images, out, layer=layer, mass=mass, size=size, width=width, name=model
    )
    _report("attention", result, as_json)


@show.command("pca")
def show_pca(
    images: Images,
    model: ModelOption,
    out: Annotated[str, typer.Option(help="The PNG to write.")] = "pca.png",
    foreground: Annotated[
        bool, typer.Option("--foreground/--no-foreground", help="Separate it by the first component.")
    ] = True,
    size: Size = None,
    width: Width = 1600,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Principal components of patch features as colours. Three, fitted over all images together."""
    from unlabeled.features.show import write_pca

    result = write_pca(
        _loaded(model, device), images, out, foreground=foreground, size=size, width=width, name=model
    )
    _report("pca", result, as_json)


@show.command("match")
def show_match(
    a: Annotated[str, typer.Argument(metavar="A", help="An image file.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another.")],
    model: ModelOption,
    out: Annotated[str, typer.Option(help="The PNG to write.")] = "match.png",
    most: Annotated[int, typer.Option(help="Lines drawn: the best ones, apart from each other.")] = 40,
    size: Size = None,
    width: Width = 1600,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """What of two images matches. Lines join patches that are each other's most similar."""
    from unlabeled.features.show import write_match

    result = write_match(_loaded(model, device), a, b, out, most=most, size=size, width=width, name=model)
    _report("match", result, as_json)


@show.command("similar")
def show_similar(
    images: Images,
    model: ModelOption,
    at: Annotated[str, typer.Option(metavar="X,Y", help="A point of the first image, in its pixels.")],
    out: Annotated[str, typer.Option(help="The PNG to write.")] = "similar.png",
    size: Size = None,
    width: Width = 1600,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """How like the patch at a point every other is. In that image and in others."""
    from unlabeled.features.show import write_similar

    try:
        x, y = map(float, at.split(","))
    except ValueError as error:
        raise UserError(f"--at {at} is no point; X,Y in pixels is, as in --at 120,80.") from error
    result = write_similar(_loaded(model, device), images, out, at=(x, y), size=size, width=width, name=model)
    _report("similar", result, as_json)


def _loaded(model: str, device: str) -> VisionTransformer:
    from unlabeled.devices import choose_device
    from unlabeled.weights.load import load_model

    return load_model(model, device=choose_device(device))


def _report(name: str, result: dict[str, Any], as_json: bool) -> None:
    print(f"{name}: {result['picture']}", file=sys.stderr if as_json else sys.stdout)
    if as_json:
        print_json(result)
