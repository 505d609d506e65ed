"""What the commands share: the top command, its options and how a result is printed."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(
    help="DINOv2, complete: learn image features without labels and put them to work.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Json = Annotated[
    bool, typer.Option("--json", help="One JSON object on standard output; the rest on standard error.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")]
Ray = Annotated[
    str | None,
    typer.Option(
        "--ray", help="Run on a Ray cluster: local (started here), auto (this machine's) or HOST:PORT."
    ),
]
Size = Annotated[
    int | None, typer.Option(help="Pixels; 224 by default, or what the model was trained at if less.")
]
Shape = Annotated[
    str, typer.Option(help="crop (the centre square), keep (size is the short side) or stretch.")
]
DataArgument = Annotated[
    str, typer.Argument(help="A folder, tar shards, Parquet, a text or CSV list of paths, or hf:NAME.")
]
ModelOption = Annotated[
    str, typer.Option("--model", help="A MODEL: run folder, Hugging Face folder or name, .pth, timm.")
]


def console(as_json: bool) -> Console:
    """Where a command's words go: standard output, or standard error where that is for JSON."""
    from rich.console import Console

    return Console(stderr=as_json)


def say_next(terminal: Console, *words: str) -> None:
    """Print the command to type next, so that a shell takes it as it is, folders with spaces included."""
    terminal.print(f"next: {shlex.join(words)}", highlight=False, markup=False, soft_wrap=True)


def print_json(result: dict[str, Any]) -> None:
    """The machine-readable result, one object on one line."""
    print(json.dumps(result), flush=True)
