"""`embed`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from unlabeled.cli.options import (
    DataArgument,
    Device,
    Json,
    ModelOption,
    Ray,
    Shape,
    Size,
    app,
    console,
    print_json,
    say_next,
)


@app.command()
def embed(
    data: DataArgument,
    model: ModelOption,
    out: Annotated[str, typer.Option(help="The feature table's folder; one that is there is gone on with.")],
    kind: Annotated[
        str, typer.Option(help="cls, mean (of the patches), cls+mean, layers, patches or attention.")
    ] = "cls",
    layer: Annotated[int, typer.Option(help="The block that is taken; 0 is the first, -1 the last.")] = -1,
    size: Size = None,
    shape: Shape = "crop",
    dtype: Annotated[
        str | None, typer.Option(help="float32 or float16; by default float16 for patches and attention.")
    ] = None,
    fast: Annotated[
        bool, typer.Option("--fast", help="8 bits on a CPU, bfloat16 and compiled on a GPU.")
    ] = False,
    batch_size: Annotated[int | None, typer.Option(help="Images at once.")] = None,
    device: Device = "auto",
    ray: Ray = None,
    as_json: Json = False,
) -> None:
    """Turn images into vectors: a feature table. Search, curation and evaluation read it."""
    from unlabeled.devices import choose_device
    from unlabeled.features.embed import embed as run_embed
    from unlabeled.features.engines import has_8_bit_products

    terminal = console(as_json)
    if fast and choose_device(device).type == "cpu" and not has_8_bit_products() and not _in_8_bits(out):
        terminal.print(
            "--fast: this processor has no instructions for 8 bits, and without them float32 is faster: it is used",
            soft_wrap=True,
        )
        fast = False
    table = run_embed(
        data, model, out, kind=kind, layer=layer, size=size, shape=shape, dtype=dtype, fast=fast,  # type: ignore[arg-type]
        device=device, batch_size=batch_size, ray=ray, console=terminal,
    )  # fmt: skip
    count, bad = len(table), table.bad_files
    result = {
        "rows": count,
        "bad_files": bad,
        "images_per_second": round(table.images_per_second, 2),
        "table": str(table.path),
        "kind": kind,
        "dimension": table.dimension,
    }
    rank, world = os.environ.get("RANK", "0"), int(os.environ.get("WORLD_SIZE", "1"))
    several = world > 1 and ray is None  # who may not be done yet
    said = f"rank {rank} of {world} is done; " if several else ""
    said += (
        f"{table.path}: {count:,} images{' so far' * several}, {kind} of {table.dimension} in {table.dtype}"
    )
    said += (
        f"; {bad} file{'s' * (bad > 1)} could not be read, see {table.path / 'bad_files.jsonl'}"
        if bad
        else ""
    )
    terminal.print(said, highlight=False, markup=False, soft_wrap=True)
    if not table.is_grid and not several:
        say_next(terminal, "unlabeled", "index", str(table.path), "--out", "index")
    if as_json:
        print_json(result)


def _in_8_bits(out: str) -> bool:
    """Whether a table that is gone on with was begun in 8 bits, on another machine."""
    from unlabeled.features.table import read_header

    folder = Path(out).expanduser()
    return (folder / "table.json").exists() and read_header(folder)["identity"]["precision"] == "int8"
