"""What the steps share: the images, what was measured of them, and their features, made when first asked for.

Shape suffixes: N images of DATA, A images that are left, D width of the features.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from unlabeled.atomic import replacing
from unlabeled.curate.blocks import Executor, Integers, Resources, parse_bytes
from unlabeled.curate.calibrate import OperatingPoint, calibrate
from unlabeled.curate.copies import make_copy
from unlabeled.curate.recipe import CurateRecipe
from unlabeled.errors import writing
from unlabeled.features.embed import embed
from unlabeled.features.extractor import Extractor
from unlabeled.features.table import FeatureTable
from unlabeled.images.decode import BadImage, decode
from unlabeled.images.sources import Source

if TYPE_CHECKING:
    from rich.console import Console

NOISY = (
    1.5  # grain from which on noise explains why an image has more bytes; one photograph in twenty has more
)
COPIES_OF_EACH = 4  # made for the calibration
CALIBRATION_POOL = 100_000  # images that copies are searched among, at most


@dataclass
class Work:
    """What the steps share: the images, what was measured of them, and their features, made when first asked for.

    Attributes:
        data: DATA, and `source`, which is it opened.
        folder: of what is kept between runs.
        measured: shards of `measure_source`.
        exclude, seeds: DATA each.
        executor: what runs blocks, if not threads.
    """

    data: str
    source: Source
    folder: Path
    measured: Sequence[Path]
    recipe: CurateRecipe
    exclude: Sequence[str] = ()
    seeds: Sequence[str] = ()
    device: str = "auto"
    executor: Executor | None = None
    console: Console | None = None
    _columns: dict[str, NDArray[Any]] = field(default_factory=dict)
    _calibrated: OperatingPoint | None = None

    @property
    def resources(self) -> Resources:
        """What the steps on matrices may use."""
        run = self.recipe.run
        memory = parse_bytes(run.memory)
        return Resources(run.workers, memory, self.folder / "blocks", run.seed, self.executor)

    def column(self, name: str) -> NDArray[Any]:
        """A measured column, (N,); kept once read."""
        if name not in self._columns:
            if name in ("side", "aspect"):
                sides = np.stack((self.column("width"), self.column("height")))
                with np.errstate(divide="ignore", invalid="ignore"):
                    self._columns[name] = sides.min(0) if name == "side" else sides.max(0) / sides.min(0)
            else:
                column = pa.concat_tables(
                    [pq.read_table(shard, columns=[name]) for shard in self.measured]
                ).column(0)
                self._columns[name] = column.to_numpy()
        return self._columns[name]

    @cached_property
    def rank(self) -> Integers:
        """Place of each image from best to worst: more pixels, without noise, more bytes, sharper, first."""
        pixels = self.column("width").astype(np.int64) * self.column("height")
        blur, is_noisy = np.nan_to_num(self.column("blur")), self.column("grain") > NOISY
        order = np.lexsort((-blur, -self.column("bytes"), is_noisy, -pixels))
        rank = np.empty(len(order), np.int64)
        rank[order] = np.arange(len(order))
        return rank

    def features_of(self, data: str) -> FeatureTable:
        """The feature table of a DATA, made once for each model and preprocessing."""
        chosen = self.recipe.features
        name = hashlib.sha256(json.dumps([asdict(chosen), str(data)]).encode()).hexdigest()[:12]
        return embed(
            data, chosen.model, self.folder / f"features-{name}", kind=chosen.kind, size=chosen.size or None,
            shape=chosen.shape, device=self.device, ray=self.recipe.run.ray or None, console=self.console,
        )  # fmt: skip

    @cached_property
    def features(self) -> FeatureTable:
        """Of DATA."""
        return self.features_of(self.data)

    @cached_property
    def table_rows(self) -> Integers:
        """Row of each image in the feature table; -1 where it has none."""
        rows = np.full(len(self.source), -1, np.int64)
        index = self.features.rows.column("index").to_numpy()
        rows[index] = np.arange(len(index))
        return rows

    def vectors(self, indices: Integers) -> Any:
        """(A, D) of the images at some indices; on disk, where these are not all."""
        rows, table = self.table_rows[indices], self.features.vectors
        if len(rows) == len(table) and (np.diff(rows) == 1).all():
            return table
        file = self.folder / "blocks" / f"vectors-{hashlib.sha256(rows.tobytes()).hexdigest()[:12]}.npy"
        if not file.is_file():
            with writing(file), replacing(file) as part:
                out = np.lib.format.open_memmap(part, "w+", table.dtype, (len(rows), table.shape[1]))
                for start in range(0, len(rows), 65536):
                    out[start : start + 65536] = table[rows[start : start + 65536]]
                out.flush()
                del out
        return np.load(file, mmap_mode="r")

    def with_features(self, alive: Integers) -> tuple[Integers, Integers]:
        """Split images into those that have features, and those that do not."""
        has = self.table_rows[alive] >= 0
        return alive[has], alive[~has]

    def copy_threshold(self, alive: Integers) -> tuple[float, dict[str, Any]]:
        """Cosine from which on two images are copies, and how it was found; above 1 where none is precise enough."""
        number = self.recipe.duplicates.threshold
        if 0 < number <= 1:
            return number, {"threshold": number, "calibrated": False}
        if self._calibrated is None:
            self._calibrated = self._calibrate(alive)
        point = self._calibrated
        return point.threshold, {"calibrated": True} | {
            name: value if np.isfinite(value) else None for name, value in asdict(point).items()
        }

    def _calibrate(self, alive: Integers) -> OperatingPoint:
        recipe, seed = self.recipe.duplicates, self.recipe.run.seed
        file = self.folder / "calibration.json"
        identity = json.dumps(
            [recipe.precision, recipe.calibration_images, seed, self.features.path.name, hash_of(alive)]
        )
        if file.is_file():
            held = json.loads(file.read_text())
            if held["identity"] == identity:
                return OperatingPoint(**held["point"])
        rng = np.random.default_rng([seed, 11])
        pool = np.sort(rng.choice(alive, min(len(alive), CALIBRATION_POOL), replace=False))
        some = np.sort(rng.choice(len(pool), min(len(pool), recipe.calibration_images), replace=False))
        extractor = Extractor.of(self.features.identity, self.device, self.recipe.features.model)
        copies, sources = [], []
        for place in some.tolist():
            try:
                pixels = decode(self.source.read(int(pool[place])).data)
            except (BadImage, OSError):
                continue
            made = [
                make_copy(pixels, np.random.default_rng([seed, 12, place, number]))
                for number in range(COPIES_OF_EACH)
            ]
            copies.append(np.asarray(extractor(made)))
            sources += [place] * COPIES_OF_EACH
        found = calibrate(
            self.features.vectors[self.table_rows[pool]],
            np.concatenate(copies) if copies else np.empty((0, 1), np.float32),
            sources,
            precisions=[recipe.precision],
            resources=self.resources,
        )
        with writing(file), replacing(file) as part:
            part.write_text(json.dumps({"identity": identity, "point": asdict(found.points[0])}))
        return found.points[0]


def hash_of(values: NDArray[Any]) -> str:
    """Return a hash of the values of an array."""
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()[:16]
