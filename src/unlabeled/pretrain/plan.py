"""What a run is made of, before its first step: a folder, images, a recipe with every field resolved, weights."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from unlabeled.errors import UserError, writing
from unlabeled.images.bad_files import first_readable
from unlabeled.images.sources import Source, open_source
from unlabeled.pretrain import auto
from unlabeled.pretrain.checkpoint import all_checkpoints
from unlabeled.pretrain.frozen_teacher import distillation
from unlabeled.pretrain.method import is_packed
from unlabeled.pretrain.parallel import Parallel
from unlabeled.pretrain.recipe import DataRecipe, Recipe, check, override
from unlabeled.pretrain.recipes import FITTED, fitted_fields, named_recipe, read_recipe, write_recipe
from unlabeled.pretrain.start import Start, heads_fit, load_start, model_fields, with_grid

HIGH_RESOLUTION = 518  # pixels, of the released models' last phase (DINOv2 appendix B)
HIGH_RESOLUTION_STEPS = 10_000
LOWER = 0.1  # learning rate of a run that begins with trained weights, over that of one that does not
LOCK = ".lock"  # file of a run folder: held by the process that trains it
JOB = ".job"  # file of a run folder: the torchrun job that began it
FREEZE = 0.1  # share of the run in which heads that start anew learn to read a backbone that stays as it is


@dataclass(frozen=True)
class Plan:
    """A run about to be done.

    Attributes:
        folder: the run folder.
        recipe: every field resolved, checked.
        source: the images.
        start: weights to begin with; None where they are random, or a checkpoint has them.
        frozen_teacher: the teacher of a distillation, or None.
    """

    folder: Path
    recipe: Recipe
    source: Source
    start: Start | None = None
    frozen_teacher: Start | None = None


def prepared(
    out: str | Path | None,
    recipe: str | Path | Recipe,
    values: dict[str, Any],
    parallel: Parallel,
    console: Console,
) -> Plan:
    """A new run, before anything of it is written (`write_plan`).

    Args:
        out: the run folder to make.
        recipe: a name, a TOML file or a Recipe.
        values: dotted recipe fields that the user set.
        parallel: device and ranks.
        console: where the reasons of choices go.

    Raises:
        UserError: bad folder, images, recipe or weights.
    """
    if out is None or not str(out).strip():
        raise UserError("no run folder was given: unlabeled pretrain DATA --out RUN")
    folder = Path(out)
    if all_checkpoints(folder / "checkpoints"):
        raise UserError(
            f"{folder} holds a run already: resume it with --resume {folder}, or choose another --out"
        )
    if fitted := fitted_fields(recipe):
        recipe, values = fitted.pop("name"), fitted | values
    values = _with_absolute_paths(values)
    plan: Recipe | None = None
    if isinstance(recipe, Recipe):
        plan = recipe
    elif str(recipe).endswith(".toml"):
        plan = read_recipe(Path(recipe))
    elif recipe not in FITTED:
        plan = named_recipe(str(recipe))
    train = values.get("data.train") or (plan.data.train if plan else "")
    if not train:
        raise UserError("no images were given: unlabeled pretrain DATA --out RUN")
    if folder.resolve() == Path(train).resolve():
        raise UserError(f"--out {folder} is the folder of the images; a run needs a folder of its own")
    source = open_source(train)
    first_readable(source)
    start = _loaded(values.get("model.start") or (plan.model.start if plan else ""))
    teacher = _loaded(values.get("teacher.model") or (plan.teacher.model if plan else ""))

    reasons: list[str] = []
    if recipe == "highres":
        plan, reasons = _high_resolution(start, values)
    elif plan is None and start and start.recipe:
        plan, reasons = _again(start.recipe), [f"the recipe is that of {start.name}"]
    elif plan is None:
        plan, reasons = auto.choose(source, parallel, values, has_weights=start is not None)
    assert plan is not None
    if start and "model.start" in values:  # a recipe that names its own is taken as it stands
        plan, more = _continued(plan, start)
        reasons += more
    learns_from = teacher if "teacher.model" in values else None
    if learns_from:
        plan = distillation(plan, learns_from, len(source))
    plan = auto.filled(override(plan, values, "the command line"))
    if learns_from:
        reasons.append(
            f"the teacher {learns_from.name} stays as it is: no masks, drop path {plan.model.drop_path:g}, "
            f"{plan.head.num_prototypes} prototypes"
        )
    if start and not plan.model.image_size:
        plan = dataclasses.replace(plan, model=with_grid(start, plan))
    if start and "model.start" in values:
        if heads_fit(start, plan):
            reasons.append("the heads come along")
        else:
            plan = override(plan, {"optimizer.freeze_backbone": FREEZE} | values, "the command line")
            share = plan.optimizer.freeze_backbone
            reasons.append(f"the heads start anew, and the backbone stays as it is for the first {share:.0%}")
    check(plan, "the recipe")
    _check_ranks(plan, parallel)
    reasons += _memory_warning(plan, parallel)
    for reason in reasons:
        console.print(reason, highlight=False, markup=False, soft_wrap=True)
    return Plan(folder, plan, source, start, teacher)


def write_plan(plan: Plan, parallel: Parallel) -> None:
    """Make the run's folder and write its recipe.toml.

    Raises:
        UserError: the folder cannot be written.
    """
    if parallel.rank == 0:
        with writing(plan.folder):
            plan.folder.mkdir(parents=True, exist_ok=True)
            write_recipe(plan.recipe, plan.folder / "recipe.toml")
            (plan.folder / JOB).write_text(_job())
    parallel.barrier()


@contextmanager
def alone(folder: Path, parallel: Parallel) -> Iterator[None]:
    """Keep a run folder to this job: two trainings that write to one would spoil both.

    The lock ends with the process, however it ends.

    Raises:
        UserError: another process has it.
    """
    if parallel.rank:
        yield
        return
    with writing(folder):
        file = (folder / LOCK).open("w")
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:  # some network file systems have no locks
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise UserError(
                    f"{folder} is being trained by another process; wait for it, or end it"
                ) from error
        yield


def begun_by_this_job(folder: Path) -> bool:
    """Whether the torchrun job that this process is of has begun this run already, and has a checkpoint of it."""
    file = folder / JOB
    return bool(
        _job() and file.exists() and file.read_text() == _job() and all_checkpoints(folder / "checkpoints")
    )


def _job() -> str:
    """What torchrun calls this job (--rdzv-id; --standalone draws one), the same when its ranks are started again."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return "" if name == "none" else name


