"""`curate`, and each of its steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from unlabeled.cli.options import DataArgument, Device, Json, app, console, print_json

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
    help="From a pile of images to a pretraining set: `unlabeled curate DATA --out CURATED` does all steps; each is a "
    "command of its own too.",
)
app.add_typer(curate, name="curate")

Out = Annotated[
    str, typer.Option(help="The folder to make, which is DATA; one that was stopped is gone on with.")
]
Model = Annotated[
    str | None, typer.Option("--model", help="MODEL of the features; none: leave out what needs them.")
]
RecipeFile = Annotated[str | None, typer.Option("--recipe", help="A TOML file of recipe fields.")]
Memory = Annotated[str | None, typer.Option(help="That arrays may take, 4GB by default.")]
Workers = Annotated[int | None, typer.Option(help="Threads; by default one for each core.")]
Shards = Annotated[bool, typer.Option("--shards", help="Write tar shards, not a list, where DATA is files.")]
Seeds = Annotated[list[str] | None, typer.Option(help="DATA that images are to be like; may be given again.")]
Exclude = Annotated[
    list[str] | None, typer.Option(help="DATA that nothing may be near to; may be given again.")
]
Count = Annotated[int | None, typer.Option(help="Images wanted, by balanced sampling.")]


@curate.command("all")
def curate_all(
    context: typer.Context,
    data: DataArgument,
    out: Out,
    seeds: Seeds = None,
    exclude: Exclude = None,
    model: Model = None,
    count: Count = None,
    recipe: RecipeFile = None,
    memory: Memory = None,
    workers: Workers = None,
    shards: Shards = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """All steps: what `unlabeled curate DATA` does. Any recipe field can follow: --quality.min_blur 40."""
    _run(
        context, as_json, data, out, seeds=seeds or (), exclude=exclude or (), model=model, count=count,
        recipe=recipe, memory=memory, workers=workers, shards=shards, device=device,
    )  # fmt: skip


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
    """Fetch a list of URLs into tar shards, with limits, and a record of what failed."""
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
    _say(terminal, f"next: unlabeled curate {found.path} --out curated")
    if as_json:
        print_json(
            {"out": str(found.path), "urls": found.urls, "fetched": found.fetched, "failures": found.failures}
        )


@curate.command("quality")
def quality_command(
    context: typer.Context,
    data: DataArgument,
    out: Out,
    model: Model = None,
    recipe: RecipeFile = None,
    workers: Workers = None,
    shards: Shards = False,
    as_json: Json = False,
) -> None:
    """Drop what cannot be read, is small, narrow, dark, bright, blank, text or blurred."""
    _run(
        context, as_json, data, out, steps=("quality",), model=model, recipe=recipe, workers=workers, shards=shards
    )  # fmt: skip


@curate.command("duplicates")
def duplicates_command(
    context: typer.Context,
    data: DataArgument,
    out: Out,
    model: Model = None,
    recipe: RecipeFile = None,
    memory: Memory = None,
    workers: Workers = None,
    shards: Shards = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Keep one of each group of copies: of the same bytes, of near perceptual hashes, of near features."""
    _run(
        context, as_json, data, out, steps=("duplicates",), model=model, recipe=recipe, memory=memory,
        workers=workers, shards=shards, device=device,
    )  # fmt: skip


@curate.command("decontaminate")
def decontaminate_command(
    context: typer.Context,
    data: DataArgument,
    out: Out,
    exclude: Exclude = None,
    model: Model = None,
    recipe: RecipeFile = None,
    memory: Memory = None,
    workers: Workers = None,
    shards: Shards = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Drop what is too near to evaluation sets."""
    _run(
        context, as_json, data, out, steps=("decontaminate",), exclude=exclude or (), model=model, recipe=recipe,
        memory=memory, workers=workers, shards=shards, device=device,
    )  # fmt: skip


@curate.command("cluster")
def cluster_command(
    context: typer.Context,
    data: DataArgument,
    out: Out,
    count: Count = None,
    model: Model = None,
    recipe: RecipeFile = None,
    memory: Memory = None,
    workers: Workers = None,
    shards: Shards = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Keep a number of images, evenly from a tree of clusters."""
    _run(
        context, as_json, data, out, steps=("cluster",), count=count, model=model, recipe=recipe, memory=memory,
        workers=workers, shards=shards, device=device,
    )  # fmt: skip


@curate.command("retrieve")
def retrieve_command(
    context: typer.Context,
    data: DataArgument,
    out: Out,
    seeds: Seeds = None,
    model: Model = None,
    recipe: RecipeFile = None,
    memory: Memory = None,
    workers: Workers = None,
    shards: Shards = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Keep what is like the seeds."""
    _run(
        context, as_json, data, out, steps=("retrieve",), seeds=seeds or (), model=model, recipe=recipe,
        memory=memory, workers=workers, shards=shards, device=device,
    )  # fmt: skip


@curate.command("report")
def report_command(
    curated: Annotated[str, typer.Argument(help="A folder that `unlabeled curate` made.")],
    as_json: Json = False,
) -> None:
    """Print what a curation kept and dropped, and where its page is."""
    from pathlib import Path

    from unlabeled.curate.report import read_counts

    counts, terminal = read_counts(curated), console(as_json)
    page = Path(curated) / "report" / "index.html"
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
    _say(terminal, f"next: unlabeled pretrain {done.path} --out runs/curated")
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
