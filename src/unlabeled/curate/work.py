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
from unlabeled.curate.blocks import (
    Executor,
    Integers,
    Resources,
    load_arrays,
    parse_bytes,
    save_arrays,
)
from unlabeled.curate.calibrate import OperatingPoint, calibrate
from unlabeled.curate.copies import make_copy
from unlabeled.curate.measured import measure_source
from unlabeled.curate.recipe import CurateRecipe
from unlabeled.curate.whitening import Whitening, fit_whitening, write_whitened
from unlabeled.errors import UserError, writing
from unlabeled.features.embed import embed
from unlabeled.features.extractor import Extractor
from unlabeled.features.table import FeatureTable, content_hash
from unlabeled.images.decode import BadImage, decode
from unlabeled.images.sources import Source, open_source

if TYPE_CHECKING:
    from rich.console import Console

GREY = 1.0  # of colour, in levels, below which an image is grey
NOISY = (
    1.5  # grain from which on noise explains why an image has more bytes; one photograph in twenty has more
)
COPIES_OF_EACH = 4  # made for the calibration
CALIBRATION_POOL = 100_000  # images that copies are searched among, at most
SAMPLED = 64  # images of DATA that are read to see whether it is still the same
RAW, WHITENED = "raw", "whitened"  # features as they are, or whitened


