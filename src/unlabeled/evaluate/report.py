"""Protocols by models: each pair run once, kept in a folder, and found again by the next run."""

from __future__ import annotations

import base64
import hashlib
import json
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from unlabeled import evaluate
from unlabeled.errors import UserError, writing
from unlabeled.evaluate.bootstrap import Difference
from unlabeled.evaluate.labelled import Data, Model, name_of, opened, tables_of
from unlabeled.evaluate.result import Figure, Picture, Result, column, compared
from unlabeled.features.engines import weights_hash
from unlabeled.features.extractor import Kind
from unlabeled.features.table import FeatureTable
from unlabeled.vit import VisionTransformer
from unlabeled.weights.files import replacing
from unlabeled.weights.load import load_model

CLASSIFICATION = ("knn", "linear", "logreg", "fewshot", "retrieval")  # on features of whole images
DENSE = ("segmentation", "depth")
FORMAT = 1  # of stored results; another number, and they are computed again


@dataclass(frozen=True)
class Comparison:
    """Two models on one task: how much b's main metric exceeds a's."""

    task: str
    metric: str
    a: str
    b: str
    found: Difference
    items: int


@dataclass(frozen=True)
class Report:
    """What a run found.

    Attributes:
        results: by task, then by model, in the order in which they were asked for.
        comparisons: of each two models on each task.
        skipped: (task, model, reason) of what could not be run, where all protocols were asked for.
    """

    results: list[Result]
    comparisons: list[Comparison]
    skipped: list[tuple[str, str, str]] = field(default_factory=list)

    @property
    def tasks(self) -> dict[str, list[Result]]:
        """Results by task."""
        found: dict[str, list[Result]] = {}
        for result in self.results:
            found.setdefault(result.task, []).append(result)
        return found

    def as_json(self) -> dict[str, Any]:
        """All figures as JSON types; for one model its metrics are at the top, too."""
        metrics: dict[str, dict[str, float]] = {}
        intervals: dict[str, dict[str, tuple[float, float]]] = {}
        for one in self.results:
            metrics.setdefault(one.model, {}).update(
                {column(one.task, name): value for name, value in one.metrics.items()}
            )
            intervals.setdefault(one.model, {}).update(
                {column(one.task, name): pair for name, pair in one.intervals.items()}
            )
        flat: dict[str, Any] = next(iter(metrics.values())) if len(metrics) == 1 else {}
        return {
            **flat,
            "metrics": metrics,
            "intervals": intervals,
            "comparisons": [
                {
                    "metric": column(one.task, one.metric),
                    "a": one.a,
                    "b": one.b,
                    "items": one.items,
                    **one.found._asdict(),
                }
                for one in self.comparisons
            ],
            "results": [
                {
                    name: getattr(one, name)
                    for name in (
                        "task",
                        "model",
                        "metrics",
                        "intervals",
                        "settings",
                        "counts",
                        "notes",
                        "bad_files",
                    )
                }
                for one in self.results
            ],
            "skipped": [dict(zip(("task", "model", "reason"), one, strict=True)) for one in self.skipped],
        }


def run(
    tasks: Sequence[str],
    models: Sequence[Model],
    train: Data,
    test: Data,
    *,
    out: str | Path | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    seen: Callable[[Result, float], None] | None = None,
    **extraction: Any,
) -> Report:
    """Run protocols on models; what is in `out` already is not run again.

    Args:
        tasks: knn, linear, logreg, fewshot, retrieval, segmentation, depth; or all that the data allow: all.
        models: MODELs; none where both sides are feature tables.
        train, test: DATA or feature tables; for segmentation and depth what those take.
        out: a folder, where results and features are kept.
        options: of protocols, by task.
        seen: told of each result when it is there, and of the seconds it took (0 where it was kept).
        extraction: see `Extraction`; cache is out/features by default.

    Raises:
        UserError: as the protocols do; of all protocols, only where none can be run.
    """
    is_all = "all" in tasks
    wanted = possible(train) if is_all else list(dict.fromkeys(tasks))
    named = [name_of(model) for model in models]
    if len(set(named)) < len(named):
        raise UserError(f"A model is given twice: {', '.join(named)}.")
    folder = Path(out).expanduser() if out is not None else None
    found: dict[tuple[str, str], Result] = {}
    skipped: list[tuple[str, str, str]] = []
    with TemporaryDirectory(prefix="unlabeled-") as temporary:
        if extraction.get("cache") is None:
            extraction["cache"] = folder / "features" if folder else Path(temporary)
        every: list[Model | None] = [*models] or [None]
        for model in every:
            own = _OfModel(
                model, train, test, folder, options or {}, extraction, _kind(wanted, options or {})
            )
            for task in wanted:
                begun = time.monotonic()
                try:
                    result, is_new = own.result(task)
                except UserError as error:
                    if not is_all:
                        raise
                    skipped.append((task, own.name, str(error)))
                    continue
                found[task, own.name] = result
                if seen:
                    seen(result, time.monotonic() - begun if is_new else 0.0)
    if not found:
        raise UserError("; ".join(dict.fromkeys(reason for *_, reason in skipped)))
    ordered = [result for task in wanted for (of, _), result in found.items() if of == task]
    return Report(ordered, list(_comparisons(ordered)), skipped)


