"""Features of labelled images: both sides of a protocol, with their classes in one numbering.

Shape suffixes: N images, D width of the model, blocks: those that a linear probe sees (4, or all of fewer).
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from unlabeled.errors import UserError
from unlabeled.features.embed import embed
from unlabeled.features.engines import weights_hash
from unlabeled.features.extractor import Kind
from unlabeled.features.identity import check_same
from unlabeled.features.preprocessing import Shape
from unlabeled.features.table import FeatureTable, open_table
from unlabeled.vit import VisionTransformer
from unlabeled.weights.load import load_model

if TYPE_CHECKING:
    from rich.console import Console

Model = str | Path | VisionTransformer
Data = str | Path | FeatureTable


class Temporary:
    """A folder that is there as long as this object is."""

    def __init__(self) -> None:
        self.path = Path(mkdtemp(prefix="unlabeled-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


class Extraction(TypedDict, total=False):
    """How features are extracted where DATA is no table yet; all have defaults.

    cache: a folder where feature tables are kept and found again. size, shape, device, batch_size: see `Extractor`.
    console: where progress is shown.
    """

    cache: str | Path | None
    size: int | None
    shape: Shape
    device: str
    batch_size: int | None
    console: Console | None


class Vectors:
    """Some rows and columns of memory-mapped features (N, width), read where they are asked for, as float32."""

    def __init__(self, stored: Any, columns: slice, rows_N: NDArray[np.int64] | None = None) -> None:
        self.stored, self.columns, self.rows_N = stored, columns, rows_N
        first, end, _ = columns.indices(stored.shape[1])
        self.shape = (len(stored) if rows_N is None else len(rows_N), end - first)

    def __len__(self) -> int:
        """Number of rows."""
        return self.shape[0]

    def __getitem__(self, wanted: slice | NDArray[np.int64]) -> NDArray[np.float32]:
        """Rows of a slice or of an array of numbers."""
        rows = wanted if self.rows_N is None else self.rows_N[wanted]
        return np.asarray(self.stored[rows])[:, self.columns].astype(np.float32, copy=False)


@dataclass(frozen=True)
class Side:
    """The labelled images of one side.

    Attributes:
        name: what was given.
        table: their features, of all images.
        rows_N: of the table, those that count; None is all.
        labels_N: int64, numbers of the task's classes.
    """

    name: str
    table: FeatureTable
    rows_N: NDArray[np.int64] | None
    labels_N: NDArray[np.int64]

    def __len__(self) -> int:
        """Number of images."""
        return len(self.labels_N)

    @property
    def keys(self) -> list[str]:
        """Names of the images."""
        keys = self.table.rows.column("key")
        found: list[str] = (keys if self.rows_N is None else keys.take(self.rows_N)).to_pylist()
        return found

    def read_image(self, place: int) -> bytes:
        """An image's encoded bytes; raises UserError where its source is gone."""
        return self.table.read_image(place if self.rows_N is None else int(self.rows_N[place]))


@dataclass(frozen=True)
class Labelled:
    """Both sides of a protocol.

    Attributes:
        model: what was given, as text.
        train, test: the sides.
        classes: their names; both sides' labels are numbers of them.
        views: columns of the table's vectors by what they are: cls, cls+mean, 4 cls, 4 cls+mean, or mean.
        counts: of images and classes.
        bad_files: (file, reason) of what could not be read on either side.
        notes: what was left out, a line each.
    """

    model: str
    train: Side
    test: Side
    classes: list[str]
    views: dict[str, slice]
    counts: dict[str, int]
    bad_files: list[tuple[str, str]]
    notes: tuple[str, ...]
    held: Temporary | None = field(default=None, repr=False)

    def vectors(self, side: Side, view: str = "cls") -> Vectors:
        """A side's features. Raises UserError where the table has no such view."""
        return Vectors(side.table.vectors, view_of(side.table, view), side.rows_N)


