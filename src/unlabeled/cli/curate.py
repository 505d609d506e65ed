"""`curate`, and each of its steps."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import Parameter, Signature
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from unlabeled.cli.options import DataArgument, Device, Json, Ray, app, console, print_json, say_next

if TYPE_CHECKING:
    from rich.console import Console

    from unlabeled.curate.pipeline import Curated


class _AllByDefault(TyperGroup):
    """A group in which words that name no command are those of `all`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] != "--help":
            args = ["all", *args]
        return super().parse_args(ctx, args)


curate = typer.Typer(
    cls=_AllByDefault,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="From a pile of images to a pretraining set. `unlabeled curate DATA --out CURATED` does all steps; each is a "
    "command of its own too.",
)
app.add_typer(curate, name="curate")

Out = Annotated[
    str, typer.Option(help="The folder to make, which is DATA; one that was stopped is gone on with.")
]
RecipeFile = Annotated[str | None, typer.Option("--recipe", help="A TOML file of recipe fields.")]

# Options of one step, which `all` has together.
OWN: dict[str, Any] = {
    "seeds": Annotated[
        list[str] | None, typer.Option(help="DATA that images are to be like; may be given again.")
    ],
    "exclude": Annotated[
        list[str] | None, typer.Option(help="DATA that nothing may be near to; may be given again.")
    ],
    "count": Annotated[int | None, typer.Option(help="Images wanted, by balanced sampling.")],
}
SHARED: dict[str, Any] = {
    "model": Annotated[
        str | None, typer.Option("--model", help="MODEL of the features; none: leave out what needs them.")
    ],
    "recipe": RecipeFile,
    "memory": Annotated[str | None, typer.Option(help="That arrays may take, 4GB by default.")],
    "workers": Annotated[int | None, typer.Option(help="Threads; by default one for each core.")],
    "shards": Annotated[
        bool, typer.Option("--shards", help="Write tar shards, not a list, where DATA is files.")
    ],
    "ray": Ray,
    "device": Device,
    "as_json": Json,
}
DEFAULTS: dict[str, Any] = {"shards": False, "device": "auto", "as_json": False}
COMMANDS: dict[str, tuple[tuple[str, ...], str]] = {  # name: its own options, and what it does
    "all": (
        tuple(OWN),
        "All steps: what `unlabeled curate DATA` does. Any recipe field can follow: --quality.min_blur 40.",
    ),
    "quality": (
        (),
        "Drop what is broken, small, dark, blank or blurred. Also what is narrow, bright or text.",
    ),
    "duplicates": (
        (),
        "Keep one of each group of copies. Of the same bytes, of near perceptual hashes, of near features.",
    ),
    "decontaminate": (("exclude",), "Drop what is too near to evaluation sets."),
    "cluster": (("count",), "Keep a number of images, evenly from all clusters."),
    "retrieve": (("seeds",), "Keep what is like the seeds."),
}


def _add(name: str, own: Sequence[str], does: str) -> None:
    """Make the command of a step, or of all; its signature is what typer reads its options from."""

    def command(context: typer.Context, data: str, out: str, as_json: bool, **options: Any) -> None:
        if name != "all":
            options["steps"] = (name,)
        for several in ("seeds", "exclude"):
            if several in options:
                options[several] = options[several] or ()
        _run(context, as_json, data, out, **options)

    kinds = {"context": typer.Context, "data": DataArgument, "out": Out}
    kinds |= {option: OWN[option] for option in own} | SHARED
    required = ("context", "data", "out")
    command.__annotations__ = kinds
    command.__signature__ = Signature(  # type: ignore[attr-defined]
        [
            Parameter(
                option,
                Parameter.KEYWORD_ONLY,
                default=Parameter.empty if option in required else DEFAULTS.get(option),
                annotation=kind,
            )
            for option, kind in kinds.items()
        ]
    )
    curate.command(name, help=does)(command)


for _name, (_own, _does) in COMMANDS.items():
    _add(_name, _own, _does)


@curate.command("collect")
def collect_command(
    context: typer.Context,
    urls: Annotated[
        str, typer.Argument(help="A .parquet, .csv or .tsv with a column url, or a .txt of URLs.")
    ],
    out: Annotated[
        str, typer.Option(help="The folder of tar shards to make; one that was stopped is gone on with.")
    ],
    recipe: RecipeFile = None,
    as_json: Json = False,
) -> None:
    """Fetch a list of URLs into tar shards. With limits, and a record of what failed."""
    from unlabeled.curate.collect import collect
    from unlabeled.curate.recipe import resolved

    terminal = console(as_json)
    found = collect(urls, out, resolved(recipe, context.obj).collect, console=terminal)
    _say(
        terminal,
        f"{found.path}: {found.fetched:,} of {found.urls:,} images; {found.record} says why others failed",
    )
    for reason, count in list(found.failures.items())[:8]:
        _say(terminal, f"    {count:,} {reason}")
    say_next(terminal, "unlabeled", "curate", str(found.path), "--out", "curated")
    if as_json:
        print_json(
            {"out": str(found.path), "urls": found.urls, "fetched": found.fetched, "failures": found.failures}
        )


@curate.command("report")
def report_command(
    curated: Annotated[str, typer.Argument(help="A folder that `unlabeled curate` made.")],
    as_json: Json = False,
) -> None:
    """Make the page of a curation again. Its pictures too, from what the steps decided; counts are printed."""
    from unlabeled.curate.pipeline import report

    terminal = console(as_json)
    page, counts = report(curated)
    _print_counts(terminal, counts)
    _say(terminal, f"report: {page}")
    if as_json:
        print_json({"counts": counts, "out": curated, "report": str(page)})


def _run(context: typer.Context, as_json: bool, data: str, out: str, **options: Any) -> None:
    from unlabeled.curate.pipeline import curate as run_curate

    terminal = console(as_json)
    done: Curated = run_curate(data, out, overrides=context.obj, console=terminal, **options)
    _print_counts(terminal, done.counts)
    _say(terminal, f"report: {done.report}")
    say_next(terminal, "unlabeled", "pretrain", str(done.path), "--out", "runs/curated")
    if as_json:
        print_json(
            {
                "counts": done.counts,
                "out": str(done.path),
                "report": str(done.report),
                "lineage": str(done.lineage),
            }
        )


def _print_counts(terminal: Console, counts: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("step", "images", "dropped", "kept"):
        table.add_column(name, justify="left" if name == "step" else "right")
    table.add_column("reasons", overflow="fold")
    for step, one in counts.items():
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in one["reasons"].items())
        table.add_row(step, f"{one['in']:,}", f"{one['dropped']:,}", f"{one['kept']:,}", reasons)
    terminal.print(table)


def _say(terminal: Console, text: str) -> None:
    terminal.print(text, highlight=False, markup=False, soft_wrap=True)