def resumed(folder: Path, values: dict[str, Any], parallel: Parallel) -> Plan:
    """A run to go on with; what changes is written to its recipe.toml, so that it need not be said again.

    Args:
        folder: of the run.
        values: fields of `run` and data.train may change; no others.
        parallel: ranks.

    Raises:
        UserError: there is no run, or a field cannot change.
    """
    if not (folder / "recipe.toml").exists():
        raise UserError(f"{folder} is no run folder: it has no recipe.toml")
    for name in values:
        if not name.startswith("run.") and name != "data.train":
            raise UserError(
                f"--{name} cannot change in a resumed run: start a new one, or edit {folder}/recipe.toml"
            )
    recipe = override(read_recipe(folder / "recipe.toml"), _with_absolute_paths(values), "the command line")
    _check_ranks(recipe, parallel)
    start = None if all_checkpoints(folder / "checkpoints") else _loaded(recipe.model.start)
    try:
        source = open_source(recipe.data.train)
    except UserError as error:
        raise UserError(
            f"{error}; if the images have moved, add --data.train and where they are now"
        ) from error
    plan = Plan(folder, recipe, source, start, _loaded(recipe.teacher.model))
    parallel.barrier()  # every rank has read the recipe as it was
    if values and parallel.rank == 0:
        with writing(folder):
            write_recipe(recipe, folder / "recipe.toml")
    return plan


_PLACES = ("data.train", "data.evaluation", "data.dense_evaluation", "model.start", "teacher.model")