def labelled(
    model: Model | None, train: Data, test: Data, *, kind: Kind = "cls", **extraction: Any
) -> Labelled:
    """Extract both sides' features, or open the tables that are there already, and match their classes by name.

    Images without a label and images of test whose class train lacks are left out, and counted in the notes.

    Args:
        model: a MODEL, or a backbone; None where both sides are tables.
        train, test: DATA with labels, or feature tables.
        kind: of the features, where neither is a table.
        extraction: see `Extraction`.

    Raises:
        UserError: a side has no labels or no image that can be read, train has one class only, no class is on
            both sides, or tables are of other features than the model's.
    """
    tables, held = tables_of(model, [train, test], kind, extraction)
    identity = tables[0].identity
    names = [_said(one) for one in (train, test)]
    numbers: list[pa.Array] = []
    notes: list[str] = []
    for name, table in zip(names, tables, strict=True):
        column = table.rows.column("label").combine_chunks()
        if len(column) == column.null_count:
            raise UserError(f"{name} has no labels: class folders or a label column are needed.")
        if column.null_count:
            notes.append(
                f"{column.null_count} of {len(column)} images of {name} have no label and are left out"
            )
        numbers.append(column)
    classes = _ordered(pc.unique(numbers[0]).drop_null().to_pylist())
    if len(classes) < 2:
        raise UserError(f"{names[0]} has images of one class only ({classes[0]}); two are needed.")
    unknown = _ordered(set(pc.unique(numbers[1]).drop_null().to_pylist()) - set(classes))
    sides = []
    for name, table, column in zip(names, tables, numbers, strict=True):
        labels = pc.index_in(column, pa.array(classes)).fill_null(-1).to_numpy().astype(np.int64)
        rows = None if (labels >= 0).all() else np.flatnonzero(labels >= 0)
        sides.append(Side(name, table, rows, labels if rows is None else labels[rows]))
    if not len(sides[1]):
        raise UserError(
            f"{names[0]} and {names[1]} have no class in common: {_few(classes)} and {_few(unknown)}."
        )
    if unknown:
        left_out = len(numbers[1]) - numbers[1].null_count - len(sides[1])
        notes.append(
            f"{left_out} images of {names[1]} are of classes that {names[0]} lacks and are left out: {_few(unknown)}"
        )
    if names[0] != names[1]:
        notes += _both(tables, names)
    bad = [pair for one in dict.fromkeys(table.path for table in tables) for pair in bad_files(one)]
    counts = {"train": len(sides[0]), "test": len(sides[1]), "classes": len(classes), "bad_files": len(bad)}
    return Labelled(
        name_of(model) if model is not None else identity["model"]["name"] or "a model without a name",
        sides[0], sides[1], classes, views_of(tables[0]), counts, bad, tuple(notes), held,
    )  # fmt: skip


def tables_of(
    model: Model | None, given: list[Data], kind: Kind, extraction: dict[str, Any]
) -> tuple[list[FeatureTable], Temporary | None]:
    """Feature tables of one model: those that are given, and of the DATA that is; and the folder that holds the latter.

    Raises:
        UserError: they are of different features, or DATA is given without a model.
    """
    found = [opened(one) for one in given]
    there = next((table for table in found if table is not None), None)
    options = dict(extraction)
    cache, held = options.pop("cache", None), None
    loaded: VisionTransformer | None = None
    if there is not None:
        for other in found:
            if other is not None:
                check_same(
                    there.identity, other.identity, f"The features in {there.path}", f"those in {other.path}"
                )
        kind, options = _as_there(there, options)
    if model is not None or None in found:
        named = model or (there.identity["model"]["name"] if there else "")
        if not named:
            raise UserError(f"{given[found.index(None)]} is no feature table, so that a model is needed.")
        loaded = named if isinstance(named, VisionTransformer) else load_model(named)
        weights = weights_hash(loaded)
        if there is not None:
            here = {"model": {"name": name_of(named), "weights": weights}}
            check_same({"model": there.identity["model"]}, here, f"The features in {there.path}", "the model")
    if None in found and cache is None:
        held = Temporary()
    tables = []
    for data, table in zip(given, found, strict=True):
        if table is None:
            assert loaded is not None
            folder = Path(cache or held.path) / _folder(data, weights, kind, options)  # type: ignore[union-attr]
            table = embed(str(data), loaded, folder, kind=kind, **options)
        tables.append(table)
    return tables, held


