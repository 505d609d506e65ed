"""A pile of images to a pretraining set: the steps in order, each kept on disk, and a report of every decision.

In CURATED are

    curated.csv or curated-000000.tar   the images that are kept: DATA
    recipe.toml                         every threshold
    curation.json                       what was curated, and the counts of each step
    report/                             index.html, lineage.parquet, pictures
    work/                               what a stopped run goes on from; may be deleted

Each step is kept with a hash of all that it depends on: run again, only what has changed is done again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from unlabeled.atomic import replacing
from unlabeled.curate import steps as do
from unlabeled.curate.blocks import Integers
from unlabeled.curate.collect import collect, is_url_list
from unlabeled.curate.distributed import RayExecutor, cluster
from unlabeled.curate.excluded import removed
from unlabeled.curate.lineage import Outcome, held, kept_or_made, write_lineage
from unlabeled.curate.measured import measure_source
from unlabeled.curate.output import write_output
from unlabeled.curate.recipe import NO_MODEL, STEPS, CurateRecipe, resolved
from unlabeled.curate.report import write_report
from unlabeled.curate.work import Work, hash_of, sample_hash
from unlabeled.errors import UserError, writing
from unlabeled.images.bad_files import first_readable
from unlabeled.images.sources import Source, open_source
from unlabeled.pretrain.recipes import write_recipe
from unlabeled.progress import Progress

if TYPE_CHECKING:
    from rich.console import Console

FORMAT = "unlabeled curation 4"


@dataclass(frozen=True)
class Curated:
    """What a curation made.

    Attributes:
        path: the folder, which is DATA.
        counts: by step, in order: images in, dropped and kept, and how many for each reason.
        report: the page; lineage: the table of all images.
    """

    path: Path
    counts: dict[str, dict[str, Any]]
    report: Path
    lineage: Path


def curate(
    data: str | Path,
    out: str | Path,
    *,
    seeds: str | Path | Sequence[str | Path] = (),
    exclude: str | Path | Sequence[str | Path] = (),
    model: str | Path | None = None,
    count: int | None = None,
    recipe: str | Path | CurateRecipe | None = None,
    steps: Sequence[str] = STEPS,
    shards: bool = False,
    memory: str | None = None,
    workers: int | None = None,
    ray: str | None = None,
    device: str = "auto",
    overrides: dict[str, Any] | None = None,
    console: Console | None = None,
) -> Curated:
    """Turn uncurated images into a pretraining set: DATA at `out`, with a report of every decision.

    A run that was stopped goes on where it was; a changed recipe does again what depends on it.

    Args:
        data: DATA, or a list of URLs (.parquet, .csv or .tsv with a column url, .txt), which are fetched first.
        out: the folder to make.
        seeds: DATA, or several; only images like these are kept.
        exclude: DATA, or several; images too near to these are dropped.
        model: MODEL of the features; "none" leaves out what needs features. By default the recipe's.
        count: images wanted, by balanced sampling; by default all that are left.
        recipe: a TOML file or a CurateRecipe.
        steps: some of quality, duplicates, decontaminate, retrieve, cluster.
        shards: write tar shards also where DATA is files.
        memory: that arrays may take, as "4GB". workers: threads; neither changes the result.
        ray: run on a Ray cluster: "local" starts one here, "auto" is the one that this machine is part of, else
            HOST:PORT. DATA and `out` are at the same place on all its machines. The result is the same.
        overrides: dotted recipe fields, as {"quality.min_blur": 40}.
        console: where progress is shown; nowhere by default.

    Raises:
        UserError: bad DATA, recipe or folder, DATA that changed since, no image left, a full disk.
    """
    if unknown := set(steps) - set(STEPS):
        raise UserError(f"There is no step {min(unknown)!r} of curation; the steps are {', '.join(STEPS)}.")
    given = dict(overrides or {}) | {
        "features.model": None if model is None else str(model),
        "cluster.count": count,
        "run.memory": memory,
        "run.workers": workers,
        "run.ray": ray,
    }
    values = resolved(recipe, given)
    folder = Path(out).expanduser()
    exclude_data, seed_data = _several(exclude), _several(seeds)
    wanted = _wanted(steps, values, exclude_data, seed_data)
    for one in (*exclude_data, *seed_data):
        first_readable(open_source(one))  # before hours of other work
    text = _lasting(data)
    if is_url_list(text):
        _claim(folder)
        text = str(collect(text, folder / "work" / "collected", values.collect, console=console).path)
    source = open_source(text)
    _claim(folder)
    _check_same(folder, text, source)
    with writing(folder), replacing(folder / "recipe.toml") as part:
        write_recipe(values, part)
    scorer = values.quality.scorer
    pixels_scorer = "" if scorer.endswith(do.HEADS) or "quality" not in wanted else scorer
    name = (
        f"measured-{hashlib.sha256(pixels_scorer.encode()).hexdigest()[:8]}" if pixels_scorer else "measured"
    )
    kept = folder.absolute() / "work"
    with _executor(values) as executor:
        measured = measure_source(
            source, kept / name, scorer=pixels_scorer, workers=values.run.workers,
            on_ray=text if executor else None, console=console,
        )  # fmt: skip
        work = Work(
            text, source, kept, measured, values, exclude_data, seed_data, device=device,
            executor=executor, console=console,
        )  # fmt: skip
        outcomes, alive = _run(work, wanted)
    counts = _counts(len(source), outcomes)
    report = folder / "report"
    keys = work.column("key")
    write_lineage(report / "lineage.parquet", measured, outcomes, lambda index: str(keys[index]))
    page = write_report(report, source, outcomes, counts)
    if not len(alive):
        last = max(outcomes, key=lambda outcome: outcome.step in counts and counts[outcome.step]["dropped"])
        raise UserError(
            f"No image of {data} is left: {last.step} dropped {counts[last.step]['dropped']:,}; {page} says why."
        )
    hashes = [str(one) for one in work.column("content_hash")[alive]]
    bar = Progress(console, "writing", "image", 0, len(alive)) if console else None
    write_output(folder, source, alive, hashes, shards=shards, progress=bar)
    _write_state(folder, text, source, counts)
    return Curated(folder, counts, page, report / "lineage.parquet")


def report(curated: str | Path) -> tuple[Path, dict[str, dict[str, Any]]]:
    """Make the page of a curation again from what its steps decided; return it, and the counts of each step.

    Raises UserError: no curation, one that was stopped, whose work/ was deleted, or whose DATA has changed.
    """
    folder = Path(curated).expanduser()
    state = _state(folder)
    counts: dict[str, dict[str, Any]] = state["counts"]
    if not counts:
        raise UserError(f"{folder} is a curation that was stopped; run it again to go on.")
    source = open_source(state["data"])
    _check_images(folder, source, state)
    try:
        outcomes = [held(folder / "work" / "steps", step) for step in counts]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"What the steps of {folder} decided cannot be read ({error}); run the curation again."
        ) from error
    if _counts(len(source), outcomes) != counts:
        raise UserError(f"{folder} was run with another recipe since, and stopped; run it again to go on.")
    return write_report(folder / "report", source, outcomes, counts), counts


@contextmanager
def _executor(recipe: CurateRecipe) -> Iterator[RayExecutor | None]:
    """What runs the blocks: a Ray cluster, or else threads."""
    if not recipe.run.ray:
        yield None
        return
    with cluster(recipe.run.ray, recipe.run.workers) as executor:
        yield executor


def _several(data: str | Path | Sequence[str | Path]) -> list[str]:
    return [_lasting(one) for one in ([data] if isinstance(data, str | Path) else data)]


def _lasting(data: str | Path) -> str:
    """DATA that means the same from every folder."""
    text = str(data)
    return text if text.startswith("hf:") else os.path.abspath(Path(text).expanduser())  # noqa: PTH100


def _wanted(
    steps: Sequence[str], recipe: CurateRecipe, exclude: Sequence[str], seeds: Sequence[str]
) -> list[str]:
    """The steps that there is something to do for, in order."""
    wanted = [step for step in STEPS if step in steps]
    asked = {"decontaminate": bool(exclude), "retrieve": bool(seeds), "cluster": bool(recipe.cluster.count)}
    options = {"decontaminate": "--exclude", "retrieve": "--seeds", "cluster": "--count"}
    if len(wanted) == 1 and not asked.get(wanted[0], True):
        raise UserError(f"{wanted[0]} needs {options[wanted[0]]}.")
    wanted = [step for step in wanted if asked.get(step, True)]
    if recipe.features.model == NO_MODEL:
        for step in ("retrieve", "cluster"):
            option = options[step]
            if step in wanted:
                raise UserError(f"{option} needs features, and the model is none; give a MODEL.")
        if recipe.quality.scorer.endswith(do.HEADS):
            raise UserError("quality.scorer is a head on features, and the model is none; give a MODEL.")
    return wanted


def _claim(folder: Path) -> None:
    """Refuse a folder that is something else."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; --out is a folder.")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "curation.json").is_file():
        if {entry.name for entry in folder.iterdir()} <= {"work"}:  # stopped while URLs were fetched
            return
        raise UserError(f"{folder} exists and is no curation; choose another --out.")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)