def _with_absolute_paths(values: dict[str, Any]) -> dict[str, Any]:
    """Paths are kept absolute, so that a run resumes from any folder; names (of a hub) stay names."""
    return {name: _absolute(value) if name in _PLACES else value for name, value in values.items()}


def _absolute(value: Any) -> Any:
    if value == "":
        return value
    text = os.path.expanduser(value)  # noqa: PTH111  (a glob is no path)
    is_path = Path(text).exists() or "*" in text or not isinstance(value, str)
    return os.path.abspath(text) if is_path else value  # noqa: PTH100


def _check_ranks(recipe: Recipe, parallel: Parallel) -> None:
    batch, world = recipe.run.batch_size, parallel.world
    if batch % world:
        fewer = f"{batch - batch % world} and " if batch > world else ""
        raise UserError(
            f"run.batch_size {batch} does not divide by {world} ranks; {fewer}{batch - batch % world + world} do"
        )


def _memory_warning(recipe: Recipe, parallel: Parallel) -> list[str]:
    """A line where the batch is likely to be more than a device holds, which a CPU's system ends without a word."""
    memory = auto.device_memory(parallel.device)
    fits = auto.images_that_fit(recipe, memory, is_packed(recipe, parallel.device))
    local = math.ceil(recipe.run.batch_size / parallel.world)
    if (parallel.world > 1 and recipe.run.sharding == "fsdp") or math.ceil(
        local / recipe.run.accumulation
    ) <= fits:
        return []
    return [
        f"memory may not do: {memory / 1e9:.0f} GB hold about {fits} image{'s' * (fits > 1)} at a time; "
        f"--run.accumulation {math.ceil(local / fits)} cuts a step into parts that fit"
    ]


def _loaded(name: str) -> Start | None:
    return load_start(name) if name else None


def _again(recipe: Recipe) -> Recipe:
    """The recipe of a finished run for a new one: bookkeeping, data and origin are the new run's own."""
    return dataclasses.replace(
        recipe,
        run=dataclasses.replace(recipe.run, checkpoint_every=0, health_every=0, eval_every=0),
        data=DataRecipe(),
        optimizer=dataclasses.replace(recipe.optimizer, freeze_backbone=0.0),
        teacher=dataclasses.replace(recipe.teacher, model=""),
    )


def _high_resolution(start: Start | None, values: dict[str, Any]) -> tuple[Recipe, list[str]]:
    """The short phase at a larger size: the recipe that was, its schedules compressed, its crops larger."""
    if start is None:
        raise UserError("the recipe highres goes on from a model: --from RUN (or any MODEL)")
    base = _again(start.recipe) if start.recipe else named_recipe("vits14")
    patch = start.backbone.config.patch_size
    wanted = int(values.get("crops.global_size", HIGH_RESOLUTION))
    size = max(1, round(wanted / patch)) * patch
    crops = dataclasses.replace(base.crops.fitted(patch), global_size=size)
    steps = int(values.get("run.steps", HIGH_RESOLUTION_STEPS))
    recipe = dataclasses.replace(
        base,
        name="highres",
        crops=crops,
        model=dataclasses.replace(base.model, image_size=size),
        run=dataclasses.replace(base.run, steps=steps),
    )
    return recipe, [f"global crops of {size} pixels for {steps} steps; all else as {start.name} was trained"]


def _continued(recipe: Recipe, start: Start) -> tuple[Recipe, list[str]]:
    """A recipe for training on from weights, and what was changed, with the reason."""
    config = start.backbone.config
    recipe = dataclasses.replace(
        recipe,
        crops=recipe.crops.fitted(config.patch_size),
        model=model_fields(start, recipe),
        optimizer=dataclasses.replace(recipe.optimizer, lr=recipe.optimizer.lr * LOWER),
    )
    reasons = [
        f"the backbone of {start.name}: {config.depth} blocks of width {config.width}, patch {config.patch_size}",
        f"learning rate {recipe.optimizer.lr:g} before scaling, a tenth: the weights are trained",
    ]
    return recipe, reasons
