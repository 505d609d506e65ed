"""`evaluate`: the papers' protocols, several models in one table, and the health of a feature table."""

from __future__ import annotations

from collections.abc import Callable
from inspect import Signature, signature
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from unlabeled.cli.options import Device, Json, Shape, Size, app, console, print_json
from unlabeled.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from unlabeled.evaluate.report import Report

group = typer.Typer(
    help="How good features are, by the papers' protocols. Several models come in one table.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(group, name="evaluate")

Model = Annotated[
    list[str] | None,
    typer.Option(help="A MODEL; give it again for each more. None where both sides are feature tables."),
]
Out = Annotated[
    str | None,
    typer.Option(
        metavar="REPORT",
        help="A folder for report.md, .json and .html; what is done there is not done again.",
    ),
]
Seed = Annotated[int, typer.Option(help="Of everything random.")]
Features = Annotated[str, typer.Option(help="cls, or cls+mean for CLS and mean patch side by side.")]
Options = Callable[..., dict[str, Any]]
FIRST = ("train", "test", "model")
LAST = ("out", "cache", "seed", "device", "as_json")


def _of_features(
    *,
    train: Annotated[
        str, typer.Option(help="DATA with labels, or a feature table; the gallery of retrieval.")
    ],
    test: Annotated[str, typer.Option(help="The same; the queries of retrieval.")],
    model: Model = None,
    out: Out = None,
    cache: Annotated[
        str | None, typer.Option(help="Where features are kept; REPORT/features by default.")
    ] = None,
    size: Size = None,
    shape: Shape = "crop",
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> dict[str, Any]:
    """What all protocols on features of whole images take; returns how features are extracted."""
    return {"cache": cache, "size": size, "shape": shape, "device": device}


def _of_maps(
    *,
    train: Annotated[str, typer.Option(help="A folder of images/ beside labels/ or depth/.")],
    test: Annotated[str, typer.Option(help="The same; the classes of train, where there are labels.")],
    model: Model = None,
    out: Out = None,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> dict[str, Any]:
    """What segmentation and depth take."""
    return {"device": device}


def _training(
    *,
    size: Annotated[
        int, typer.Option(help="Pixels, of the short side that the model sees; 0: as finetune takes it.")
    ] = 0,
    window: Annotated[
        int,
        typer.Option(help="Pixels; test images are seen through a sliding window of this side; 0: whole."),
    ] = 0,
    lr: Annotated[
        str, typer.Option("--lr", help="Learning rates; the best one within train is chosen.")
    ] = "1e-3,3e-3,1e-2",
    epochs: Annotated[float, typer.Option(help="Passes over train; 0: as finetune takes it.")] = 0,
) -> dict[str, Any]:
    """How a head on maps is trained, and looks at test images."""
    return {"size": size, "window": window, "epochs": epochs, "learning_rates": _rates(lr)}


def _protocol(task: str, *shared: Options) -> Callable[[Options], Options]:
    """Make a command of what returns a protocol's own options; it takes those of `shared` as well.

    The first of `shared` says how features are extracted; what the others return joins the protocol's options.
    """

    def made(own: Options) -> Options:
        parts = (shared[0], own, *shared[1:])

        def command(**given: Any) -> None:
            extraction, *options = (
                part(**{name: given[name] for name in signature(part).parameters}) for part in parts
            )
            protocol = {name: value for one in options for name, value in one.items()} | {
                "seed": given["seed"]
            }
            _run(task, protocol, extraction, given)

        hints = {
            name: hint for part in parts for name, hint in get_type_hints(part, include_extras=True).items()
        }
        parameters = [one for part in parts for one in signature(part).parameters.values()]
        # Data and model, then the protocol's own, then what all have.
        parameters.sort(key=lambda one: (one.name not in FIRST) + (one.name in LAST))
        # Typer reads the signature.
        command.__signature__ = Signature(  # type: ignore[attr-defined]
            [one.replace(annotation=hints[one.name]) for one in parameters]
        )
        command.__annotations__ = {one.name: hints[one.name] for one in parameters}
        group.command(task, help=own.__doc__)(command)
        return own

    return made


@_protocol("knn", _of_features)
def _knn(
    *,
    k: Annotated[
        str,
        typer.Option("--k", "-k", help="Neighbours; of several the one is chosen that is best within train."),
    ] = "10,20,100,200",
    temperature: Annotated[float, typer.Option(help="Of the votes.")] = 0.07,
    features: Features = "cls",
) -> dict[str, Any]:
    """The classes of the nearest training images vote. They are weighed by similarity."""
    return {"k": _numbers("--k", k), "temperature": temperature, "features": features}


@_protocol("linear", _of_features)
def _linear(
    *,
    steps: Annotated[int | None, typer.Option(help="Of SGD; 10 passes by default, 500 at least.")] = None,
    batch: Annotated[int, typer.Option(help="Images of a step.")] = 1024,
) -> dict[str, Any]:
    """A linear head. Learning rate, {1, 4} layers and mean patch or not are chosen within train."""
    return {"steps": steps, "batch": batch}


@_protocol("logreg", _of_features)
def _logreg(*, features: Features = "cls") -> dict[str, Any]:
    """Logistic regression, its C chosen within train."""
    return {"features": features}


@_protocol("fewshot", _of_features)
def _fewshot(
    *,
    shots: Annotated[str, typer.Option(help="Training images a class.")] = "1,5,10",
    draws: Annotated[int, typer.Option(help="Of the training images; the accuracy is the mean.")] = 10,
    features: Features = "cls",
) -> dict[str, Any]:
    """Logistic regression on a few images a class. They are drawn several times."""
    return {"shots": _numbers("--shots", shots), "draws": draws, "features": features}


@_protocol("retrieval", _of_features)
def _retrieval(
    *,
    ground_truth: Annotated[
        str | None,
        typer.Option(metavar="JSON", help="What each query should find, as in revisited Oxford and Paris."),
    ] = None,
    features: Features = "cls",
) -> dict[str, Any]:
    """mAP and recall of finding images of a kind. Of one label, or of a ground truth (easy, medium, hard)."""
    return {"ground_truth": ground_truth, "features": features}


@_protocol("segmentation", _of_maps, _training)
def _segmentation(
    *,
    head: Annotated[str, typer.Option(help="linear4 (four blocks) or linear (the last one).")] = "linear4",
    ignore: Annotated[int, typer.Option(help="Label of pixels that do not count.")] = 255,
) -> dict[str, Any]:
    """The class of every pixel, by a head on frozen features. mIoU, IoU of each class, pixel accuracy."""
    return {"head": head, "ignore": ignore}


@_protocol("depth", _of_maps, _training)
def _depth(
    *,
    head: Annotated[str, typer.Option(help="linear4, linear, dpt or regression.")] = "linear4",
    max_depth: Annotated[
        float, typer.Option(help="Metres; what is farther does not count. 0: as far as train goes.")
    ] = 0.0,
    crop: Annotated[str, typer.Option(help="The part that counts: eigen (NYU) or garg (KITTI).")] = "",
    align: Annotated[
        str, typer.Option(help="Of depth up to scale: median or 'least squares', on each image.")
    ] = "",
    depth_scale: Annotated[float, typer.Option(help="What one metre is in an integer depth file.")] = 1000.0,
    channels: Annotated[int, typer.Option(help="Of dpt's maps; the papers' 256 are slow on a CPU.")] = 256,
) -> dict[str, Any]:
    """How far every pixel is, by a head on frozen features. RMSE, AbsRel, log10, delta1 to delta3."""
    return {
        "head": head, "max_depth": max_depth, "crop": crop, "align": align, "depth_scale": depth_scale,
        "channels": channels,
    }  # fmt: skip


@_protocol("all", _of_features)
def _all() -> dict[str, Any]:
    """Every protocol that the data allow."""
    return {}


@group.command("health")
def health_command(
    table: Annotated[
        str, typer.Argument(help="A feature table, that `embed` wrote: of vectors or of patches.")
    ],
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """What features say of their model without labels. Rank, spread, dead dimensions, outlier patches."""
    from rich.table import Table

    from unlabeled.evaluate.health import health

    terminal, found = console(as_json), health(table, seed=seed)
    shown = Table(box=None, padding=(0, 2, 0, 0))
    shown.add_column("figure")
    shown.add_column("value", justify="right")
    shown.add_column("what it says", overflow="fold")
    for name, value in found.figures.items():
        shown.add_row(name, f"{value:.4g}", found.meanings[name])
    terminal.print(shown)
    counted = ", ".join(f"{count:,} {name}" for name, count in found.counts.items())
    _say(terminal, f"{found.table}: of {counted}")
    if as_json:
        print_json(
            {**found.figures, "meanings": found.meanings, "counts": found.counts, "table": found.table}
        )


def _run(task: str, options: dict[str, Any], extraction: dict[str, Any], given: dict[str, Any]) -> None:
    """Run one protocol, or all, and print, write and say what was found.

    options: of the protocol, of each of all. given: what was said of train, test, model, out and as_json.
    """
    from unlabeled.evaluate.page import cell, write_report
    from unlabeled.evaluate.report import CLASSIFICATION, run
    from unlabeled.evaluate.result import Result

    train, test, out, as_json = (given[name] for name in ("train", "test", "out", "as_json"))
    terminal = console(as_json)

    def seen(result: Result, seconds: float) -> None:
        value, between = cell(result, result.main)
        took = f"{seconds:.0f} s" if seconds else f"kept in {out}"
        _say(terminal, f"{result.task} {result.main} of {result.model}: {value} ({between}), {took}")

    by_task = dict.fromkeys(CLASSIFICATION if task == "all" else [task], options)
    report = run(
        [task], given["model"] or [], train, test, out=out, options=by_task, seen=seen, console=terminal, **extraction
    )  # fmt: skip
    _print(terminal, report)
    if out:
        write_report(out, report, f"{task} of {train} on {test}")
        _say(terminal, f"report: {out}/report.html, report.md, report.json")
    if as_json:
        print_json({**report.as_json(), "report": out})


def _print(terminal: Console, report: Report) -> None:
    from rich.table import Table
    from rich.text import Text

    from unlabeled.evaluate.page import best, cell, notes_of, rows_of, said, short_names
    from unlabeled.evaluate.result import column

    names = short_names([one.model for one in report.results])
    table = Table(box=None, padding=(0, 3, 0, 0))
    table.add_column("", no_wrap=True)
    for name in names.values():
        table.add_column(Text(name), justify="right")
    for task, results in report.tasks.items():
        by_model = {one.model: one for one in results}
        for name in rows_of(results):
            cells = []
            for model in names:
                one = by_model.get(model)
                if one is None or name not in one.metrics:
                    cells.append(Text(""))
                    continue
                value, between = cell(one, name)
                is_best = len(results) > 1 and one.metrics[name] == best(results, name)
                cells.append(
                    Text.assemble(
                        (value, "bold" if is_best else ""), (f" ({between})" if between else "", "dim")
                    )
                )
            table.add_row(column(task, name), *cells)
    terminal.print(table)
    for comparison in report.comparisons:
        _say(terminal, said(comparison, names))
    for note in notes_of(report, names):
        _say(terminal, f"note: {note}")
    for task, model, reason in report.skipped:
        _say(terminal, f"{task} was left out for {model}: {reason}")
    if bad := max(one.counts.get("bad_files", 0) for one in report.results):
        _say(terminal, f"{bad} files could not be read; the report names them")


def _numbers(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"{option} {text} is no list of whole numbers; 5 and 1,5,10 are.") from error


def _rates(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"--lr {text} is no list of learning rates; 1e-3 and 1e-3,1e-2 are.") from error


def _say(terminal: Console, text: str) -> None:
    terminal.print(text, highlight=False, markup=False, soft_wrap=True)