def _check_same(folder: Path, data: str, source: Source) -> None:
    """Refuse DATA that is other than when the folder was begun."""
    if not (folder / "curation.json").is_file():
        _write_state(folder, data, source, {})
        return
    state = _state(folder)
    if state["data"] != data:
        raise UserError(f"{folder} is a curation of {state['data']}, not of {data}; choose another --out.")
    _check_images(folder, source, state)


def _check_images(folder: Path, source: Source, state: dict[str, Any]) -> None:
    data, images = state["data"], state["images"]
    if images != len(source):
        raise UserError(
            f"{data} has {len(source):,} images and had {images:,} when {folder} was begun; choose another --out."
        )
    if state["sample"] != sample_hash(source):
        raise UserError(f"{data} has other images than when {folder} was begun; choose another --out.")


def _state(folder: Path) -> dict[str, Any]:
    """What curation.json says."""
    file = folder / "curation.json"
    if not file.is_file():
        raise UserError(f"{folder} is no curation; `unlabeled curate` makes one.")
    try:
        state: dict[str, Any] = json.loads(file.read_text())
        known = state["format"] == FORMAT
        missing = {"data", "images", "sample", "counts"} - state.keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} cannot be read: {error!r}; choose another --out.") from error
    if not known or missing:
        raise UserError(f"{file} is of another format than {FORMAT!r}; choose another --out.")
    return state


