"""DATA to a feature table: decode, run, write a shard at a time, go on where it stopped."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from unlabeled.ahead import ahead
from unlabeled.errors import UserError, writing
from unlabeled.features.engines import num_probed
from unlabeled.features.extractor import Extractor, Kind
from unlabeled.features.identity import check_same
from unlabeled.features.preprocessing import Shape
from unlabeled.features.table import FORMAT, GRID_SCHEMA, SCHEMA, FeatureTable, content_hash, read_header
from unlabeled.images.bad_files import BadFiles, name_of
from unlabeled.images.decode import SUPPORTED, BadImage, decode
from unlabeled.images.sources import Source, lasting, open_source
from unlabeled.progress import Progress
from unlabeled.ray_cluster import connected, on_workers
from unlabeled.weights.files import replacing

if TYPE_CHECKING:
    from rich.console import Console

    from unlabeled.vit import VisionTransformer

SHARD_BYTES = 2**28  # of values, at most about this many a shard: they are held until it is written
SHARD_IMAGES = (512, 65536)


class Loaded(NamedTuple):
    """One image of a source, ready for the model, or the reason why not."""

    place: int  # in the source
    key: str
    label: int | None = None
    hash: str = ""
    size: tuple[int, int] = (0, 0)  # height, width
    pixels: NDArray[np.uint8] | None = None
    reason: str = ""


def embed(
    data: str | Path,
    model: str | Path | VisionTransformer,
    out: str | Path,
    *,
    kind: Kind = "cls",
    layer: int = -1,
    size: int | None = None,
    shape: Shape = "crop",
    dtype: str | None = None,
    fast: bool = False,
    device: str = "auto",
    batch_size: int | None = None,
    ray: str | None = None,
    console: Console | None = None,
) -> FeatureTable:
    """Write the features of all images of DATA to a feature table, and open it.

    A table that is there already is gone on with: what is done is kept, images of another DATA are added. A table
    that was stopped and gone on with is the same, to the last bit, as one that was not. Under torchrun, or with
    RANK and WORLD_SIZE set, each process writes its own shards of one table; with Ray, each worker the next one.

    Args:
        data: DATA.
        model: a MODEL's text, or a backbone in evaluation mode.
        out: the table's folder.
        kind, layer, size, shape, fast, device, batch_size: see `Extractor`.
        dtype: float32 or float16; by default float16 for grids and float32 for vectors.
        ray: run on the workers of a Ray cluster: "local" starts one here, "auto" is the one that this machine is part
            of, else HOST:PORT. DATA and `out` are at the same place on all its machines.
        console: where progress is shown; nowhere by default.

    Raises:
        UserError: the table is of another model, kind or preprocessing, DATA has another number of images than
            when it was begun, no image can be read, or the disk is full.
    """
    folder, source = Path(out).expanduser(), open_source(data)
    settings: dict[str, Any] = {
        "kind": kind, "layer": layer, "size": size, "shape": shape, "fast": fast, "calibrate": lasting(data),
        "device": device, "batch_size": batch_size,
    }  # fmt: skip
    extractor = Extractor(model, **settings)
    dtype = dtype or ("float16" if extractor.is_grid else "float32")
    if dtype not in ("float16", "float32"):
        raise UserError(f"A table holds float32 or float16, not {dtype}.")
    number, shard_images = _joined(folder, extractor, source, lasting(data), np.dtype(dtype))
    bad = BadFiles(folder / "bad_files.jsonl")
    begun, tried = time.monotonic(), 0
    shards = _Shards(folder.absolute(), number, shard_images, len(source), np.dtype(dtype))
    if ray is None:
        rank, world = (
            int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1))
        )
        ours = range(rank, shards.count, world)
        counts = _write_shards(shards, ours, source, extractor, bad, console)
    else:
        if isinstance(model, str | Path) and Path(model).expanduser().exists():
            model = Path(model).expanduser().absolute()  # a worker may be in another folder
        counts = _write_on_ray(shards, (lasting(data), model, settings), ray, bad, console)
    for count in counts:
        tried += count
    seconds = time.monotonic() - begun
    table = FeatureTable(folder)
    table.images_per_second = tried / seconds if tried else 0.0
    if not len(table) and bad.count >= len(source):
        raise UserError(
            f"{source.name} holds no image that can be read; {bad.path} names {bad.count} files. {SUPPORTED}"
        )
    return table


def _joined(
    folder: Path, extractor: Extractor, source: Source, data: str, dtype: np.dtype[Any]
) -> tuple[int, int]:
    """A source's number in the table and its images a shard; table.json is made, or the source added to it."""
    dimension = _dimension(extractor)
    header: dict[str, Any] = {
        "format": FORMAT,
        "identity": extractor.identity,
        "dtype": dtype.name,
        "dimension": dimension,
        "sources": [],
    }
    if (folder / "table.json").exists():
        held = read_header(folder)
        check_same(held["identity"], extractor.identity, f"The features in {folder}", "what is wanted now")
        if held["dtype"] != dtype.name:
            raise UserError(
                f"{folder} holds {held['dtype']}, and {dtype.name} is wanted now; choose another --out."
            )
        header = held
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is no feature table; choose another --out.")
    for number, one in enumerate(header["sources"]):
        if one["data"] == data:
            if one["images"] != len(source):
                raise UserError(
                    f"{data} has {len(source)} images and had {one['images']} when {folder} was begun; embed it into "
                    "another --out, or give the new images as DATA of their own."
                )
            return number, int(one["shard"])
    preprocessing = extractor.preprocessing
    patches = (preprocessing.size // preprocessing.patch_size) ** 2 if extractor.is_grid else 1
    wide = 1.5 if preprocessing.shape == "keep" else 1.0
    row_bytes = int(dimension * dtype.itemsize * patches * wide)
    low, high = SHARD_IMAGES
    shard = 2 ** int(np.log2(min(max(len(source) / 256, low), high, max(1, SHARD_BYTES // row_bytes))))
    header["sources"].append({"data": data, "images": len(source), "shard": shard})
    with writing(folder), replacing(folder / "table.json") as part:
        part.write_text(json.dumps(header, indent=2) + "\n")
    return len(header["sources"]) - 1, shard


def _dimension(extractor: Extractor) -> int:
    config = extractor.model.config
    if extractor.kind == "attention":
        return int(config.num_heads)
    if extractor.kind == "layers":
        return int(config.width * (1 + num_probed(extractor.model)))
    return int(config.width * (2 if extractor.kind == "cls+mean" else 1))


@dataclass(frozen=True)
class _Shards:
    """A source's part of a table, in shards of consecutive images.

    Attributes:
        number: of the source in the table.
        size: images of a shard, less in the last one. images: of the source.
    """

    folder: Path
    number: int
    size: int
    images: int
    dtype: np.dtype[Any]

    @property
    def count(self) -> int:
        return -(-self.images // self.size)

    def images_of(self, shard: int) -> range:
        return range(shard * self.size, min(self.images, (shard + 1) * self.size))

    def path_of(self, shard: int) -> Path:
        return self.folder / f"{self.number:03}-{shard:06}.parquet"

    def waiting(self, ours: Iterable[int]) -> list[int]:
        """Those that are not there yet."""
        return [shard for shard in ours if not self.path_of(shard).exists()]


def _write_shards(
    shards: _Shards,
    ours: Sequence[int],
    source: Source,
    extractor: Extractor,
    bad: BadFiles,
    console: Console | None = None,
) -> Iterator[int]:
    """Write those of our shards that are not there yet; gives how many images each has."""
    total = sum(len(shards.images_of(shard)) for shard in ours)
    waiting = shards.waiting(ours)
    done = total - sum(len(shards.images_of(shard)) for shard in waiting)
    if not waiting:
        return
    with ThreadPoolExecutor(min(32, (os.cpu_count() or 1) + 1)) as pool, _shown(console, done, total) as show:
        indices = itertools.chain.from_iterable(shards.images_of(shard) for shard in waiting)
        loaded = ahead(pool, lambda index: _load(source, index, extractor), indices)
        for shard in waiting:
            count = len(shards.images_of(shard))
            images = itertools.islice(loaded, count)
            _write_shard(
                shards.path_of(shard),
                images,
                source,
                extractor,
                shards.dtype,
                bad,
                lambda one: show(one, bad.count),
            )
            yield count


def _write_on_ray(
    shards: _Shards,
    opened: tuple[str, str | Path | VisionTransformer, dict[str, Any]],
    address: str,
    bad: BadFiles,
    console: Console | None,
) -> Iterator[int]:
    """The same by the workers of a Ray cluster, each with a model of its own."""
    waiting = shards.waiting(range(shards.count))
    left = sum(len(shards.images_of(shard)) for shard in waiting)
    with connected(address), _shown(console, shards.images - left, shards.images) as show:
        for count in on_workers(_ShardWriter, (shards, *opened), waiting, opened[2]["device"] != "cpu"):
            show(count, bad.catch_up())
            yield count


class _ShardWriter:
    """Writes one shard after another, in a process of its own."""

    def __init__(
        self, shards: _Shards, data: str, model: str | Path | VisionTransformer, settings: dict[str, Any]
    ) -> None:
        self.shards, self.source, self.extractor = shards, open_source(data), Extractor(model, **settings)
        self.bad = BadFiles(shards.folder / "bad_files.jsonl")

    def __call__(self, shard: int) -> int:
        return sum(_write_shards(self.shards, [shard], self.source, self.extractor, self.bad))


class _shown:  # noqa: N801  (a context manager, used as a function)
    """A progress bar over images, fed one at a time; nothing where there is no console."""

    def __init__(self, console: Console | None, done: int, total: int) -> None:
        self.bar = Progress(console, "embedding", "image", done, total) if console else None
        self.done, self.start, self.begun = done, done, time.monotonic()

    def __enter__(self) -> Callable[[int, int], None]:
        if self.bar:
            self.bar.__enter__()
        return self._show

    def __exit__(self, *error: Any) -> None:
        if self.bar:
            self.bar.__exit__(*error)

    def _show(self, more: int, bad: int) -> None:
        self.done += more
        if self.bar:
            rate = (self.done - self.start) / max(1e-9, time.monotonic() - self.begun)
            self.bar.update(self.done, f"{rate:.1f} images/s" + (f"  {bad} bad" if bad else ""))


def _load(source: Source, index: int, extractor: Extractor) -> Loaded:
    try:
        sample = source.read(index)
    except OSError as error:
        return Loaded(index, name_of(source, index), reason=f"unreadable: {error}")
    try:
        pixels = decode(sample.data)
        prepared = extractor.prepare(pixels)
    except (BadImage, UserError) as error:
        return Loaded(index, sample.key, reason=str(error))
    height, width = pixels.shape[:2]
    return Loaded(index, sample.key, sample.label, content_hash(sample.data), (height, width), prepared)


def _write_shard(
    path: Path,
    images: Iterable[Loaded],
    source: Source,
    extractor: Extractor,
    dtype: np.dtype[Any],
    bad: BadFiles,
    seen: Callable[[int], None],
) -> None:
    """Run the images of one shard and write it; the Parquet file last, which says that it is whole."""
    rows: list[Loaded] = []

    def good() -> Iterator[tuple[int, NDArray[np.uint8]]]:
        for image in images:
            if image.pixels is None:
                bad.add(image.key, image.reason)
                seen(1)
            else:
                rows.append(image._replace(pixels=None))
                yield len(rows) - 1, image.pixels

    found: dict[int, NDArray[Any]] = {}
    for places, features in extractor.run(good()):
        for place, feature in zip(places, features, strict=True):
            found[place] = _stored(feature, dtype, extractor, rows[place])
        seen(len(places))
    values = [found[place] for place in range(len(rows))]
    with writing(path):
        if rows:
            flat = [value.reshape(-1, value.shape[-1]) for value in values]
            with replacing(path.with_suffix(".npy")) as part, part.open("wb") as file:
                np.save(file, np.concatenate(flat))
        with replacing(path) as part:
            pq.write_table(_rows(rows, source, values, extractor), part)


def _stored(feature: NDArray[Any], dtype: np.dtype[Any], extractor: Extractor, row: Loaded) -> NDArray[Any]:
    """An image's values as they are kept: (D,), or a grid's (h, w, D) with attention's heads last."""
    if extractor.kind == "attention":
        feature = feature.transpose(1, 2, 0)
    with np.errstate(over="ignore"):
        stored = feature.astype(dtype)
    if not np.isfinite(stored).all():
        raise UserError(f"The features of {row.key} are beyond float16's range; use --dtype float32.")
    return stored


def _rows(rows: list[Loaded], source: Source, values: list[NDArray[Any]], extractor: Extractor) -> pa.Table:
    names = source.class_names
    labels = [None if row.label is None else names[row.label] if names else str(row.label) for row in rows]
    columns: dict[str, Any] = {
        "key": [row.key for row in rows],
        "source": [source.name] * len(rows),
        "index": [row.place for row in rows],
        "content_hash": [row.hash for row in rows],
        "width": [row.size[1] for row in rows],
        "height": [row.size[0] for row in rows],
        "label": labels,
    }
    if not extractor.is_grid:
        return pa.table(columns, schema=SCHEMA)
    lengths = np.array([value.shape[0] * value.shape[1] for value in values], np.int64)
    columns["grid_height"] = [value.shape[0] for value in values]
    columns["grid_width"] = [value.shape[1] for value in values]
    columns["first_patch"] = np.cumsum(lengths) - lengths
    return pa.table(columns, schema=GRID_SCHEMA)
