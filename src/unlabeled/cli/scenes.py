"""`scenes`."""

from __future__ import annotations

from typing import Annotated

import typer

from unlabeled.cli.options import Json, app, console, print_json, say_next


@app.command()
def scenes(
    out: Annotated[str, typer.Option(help="The folder; train/ and test/ in it.")],
    photographs: Annotated[str, typer.Option(help="DATA whose images become the textures.")],
    count: Annotated[int, typer.Option(help="Training images.")] = 1000,
    test_count: Annotated[
        int | None,
        typer.Option(help="Test images, of other rooms, textures and cameras; a fifth by default."),
    ] = None,
    width: Annotated[int, typer.Option(help="Of the images, in pixels.")] = 256,
    height: Annotated[int, typer.Option(help="Of the images, in pixels.")] = 192,
    views: Annotated[int, typer.Option(help="Images of one room.")] = 1,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    workers: Annotated[int | None, typer.Option(help="Processes; as many as cores by default.")] = None,
    as_json: Json = False,
) -> None:
    """Render rooms whose depth is known exactly. Data to train and to test depth on."""
    from unlabeled.dense.scene_data import SceneRecipe, write_scenes

    terminal = console(as_json)
    recipe = SceneRecipe(size=(height, width), views=views)
    made = write_scenes(
        out, photographs, count, test_count, recipe, seed=seed, workers=workers, console=terminal
    )
    said = f"{made.out}: {made.train:,} training and {made.test:,} test images, {made.images_per_second:.1f} images/s"
    terminal.print(said, highlight=False, markup=False, soft_wrap=True)
    rest = ("--task", "depth", "--model", "MODEL", "--out", "runs/depth")
    say_next(terminal, "unlabeled", "finetune", f"{made.out}/train", *rest)
    if as_json:
        print_json(made._asdict() | {"out": str(made.out), "seconds": round(made.seconds, 2)})