def possible(train: Data) -> list[str]:
    """The protocols for which a DATA or folder has what they need."""
    folder = Path(train).expanduser() if not isinstance(train, FeatureTable) else train.path
    layouts = {"segmentation": "labels", "depth": "depth"}
    dense = [
        task for task, part in layouts.items() if (folder / "images").is_dir() and (folder / part).is_dir()
    ]
    return dense or list(CLASSIFICATION)


def _kind(tasks: Sequence[str], options: Mapping[str, Mapping[str, Any]]) -> Kind:
    """The features that serve all of some protocols."""
    if "linear" in tasks:
        return "layers"
    return (
        "cls+mean" if any("mean" in options.get(task, {}).get("features", "cls") for task in tasks) else "cls"
    )


class _OfModel:
    """One model's results: its features are extracted once, and only if a result is missing."""

    def __init__(
        self,
        model: Model | None,
        train: Data,
        test: Data,
        folder: Path | None,
        options: Mapping[str, Mapping[str, Any]],
        extraction: dict[str, Any],
        kind: Kind,
    ) -> None:
        self.model, self.train, self.test, self.folder = model, train, test, folder
        self.options, self.extraction, self.kind = options, extraction, kind
        self.tables: list[FeatureTable] | None = None
        table = opened(train)
        if model is not None:
            self.name = name_of(model)
            self.weights = weights_hash(model if isinstance(model, VisionTransformer) else load_model(model))
        elif table is not None:
            self.name = table.identity["model"]["name"] or "a model without a name"
            self.weights = table.identity["model"]["weights"]
        else:
            raise UserError(f"{train} is no feature table, so that a model is needed.")

    def result(self, task: str) -> tuple[Result, bool]:
        """A task's result, and whether it is new."""
        place = self._place(task)
        if place and (kept := load_result(place)):
            return replace(kept, model=self.name), False
        result = replace(self._run(task), model=self.name)
        if place:
            save_result(place, result)
        return result, True

    def _run(self, task: str) -> Result:
        protocol = getattr(evaluate, task)
        options = dict(self.options.get(task, {}))
        if task in DENSE:
            device = {name: self.extraction[name] for name in ("device",) if name in self.extraction}
            dense: Result = protocol(self.model, train=self.train, test=self.test, **device, **options)
            return dense
        if self.tables is None:
            self.tables, _ = tables_of(self.model, [self.train, self.test], self.kind, self.extraction)
        # The tables are of this model; only queries that are cropped want it again.
        model = self.model if options.get("ground_truth") else None
        device = {"device": self.extraction.get("device", "auto")}
        result: Result = protocol(model, train=self.tables[0], test=self.tables[1], **device, **options)
        return result

    def _place(self, task: str) -> Path | None:
        """Where a result is kept: named by all that it depends on, less the images themselves."""
        if self.folder is None:
            return None
        sides = [str(one.path if isinstance(one, FeatureTable) else one) for one in (self.train, self.test)]
        sides = [one if one.startswith("hf:") else str(Path(one).expanduser().absolute()) for one in sides]
        shaped = {name: self.extraction.get(name) for name in ("size", "shape")}
        made_of = [FORMAT, task, self.weights, sides, shaped, self.options.get(task, {})]
        if task not in DENSE:
            made_of.append(self.kind)
        digest = hashlib.sha256(json.dumps(made_of, sort_keys=True, default=str).encode()).hexdigest()[:12]
        return self.folder / "results" / f"{task}-{digest}.npz"


def _comparisons(results: list[Result]) -> Iterator[Comparison]:
    for a, b in combinations(results, 2):
        if a.task == b.task and a.main == b.main and a.main in a.figures:
            items = len(set(a.keys) & set(b.keys))
            if items:
                yield Comparison(a.task, a.main, a.model, b.model, compared(a, b), items)


def save_result(path: Path, result: Result) -> None:
    """Keep a result in one file: its arrays as they are, the rest as JSON beside them."""
    names = (
        "task",
        "model",
        "metrics",
        "intervals",
        "settings",
        "counts",
        "bad_files",
        "notes",
        "keys",
        "predictions",
        "truths",
    )
    held = {name: getattr(result, name) for name in names}
    held["figures"] = {name: one.statistic for name, one in result.figures.items()}
    held["pictures"] = [
        (one.title, base64.b64encode(one.image).decode(), one.is_hit) for one in result.pictures
    ]
    arrays = {f"figure_{name}": one.values_M for name, one in result.figures.items()}
    text = np.frombuffer(json.dumps(held).encode(), np.uint8)
    with writing(path), replacing(path) as part, part.open("wb") as file:
        np.savez_compressed(file, **{"result": text, **arrays})  # type: ignore[arg-type]


def load_result(path: Path) -> Result | None:
    """A result that was kept, or None where there is none, or one that was cut off."""
    if not path.exists():
        return None
    try:
        with np.load(path) as arrays:
            held = json.loads(arrays["result"].tobytes())
            figures = {
                name: Figure(arrays[f"figure_{name}"], kind) for name, kind in held.pop("figures").items()
            }
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None
    pictures = [
        Picture(title, base64.b64decode(image), is_hit) for title, image, is_hit in held.pop("pictures")
    ]
    held["intervals"] = {name: tuple(pair) for name, pair in held["intervals"].items()}
    held["bad_files"] = [tuple(pair) for pair in held["bad_files"]]
    return Result(**{**held, "notes": tuple(held["notes"]), "figures": figures, "pictures": pictures})
