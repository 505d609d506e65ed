"""The steps, each a function from the images that are left to an outcome: which of them go, and why.

Shape suffixes: N images of DATA, A images that are left, D width of the features.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from unlabeled.curate.blocks import Integers
from unlabeled.curate.duplicates import near_duplicates
from unlabeled.curate.hashes import first_of_each, near_copies
from unlabeled.curate.hierarchy import hierarchical_kmeans
from unlabeled.curate.kmeans import assign, kmeans
from unlabeled.curate.lineage import rows_of
from unlabeled.curate.measured import head_scores
from unlabeled.curate.neighbours import pairs_above
from unlabeled.curate.quality import criteria, failed, fails
from unlabeled.curate.retrieve import from_seed_clusters, nearest_to_seeds
from unlabeled.curate.sampling import balanced_sample
from unlabeled.curate.work import Work, read_column
from unlabeled.errors import UserError

IMAGES_PER_CLUSTER = (
    50  # of the finest level, where levels are chosen; each level has a tenth of the one before
)
NEIGHBOURING = (
    -0.05,
    -0.02,
    -0.01,
    0.0,
    0.01,
    0.02,
    0.05,
)  # cosines beside a threshold that the report shows
FACTORS = (0.25, 0.5, 0.71, 1.0, 1.41, 2.0, 4.0)  # of a limit, the same
HEADS = (".npz", ".safetensors")  # endings of scorers that are heads on features
NO_FEATURES = "no features"  # the reason, where the model's extraction could not read an image

Made = tuple[pa.Table, dict[str, Any]]


def readable(work: Work, alive: Integers) -> Made:
    """Drop what cannot be read."""
    bad = work.column("bad")[alive]
    unread = np.array([reason is not None for reason in bad], bool)
    return rows_of(alive[unread], "unreadable"), {}


def quality(work: Work, alive: Integers) -> Made:
    """Drop what cannot be read or is beyond a limit of the recipe."""
    unread, _ = readable(work, alive)
    tables = [unread]
    good = np.setdiff1d(alive, unread.column("index").to_numpy(), assume_unique=True)
    recipe = work.recipe.quality
    limits = criteria(recipe)
    columns = {one.column: work.column(one.column)[good] for one, _ in limits if one.name != "score"}
    if recipe.scorer:
        columns["score"] = _scores(work, good)
    numbers = failed(recipe, columns) if len(good) else np.empty(0, np.int8)
    figures: dict[str, Any] = {"limits": []}
    for number, (criterion, limit) in enumerate(limits):
        chosen = numbers == number
        values = columns[criterion.column]
        tables.append(rows_of(good[chosen], criterion.name, value=values[chosen], limit=limit))
        tried = sorted({min(criterion.most, limit * factor) for factor in FACTORS})
        sides = _beside(criterion.is_minimum, limit, values)
        figures["limits"].append(
            {
                "name": criterion.name,
                "words": criterion.words,
                "field": f"quality.{criterion.field}",
                "limit": limit,
                "is_minimum": criterion.is_minimum,
                "dropped": int(chosen.sum()),
                "alone": {f"{one:.4g}": int(fails(criterion, one, values).sum()) for one in tried},
                "sides": [good[rows].tolist() for rows in sides],
                "values": [values[rows].astype(float).tolist() for rows in sides],
            }
        )
    return pa.concat_tables(tables), figures


def _scores(work: Work, good: Integers) -> NDArray[np.float32]:
    if not work.recipe.quality.scorer.endswith(HEADS):
        return work.column("score")[good].astype(np.float32)
    scores = np.full(len(good), np.nan, np.float32)
    has = work.table_rows[good] >= 0
    scores[has] = head_scores(work.recipe.quality.scorer, work.vectors(good[has]))
    return scores


def _beside(is_minimum: bool, limit: float, values: NDArray[Any], most: int = 6) -> tuple[Integers, Integers]:
    """Places of the values nearest to a limit: dropped ones, and kept ones."""
    order = np.argsort(values, kind="stable")
    order = order[np.isfinite(values[order])]
    cut = int(np.searchsorted(values[order], np.float32(limit), side="left" if is_minimum else "right"))
    below, above = order[max(0, cut - most) : cut][::-1], order[cut : cut + most]
    return (below, above) if is_minimum else (above, below)


def exact(work: Work, alive: Integers) -> Made:
    """Drop all but the first of images of the same bytes."""
    hashes = work.column("content_hash")[alive].astype(str)
    first = first_of_each(hashes, alive)
    copies = first != np.arange(len(alive))
    rows = rows_of(alive[copies], "same bytes", other_index=alive[first[copies]])
    return rows, {"groups": _groups(alive[first[copies]], alive[copies])}


def perceptual(work: Work, alive: Integers) -> Made:
    """Drop all but the best of images whose perceptual hashes differ in few bits."""
    distance = work.recipe.duplicates.hash_distance
    column = read_column(work.measured, "hash").take(pa.array(alive))
    has = column.is_valid().to_numpy()
    hashes = column.drop_null().to_numpy()
    some = alive[has]
    best, bits, _ = near_copies(hashes, work.rank[some], distance)
    copies = best != np.arange(len(some))
    rows = rows_of(
        some[copies], "near hash", value=bits[copies], limit=distance, other_index=some[best[copies]]
    )
    _, _, wide = near_copies(hashes, work.rank[some], 7)
    return rows, {
        "distance": distance,
        "without": int((~has).sum()),
        "near": {str(bits): int((wide <= bits).sum()) for bits in range(8)},
        "groups": _groups(some[best[copies]], some[copies]),
    }


def copies(work: Work, alive: Integers) -> Made:
    """Drop all but the best of images whose features are nearer than the threshold."""
    recipe = work.recipe.duplicates
    alive, without = work.with_features(alive)
    missing = rows_of(without, NO_FEATURES)
    compared = work.comparison(alive)
    threshold, figures = compared.threshold, compared.figures
    if threshold > 1:
        return missing, figures | {"groups": []}
    vectors = work.compared_vectors(alive, compared.whitening)
    found = near_duplicates(
        vectors,
        threshold,
        -work.rank[alive].astype(np.float64),
        recall=recipe.recall,
        resources=work.resources,
    )
    dropped = ~found.is_kept
    other = alive[found.representative_N[dropped]]
    rows = rows_of(
        alive[dropped], "copy", value=found.similarity_N[dropped], limit=threshold, other_index=other
    )
    tried = [threshold + step for step in NEIGHBOURING if 0 < threshold + step <= 1]
    nearest = np.full(len(alive), -1, np.float32)
    for pairs in pairs_above(vectors, tried[0], recall=recipe.recall, resources=work.resources):
        np.maximum.at(nearest, pairs.left_P, pairs.cosines_P)
        np.maximum.at(nearest, pairs.right_P, pairs.cosines_P)
    figures = figures | {
        "search_recall": found.recall.value,
        "search_bound": found.recall.bound,
        "pairs": found.pairs,
        "chained": found.chained,
        "near": {f"{one:.4f}": int((nearest >= one).sum()) for one in tried},
        "groups": _groups(other, alive[dropped]),
    }
    return pa.concat_tables([missing, rows]), figures


def _groups(kept: Integers, dropped: Integers, most: int = 12) -> list[list[int]]:
    """The largest groups, the kept image first, for the report."""
    names, starts, counts = np.unique(np.sort(kept), return_index=True, return_counts=True)
    by_kept = dropped[np.argsort(kept, kind="stable")]
    chosen = np.argsort(-counts, kind="stable")[:most]
    return [
        [int(names[one]), *by_kept[starts[one] : starts[one] + counts[one]][:11].tolist()] for one in chosen
    ]


def retrieve(work: Work, alive: Integers) -> Made:
    """Keep only what is like the seeds."""
    recipe = work.recipe.retrieve
    alive, without = work.with_features(alive)
    tables = {data: work.features_of(data) for data in work.seeds}
    seeds = np.concatenate([np.asarray(table.vectors[:], np.float32) for table in tables.values()])
    images, keys = [], []  # of each seed; a table leaves out what is bad, so that its rows are not the images
    for data, table in tables.items():
        images += [(data, index) for index in table.rows.column("index").to_pylist()]
        keys += [f"{data}: {key}" for key in table.rows.column("key").to_pylist()]
    method = recipe.method
    if method == "auto":
        method = "nearest" if len(seeds) >= recipe.auto_seeds else "clusters"
    vectors = work.vectors(alive)
    figures: dict[str, Any] = {"method": method, "seeds": len(seeds)}
    if method == "nearest":
        found = nearest_to_seeds(vectors, seeds, recipe.neighbours, resources=work.resources)
        other = [keys[source] for source in found.sources_R.tolist()]
    else:
        count = min(len(alive), recipe.clusters or min(100_000, max(1, round(len(alive) ** 0.5))))
        clusters = kmeans(vectors, count, resources=work.resources)
        found = from_seed_clusters(
            clusters, seeds, per_cluster=recipe.per_cluster, more_than=recipe.min_seeds, most=recipe.most,
            resources=work.resources,
        )  # fmt: skip
        matched = np.unique(found.sources_R)
        cluster_of_seed, _ = assign(seeds, clusters.centroids_KD, resources=work.resources)
        figures |= {"clusters": count, "matched": len(matched)}
        other = [f"cluster {source}" for source in found.sources_R.tolist()]
    retrieved, order = found.images_R, np.arange(len(found.images_R))
    if len(retrieved) > recipe.most:  # the most similar
        order = np.sort(np.argsort(-found.similarities_R, kind="stable")[: recipe.most])
        retrieved = retrieved[order]
    kept = np.zeros(len(alive), bool)
    kept[retrieved] = True
    first: dict[int, list[int]] = {}  # the most alike of each seed, or of each cluster
    for one in np.argsort(-found.similarities_R[order], kind="stable").tolist():
        first.setdefault(int(found.sources_R[order[one]]), []).append(int(alive[retrieved[one]]))
    figures["by_seed"] = []
    for source, rows in list(first.items())[:8]:
        own = [source] if method == "nearest" else np.flatnonzero(cluster_of_seed == source)[:2].tolist()
        figures["by_seed"].append([[images[seed] for seed in own], rows[: 6 - len(own)]])
    return pa.concat_tables(
        [
            rows_of(np.concatenate((alive[~kept], without)), "not like a seed"),
            rows_of(
                alive[retrieved],
                "like a seed",
                dropped=False,
                value=found.similarities_R[order],
                other=[other[one] for one in order.tolist()],
            ),
        ]
    ), figures


def cluster(work: Work, alive: Integers) -> Made:
    """Keep a number of images, evenly from a tree of clusters."""
    recipe = work.recipe.cluster
    alive, without = work.with_features(alive)
    levels = list(recipe.levels)
    if not levels:
        levels = [max(1, len(alive) // IMAGES_PER_CLUSTER)]
        while levels[-1] >= 20:
            levels.append(levels[-1] // 10)
    if levels[0] > len(alive):
        raise UserError(
            f"cluster.levels asks for {levels[0]:,} clusters, and {len(alive):,} images are left."
        )
    tree = hierarchical_kmeans(
        work.vectors(alive), levels, rounds=recipe.resampling, resources=work.resources
    )
    chosen = balanced_sample(
        tree, min(recipe.count, len(alive)), within=recipe.sampling, seed=work.recipe.run.seed
    )
    kept = np.zeros(len(alive), bool)
    kept[chosen] = True
    labels, similarities = tree.levels[0].labels_N, tree.levels[0].similarities_N
    before, after = np.bincount(labels, minlength=levels[0]), np.bincount(labels[kept], minlength=levels[0])
    largest = np.argsort(-before, kind="stable")[:8]
    nearest = np.argsort(-similarities, kind="stable")
    shown = [[int(one), alive[nearest[labels[nearest] == one][:6]].tolist()] for one in largest]
    rows = rows_of(
        np.concatenate((alive, without)),
        [*np.where(kept, "sampled", "not sampled").tolist(), *[NO_FEATURES] * len(without)],
        dropped=np.concatenate((~kept, np.ones(len(without), bool))),
        value=np.concatenate((similarities, np.full(len(without), np.nan))),
        other=[*(f"cluster {one}" for one in labels.tolist()), *[None] * len(without)],
    )
    return rows, {
        "levels": levels,
        "wanted": recipe.count,
        "shown": shown,
        "sizes": sorted(before.tolist(), reverse=True)[:200],
        "sampled": [int(after[one]) for one in np.argsort(-before, kind="stable")[:200]],
    }
