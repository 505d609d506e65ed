"""A pretraining run from start to end: data in, steps, checkpoints, figures, pictures."""

from __future__ import annotations

import json
import shlex
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from unlabeled.devices import tuned_for
from unlabeled.errors import UserError
from unlabeled.images.bad_files import BadFiles
from unlabeled.images.sources import open_source
from unlabeled.metrics import Metrics
from unlabeled.pretrain.checkpoint import (
    Checkpoints,
    all_checkpoints,
    export,
    full_teacher,
    load,
    num_images_of,
)
from unlabeled.pretrain.data import batches
from unlabeled.pretrain.frozen_teacher import frozen_teacher
from unlabeled.pretrain.health import CollapseWatch, figures
from unlabeled.pretrain.method import SelfDistillation
from unlabeled.pretrain.optimizer import apply_schedule, parameter_groups
from unlabeled.pretrain.parallel import Parallel
from unlabeled.pretrain.plan import Plan, alone, begun_by_this_job, prepared, resumed, write_plan
from unlabeled.pretrain.recipe import Recipe
from unlabeled.pretrain.recipes import read_recipe
from unlabeled.pretrain.rows import Rows
from unlabeled.pretrain.schedules import values_at
from unlabeled.pretrain.start import begin, heads_fit
from unlabeled.progress import Progress
from unlabeled.scripts import refuse_imported_script
from unlabeled.signals import StoppedBySignal, noted_signals
from unlabeled.vit import VisionTransformer
from unlabeled.weights.load import load_model

Evaluation = Callable[[VisionTransformer], dict[str, float]]


