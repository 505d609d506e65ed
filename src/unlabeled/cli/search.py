"""`index` and `search`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unlabeled.cli.options import Device, Json, app, console, print_json, say_next
from unlabeled.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from unlabeled.search.index import Index

IndexOption = Annotated[str, typer.Option("--index", help="The index's folder.")]
GROUPS_SHOWN = 20


@app.command("index")
def index_command(
    table: Annotated[str | None, typer.Argument(help="A feature table, that `embed` wrote.")] = None,
    out: Annotated[
        str, typer.Option(help="The index's folder; what is new is added to one that is there.")
    ] = "index",
    recall: Annotated[
        float | None, typer.Option(help="Share of the true 10 nearest to find, .95 by default.")
    ] = None,
    kind: Annotated[
        str | None, typer.Option(help="auto, exact or approximate; auto is exact up to 100,000 images.")
    ] = None,
    delete: Annotated[
        str | None, typer.Option(metavar="WHERE", help="Delete images, as in \"key LIKE 'old/%'\".")
    ] = None,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Build it anew from its own vectors, without deleted ones.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Build an image index of a feature table. Or change one: add, delete, rebuild."""
    from unlabeled.progress import Progress
    from unlabeled.search.index import build_index, open_index

    terminal = console(as_json)
    is_new = not (Path(out).expanduser() / "index.json").exists()
    if table is None and not (delete or rebuild):
        raise UserError(
            "Give a feature table to index, or --delete or --rebuild with an index that is there."
        )
    if is_new and (delete or rebuild):
        open_index(out)  # which says what is wrong with it
    if not is_new and not rebuild and (recall is not None or kind is not None):
        raise UserError(f"{out} is an index already; --recall and --kind change it together with --rebuild.")
    result: dict[str, Any] = {}
    bars: list[Progress] = []

    def seen(done: int, total: int) -> None:
        if not bars:
            bars.append(Progress(terminal, "index", "image", 0, total).__enter__())
        bars[0].update(done, "")

    try:
        if is_new:
            wanted = 0.95 if recall is None else recall
            built = build_index(str(table), out, recall=wanted, choice=kind or "auto", seen=seen)  # type: ignore[arg-type]
            result["added"] = len(built)
        else:
            built = open_index(out)
            if delete:
                result["deleted"] = built.delete(delete)
            if table:
                result["added"] = built.add(table, seen=seen)
            if rebuild:
                built.rebuild(recall=recall, choice=kind, seen=seen)  # type: ignore[arg-type]
    finally:
        for bar in bars:
            bar.__exit__()
    _say(terminal, _described(built, result))
    say_next(terminal, "unlabeled", "search", "IMAGE", "--index", out)
    if as_json:
        print_json({"images": len(built), "kind": built.kind, "recall": built.recall, "index": out, **result})


def _described(index: Index, result: dict[str, Any]) -> str:
    changes = ", ".join(f"{count:,} {verb}" for verb, count in result.items())
    said = f"{index.path}: {len(index):,} images{f' ({changes})' if changes else ''}, "
    if index.kind == "exact":
        return said + "exact search"
    manifest = index.now.manifest
    wanted, measured_on = manifest.recall, int(manifest.curve[0].get("images", 1000))
    said += f"approximate search, recall@10 {index.recall:.3f} measured on {measured_on:,} of its own images"
    return said if index.recall >= wanted else f"{said}; {wanted:g} was wanted and is out of its reach"


