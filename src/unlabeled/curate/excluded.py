"""The step of decontamination: what has the bytes, nearly the hash or nearly the features of an image to exclude.

Shape suffixes: N images of DATA, C clean images, before copies were dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from unlabeled.curate.blocks import Integers
from unlabeled.curate.decontaminate import decontaminate, first_of_groups
from unlabeled.curate.hashes import nearest_hashes
from unlabeled.curate.lineage import rows_of
from unlabeled.curate.products import ROUNDING
from unlabeled.curate.recipe import NO_MODEL
from unlabeled.curate.steps import NEIGHBOURING, Made
from unlabeled.curate.work import Work, read_column

BYTES, HASH, FEATURES, NOTHING = range(4)  # that an image shares with one to exclude, the surest first
REASONS = ("the bytes of an excluded image", "a hash near an excluded image's", "near an excluded image")
OF_COPIES = (
    "copy of one with the bytes of an excluded image",
    "copy of one with a hash near an excluded image's",
    "copy of one near an excluded image",
)


@dataclass
class Matches:
    """The surest match of each image.

    Attributes:
        kind_C: BYTES, HASH, FEATURES or NOTHING.
        set_C, image_C: number of the set, index of the image in it; -1 where there is none.
        value_C: bits that differ, or cosine; nan for the same bytes.
        limit_C: that it was held against.
    """

    kind_C: NDArray[np.int8]
    set_C: NDArray[np.int32]
    image_C: Integers
    value_C: NDArray[np.float32]
    limit_C: NDArray[np.float32]

    @classmethod
    def none(cls, count: int) -> Matches:
        """No image matches."""
        nothing, nan = np.full(count, -1), np.full(count, np.nan, np.float32)
        return cls(
            np.full(count, NOTHING, np.int8), nothing.astype(np.int32), nothing.copy(), nan, nan.copy()
        )

    def add(
        self,
        places: Integers,
        kind: int,
        which: Any,
        images: Integers,
        values: Any = np.nan,
        limit: float = np.nan,
    ) -> None:
        """Set the match of images that have none so sure; values: the smaller the surer, cosines the larger."""
        spread = np.broadcast_to(np.asarray(values, np.float32), places.shape)
        sign = -1 if kind == FEATURES else 1
        with np.errstate(invalid="ignore"):
            better = (kind < self.kind_C[places]) | (
                (kind == self.kind_C[places]) & (sign * spread < sign * self.value_C[places])
            )
        chosen = places[better]
        self.kind_C[chosen], self.image_C[chosen], self.limit_C[chosen] = kind, images[better], limit
        self.set_C[chosen] = np.broadcast_to(which, places.shape)[better]
        self.value_C[chosen] = spread[better]

    def surest_first(self) -> Integers:
        """Places of those that match."""
        value = np.where(self.kind_C == FEATURES, -self.value_C, np.nan_to_num(self.value_C))
        order = np.lexsort((value, self.kind_C))
        surest: Integers = order[self.kind_C[order] != NOTHING]
        return surest


def removed(work: Work, clean: Integers, pool: Integers, kept_for_N: Integers, alive: Integers) -> Made:
    """Drop what matches an image to exclude, and what is kept for such a one, or dropped for it.

    clean: indices before copies were dropped, pool: before those by features were. kept_for: index of the image that
    each is a copy of, or its own.
    """
    unreadable = {data: _unreadable(work, data) for data in work.exclude}
    found = Matches.none(len(clean))
    _by_hashes(work, clean, found)
    figures: dict[str, Any] = {"hash_distance": work.recipe.duplicates.hash_distance}
    if work.recipe.features.model != NO_MODEL:
        figures |= _by_features(work, clean, pool, alive, found)
    cause = first_of_groups(found.surest_first(), kept_for_N[clean])
    cause = np.where(found.kind_C != NOTHING, np.arange(len(clean)), cause)
    dropped = np.flatnonzero((cause >= 0) & np.isin(clean, alive))
    cause = cause[dropped]
    own, kind = cause == dropped, found.kind_C[cause]
    keys = [read_column(work.measured_of(data), "key") for data in work.exclude]
    matched = list(zip(found.set_C[cause].tolist(), found.image_C[cause].tolist(), strict=True))
    rows = rows_of(
        clean[dropped],
        [(REASONS if one else OF_COPIES)[number] for one, number in zip(own, kind.tolist(), strict=True)],
        value=found.value_C[cause],
        limit=found.limit_C[cause],
        other_index=np.where(own, -1, clean[cause]),
        other=[f"{work.exclude[number]}: {keys[number][row].as_py()}" for number, row in matched],
    )
    # Shown are four of each kind, as far as there are, and more of those by features: the nearest of them first.
    of_kind = [np.flatnonzero(kind == one) for one in (FEATURES, HASH, BYTES)]
    of_kind[0] = of_kind[0][np.argsort(-found.value_C[cause[of_kind[0]]], kind="stable")]
    parts = [places[:4] for places in of_kind] + [places[4:] for places in of_kind]
    chosen = np.concatenate(parts)[:12]
    return rows, figures | {
        "images": {data: len(column) - unreadable[data] for data, column in zip(work.exclude, keys, strict=True)},
        "unreadable": unreadable,
        "shown": [
            [
                int(clean[dropped[one]]),
                work.exclude[matched[one][0]],
                matched[one][1],
                ("" if own[one] else "copy of one: ") + _words(int(kind[one]), found.value_C[cause[one]]),
            ]
            for one in chosen.tolist()
        ],
    }  # fmt: skip


def _unreadable(work: Work, data: str) -> int:
    """Number of images to exclude that cannot be read."""
    bad = read_column(work.measured_of(data), "bad")
    return int(len(bad) - bad.null_count)


def _by_hashes(work: Work, clean: Integers, found: Matches) -> None:
    """Match the same bytes, and perceptual hashes within the distance of duplicates."""
    distance = work.recipe.duplicates.hash_distance
    own_bytes = work.column("content_hash")[clean].astype(str)
    column = read_column(work.measured, "hash").take(pa.array(clean))
    has = np.flatnonzero(column.is_valid().to_numpy())
    own = column.drop_null().to_numpy()
    for number, data in enumerate(work.exclude):
        measured = work.measured_of(data)
        hashes = read_column(measured, "content_hash").to_numpy().astype(str)
        names, first = np.unique(hashes, return_index=True)
        place = np.minimum(np.searchsorted(names, own_bytes), len(names) - 1)
        same = np.flatnonzero((names[place] == own_bytes) & (own_bytes != ""))
        found.add(same, BYTES, number, first[place[same]])
        if distance < 0:
            continue
        other = read_column(measured, "hash")
        images = np.flatnonzero(other.is_valid().to_numpy())
        nearest, bits = nearest_hashes(own, other.drop_null().to_numpy(), distance)
        near = np.flatnonzero(nearest >= 0)
        found.add(has[near], HASH, number, images[nearest[near]], bits[near], distance)


def _by_features(
    work: Work, clean: Integers, pool: Integers, alive: Integers, found: Matches
) -> dict[str, Any]:
    """Match features at or above the threshold; what is said of it."""
    recipe = work.recipe.decontaminate
    pool, _ = work.with_features(pool)
    compared = work.comparison(pool, recipe.threshold)
    threshold, figures = compared.threshold, compared.figures
    if threshold > 1:
        return figures
    tables = {data: work.features_of(data) for data in work.exclude}
    vectors = work.compared_vectors(pool, compared.whitening)
    sets = {data: work.compared_vectors_of(table, compared.whitening) for data, table in tables.items()}
    tried = [threshold + step for step in NEIGHBOURING if 0 < threshold + step <= 1]
    wide = decontaminate(vectors, sets, tried[0], recall=recipe.recall, resources=work.resources)
    cosines = np.nan_to_num(wide.similarity_N, nan=-1.0)
    near = np.flatnonzero(cosines >= threshold - ROUNDING)
    images = np.full(len(near), -1, np.int64)
    for number, table in enumerate(tables.values()):
        of_set = wide.set_N[near] == number
        images[of_set] = table.rows.column("index").to_numpy()[wide.image_N[near[of_set]]]
    places = np.searchsorted(clean, pool[near])
    found.add(places, FEATURES, wide.set_N[near], images, cosines[near], threshold)
    left = np.isin(pool, alive)
    return figures | {"near": {f"{one:.4f}": int((cosines[left] >= one).sum()) for one in tried}}


def _words(kind: int, value: float) -> str:
    """How an image matches."""
    return {BYTES: "same bytes", HASH: f"{value:.0f} bits", FEATURES: f"{value:.3f}"}[kind]
