"""The image index: build it from a feature table, ask it, change it while others ask.

Shape suffixes: B queries, D width, k neighbours.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from unlabeled.errors import UserError
from unlabeled.features.inputs import are_several
from unlabeled.features.table import FeatureTable, open_table, read_checked
from unlabeled.images.sources import Source
from unlabeled.search import build
from unlabeled.search.build import Seen, check_recall, unseen
from unlabeled.search.duplicates import Group, find_groups
from unlabeled.search.generation import Choice, Generation, Kind, open_generation
from unlabeled.search.graph import effort_for
from unlabeled.search.scan import Nearest, scan, unit

if TYPE_CHECKING:
    from unlabeled.features.extractor import Extractor
    from unlabeled.features.inputs import ImageLike

# Microseconds of a core at 384 values, of which only the ratios matter: what exact search takes to read a row, and to
# compare it with a query; and what the graph takes for a query, times the share of the rows that meet a condition.
READ, COMPARE, WALK = 1.0, 0.02, 100.0
SPARE = 1.5  # times as many candidates as a condition needs on average, and MORE of them
MORE = 10


def _is_scanned(queries: int, k: int, count: int, total: int) -> bool:
    """Whether exact search of the rows that meet a condition takes no longer than the graph would."""
    return count <= k or count * (READ + COMPARE * queries) <= WALK * queries * total / count


class Hit(NamedTuple):
    """One image that was found. rank: from 1; similarity: cosine in [-1, 1]; row: its number, see `Index.row`."""

    rank: int
    similarity: float
    key: str
    row: int


class Index:
    """An image index on disk, open for searching; it can be changed while others search it.

    A search is answered from the state that was there when the index was opened, or last refreshed or changed
    through this object.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self.now: Generation = open_generation(self.path)
        self._sources: dict[str, Source] = {}

    def __len__(self) -> int:
        """Number of images."""
        return len(self.now)

    def __repr__(self) -> str:
        """What it is, in one line."""
        how = "exact" if self.kind == "exact" else f"approximate, recall@10 {self.recall:.3f}"
        return f"<Index {self.path}: {len(self):,} images, {how}>"

    @property
    def identity(self) -> dict[str, Any]:
        """Model, kind and preprocessing of the features, see `Extractor`."""
        return self.now.manifest.identity

    @property
    def kind(self) -> Kind:
        """exact or approximate."""
        return self.now.manifest.kind

    @property
    def recall(self) -> float:
        """Share of the true 10 nearest that is found, as measured when the index was built; 1 where it is exact."""
        manifest = self.now.manifest
        if manifest.kind == "exact":
            return 1.0
        reached = [point["recall"] for point in manifest.curve]
        return next((recall for recall in reached if recall >= manifest.recall), max(reached))

    @cached_property
    def extractor(self) -> Extractor:
        """What makes features like the index's; may be set, where the model has moved."""
        from unlabeled.features.extractor import Extractor

        return Extractor.of(self.identity)

    def search(
        self,
        queries: ImageLike | Iterable[ImageLike] | NDArray[Any],
        k: int = 5,
        *,
        where: str | None = None,
        recall: float | None = None,
    ) -> Any:
        """Return the most similar images, best first: a list of `Hit`, or a list of such lists for several queries.

        Args:
            queries: an image (path, bytes, Pillow image, array (H, W, 3), tensor), or several: a list, a generator, a
                batch; or features: an array (D,) or (B, D).
            k: hits of each query; they are fewer where a condition leaves fewer.
            where: an SQL condition on the columns key, source, label, width, height, content_hash, data, index:
                "label = 'cat' AND width >= 640".
            recall: wanted of an approximate index, in place of what it was built for.

        Raises:
            UserError: an image cannot be read, features are of another width, k is not in 1 to len(index), the
                condition is no SQL, or the recall is beyond the index.
        """
        self.check(k, recall)
        if isinstance(queries, np.ndarray) and queries.ndim <= 2:
            is_one, vectors = queries.ndim == 1, np.atleast_2d(queries)
        else:
            is_one = not are_several(queries)
            vectors = np.atleast_2d(cast("NDArray[Any]", self.extractor(queries)))
        now = self.now
        hits = _hits(now.rows, self._nearest(now, vectors, k, where, recall))
        return hits[0] if is_one else hits

    def nearest(
        self, vectors_BD: NDArray[Any], k: int = 5, *, where: str | None = None, recall: float | None = None
    ) -> Nearest:
        """As `search` with features, but as arrays: similarities (B, k), rows (B, k); -inf and -1 where fewer."""
        self.check(k, recall)
        return self._nearest(self.now, vectors_BD, k, where, recall)

    def duplicates(self, similarity: float, *, where: str | None = None, seen: Seen = unseen) -> list[Group]:
        """Return groups of images that are at least so similar, largest first.

        Two images are in one group where a chain of pairs over the threshold joins them. An approximate index
        misses some pairs, as its recall says, and an image's pairs are looked for among its nearest 512.

        Args:
            similarity: cosine, above 0 and up to 1.
            where: an SQL condition that all the images meet, see `search`.
            seen: called with the number of images done, and of all.

        Raises:
            UserError: the similarity is out of range, or the condition is no SQL.
        """
        now = self.now
        allowed = now.allowed(where)
        rows = np.arange(len(now.rows)) if allowed is None else allowed.nonzero()[0]
        found = find_groups(
            lambda vectors, k: self._nearest(now, vectors, k, where, None),
            now.vectors,
            rows,
            similarity,
            seen,
        )
        keys = now.rows.column("key")
        return [
            Group(keys.take(pa.array(numbers)).to_pylist(), numbers.tolist(), similarities.tolist())
            for numbers, similarities in found
        ]

    def row(self, number: int) -> dict[str, Any]:
        """Return the columns of a row: key, source, label, width, height, content_hash, data, index."""
        return dict(self.now.rows.slice(number, 1).to_pylist()[0])

    def read_image(self, number: int) -> bytes:
        """Return the encoded image of a row. Raises UserError where its source is gone, or has another one there."""
        return read_checked(self._sources, self.row(number))

    def refresh(self) -> None:
        """See what others have changed."""
        self.now = open_generation(self.path)

    def add(self, table: str | Path | FeatureTable, *, seen: Seen = unseen) -> int:
        """Add the images of a feature table that are not there yet, and return how many those were.

        An image whose file has changed since takes its old place's. An index that grows beyond 100,000 images
        becomes approximate, unless it was asked to be exact. seen: called with the number done, and of all.

        Raises:
            UserError: the table is of another model, kind or preprocessing, or the disk is full.
        """
        self.now, count = build.add(self.path, open_table(table), seen)
        return count

    def delete(self, where: str) -> int:
        """Delete the images that meet a condition, see `search`, and return how many those were.

        Their vectors stay in the files until `rebuild`. Raises UserError for no SQL, or where none would be left.
        """
        self.now, count = build.delete(self.path, where)
        return count

    def rebuild(
        self, *, recall: float | None = None, choice: Choice | None = None, seen: Seen = unseen
    ) -> None:
        """Build it anew from its own vectors, without what was deleted; for another recall or as another kind too."""
        self.now = build.rebuild(self.path, recall, choice, seen)

    def check(self, k: int, recall: float | None = None) -> None:
        """Raise UserError unless a search can have this k and this recall."""
        if not 1 <= k <= len(self):
            raise UserError(f"k is 1 to {len(self)}, the number of images in {self.path}; not {k}.")
        if recall is not None:
            check_recall(recall)

    def _nearest(
        self, now: Generation, vectors_BD: NDArray[Any], k: int, where: str | None, recall: float | None
    ) -> Nearest:
        queries = self._unit(vectors_BD)
        allowed = now.allowed(where)
        total = len(now.rows)
        count = total if allowed is None else int(np.count_nonzero(allowed))
        if now.graph is None or (allowed is not None and _is_scanned(len(queries), k, count, total)):
            return scan(queries, now.vectors, k, None if allowed is None else allowed.nonzero()[0])
        wide = k if allowed is None else min(total, int(SPARE * k * total / count) + MORE)
        effort = effort_for(now.manifest.curve, self.recall if recall is None else recall, wide)
        found = now.graph.nearest(queries, wide, effort)
        if allowed is None:
            return found
        # These are the `wide` nearest of all: where k of them are allowed, they are the k nearest allowed.
        kept = (found.rows >= 0) & allowed[found.rows]
        order = np.argsort(~kept, axis=1, kind="stable")[:, :k]
        result = Nearest(
            np.take_along_axis(found.similarities, order, 1), np.take_along_axis(found.rows, order, 1)
        )
        short = kept.sum(1) < k
        if short.any():
            exact = scan(queries[short], now.vectors, k, allowed.nonzero()[0])
            result.similarities[short], result.rows[short] = exact
        return result

    def _unit(self, vectors_BD: NDArray[Any]) -> NDArray[np.float32]:
        dimension = self.now.manifest.dimension
        if vectors_BD.ndim != 2 or vectors_BD.shape[1] != dimension:
            raise UserError(f"Features searched in {self.path} are (B, {dimension}), not {vectors_BD.shape}.")
        queries = unit(vectors_BD)
        if np.isnan(queries).any():
            raise UserError(
                "A query has length 0 or a value that is not finite, so it is similar to nothing."
            )
        return queries


