"""Feature tables of vectors of any kind, without images."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from unlabeled import FeatureTable
from unlabeled.features.table import FORMAT, SCHEMA

IDENTITY = {
    "model": {"name": "", "weights": "0" * 64},
    "kind": "cls",
    "layer": 1,
    "preprocessing": {"size": 32, "shape": "crop", "patch_size": 8},
    "precision": "float32",
}


def write_table(
    folder: Path,
    vectors: NDArray[np.floating],
    *,
    data: str = "/images",
    first: int = 0,
    hashes: str = "a",
    shard: int = 1000,
    **identity: object,
) -> FeatureTable:
    """Image i has the number first + i in its source, the key "i.png", the label i % 7 and a width of i % 100."""
    folder.mkdir(parents=True)
    header = {
        "format": FORMAT,
        "identity": IDENTITY | identity,
        "dtype": vectors.dtype.name,
        "dimension": vectors.shape[1],
        "sources": [{"data": data, "images": first + len(vectors), "shard": shard}],
    }
    (folder / "table.json").write_text(json.dumps(header))
    for number, start in enumerate(range(0, len(vectors), shard)):
        part = vectors[start : start + shard]
        places = range(first + start, first + start + len(part))
        columns = {
            "key": [f"{place}.png" for place in places],
            "source": ["images"] * len(part),
            "index": places,
            "content_hash": [f"{hashes}{place}" for place in places],
            "width": [place % 100 for place in places],
            "height": [50] * len(part),
            "label": [None if place % 7 == 0 else str(place % 7) for place in places],
        }
        np.save(folder / f"000-{number:06}.npy", part)
        pq.write_table(pa.table(columns, schema=SCHEMA), folder / f"000-{number:06}.parquet")
    return FeatureTable(folder)


@pytest.fixture
def make_table(tmp_path: Path) -> Callable[..., FeatureTable]:
    def make(name: str, vectors: NDArray[np.floating], **options: object) -> FeatureTable:
        return write_table(tmp_path / name, vectors, **options)

    return make


def clustered(count: int, dimension: int = 24, seed: int = 0) -> NDArray[np.float32]:
    """Vectors as features are: in clusters, none of length 1."""
    generator = np.random.default_rng(seed)
    centres = np.random.default_rng(100).standard_normal((40, dimension))
    vectors = centres[generator.integers(0, 40, count)] + 0.5 * generator.standard_normal((count, dimension))
    return (3 * vectors).astype(np.float32)


def cosines(queries: NDArray[np.floating], vectors: NDArray[np.floating]) -> NDArray[np.float64]:
    a, b = queries.astype(np.float64), vectors.astype(np.float64)
    return (a / np.linalg.norm(a, axis=1, keepdims=True)) @ (b / np.linalg.norm(b, axis=1, keepdims=True)).T
