"""What a trained head says of all images of DATA: a table of classes, masks, or depth; with pictures and figures.

    predictions.jsonl     a row an image, written as soon as it is done: what is there is not done again
    predictions.parquet   the same as a table, and predictions.csv
    masks/, overlays/     of segmentation: class numbers with the palette, and the same over the image
    depth/, pictures/     of depth: 16 bits of 1 / depth_scale metres, and colours with their bar
    predictions.png       some of the images
    predictions.json      head, counts and figures
    bad_files.jsonl       what could not be read

Shape suffixes: C classes, H W pixels, h w pixels as the model sees them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from PIL import Image

from unlabeled.ahead import LOOKAHEAD, ahead
from unlabeled.dense.labelled import DenseData, depth_images, labelled_images, read_depth, read_labels
from unlabeled.errors import UserError, writing
from unlabeled.finetune.batches import num_threads, of_one_shape
from unlabeled.finetune.compare import Figures, class_figures, depth_figures, segmentation_figures
from unlabeled.finetune.pictures import Shown, coloured_depth, overlay, write_page
from unlabeled.finetune.rows import Row, flat, kept_rows
from unlabeled.finetune.saved import TrainedHead, load_head
from unlabeled.images.bad_files import BadFiles, name_of
from unlabeled.images.decode import SUPPORTED, BadImage, decode
from unlabeled.images.sources import Source, lasting, open_source
from unlabeled.json_file import read_json
from unlabeled.progress import Progress
from unlabeled.weights.files import replacing

if TYPE_CHECKING:
    from rich.console import Console

    from unlabeled.vit import VisionTransformer

BATCH = {"classify": 64, "segment": 4, "depth": 4}  # images at once
SHOWN = {"classify": 16, "segment": 6, "depth": 6}  # images in predictions.png


@dataclass(frozen=True)
class Predictions:
    """What `predict` wrote.

    Attributes:
        path: the folder.
        images: predicted, in this call or before.
        bad_files: that could not be.
        figures: where DATA has labels: accuracy, top5_accuracy; miou, pixel_accuracy; or depth's.
        by_class: accuracy or IoU of each class, where DATA has labels of it.
        notes: one line for each thing a user should know.
    """

    path: Path
    images: int
    bad_files: int
    figures: dict[str, float]
    by_class: dict[str, float]
    notes: tuple[str, ...] = ()

    @property
    def rows(self) -> pa.Table:
        """The table."""
        return pq.read_table(self.path / "predictions.parquet")


class _Loaded(NamedTuple):
    place: int  # in the source
    key: str
    reason: str = ""
    label: int | None = None
    size: tuple[int, int] = (0, 0)  # height, width
    pixels: NDArray[np.uint8] | None = None  # (H, W, 3), where pictures are made of it
    prepared: NDArray[np.uint8] | None = None  # (3, h, w)


def predict(
    data: str | Path,
    head: str | Path | TrainedHead,
    out: str | Path,
    *,
    model: str | Path | VisionTransformer | None = None,
    device: str = "auto",
    pictures: bool = True,
    console: Console | None = None,
) -> Predictions:
    """Predict all images of DATA into a folder; one that was begun is gone on with.

    Args:
        data: DATA; or a folder of images/ beside labels/ or depth/, which the predictions are then compared with.
        head: what `finetune` made, or one of Meta's released heads with its model.
        out: the folder to make.
        model: the backbone, where it does not lie in the head's folder.
        device: auto, cpu, cuda, cuda:1, mps; of a head that is loaded already its own.
        pictures: overlays and coloured depth, and a page of some images.
        console: where progress is shown; nowhere by default.

    Raises:
        UserError: no head, another head than the folder was begun with, no image can be read, a full disk.
    """
    trained = head if isinstance(head, TrainedHead) else load_head(head, model, device)
    folder, task = Path(out).expanduser(), trained.info.task
    source, truth, notes = _opened(data, trained)
    header = _begin(folder, trained, lasting(data), len(source))
    bad = BadFiles(folder / "bad_files.jsonl")
    journal = folder / "predictions.jsonl"
    rows = kept_rows(journal)
    done = {row["index"] for row in rows}
    names = {row["file"] for row in rows if "file" in row}
    waiting = [index for index in range(len(source)) if index not in done]
    write = _Writer(folder, trained, header.get("depth_scale", 0), pictures)
    with (
        writing(folder), journal.open("a", encoding="utf-8") as file,
        _progress(console, len(done), len(source)) as progress,
    ):  # fmt: skip
        for batch in _batches(source, waiting, trained, bad, pictures and task == "segment"):
            prepared = torch.from_numpy(np.stack([one.prepared for one in batch if one.prepared is not None]))
            found = trained.results(trained.outputs(prepared), [one.size for one in batch])
            for one, result in zip(batch, found, strict=True):
                row = write(one, result, names)
                if task == "classify" and one.label is not None and source.class_names:
                    row["label"] = source.class_names[one.label]
                rows.append(row)
                file.write(json.dumps(row) + "\n")
            file.flush()
            progress.update(len(rows) + bad.count, f"{bad.count} bad" if bad.count else "")
    if not rows:
        raise UserError(
            f"{source.name} holds no image that can be read; {bad.path} names {bad.count} files. {SUPPORTED}"
        )
    rows.sort(key=lambda row: row["index"])
    table = pa.Table.from_pylist([flat(row) for row in rows])
    with writing(folder):
        with replacing(folder / "predictions.parquet") as part:
            pq.write_table(table, part)
        with replacing(folder / "predictions.csv") as part:
            pa.csv.write_csv(table, part)
    figures, by_class, more = _figures(rows, folder, trained, truth, header.get("depth_scale", 0))
    notes += more
    header |= {"predicted": len(rows), "bad_files": bad.count, "figures": figures, "by_class": by_class}
    _write_header(folder, header)
    if pictures:
        _show(rows, source, folder, trained, header)
    return Predictions(folder, len(rows), bad.count, figures, by_class, tuple(notes))


def _opened(data: str | Path, trained: TrainedHead) -> tuple[Source, DenseData | None, list[str]]:
    """Return the images, what is known of their pixels, and what a user should know."""
    task, folder = trained.info.task, Path(data).expanduser()
    part = {"segment": "labels", "depth": "depth"}.get(task, "")
    if not part or not (folder / "images").is_dir():
        return open_source(data), None, []
    source = open_source(folder / "images")
    if not (folder / part).is_dir():
        return source, None, []
    if task == "segment":
        truth = labelled_images(folder, class_names=trained.info.classes, ignore=trained.info.ignore)
    else:
        truth = depth_images(folder, depth_scale=trained.info.depth_scale)
    return source, truth, list(truth.notes)


def _begin(folder: Path, trained: TrainedHead, data: str, images: int) -> dict[str, Any]:
    """Make the folder's predictions.json, or check that it is of the same head and images."""
    header: dict[str, Any] = {
        "task": trained.info.task, "head": trained.identity, "data": data, "images": images,
    }  # fmt: skip
    if trained.info.task == "depth":
        header["depth_scale"] = _depth_scale(trained)
    if (folder / "predictions.json").exists():
        held = read_json(folder / "predictions.json")
        for name, words in (
            ("head", "of another head"),
            ("data", "of other images"),
            ("images", "of other images"),
        ):
            if held.get(name) != header[name]:
                raise UserError(f"{folder} holds predictions {words}; choose another --out.")
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and holds no predictions; choose another --out.")
    else:
        _write_header(folder, header)
    return header


