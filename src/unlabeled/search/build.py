"""How an index comes to be and changes: each function writes new files and makes them the index in one step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from unlabeled.errors import UserError
from unlabeled.features.identity import check_same
from unlabeled.features.table import FeatureTable
from unlabeled.search.filters import rows_not_in, rows_where
from unlabeled.search.generation import (
    Choice,
    Generation,
    Kind,
    Manifest,
    check_free,
    open_generation,
    publish,
    write_array,
    write_rows,
    writer,
)
from unlabeled.search.graph import Graph, grow, measure, read_graph
from unlabeled.search.scan import unit

EXACT_LIMIT = 100_000  # images, up to which an index is exact unless asked otherwise
LEAST_APPROXIMATE = 100  # images: fewer say nothing about recall
SAMPLE = 1000  # images that recall is measured with
COLUMNS = ["key", "source", "label", "width", "height", "content_hash", "data", "index"]
PART = 8192  # vectors between two reports of progress

Seen = Callable[[int, int], None]
Vectors = Iterator[NDArray[np.float32]]


def unseen(done: int, total: int) -> None:
    """Report progress to nobody."""


def build(table: FeatureTable, path: Path, recall: float, choice: Choice, seen: Seen) -> Generation:
    """Write the first generation of an index; see `build_index`."""
    check_recall(recall)
    if choice not in get_args(Choice):
        raise UserError(f"An index is {', '.join(get_args(Choice))}; not {choice}.")
    if table.is_grid:
        raise UserError(
            f"{table.path} holds grids ({table.identity['kind']}); an index is of vectors: embed --kind cls, say."
        )
    if not len(table):
        raise UserError(f"{table.path} holds no images, so there is nothing to search.")
    check_free(path)
    with writer(path):
        check_free(path)
        rows = table_rows(table)
        manifest = Manifest(1, kind_of(choice, len(rows)), choice, table.identity, table.dimension, recall)
        return _store(path, manifest, rows, _of_table(table, np.arange(len(rows))), seen)


def add(path: Path, table: FeatureTable, seen: Seen) -> tuple[Generation, int]:
    """Write a generation with the images of a table that are not there yet, and say how many; see `Index.add`."""
    with writer(path):
        now = open_generation(path)
        held = now.manifest
        check_same(held.identity, table.identity, f"The features in {path}", f"those in {table.path}")
        given, alive = table_rows(table), now.alive_mask()
        new = rows_not_in(given, now.rows.filter(pa.array(alive)), ["data", "index", "content_hash"])
        if not len(new):
            return now, 0
        rows, vectors = given.take(pa.array(new)), _of_table(table, new)
        replaced = np.ones(len(alive), bool)
        replaced[rows_not_in(now.rows, rows, ["data", "index"])] = False
        alive &= ~replaced
        manifest = replace(held, generation=held.generation + 1)
        if kind_of(held.choice, len(alive) + len(new)) != held.kind:  # it has outgrown exact search
            rows = pa.concat_tables([now.rows.filter(pa.array(alive)), rows])
            both = chain(_of_index(now, alive), vectors)
            manifest = replace(manifest, kind="approximate", rows=[], vectors=[], deleted="")
            return _store(path, manifest, rows, both, seen), len(new)
        graph = read_graph(path / held.graph, mapped=False) if held.graph else None
        deleted = np.concatenate((~alive, np.zeros(len(new), bool)))
        return _store(path, manifest, rows, vectors, seen, graph, deleted), len(new)


def delete(path: Path, where: str) -> tuple[Generation, int]:
    """Write a generation without the images that meet a condition, and say how many; see `Index.delete`."""
    with writer(path):
        now = open_generation(path)
        alive = now.alive_mask()
        before = int(alive.sum())
        alive[rows_where(now.rows, where)] = False
        count = before - int(alive.sum())
        if count == before:
            raise UserError(f'"{where}" would delete all {before:,} images; remove {path} itself instead.')
        if not count:
            return now, 0
        number = now.manifest.generation + 1
        name = write_array(path, "deleted", number, (~alive).nonzero()[0])
        return publish(path, replace(now.manifest, generation=number, deleted=name)), count


def rebuild(path: Path, recall: float | None, choice: Choice | None, seen: Seen) -> Generation:
    """Write a generation anew from the vectors that are not deleted; see `Index.rebuild`."""
    with writer(path):
        now = open_generation(path)
        held, alive = now.manifest, now.alive_mask()
        rows = now.rows.filter(pa.array(alive))
        manifest = Manifest(
            held.generation + 1, kind_of(choice or held.choice, len(rows)), choice or held.choice, held.identity,
            held.dimension, check_recall(held.recall if recall is None else recall),
        )  # fmt: skip
        return _store(path, manifest, rows, _of_index(now, alive), seen)


def _store(
    path: Path,
    manifest: Manifest,
    rows: pa.Table,
    vectors: Vectors,
    seen: Seen,
    graph: Graph | None = None,
    deleted: NDArray[np.bool_] | None = None,
) -> Generation:
    """Write rows and their vectors, in addition to what the manifest has, and make that the index."""
    number = manifest.generation
    changes: dict[str, Any] = {}
    vectors = _shown(vectors, len(rows), seen)
    if manifest.kind == "approximate":
        graph, order, curve = _grown(graph, vectors, len(rows), manifest)
        rows = rows.take(pa.array(order))
        changes["graph"], changes["curve"] = graph.write(path, number), curve
    else:
        name = write_array(path, "vectors", number, np.concatenate(list(vectors)))
        changes["vectors"] = [*manifest.vectors, name]
    changes["rows"] = [*manifest.rows, write_rows(path, number, rows)]
    if deleted is not None and deleted.any():
        changes["deleted"] = write_array(path, "deleted", number, deleted.nonzero()[0])
    return publish(path, replace(manifest, **changes))


def _grown(
    graph: Graph | None, vectors: Vectors, count: int, manifest: Manifest
) -> tuple[Graph, NDArray[np.int64], list[dict[str, float]]]:
    """Put vectors into a graph; return it, the order in which they went in, and its recall.

    Some are held back until they have measured it. A few more in a graph that is there leave its recall as it was.
    """
    size = 0 if graph and count < 10 * SAMPLE else min(SAMPLE, count // 10)
    held_back = np.zeros(count, bool)
    held_back[np.random.default_rng(manifest.generation).choice(count, size, replace=False)] = True
    queries: list[NDArray[np.float32]] = []

    def others() -> Vectors:
        start = 0
        for part in vectors:
            held = held_back[start : start + len(part)]
            start += len(part)
            queries.append(part[held])
            yield part[~held]

    whole = count + (len(graph) if graph else 0)
    graph = grow(graph, others(), manifest.dimension, whole)
    curve = manifest.curve
    if size:
        curve = measure(graph, np.concatenate(queries))
        graph = grow(graph, queries, manifest.dimension, whole)
    return graph, np.argsort(held_back, kind="stable"), curve


def kind_of(choice: Choice, count: int) -> Kind:
    """Return what an index of so many images is. Raises UserError for too few to be approximate."""
    if choice == "approximate" and count < LEAST_APPROXIMATE:
        raise UserError(
            f"An approximate index has {LEAST_APPROXIMATE} images or more, not {count}; make it exact."
        )
    if choice != "auto":
        return choice
    return "exact" if count <= EXACT_LIMIT else "approximate"


def check_recall(recall: float) -> float:
    """Return it. Raises UserError unless it is a share."""
    if not 0 < recall <= 1:
        raise UserError(f"A recall is a share above 0 and up to 1, not {recall:g}.")
    return recall


def table_rows(table: FeatureTable) -> pa.Table:
    """Return a table's rows as an index has them, with a column `data`: the DATA that each is of."""
    texts = pa.array([source["data"] for source in table.sources], pa.string())
    return table.rows.append_column("data", texts.take(pa.array(table.source_numbers))).select(COLUMNS)


def _of_table(table: FeatureTable, rows: NDArray[np.int64]) -> Vectors:
    """Give vectors of a table at length 1. Raises UserError for one that has no direction."""
    for start in range(0, len(rows), PART):
        numbers = rows[start : start + PART]
        vectors = unit(table.vectors[numbers])
        (lost,) = np.isnan(vectors[:, 0]).nonzero()  # all of a vector's values are NaN, or none
        if len(lost):
            key = table.rows.column("key")[int(numbers[lost[0]])].as_py()
            raise UserError(f"The features of {key} in {table.path} are zero or not finite; embed it again.")
        table.release()
        yield vectors


def _of_index(now: Generation, alive: NDArray[np.bool_]) -> Vectors:
    rows = alive.nonzero()[0]
    for start in range(0, len(rows), PART):
        yield unit(now.vectors[rows[start : start + PART]])


def _shown(vectors: Vectors, total: int, seen: Seen) -> Vectors:
    done = 0
    for part in vectors:
        yield part
        done += len(part)
        seen(done, total)