def _write_state(folder: Path, data: str, source: Source, counts: dict[str, Any]) -> None:
    state = {
        "format": FORMAT,
        "data": data,
        "images": len(source),
        "sample": sample_hash(source),
        "counts": counts,
    }
    with writing(folder), replacing(folder / "curation.json") as part:
        part.write_text(json.dumps(state, indent=2) + "\n")


def _run(work: Work, wanted: list[str]) -> tuple[list[Outcome], Integers]:
    """Do the steps; what each decided, and the images that are left."""
    recipe = work.recipe
    everything: dict[str, Any] = {"images": len(work.source), "measured": work.measured[0].parent.name}
    outcomes: list[Outcome] = []
    alive: Integers = np.arange(len(work.source))
    has_model = recipe.features.model != NO_MODEL

    def step(name: str, given: dict[str, Any], make: Callable[[], do.Made]) -> Outcome | None:
        nonlocal alive
        if not len(alive):
            return None
        identity = everything | given | {"alive": hash_of(alive), "seed": recipe.run.seed}
        outcome = kept_or_made(work.folder / "steps", name, identity, make)
        outcomes.append(outcome)
        alive = np.setdiff1d(alive, outcome.dropped, assume_unique=True)
        return outcome

    quality = asdict(recipe.quality) if "quality" in wanted else {}
    features = asdict(recipe.features)
    if "quality" in wanted:
        needs = features if recipe.quality.scorer.endswith(do.HEADS) else {}
        step("quality", {"quality": quality, "features": needs}, lambda: do.quality(work, alive))
    else:
        step("readable", {}, lambda: do.readable(work, alive))
    copies, clean = recipe.duplicates, alive
    kept_for = np.arange(len(work.source))  # the image that each is a copy of, or itself

    def follow(outcome: Outcome | None) -> None:
        if outcome:
            others = outcome.column("other_index")
            step_for = np.arange(len(kept_for))
            step_for[outcome.column("index")[others >= 0]] = others[others >= 0]
            kept_for[:] = step_for[kept_for]

    if "duplicates" in wanted:
        if copies.exact:
            follow(step("exact", {}, lambda: do.exact(work, alive)))
        if copies.hash_distance >= 0:
            follow(step("perceptual", {"distance": copies.hash_distance}, lambda: do.perceptual(work, alive)))
    pool = alive
    given = {"duplicates": asdict(replace(copies, exact=True, hash_distance=0)), "features": features}
    if "duplicates" in wanted and has_model and copies.threshold != 2:
        follow(step("copies", given, lambda: do.copies(work, alive)))
    if "decontaminate" in wanted:
        sets = {
            "exclude": {one: work.sample_of(one) for one in work.exclude},
            "decontaminate": asdict(recipe.decontaminate),
            "distance": copies.hash_distance,
            "kept_for": hash_of(kept_for),
        }
        step("decontaminate", given | sets, lambda: removed(work, clean, pool, kept_for, alive))
    if "retrieve" in wanted:
        sets = {
            "seeds": {one: work.sample_of(one) for one in work.seeds},
            "retrieve": asdict(recipe.retrieve),
            "features": features,
        }
        step("retrieve", sets, lambda: do.retrieve(work, alive))
    if "cluster" in wanted:
        step(
            "cluster",
            {"cluster": asdict(recipe.cluster), "features": features},
            lambda: do.cluster(work, alive),
        )
    return outcomes, alive


def _counts(images: int, outcomes: Sequence[Outcome]) -> dict[str, dict[str, Any]]:
    counts: dict[str, dict[str, Any]] = {}
    left = images
    for outcome in outcomes:
        dropped = len(outcome.dropped)
        counts[outcome.step] = {
            "in": left, "dropped": dropped, "kept": left - dropped, "reasons": outcome.reasons()
        }  # fmt: skip
        left -= dropped
    return counts
