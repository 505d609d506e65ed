"""`segment`: masks by reference, and a first mask through a video."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unlabeled.cli.options import Device, Json, ModelOption, app, console, print_json
from unlabeled.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console


@app.command()
def segment(
    targets: Annotated[
        list[str], typer.Argument(metavar="TARGET...", help="Images or DATA; or one video or folder of frames.")
    ],
    model: ModelOption,
    mask: Annotated[
        list[str],
        typer.Option(
            metavar="PNG",
            help="A reference's mask: 255 on the object and 0 elsewhere, or class numbers and 255 for unknown; or "
            "several masks of one object each, A.png,B.png. Without a reference: of the first frame.",
        ),
    ],
    reference: Annotated[
        list[str] | None, typer.Option(metavar="IMAGE", help="A marked image; as often as --mask, in the same order.")
    ] = None,
    out: Annotated[str, typer.Option(help="The folder of results; one that is there is gone on with.")] = "segmented",
    classes: Annotated[
        str | None, typer.Option(help="Names of the classes by number, as in sky,building,road.")
    ] = None,
    prototypes: Annotated[int | None, typer.Option(help="Of a class, at most; 128 by default.")] = None,
    size: Annotated[
        int | None,
        typer.Option(help="Short side in pixels that the model sees; by default that of its training images, and at "
                     "least 37 patches."),
    ] = None,
    layer: Annotated[int, typer.Option(help="The block whose patches are compared; -1 is the last.")] = -1,
    radius: Annotated[
        float | None, typer.Option(help="Of the filter that follows the image's edges, in patches; 0 is none.")
    ] = None,
    propagate: Annotated[
        bool, typer.Option("--propagate", help="With a reference: segment the first frame by it, and go on from there.")
    ] = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:  # fmt: skip
    """Masks without training, from images that are marked. Of a video, from the mask of its first frame."""
    from unlabeled.dense.video import is_video

    terminal = console(as_json)
    names = [name.strip() for name in classes.split(",")] if classes else None
    options: dict[str, Any] = {"size": size, "layer": layer, "device": device}
    options |= {} if radius is None else {"radius": radius}
    caption = f"{model}, short side {size} pixels" if size else model
    masks = [_masks(text) for text in mask]
    videos = [target for target in targets if is_video(target)]
    if not reference or propagate or videos:
        if len(targets) != 1:
            raise UserError(
                f"A mask is propagated through one video or folder of frames at a time, not {len(targets)} targets; "
                "images are segmented with --reference."
            )
        result = _propagate(
            targets[0], model, reference, masks, out, names, prototypes, options, caption, terminal
        )
    else:
        from unlabeled.dense.reference import learn_prototypes, open_references
        from unlabeled.dense.segment_data import segment_data

        references = open_references(reference, masks, names)
        options |= {} if prototypes is None else {"num_prototypes": prototypes}
        learned = learn_prototypes(model, references, **options)
        result = segment_data(
            learned, targets, out, references=references, class_names=names, caption=caption, console=terminal
        )
    bad = result["bad_files"]
    said = f"{out}: {result['targets']} masks; see {result['picture']}"
    said += f"; {bad} files could not be read, see {Path(out) / 'bad_files.jsonl'}" if bad else ""
    terminal.print(said, highlight=False, markup=False, soft_wrap=True)
    if as_json:
        print_json(result)


def _masks(text: str) -> str | list[str]:
    """A mask's file, or the files of a list."""
    return text if Path(text).expanduser().exists() or "," not in text else text.split(",")


def _propagate(
    target: str,
    model: str,
    reference: list[str] | None,
    masks: list[str | list[str]],
    out: str,
    names: list[str] | None,
    prototypes: int | None,
    options: dict[str, Any],
    caption: str,
    terminal: Console,
) -> dict[str, Any]:
    from unlabeled.dense.masks import labels_of
    from unlabeled.dense.propagate_data import first_frame, propagate_data
    from unlabeled.dense.reference import learn_prototypes, open_references
    from unlabeled.dense.video import Frames

    frames = Frames(target)
    first = first_frame(frames)
    assert first.pixels is not None
    given: list[Any] = masks
    if reference:
        extra = {} if prototypes is None else {"num_prototypes": prototypes}
        learned = learn_prototypes(model, open_references(reference, masks, names), **(options | extra))
        given = [learned.segment(first.pixels).mask]
    elif prototypes is not None:
        raise UserError("--prototypes are of a --reference; a first frame's mask is propagated without.")
    height, width = first.pixels.shape[:2]
    labels = labels_of(given, [(height, width)], [f"the first frame, {first.key}"], names)
    return propagate_data(
        model, frames, labels, out, class_names=names, caption=caption, console=terminal, **options
    )