def _write_header(folder: Path, header: dict[str, Any]) -> None:
    with writing(folder), replacing(folder / "predictions.json") as part:
        part.write_text(json.dumps(header, indent=2) + "\n", encoding="utf-8")


def _depth_scale(trained: TrainedHead) -> int:
    """Return what one metre is in a 16-bit PNG: millimetres as far as they reach, KITTI's 256, or metres."""
    farthest = trained.info.arguments["max_depth"]
    return next(scale for scale in (1000, 256, 1) if farthest * scale < 65535 or scale == 1)


def _progress(console: Console | None, done: int, total: int) -> Progress:
    from rich.console import Console

    return Progress(console or Console(quiet=True), "predicting", "image", done, total)


def _batches(
    source: Source, indices: list[int], trained: TrainedHead, bad: BadFiles, keeps_pixels: bool
) -> Iterator[list[_Loaded]]:
    """Give the images that can be read, in order, neighbours of one shape together."""

    def load(index: int) -> _Loaded:
        key = name_of(source, index)
        try:
            sample = source.read(index)
            key = sample.key
            pixels = decode(sample.data)
            size, prepared = (pixels.shape[0], pixels.shape[1]), trained.preprocessing(pixels)
            kept = pixels if keeps_pixels else None
            return _Loaded(index, key, "", sample.label, size, kept, prepared)
        except (BadImage, OSError, UserError) as error:
            return _Loaded(index, key, str(error))

    def good(pool: ThreadPoolExecutor) -> Iterator[_Loaded]:
        # Whole photographs are large: few of them wait.
        for one in ahead(pool, load, indices, 8 if keeps_pixels else LOOKAHEAD):
            if one.prepared is None:
                bad.add(one.key, one.reason)
            else:
                yield one

    with ThreadPoolExecutor(num_threads()) as pool:
        yield from of_one_shape(
            good(pool), lambda one: one.prepared is not None and one.prepared.shape, BATCH[trained.info.task]
        )