@dataclass(frozen=True)
class Run:
    """A run folder.

    Attributes:
        path: the folder: recipe.toml, metrics.jsonl, checkpoints/, model/, pictures/, bad_files.jsonl.
    """

    path: Path

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """One dict a step."""
        with (self.path / "metrics.jsonl").open(encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    @property
    def recipe(self) -> Recipe:
        """The recipe, every field resolved."""
        return read_recipe(self.path / "recipe.toml")

    def model(self, device: str = "cpu") -> VisionTransformer:
        """The teacher's backbone."""
        return load_model(str(self.path), device=device)


def pretrain(
    data: str | Path | None = None,
    out: str | Path | None = None,
    *,
    recipe: str | Path | Recipe = "auto",
    steps: int | None = None,
    eval: str | Path | None = None,
    seed: int | None = None,
    device: str = "auto",
    start: str | Path | None = None,
    eval_dense: str | Path | None = None,
    resume: str | Path | None = None,
    overrides: dict[str, Any] | None = None,
    evaluation: Evaluation | None = None,
    console: Console | None = None,
) -> Run:
    """Learn a backbone from unlabelled images by self-distillation.

    When torchrun starts the ranks again because one was lost (--max-restarts), or a cluster the whole job with the same
    --rdzv-id, the run goes on from its last checkpoint.

    Args:
        data: DATA: a folder, tar shards, Parquet, a list of paths, hf:NAME.
        out: the run folder to make.
        recipe: a name (see `unlabeled info recipes`), a TOML file, or a Recipe; "auto" reads the data and the machine,
            or is that of the run to start from; "highres" is the short phase at 518 pixels after it.
        steps: optimizer steps, over the recipe's.
        eval: labelled DATA for a k-NN figure on the way: half of it is searched for the other half's labels.
        seed: of everything random, over the recipe's.
        device: auto, cpu, cuda, cuda:1, mps.
        start: MODEL whose weights to begin with; of a run, its heads too.
        eval_dense: a folder of images/ and labels/, for a patch k-NN figure on the way (`evaluate.dense`).
        resume: a run folder to go on with; it has its own data and recipe.
        overrides: dotted recipe fields, as {"optimizer.lr": 1e-3}.
        evaluation: called with the teacher's backbone every run.eval_every steps; its figures join the metrics.
        console: where progress goes; standard error by default.

    Returns:
        The run; its model is in Hugging Face format in RUN/model.

    Raises:
        UserError: bad data, recipe or folder; a full disk; a loss that stays non-finite.
        StoppedBySignal: SIGTERM or SIGINT came; a checkpoint is written.
    """
    refuse_imported_script()
    parallel = Parallel.start(device)
    console = console or Console(stderr=True)
    if parallel.rank:
        console = Console(quiet=True)
    named = {
        "data.train": data,
        "run.steps": steps,
        "run.seed": seed,
        "data.evaluation": eval,
        "data.dense_evaluation": eval_dense,
        "model.start": start,
    }
    values = dict(overrides or {}) | {name: value for name, value in named.items() if value is not None}
    if out and begun_by_this_job(Path(out)):
        resume, values = out, {}  # recipe.toml has them all
    elif resume and out and Path(out).resolve() != Path(resume).resolve():
        raise UserError(f"--out {out} and --resume {resume} are two runs: a run is resumed in its own folder")
    plan = (
        resumed(Path(resume), values, parallel)
        if resume
        else prepared(out, recipe, values, parallel, console)
    )
    evaluate = evaluation or _evaluation(plan.recipe, parallel)
    if not resume:
        write_plan(plan, parallel)
    with alone(plan.folder, parallel), tuned_for(parallel.device):
        return _train(plan, parallel, evaluate, console)


def distill(
    data: str | Path | None = None,
    out: str | Path | None = None,
    *,
    teacher: str | Path,
    student: str = "vit_small",
    overrides: dict[str, Any] | None = None,
    **options: Any,
) -> Run:
    """Learn a smaller backbone from a trained one that stays as it is (DINOv2 section 5).

    The student sees all crops without masks and has no drop path; every patch of both global crops is compared; the
    EMA of the student is the result. A run as teacher brings its heads. Weights without heads get prototypes from
    features of the images themselves: each target says how much like each of these the crop is.

    Args:
        data: DATA, as `pretrain`'s.
        out: the run folder to make.
        teacher: MODEL.
        student: a name in unlabeled.vit.SIZES; its patch is the teacher's.
        overrides: dotted recipe fields.
        options: as `pretrain`'s.

    Raises:
        UserError: as `pretrain`.
    """
    fields = {"model.size": student, "teacher.model": str(teacher)}
    return pretrain(data, out, overrides=fields | (overrides or {}), **options)


def _train(plan: Plan, parallel: Parallel, evaluate: Evaluation | None, console: Console) -> Run:
    folder, recipe, run = plan.folder, plan.recipe, plan.recipe.run
    saved = all_checkpoints(folder / "checkpoints")
    torch.manual_seed(run.seed)
    method = make_method(plan, parallel)
    optimizer = make_optimizer(method)
    start = load(saved[-1], method, optimizer) if saved else 0
    metrics = Metrics(folder, start, writes=parallel.rank == 0)
    report = BadFiles(folder / "bad_files.jsonl")
    watch, begun = CollapseWatch(recipe.head.num_prototypes), time.perf_counter()
    with (
        noted_signals() as received,
        Progress(console, "pretraining", "step", start, run.steps) as progress,
        metrics,
        Checkpoints(folder, method, optimizer, run.keep_checkpoints, len(plan.source)) as checkpoints,
    ):
        if start:
            progress.say(f"resumed from step {start}")
            had, has = num_images_of(saved[-1]), len(plan.source)
            if had not in (None, has):
                progress.say(
                    f"{plan.source.name} had {had} images and has {has}: from here on they come in another order"
                )
        begun_with = _evaluated(method, evaluate) if plan.start and evaluate else {}
        if begun_with:
            progress.say(f"before: {_said(begun_with)}")
        if start >= run.steps:  # killed between its last checkpoint and its model
            teacher = full_teacher(method)
            if parallel.rank == 0:
                export(teacher, folder / "model")
        rows = Rows(metrics, progress, parallel.device, run.batch_size, folder / "checkpoints")
        waited_since = time.perf_counter()
        for step, batch in batches(plan.source, recipe, parallel, start, report):
            waited, done = time.perf_counter() - waited_since, step + 1
            values = values_at(recipe, step)
            apply_schedule(optimizer, values)
            torch.manual_seed(step_seed(run.seed, step, parallel.rank))
            result = method.train_step(batch, optimizer, values)
            targets, cls = result.pop("targets"), result.pop("teacher_cls")
            row: dict[str, Any] = {"step": step} | values._asdict()
            rows.begin(row, result, waited)

            stopping = parallel.any(bool(received))
            is_last = done == run.steps
            examined = step % run.health_every == 0 or is_last
            evaluated = evaluate is not None and (done % run.eval_every == 0 or is_last)
            saved_now = done % run.checkpoint_every == 0 or is_last or stopping
            if examined or evaluated or saved_now:
                rows.settle()
            if step == start:
                row |= {f"{name}_before": value for name, value in begun_with.items()}
            if examined:
                if method.frozen_teacher:
                    cls = method.teacher_cls(batch)
                row |= figures(targets, cls, parallel)
                if step > run.steps // 10:
                    for warning in watch.check(row):
                        progress.say(f"step {step}: {warning}")
            if evaluate and evaluated:
                found = _evaluated(method, evaluate)
                progress.say(f"step {done}: {_said(found)}")
                row |= found
            rows.end(written=examined or evaluated or saved_now)
            # What is saved while steps are skipped is no newer than before, and may be what they are skipped for.
            if saved_now and (is_last or stopping or not rows.skipped):
                metrics.flush()
                checkpoints.save(done)
            checkpoints.check()
            if stopping and not is_last:
                number = received[0] if received else signal.SIGTERM
                again = f"unlabeled pretrain --resume {shlex.quote(str(folder))}"
                checkpoints.wait()
                raise StoppedBySignal(number, f"stopped after step {done}; go on with: {again}")
            rows.go_on()
            waited_since = time.perf_counter()
    if report.count:
        many = f"{report.count} image{'s' * (report.count > 1)}"
        progress.say(f"{many} could not be read: {folder / 'bad_files.jsonl'}")
    progress.say(f"{run.steps} steps in {time.perf_counter() - begun:.0f} s: {folder}")
    return Run(folder)


def make_method(plan: Plan, parallel: Parallel) -> SelfDistillation:
    """Student and teacher as a plan wants them to begin."""
    recipe, start = plan.recipe, plan.start
    teacher = None
    if plan.frozen_teacher:
        teacher = frozen_teacher(plan.frozen_teacher, plan.source, recipe, parallel.device)
    if start is None:
        return SelfDistillation(recipe, parallel, frozen_teacher=teacher)
    method = SelfDistillation(
        recipe, parallel, lambda network: begin(network, start, recipe), frozen_teacher=teacher
    )
    if heads_fit(start, recipe):
        method.dino_center.center.copy_(start.centers["dino"])
        method.ibot_center.center.copy_(start.centers["ibot"])
    return method


def make_optimizer(method: SelfDistillation) -> torch.optim.AdamW:
    """AdamW over the student, in the groups that the schedules need."""
    recipe = method.recipe.optimizer
    groups = parameter_groups(
        method.parallel.unwrap(method.student),
        method.recipe.vit_config().depth,
        recipe.layer_decay,
        recipe.patch_embed_multiplier,
    )
    return torch.optim.AdamW(groups, lr=0.0, betas=recipe.betas, fused=method.parallel.device.type != "mps")


def step_seed(seed: int, step: int, rank: int) -> int:
    """The seed of drop path in one step on one rank: no random state has to outlive a step."""
    return ((seed * 1_000_003 + step) * 65_537 + rank) % 2**64


def _evaluated(method: SelfDistillation, evaluate: Evaluation) -> dict[str, float]:
    """Rank 0 evaluates while the others wait."""
    network = full_teacher(method)
    result = {}
    if method.parallel.rank == 0:
        with torch.no_grad():
            result = evaluate(network)
    method.parallel.barrier()
    return result


def _said(found: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in found.items())


def _evaluation(recipe: Recipe, parallel: Parallel) -> Evaluation | None:
    """The figures that the recipe's labelled data allow: k-NN of images, k-NN of patches."""
    data, side, device = recipe.data, recipe.data.eval_crop or recipe.crops.global_size, parallel.device
    parts: list[Evaluation] = []
    if data.evaluation:
        from unlabeled.evaluate.knn import split_knn

        source = open_source(data.evaluation)
        if source.labels() is None:
            raise UserError(
                f"--eval {data.evaluation} has no labels: class folders or a label column are needed"
            )
        parts.append(lambda model: {"knn": split_knn(model, source, crop=side, device=device)})
    if data.dense_evaluation:
        from unlabeled.dense.labelled import matched
        from unlabeled.evaluate.dense import patch_knn

        pairs, _ = matched(data.dense_evaluation, "labels")
        if len(pairs) < 2:
            raise UserError(
                f"--eval-dense {data.dense_evaluation} has one pair of image and labels; 2 are needed"
            )
        parts.append(lambda model: patch_knn(model, pairs, side, data.dense_ignore, device=device))
    if not parts:
        return None
    return lambda model: {name: value for part in parts for name, value in part(model).items()}