def _as_there(table: FeatureTable, options: dict[str, Any]) -> tuple[Kind, dict[str, Any]]:
    """The kind of a table's features, and the options that make such."""
    identity = table.identity
    if identity["precision"] != "float32":
        raise UserError(
            f"{table.path} is of {identity['precision']} features; give both sides as such tables."
        )
    preprocessing = {name: identity["preprocessing"][name] for name in ("size", "shape")}
    return identity["kind"], {**options, **preprocessing, "layer": identity["layer"]}


def _folder(data: Data, weights: str, kind: Kind, options: dict[str, Any]) -> str:
    """A table's name in a cache: readable, and another one for whatever makes other features."""
    text = str(data)
    lasting = text if text.startswith("hf:") else str(Path(text).expanduser().absolute())
    made_of = [
        lasting,
        weights,
        kind,
        options.get("size"),
        options.get("shape", "crop"),
        options.get("layer", -1),
    ]
    digest = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:12]
    return f"{re.sub(r'[^A-Za-z0-9]+', '-', Path(text).stem)[:40].strip('-')}-{kind}-{digest}"


def opened(given: Data) -> FeatureTable | None:
    """The feature table that is given, or None for other DATA."""
    if isinstance(given, FeatureTable):
        return given
    return open_table(given) if (Path(given).expanduser() / "table.json").exists() else None


def name_of(model: Model) -> str:
    """A model as text."""
    return model.name or "the given model" if isinstance(model, VisionTransformer) else str(model)


def views_of(table: FeatureTable) -> dict[str, slice]:
    """Columns of a table's vectors by what they are."""
    kind, width = table.identity["kind"], table.dimension
    if kind == "cls+mean":
        return {"cls": slice(0, width // 2), "cls+mean": slice(0, width)}
    if kind != "layers":
        return {kind: slice(0, width)}
    blocks = min(4, table.identity["layer"] + 1)
    last = width // (blocks + 1) * (blocks - 1)
    views = {"cls": slice(last, width * blocks // (blocks + 1)), "cls+mean": slice(last, width)}
    if blocks > 1:
        views |= {f"{blocks} cls": slice(0, views["cls"].stop), f"{blocks} cls+mean": slice(0, width)}
    return views


def view_of(table: FeatureTable, view: str) -> slice:
    """Columns of a view. Raises UserError where the table has no such."""
    views = views_of(table)
    if view not in views:
        raise UserError(f"There are no features {view!r} here; there are {', '.join(views)}.")
    return views[view]


def bad_files(table: Path) -> list[tuple[str, str]]:
    """(file, reason) of what a table's images could not be read."""
    path = table / "bad_files.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [(held["key"], held["reason"]) for held in map(json.loads, lines)]


def _both(tables: list[FeatureTable], names: list[str]) -> list[str]:
    """A note, where images of test are in train as well."""
    train, test = (table.rows.column("content_hash") for table in tables)
    count = pc.sum(pc.is_in(test, value_set=pc.unique(train))).as_py()
    if not count:
        return []
    return [f"{count} images of {names[1]} are in {names[0]} as well, byte for byte: they are found easily"]


def _ordered(names: Iterable[str]) -> list[str]:
    """Class names in order, numbers by value."""
    return sorted(names, key=lambda name: (not name.isdecimal(), int(name) if name.isdecimal() else 0, name))


def _said(given: Data) -> str:
    """What a user calls one side: a table that is open by the DATA it was made of."""
    if isinstance(given, FeatureTable):
        return ", ".join(source["data"] for source in given.sources)
    return str(given)


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def held_out(labels_N: NDArray[np.int64], seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split training images: those to fit on, and a tenth (10,000 at most) to choose on; rows, both in order.

    Classes are split by themselves, so that each of two images and more is fitted on; one of single images is not
    chosen on.
    """
    rng = np.random.default_rng(seed)
    share = min(0.1, 10_000 / len(labels_N))
    order = rng.permutation(len(labels_N))
    order = order[np.argsort(labels_N[order], kind="stable")]
    sizes = np.bincount(labels_N)
    place = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    size = sizes[labels_N[order]]
    wanted = np.minimum(np.maximum(1, np.round(size * share)), size - 1)
    return np.sort(order[place >= wanted]), np.sort(order[place < wanted])
