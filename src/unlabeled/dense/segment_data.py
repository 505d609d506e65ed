"""DATA to a folder of masks, similarities and overlays: what `unlabeled segment` does with references."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from unlabeled.dense.mask_pictures import Shown, draw_masks, overlay
from unlabeled.dense.masks import OBJECT
from unlabeled.dense.reference import Prototypes, References, Segmentation
from unlabeled.errors import UserError, writing
from unlabeled.images.bad_files import BadFiles, name_of
from unlabeled.images.decode import SUPPORTED, BadImage, decode
from unlabeled.images.sources import Source, open_source
from unlabeled.progress import Progress
from unlabeled.weights.files import replacing

if TYPE_CHECKING:
    from rich.console import Console

SHOWN = (2, 4)  # references and targets on the page
QUALITY = 92  # of JPEG overlays


def segment_data(
    prototypes: Prototypes,
    targets: Sequence[str | Path],
    out: str | Path,
    *,
    references: References | None = None,
    class_names: Sequence[str] | None = None,
    caption: str = "",
    console: Console | None = None,
) -> dict[str, Any]:
    """Write the masks of all images of some DATA to a folder, and return what was done.

    For a target a/b.jpg the folder has masks/a/b.png (class numbers; 255 on the object of a binary mask),
    overlays/a/b.jpg, and similarity/a/b.npz with `similarity` (C, h, w) and `margin` (H, W), both float16, and
    `classes`; beside them segment.json, the page segment.png with references and the first targets, and, where images
    cannot be read, bad_files.jsonl. A folder that is there is gone on with, if it is of the same references, model and
    options.

    references: to be shown on the page. class_names: by number.

    Returns targets (whose masks are there), bad_files, out, picture, and pixels: how many of each class in these masks.
    Raises UserError where the folder is of something else, nothing can be read, or the disk is full.
    """
    folder = Path(out).expanduser()
    sources = [open_source(data) for data in targets]
    begin(folder / "segment.json", prototypes.identity())
    names = named(prototypes.classes, prototypes.is_binary, class_names)
    bad = BadFiles(folder / "bad_files.jsonl")
    places = Places()
    first: list[tuple[str, NDArray[np.uint8]]] = []
    pixels = dict.fromkeys(names, 0)
    done = tried = 0
    total = sum(len(source) for source in sources)
    with Progress(console, "segmenting", "image", 0, total) if console else contextlib.nullcontext() as bar:
        for key, found in _read(sources):
            tried += 1
            if bar:
                bar.update(tried, f"{bad.count} bad" if bad.count else "")
            try:
                if isinstance(found, str):
                    raise BadImage(found)
                place = places.of(key)
                mask_path = folder / "masks" / f"{place}.png"
                segmentation = None if mask_path.exists() else prototypes.segment(found)
            except (BadImage, UserError) as error:
                bad.add(key, str(error))
                continue
            if segmentation is None:
                mask_HW = np.asarray(Image.open(mask_path))
            else:
                mask_HW = segmentation.mask
                _write(folder, place, found, segmentation, prototypes.is_binary)
            for number in pixels:
                pixels[number] += int((mask_HW == number).sum())
            done += 1
            if len(first) < SHOWN[1]:
                first.append((Path(key).name, found))
    if not done:
        raise UserError(
            f"{', '.join(str(data) for data in targets)}: no image can be segmented; {bad.path} names {bad.count}. "
            f"{SUPPORTED}"
        )
    picture = folder / "segment.png"
    _page(prototypes, references, first, names, caption, picture)
    return {
        "targets": done,
        "bad_files": bad.count,
        "out": str(folder),
        "picture": str(picture),
        "pixels": {names[number]: count for number, count in pixels.items()},
    }


def begin(path: Path, identity: dict[str, Any]) -> None:
    """Begin a folder of results that says in a file how they are made, or go on with it.

    Raises UserError where the folder is of something else.
    """
    folder = path.parent
    if path.exists():
        try:
            held = json.loads(path.read_text())
        except ValueError as error:
            raise UserError(f"{path} is damaged; choose another --out.") from error
        # Compared as they are written: JSON knows no tuples.
        differs = [
            name for name, value in json.loads(json.dumps(identity)).items() if held.get(name) != value
        ]
        if differs:
            raise UserError(
                f"{folder} holds the results of other settings ({', '.join(differs)} differ); choose another --out."
            )
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is no folder of results; choose another --out.")
    with writing(path), replacing(path) as part:
        part.write_text(json.dumps(identity, indent=2) + "\n")


def named(classes: Sequence[int], is_binary: bool, class_names: Sequence[str] | None) -> dict[int, str]:
    """Return the names of classes by the number they have in a mask."""
    if is_binary:
        return {0: "background", OBJECT: class_names[0] if class_names else "object"}
    return {
        number: class_names[number] if class_names and number < len(class_names) else f"class {number}"
        for number in classes
    }


class Places:
    """Where the results of an image go, below the folders of results: its key without its ending."""

    def __init__(self) -> None:
        self.taken: set[str] = set()

    def of(self, key: str) -> str:
        """Return the place of a key; keys that differ in their endings only keep them."""
        parts = [part for part in Path(key).parts if part not in ("..", Path(key).anchor)] or ["image"]
        place = Path(*parts).with_suffix("").as_posix()
        if place in self.taken:
            place = Path(*parts).as_posix()
        copy = 2
        while place in self.taken:
            place, copy = f"{Path(*parts).as_posix()}.{copy}", copy + 1
        self.taken.add(place)
        return place


def save_image(pixels: NDArray[np.uint8], path: Path) -> None:
    """Write a PNG, or a JPEG, that is there when it is whole. Raises UserError."""
    with writing(path), replacing(path) as part:
        if path.suffix == ".jpg":
            Image.fromarray(pixels).save(part, "JPEG", quality=QUALITY)
        else:
            Image.fromarray(pixels).save(part, "PNG")


def _read(sources: Sequence[Source]) -> Iterator[tuple[str, NDArray[np.uint8] | str]]:
    """The key of each image, and its pixels or why there are none."""
    for source in sources:
        for index in range(len(source)):
            key = name_of(source, index)
            try:
                sample = source.read(index)
                key = sample.key
                yield key, decode(sample.data)
            except (BadImage, OSError) as error:
                yield key, str(error)


def _write(
    folder: Path, place: str, pixels_HW3: NDArray[np.uint8], found: Segmentation, is_binary: bool
) -> None:
    """Write a target's results; the mask last, which says that they are whole."""
    arrays = folder / "similarity" / f"{place}.npz"
    with writing(arrays), replacing(arrays) as part, part.open("wb") as file:
        np.savez(
            file,
            similarity=found.similarity.astype(np.float16),
            margin=found.margin.astype(np.float16),
            classes=np.array(found.classes),
        )
    save_image(overlay(pixels_HW3, found.mask, is_binary), folder / "overlays" / f"{place}.jpg")
    save_image(found.mask, folder / "masks" / f"{place}.png")


def _page(
    prototypes: Prototypes,
    references: References | None,
    first: Sequence[tuple[str, NDArray[np.uint8]]],
    names: dict[int, str],
    caption: str,
    path: Path,
) -> None:
    is_binary = prototypes.is_binary
    shown = []
    if references:
        given = zip(references.names, references.images, references.labels.maps, strict=True)
        for name, one, labels in itertools.islice(given, SHOWN[0]):
            mask = labels * np.uint8(OBJECT) if is_binary else labels
            shown.append(Shown(Path(name).name, one, prototypes.segment(one).margin, mask, True))
    for name, one in first:
        found = prototypes.segment(one)
        shown.append(Shown(name, one, found.margin, found.mask))
    draw_masks(shown, names, is_binary, caption).save(path)