def build_index(
    table: str | Path | FeatureTable,
    out: str | Path,
    *,
    recall: float = 0.95,
    choice: Choice = "auto",
    seen: Seen = unseen,
) -> Index:
    """Build an index of the images of a feature table.

    Args:
        table: of vectors, which `unlabeled.embed` and `unlabeled embed` write.
        out: the index's folder.
        recall: share of the true 10 nearest images that an approximate index is to find.
        choice: exact, approximate, or auto: exact up to 100,000 images.
        seen: called with the number of images that are in, and of all.

    Raises:
        UserError: the table is empty or holds grids, there is an index already, or the disk is full.
    """
    path = Path(out).expanduser()
    build.build(open_table(table), path, recall, choice, seen)
    return Index(path)


def open_index(path: str | Path | Index) -> Index:
    """Open an index; one that is open is returned as it is. Raises UserError where there is none."""
    return path if isinstance(path, Index) else Index(path)


def _hits(rows: pa.Table, nearest: Nearest) -> list[list[Hit]]:
    numbers = nearest.rows[nearest.rows >= 0]
    keys = iter(rows.column("key").take(pa.array(numbers)).to_pylist())
    return [
        [
            Hit(rank, similarity, next(keys), row)
            for rank, (similarity, row) in enumerate(zip(similarities, found, strict=True), 1)
            if row >= 0
        ]
        for similarities, found in zip(nearest.similarities.tolist(), nearest.rows.tolist(), strict=True)
    ]