@app.command()
def search(
    images: Annotated[list[str] | None, typer.Argument(metavar="IMAGE...", help="Image files.")] = None,
    index: IndexOption = "index",
    k: Annotated[int, typer.Option("--k", "-k", help="Hits of each image.")] = 5,
    where: Annotated[
        str | None,
        typer.Option(help="Only images that meet this: \"label = 'cat' AND width >= 640\"; SQL's WHERE."),
    ] = None,
    duplicates: Annotated[
        bool, typer.Option("--duplicates", help="No query: groups of images that are similar to each other.")
    ] = False,
    similarity: Annotated[
        float, typer.Option(help="Cosine from which on two images are duplicates of each other.")
    ] = 0.95,
    recall: Annotated[float | None, typer.Option(help="Another than the index was built for.")] = None,
    model: Annotated[str | None, typer.Option(help="The index's MODEL, where it has moved.")] = None,
    out: Annotated[str, typer.Option(help="The contact sheet, a PNG.")] = "hits.png",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Find images similar to an image, or to each other."""
    from unlabeled.features.page import check_place
    from unlabeled.search.index import open_index

    terminal, opened = console(as_json), open_index(index)
    check_place(Path(out), images or [])
    if duplicates:
        if images:
            raise UserError(
                f"--duplicates compares the index's images with each other and takes no IMAGE, as {images[0]} is; "
                "--similarity says from which similarity on."
            )
        _duplicates(terminal, opened, similarity, where, out, as_json)
        return
    if not images:
        raise UserError("Give one image or more to search with, or --duplicates.")
    from unlabeled.features.extractor import Extractor
    from unlabeled.search.sheet import write_hits

    opened.check(k, recall)
    opened.extractor = Extractor.of(opened.identity, device=device, model=model)
    hits = opened.search(images, k, where=where, recall=recall)
    names = [Path(image).name for image in images]
    unread = write_hits(Path(out), opened, images, names, hits)
    for image, found in zip(images, hits, strict=True):
        if found:
            _print_hits(terminal, opened, image, found)
    if len(hits[0]) < k:
        why = f"no more images meet {where}" if where else "the approximate index finds no more"
        _say(terminal, f"{len(hits[0])} of {k} hits: {why}")
    _say(
        terminal, f"contact sheet: {out}" + (f"; {unread} images could not be read for it" if unread else "")
    )
    if as_json:
        listed = [
            {"query": image, "rank": hit.rank, "similarity": hit.similarity, "key": hit.key}
            for image, found in zip(images, hits, strict=True)
            for hit in found
        ]
        print_json({"hits": listed, "picture": out})


def _print_hits(terminal: Console, index: Index, image: str, hits: Any) -> None:
    from rich.table import Table
    from rich.text import Text

    rows = [index.row(hit.row) for hit in hits]
    labelled = any(row["label"] is not None for row in rows)
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("rank", justify="right")
    table.add_column("similarity", justify="right")
    if labelled:
        table.add_column("label")
    table.add_column("key", overflow="fold")
    for hit, row in zip(hits, rows, strict=True):
        label = [Text(row["label"] or "")] if labelled else []
        table.add_row(str(hit.rank), f"{hit.similarity:.4f}", *label, Text(hit.key))
    _say(terminal, image)
    terminal.print(table)


def _duplicates(
    terminal: Console, index: Index, similarity: float, where: str | None, out: str, as_json: bool
) -> None:
    from unlabeled.progress import Progress
    from unlabeled.search.sheet import write_groups

    with Progress(terminal, "duplicates", "image", 0, len(index)) as progress:
        groups = index.duplicates(similarity, where=where, seen=lambda done, total: progress.update(done, ""))
    count = sum(len(group.keys) for group in groups)
    for group in groups[:GROUPS_SHOWN]:
        _say(terminal, f"{len(group.keys)} images, {group.similarities[-1]:.3f} and more to the first:")
        for key in group.keys[:GROUPS_SHOWN]:
            _say(terminal, f"    {key}")
        if len(group.keys) > GROUPS_SHOWN:
            _say(terminal, f"    and {len(group.keys) - GROUPS_SHOWN} more")
    if len(groups) > GROUPS_SHOWN:
        _say(terminal, f"and {len(groups) - GROUPS_SHOWN} groups more; --json lists all")
    counted = f"{len(groups):,} group{'s' * (len(groups) != 1)}"
    _say(terminal, f"{counted} of {count:,} images at a similarity of {similarity:g} and more")
    if groups:
        unread = write_groups(Path(out), index, groups)
        _say(
            terminal,
            f"contact sheet: {out}" + (f"; {unread} images could not be read for it" if unread else ""),
        )
    if as_json:
        print_json(
            {
                "groups": [{"keys": group.keys, "similarities": group.similarities} for group in groups],
                "picture": out if groups else None,
            }
        )


def _say(terminal: Console, text: str) -> None:
    terminal.print(text, highlight=False, markup=False, soft_wrap=True)
