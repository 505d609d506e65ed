"""One pass over DATA: each image is decoded once, measured and hashed; a folder of Parquet shards, resumable."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from unlabeled.ahead import ahead
from unlabeled.atomic import replacing
from unlabeled.curate.hashes import perceptual_hash
from unlabeled.curate.quality import SHORT_SIDE, Measures, colour, measure, shrunk_grey
from unlabeled.errors import UserError, writing
from unlabeled.features.table import content_hash
from unlabeled.images.bad_files import name_of
from unlabeled.images.decode import BadImage, decode
from unlabeled.images.headers import jpeg_header
from unlabeled.images.sources import Source, open_source
from unlabeled.progress import Progress
from unlabeled.ray_cluster import on_workers

if TYPE_CHECKING:
    from rich.console import Console

SHARD = 1024  # images; what a stopped run does again at most
Scorer = Callable[[NDArray[np.uint8]], float]
SCHEMA = pa.schema(
    [
        ("index", pa.int64()),  # in DATA
        ("key", pa.string()),
        ("label", pa.string()),  # class name, or null
        ("bytes", pa.int64()),  # of the encoded image
        ("content_hash", pa.string()),  # of those, as in a feature table; "" where they cannot be read
        ("bad", pa.string()),  # why it cannot be read, or null
        ("width", pa.int32()),  # pixels, upright
        ("height", pa.int32()),
        *((name, pa.float32()) for name in Measures._fields),
        ("colour", pa.float32()),  # see quality.colour
        ("score", pa.float32()),  # of a scorer of pixels
        ("hash", pa.uint64()),  # perceptual; null where there is no contrast
    ]
)


@dataclass(frozen=True)
class Measured:
    """One row; see SCHEMA."""

    index: int
    key: str
    label: str | None = None
    bytes: int = 0
    content_hash: str = ""
    bad: str | None = None
    width: int = 0
    height: int = 0
    measures: Measures | None = None
    colour: float | None = None
    score: float | None = None
    hash: int | None = None


def measure_source(
    source: Source,
    folder: Path,
    *,
    scorer: str = "",
    workers: int = 0,
    on_ray: str | None = None,
    console: Console | None = None,
) -> list[Path]:
    """Measure all images of a source into Parquet shards, but for those that are there, and return these.

    scorer: "module:function" of RGB pixels, or "". on_ray: DATA that the source is, to be opened by the workers of the
        Ray cluster that this process is connected to.
    Raises UserError: the scorer cannot be imported or fails, the disk is full.
    """
    function = load_scorer(scorer) if scorer else None
    count = -(-len(source) // SHARD)
    shards = [_shard(folder, number) for number in range(count)]
    waiting = [number for number in range(count) if not shards[number].exists()]
    done = len(source) - sum(len(_images(number, len(source))) for number in waiting)
    if not waiting:
        return shards
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with (
        Progress(console, "measuring", "image", done, len(source)) if console else nullcontext() as bar,
        ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool,
    ):
        if on_ray is not None:
            for images in on_workers(_Measurer, (on_ray, folder, scorer), waiting):
                done += images
                if bar:
                    bar.update(done, "")
            return shards
        for number in waiting:
            rows = []
            indices = _images(number, len(source))
            for row in ahead(pool, lambda index: measured(source, index, function), indices):
                rows.append(row)
                done += 1
                if bar:
                    bar.update(done, "")
            _write(shards[number], rows)
    return shards


def _shard(folder: Path, number: int) -> Path:
    return folder / f"{number:06}.parquet"


def _images(number: int, count: int) -> range:
    return range(number * SHARD, min(count, (number + 1) * SHARD))


def _write(shard: Path, rows: list[Measured]) -> None:
    with writing(shard), replacing(shard) as part:
        pq.write_table(_table(rows), part)


class _Measurer:
    """Measures one shard after another, in a process of its own."""

    def __init__(self, data: str, folder: Path, scorer: str) -> None:
        self.source, self.folder = open_source(data), folder
        self.scorer = load_scorer(scorer) if scorer else None

    def __call__(self, number: int) -> int:
        rows = [measured(self.source, index, self.scorer) for index in _images(number, len(self.source))]
        _write(_shard(self.folder, number), rows)
        return len(rows)


def measured(source: Source, index: int, scorer: Scorer | None = None) -> Measured:
    """Read, decode and measure one image."""
    try:
        sample = source.read(index)
    except OSError as error:
        return Measured(index, name_of(source, index), bad=f"unreadable: {error}")
    names = source.class_names
    label = None if sample.label is None else names[sample.label] if names else str(sample.label)
    row = Measured(index, sample.key, label, len(sample.data), content_hash(sample.data))
    try:
        pixels = decode(sample.data, SHORT_SIDE)
    except BadImage as error:
        return replace(row, bad=str(error))
    height, width = _full_size(sample.data, pixels)
    grey = shrunk_grey(pixels)
    row = replace(
        row,
        width=width,
        height=height,
        measures=measure(grey),
        colour=colour(pixels),
        hash=perceptual_hash(grey),
    )
    if scorer is None:
        return row
    try:
        return replace(row, score=float(scorer(pixels)))
    except Exception as error:  # the user's own code
        raise UserError(f"The scorer failed on {sample.key}: {type(error).__name__}: {error}") from error


def _full_size(data: bytes, pixels_HW3: NDArray[np.uint8]) -> tuple[int, int]:
    """Height and width of an image that may have been decoded at a part of its size."""
    height, width = pixels_HW3.shape[:2]
    header = jpeg_header(data) if data[:3] == b"\xff\xd8\xff" else None
    if header is None or min(height, width) >= min(header.height, header.width):
        return height, width
    sides = header.height, header.width
    turned = (height > width) != (header.height > header.width) and height != width
    return sides[::-1] if turned else sides


def load_scorer(name: str) -> Scorer:
    """Return the function that "module:function" names; modules of the working folder are found too.

    Raises UserError where there is none.
    """
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise UserError(f"A scorer is module:function, or a .npz or .safetensors file; not {name!r}.")
    working = str(Path.cwd())
    if working not in sys.path:
        sys.path.insert(0, working)
    try:
        found = getattr(importlib.import_module(module_name), function_name)
    except Exception as error:  # whatever the user's module does when it is imported
        raise UserError(f"The scorer {name} cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise UserError(f"The scorer {name} is no function.")
    result: Scorer = found
    return result


def head_scores(file: str, vectors: Any, block: int = 65536) -> NDArray[np.float32]:
    """Return the scores that a linear head gives to features, float32 (N,): weight . vector / |vector| + bias.

    file: .npz or .safetensors with weight (D,) or (1, D), and perhaps bias.
    vectors: (N, D).
    Raises UserError for a file that is no such head, or is of another D.
    """
    path = Path(file).expanduser()
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as opened:
                held = dict(opened)
        else:
            from safetensors.numpy import load_file

            held = load_file(path)
        weight = np.asarray(held["weight"], np.float32).reshape(-1)
        bias = float(np.asarray(held.get("bias", 0.0), np.float32).reshape(-1)[0])
    except Exception as error:  # what a damaged file raises depends on the byte it breaks at
        raise UserError(f"{file} is no linear head with a weight and perhaps a bias: {error}") from error
    if len(weight) != vectors.shape[1]:
        raise UserError(f"{file} has {len(weight)} weights, and the features have {vectors.shape[1]} values.")
    scores = np.empty(len(vectors), np.float32)
    for start in range(0, len(vectors), block):
        rows = np.asarray(vectors[start : start + block], np.float32)
        lengths = np.maximum(np.sqrt(np.einsum("nd,nd->n", rows, rows)), 1e-12)
        scores[start : start + block] = (rows * weight).sum(1) / lengths + bias
    return scores


def _table(rows: list[Measured]) -> pa.Table:
    columns: dict[str, list[Any]] = {
        name: [getattr(row, name) for row in rows] for name in SCHEMA.names if name not in Measures._fields
    }
    for name in Measures._fields:
        columns[name] = [None if row.measures is None else getattr(row.measures, name) for row in rows]
    return pa.table(columns, schema=SCHEMA)