class _Writer:
    """Writes one image's files and says what its row is."""

    def __init__(self, folder: Path, trained: TrainedHead, depth_scale: int, pictures: bool) -> None:
        self.folder, self.info = folder, trained.info
        self.depth_scale, self.pictures = depth_scale, pictures

    def __call__(self, one: _Loaded, result: Any, names: set[str]) -> Row:
        if self.info.task == "classify":
            return Row(index=one.place, key=one.key, top=result.top)
        height, width = one.size
        part = "masks" if self.info.task == "segment" else "depth"
        file = f"{part}/{_name_of(one.key)}.png"
        if file in names:  # of two images that differ in their ending only
            file = f"{part}/{_name_of(one.key)}_{one.place}.png"
        names.add(file)
        row = Row(index=one.place, key=one.key, file=file, width=width, height=height)
        if self.info.task == "segment":
            self._image(file, _mask(result, self.info.palette))
            counts = np.bincount(result.reshape(-1), minlength=len(self.info.classes)) / result.size
            row["shares"] = {self.info.classes[c]: float(counts[c]) for c in np.flatnonzero(counts)}
            if self.pictures and one.pixels is not None:
                picture = overlay(one.pixels, result, self.info.palette)
                self._image(file.replace("masks/", "overlays/", 1), Image.fromarray(picture))
            return row
        stored = (result.astype(np.float64) * self.depth_scale).round().clip(1, 65535).astype(np.uint16)
        self._image(file, Image.fromarray(stored))
        row["metres"] = (float(result.min()), float(np.median(result)), float(result.max()))
        if self.pictures:
            picture = coloured_depth(result)
            self._image(file.replace("depth/", "pictures/", 1), Image.fromarray(picture))
        return row

    def _image(self, file: str, image: Image.Image) -> None:
        with replacing(self.folder / file) as part:
            image.save(part, "PNG", compress_level=3)


def _name_of(key: str) -> str:
    """Return a file name for a key, without its ending, that stays below the folder."""
    parts = [part for part in re.sub(r"[^\w./-]", "_", key).split("/") if part not in ("", ".", "..")]
    name = "/".join(parts) or "image"
    stem, dot, ending = name.rpartition(".")
    return stem if dot and len(ending) <= 4 and stem and not stem.endswith("/") else name


def _mask(classes_HW: NDArray[np.int64], palette: list[tuple[int, int, int]]) -> Image.Image:
    """Return class numbers as a palette image of 8 bits, or as 16 bits where there are more."""
    if len(palette) > 256:
        return Image.fromarray(classes_HW.astype(np.uint16))
    image = Image.fromarray(classes_HW.astype(np.uint8), "P")
    image.putpalette([value for colour in palette for value in colour])
    return image


def _figures(
    rows: list[Row], folder: Path, trained: TrainedHead, truth: DenseData | None, depth_scale: float
) -> Figures:
    info = trained.info
    if info.task == "classify":
        return class_figures(rows, info.classes)
    if truth is None:
        return {}, {}, []
    if info.task == "segment":
        return segmentation_figures(rows, folder, truth, info.classes)
    return depth_figures(rows, folder, truth, depth_scale, info.arguments["max_depth"])


def _show(
    rows: list[Row], source: Source, folder: Path, trained: TrainedHead, header: dict[str, Any]
) -> None:
    """Write predictions.png: some of the images, evenly over all."""
    info = trained.info
    chosen = np.linspace(0, len(rows) - 1, min(len(rows), SHOWN[info.task])).round().astype(int)
    shown = []
    for row in (rows[place] for place in chosen):
        pixels = decode(source.read(row["index"]).data)
        if info.task == "classify":
            name, probability = row["top"][0]
            shown.append(Shown(pixels, f"{name} {probability:.0%}", label=row.get("label")))
        elif info.task == "segment":
            shown.append(Shown(pixels, row["key"], classes=read_labels(folder / row["file"])))
        else:
            metres = read_depth(folder / row["file"], header["depth_scale"])
            shown.append(Shown(pixels, row["key"], depth=metres))
    write_page(shown, info.classes, info.palette, folder / "predictions.png")
