"""Feature tables whose vectors a test chooses."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from unlabeled.features.table import FORMAT, SCHEMA, FeatureTable

MakeTable = Callable[..., FeatureTable]


@pytest.fixture
def make_table(tmp_path: Path) -> MakeTable:
    """(name, vectors, labels, keys=None, kind="cls", layer=11, weights="w") to a table in two shards."""

    def make(
        name: str,
        vectors: np.ndarray,
        labels: Sequence[str | None],
        keys: Sequence[str] | None = None,
        kind: str = "cls",
        layer: int = 11,
        weights: str = "w",
    ) -> FeatureTable:
        folder = tmp_path / name
        folder.mkdir()
        keys = keys or [f"{name}/{number}.jpg" for number in range(len(vectors))]
        identity = {
            "model": {"name": "", "weights": weights},
            "kind": kind,
            "layer": layer,
            "preprocessing": {"size": 32, "shape": "crop", "patch_size": 8},
            "precision": "float32",
        }
        header = {
            "format": FORMAT, "identity": identity, "dtype": "float32", "dimension": vectors.shape[1],
            "sources": [{"data": f"/{name}", "images": len(vectors), "shard": 512}],
        }  # fmt: skip
        (folder / "table.json").write_text(json.dumps(header))
        half = len(vectors) // 2
        for number, part in enumerate((slice(0, half), slice(half, None))):
            length = len(vectors[part])
            columns = {
                "key": list(keys[part]), "source": [name] * length, "index": list(range(length)),
                "content_hash": [f"{name} {key}" for key in keys[part]], "width": [32] * length,
                "height": [32] * length, "label": list(labels[part]),
            }  # fmt: skip
            pq.write_table(pa.table(columns, schema=SCHEMA), folder / f"000-{number:06}.parquet")
            np.save(folder / f"000-{number:06}.npy", vectors[part].astype(np.float32))
        return FeatureTable(folder)

    return make


def clusters(
    num: int, width: int, classes: int, spread: float, seed: int, names: str = "class {}"
) -> tuple[np.ndarray, list[str]]:
    """Points around a centre for each class, the same centres for every seed; and their class names."""
    centres = np.random.default_rng(99).normal(size=(classes, width))
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, num)
    labels[:classes] = np.arange(classes)
    points = centres[labels] + spread * rng.normal(size=(num, width))
    return points.astype(np.float32), [names.format(label) for label in labels]