@dataclass(frozen=True)
class Comparison:
    """How features are compared.

    Attributes:
        threshold: cosine from which on two images are copies; above 1 where none is precise enough.
        whitening: what the features go through first, if anything.
        figures: how that was found, for the report.
    """

    threshold: float
    whitening: Whitening | None
    figures: dict[str, Any]


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
    _samples: dict[str, str] = field(default_factory=dict)
    _compared: Comparison | None = None

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
                self._columns[name] = read_column(self.measured, name).to_numpy()
        return self._columns[name]

    @cached_property
    def rank(self) -> Integers:
        """Place of each image, best first: more pixels, without noise, with colour, more bytes, sharper."""
        pixels = self.column("width").astype(np.int64) * self.column("height")
        blur, is_noisy = np.nan_to_num(self.column("blur")), self.column("grain") > NOISY
        is_grey = (
            self.column("colour") < GREY
        )  # a grey PNG has more bytes than the coloured JPEG it was made of
        order = np.lexsort((-blur, -self.column("bytes"), is_grey, is_noisy, -pixels))
        rank = np.empty(len(order), np.int64)
        rank[order] = np.arange(len(order))
        return rank

    def features_of(self, data: str) -> FeatureTable:
        """The feature table of a DATA, made once for each model and preprocessing."""
        chosen = self.recipe.features
        what = [str(data)] if data == self.data else [str(data), self.sample_of(data)]
        name = hashlib.sha256(json.dumps([asdict(chosen), *what]).encode()).hexdigest()[:12]
        return embed(
            data, chosen.model, self.folder / f"features-{name}", kind=chosen.kind, size=chosen.size or None,
            shape=chosen.shape, device=self.device, ray=self.recipe.run.ray or None, console=self.console,
        )  # fmt: skip

    def sample_of(self, data: str) -> str:
        """Hash of some images of a DATA other than the pile, and of how many it has; made once."""
        if data not in self._samples:
            source = open_source(data)
            self._samples[data] = f"{len(source)} {sample_hash(source)}"
        return self._samples[data]

    def measured_of(self, data: str) -> list[Path]:
        """What is measured of a DATA other than the pile, made once."""
        name = hashlib.sha256(f"{data}\0{self.sample_of(data)}".encode()).hexdigest()[:12]
        return measure_source(
            open_source(data), self.folder / f"measured-of-{name}", workers=self.recipe.run.workers,
            on_ray=data if self.executor else None, console=self.console,
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

    def compared_vectors(self, indices: Integers, whitening: Whitening | None) -> Any:
        """(A, K) of the images at some indices as they are compared: whitened, where that is wanted."""
        name = f"{self.features.path.name} {hash_of(indices)}"
        return self._whitened(self.vectors(indices), whitening, name)

    def compared_vectors_of(self, table: FeatureTable, whitening: Whitening | None) -> Any:
        """Of a whole feature table."""
        return self._whitened(table.vectors, whitening, table.path.name)

    def _whitened(self, vectors: Any, whitening: Whitening | None, name: str) -> Any:
        """On disk, made once. name: of the vectors."""
        if whitening is None:
            return vectors
        digest = hashlib.sha256(f"{name} {hash_of(whitening.matrix_DK)}".encode()).hexdigest()[:12]
        file = self.folder / "blocks" / f"whitened-{digest}.npy"
        if not file.is_file():
            write_whitened(file, whitening, vectors, resources=self.resources)
        return np.load(file, mmap_mode="r")

    def comparison(self, alive: Integers, threshold: float = 0.0) -> Comparison:
        """How images that have features are compared to find copies.

        threshold: that was given for a step, or 0: that of the duplicates, or else calibrated.
        Raises UserError where features have to be whitened and cannot be.
        """
        recipe = self.recipe.duplicates
        number = threshold or recipe.threshold
        if 0 < number <= 1:
            whitening = self._whitening(alive) if recipe.whiten == "yes" else None
            figures = {"threshold": number, "calibrated": False, "space": WHITENED if whitening else RAW}
            return Comparison(number, whitening, figures)
        if self._compared is None:
            self._compared = self._calibrated(alive)
        return self._compared

    def _whitening(self, alive: Integers) -> Whitening:
        """Fitted to images, or that of an earlier run."""
        name = hashlib.sha256(f"{self.features.path.name} {hash_of(alive)} {self.recipe.run.seed}".encode())
        file = self.folder / "blocks" / f"whitening-{name.hexdigest()[:12]}.npz"
        if not file.is_file():
            try:
                found = fit_whitening(self.vectors(alive), resources=self.resources)
            except UserError as error:
                if self.recipe.duplicates.whiten != "yes":
                    raise
                raise UserError(f"duplicates.whiten is yes. {error}") from error
            save_arrays(file, mean_D=found.mean_D, matrix_DK=found.matrix_DK)
        return Whitening(**load_arrays(file))

    def _calibrated(self, alive: Integers) -> Comparison:
        """The threshold for the wanted precision, of the features that then find more of the copies."""
        wanted = self.recipe.duplicates.whiten
        spaces: dict[str, Whitening | None] = {} if wanted == "yes" else {RAW: None}
        reason = None
        if wanted != "no":
            try:
                spaces[WHITENED] = self._whitening(alive)
            except UserError as error:
                if wanted == "yes":
                    raise
                reason = str(error)
        points, scores = self._points(alive, spaces)
        # A recall at a high precision hangs on a pair or two, micro-AP on all of them.
        best = max(spaces, key=lambda space: scores[space])  # the first of equal ones
        point = points[best]
        figures = {
            name: value if np.isfinite(value) else None for name, value in asdict(point).items()
        } | {
            "calibrated": True, "space": best, "micro_ap": scores,
            "not_whitened": reason,
        }  # fmt: skip
        return Comparison(point.threshold, spaces[best], figures)

    def _points(
        self, alive: Integers, spaces: dict[str, Whitening | None]
    ) -> tuple[dict[str, OperatingPoint], dict[str, float]]:
        """What copies made of the images say of each way to compare features: the point, and micro-AP."""
        recipe, seed = self.recipe.duplicates, self.recipe.run.seed
        file = self.folder / "calibration.json"
        identity = json.dumps(
            [
                recipe.precision, recipe.calibration_images, seed, self.features.path.name, hash_of(alive),
                list(spaces),
            ]
        )  # fmt: skip
        if file.is_file():
            held = json.loads(file.read_text())
            if held["identity"] == identity:
                points = {space: OperatingPoint(**point) for space, point in held["points"].items()}
                return points, held["micro_ap"]
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
        queries = np.concatenate(copies) if copies else np.empty((0, 1), np.float32)
        found = {
            space: calibrate(
                self.compared_vectors(pool, whitening),
                whitening(queries) if whitening and len(queries) else queries,
                sources,
                precisions=[recipe.precision],
                resources=self.resources,
            )
            for space, whitening in spaces.items()
        }
        points = {space: one.points[0] for space, one in found.items()}
        scores = {space: one.micro_ap for space, one in found.items()}
        kept = {space: asdict(point) for space, point in points.items()}
        with writing(file), replacing(file) as part:
            part.write_text(json.dumps({"identity": identity, "points": kept, "micro_ap": scores}))
        return points, scores


def read_column(measured: Sequence[Path], name: str) -> pa.ChunkedArray:
    """Return a column of shards of `measure_source`."""
    return pa.concat_tables([pq.read_table(shard, columns=[name]) for shard in measured]).column(0)


def sample_hash(source: Source) -> str:
    """Return a hash of some images, evenly spread, with their names."""
    digest = hashlib.sha256()
    for index in np.unique(np.linspace(0, len(source) - 1, min(len(source), SAMPLED)).astype(np.int64)):
        try:
            sample = source.read(int(index))
            digest.update(f"{sample.key}\0{content_hash(sample.data)}\n".encode())
        except OSError:
            digest.update(b"unreadable\n")
    return digest.hexdigest()[:32]


def hash_of(values: NDArray[Any]) -> str:
    """Return a hash of the values of an array."""
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()[:16]
