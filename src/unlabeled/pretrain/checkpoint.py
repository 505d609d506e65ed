"""Checkpoints: everything a run needs to go on, written whole or not at all, read by any number of ranks."""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import sys
import traceback
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from unlabeled.errors import UserError
from unlabeled.pretrain.method import SelfDistillation
from unlabeled.vit import VisionTransformer
from unlabeled.weights.huggingface import save_huggingface

_NAME = re.compile(r"step_(\d+)$")


class Checkpoints:
    """Writes checkpoints, and the teacher's backbone with each, while training goes on.

    The step waits for a copy of the state in the host's memory; a thread then writes it beside its place and renames it
    when it is whole, so that a crash or a full disk leaves the last one good. Random state needs no saving: everything
    random is drawn from (seed, step) or (seed, position). Every rank has one of these and calls it alike. As a context
    it ends with everything written.

    Args:
        folder: of the run: checkpoints/step_00000001 and so on, model/.
        method: what is written.
        optimizer: its state too.
        keep: how many of the latest are kept.
        num_images: of the source, noted with each; see `num_images_of`.
    """

    def __init__(
        self,
        folder: Path,
        method: SelfDistillation,
        optimizer: torch.optim.Optimizer,
        keep: int,
        num_images: int,
    ) -> None:
        self.folder, self.method, self.optimizer, self.keep = folder, method, optimizer, keep
        self.num_images = num_images
        parallel, on_gpu = method.parallel, method.parallel.device.type == "cuda"
        # The thread's messages have a group of their own: the training's come in another order.
        self.group = dist.new_group(backend="gloo") if parallel.distributed else None
        self.stager = DefaultStager(StagingOptions(on_gpu, False, False, False))
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.writing: Future[None] | None = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.wait()
        except UserError:  # what stopped the run says more
            if error is None:
                raise
        finally:
            self.thread.shutdown()
            self.stager.close()

    def save(self, step: int) -> None:
        """Begin to write the state after `step` steps; the one before it is written when this returns.

        Raises:
            UserError: the disk is full or the folder cannot be written, for this one or the one before it.
        """
        self.wait()
        state: Any = self.stager.stage(_state(self.method, self.optimizer))
        teacher = _copy_of_teacher(self.method)
        self.writing = self.thread.submit(self._write, state, teacher, step)

    def check(self) -> None:
        """Say at once if the writing has failed.

        Raises:
            UserError: as `save`.
        """
        if self.writing and self.writing.done():
            self.wait()

    def wait(self) -> None:
        """Return when everything is written.

        Raises:
            UserError: as `save`.
        """
        writing, self.writing = self.writing, None
        if writing:
            writing.result()

    def _write(self, state: dict[str, Any], teacher: VisionTransformer, step: int) -> None:
        parallel, folder = self.method.parallel, self.folder / "checkpoints"
        target, partial = folder / f"step_{step:08d}", folder / f".partial_{step:08d}"
        with _one_line(folder):
            if parallel.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
                folder.mkdir(parents=True, exist_ok=True)
            self._barrier()
            with _quiet():
                state_dict_saver.save(
                    state, checkpoint_id=partial, process_group=self.group, no_dist=self.group is None
                )
            if parallel.rank == 0:
                state_json = {"step": step, "num_images": self.num_images}
                (partial / "state.json").write_text(json.dumps(state_json))
                _flush(partial)
                shutil.rmtree(target, ignore_errors=True)
                partial.replace(target)
                _flush_folder(folder)
                for old in all_checkpoints(folder)[: -self.keep]:
                    shutil.rmtree(old)
        if parallel.rank == 0:
            export(teacher, self.folder / "model")
        self._barrier()

    def _barrier(self) -> None:
        if self.group is not None:
            dist.barrier(self.group)


def load(path: Path, method: SelfDistillation, optimizer: torch.optim.Optimizer) -> int:
    """Read a checkpoint into method and optimizer; returns the number of steps done.

    Raises:
        UserError: it does not fit the recipe, or is not readable.
    """
    state = _state(method, optimizer)
    load_part(path, state, distributed=method.parallel.distributed)
    options = StateDictOptions(strict=True)
    set_model_state_dict(method.student, state["student"], options=options)
    set_model_state_dict(method.teacher, state["teacher"], options=options)
    set_optimizer_state_dict(method.student, optimizer, state["optimizer"], options=options)
    method.dino_center.load_state_dict(state["dino_center"])
    method.ibot_center.load_state_dict(state["ibot_center"])
    return int(json.loads((path / "state.json").read_text())["step"])


def num_images_of(path: Path) -> int | None:
    """How many images the source had when a checkpoint was written, which the order of all later ones hangs on."""
    number = json.loads((path / "state.json").read_text()).get("num_images")
    return None if number is None else int(number)


def load_part(path: Path, state: dict[str, Any], distributed: bool = False) -> None:
    """Fill some tensors, by the checkpoint's own names, in place; every rank calls it if distributed.

    Raises:
        UserError: they are not in it, or it is not readable.
    """
    try:
        with _quiet():
            state_dict_loader.load(state, checkpoint_id=path, no_dist=not distributed)
    except (OSError, KeyError, ValueError, RuntimeError, CheckpointException) as error:
        first = (str(_causes(error)[0]).strip() or repr(error)).splitlines()[0]
        older = [other.name for other in all_checkpoints(path.parent) if other.name < path.name]
        again = f"; remove it to go on from {older[-1]}" if older else ""
        raise UserError(f"the checkpoint {path} does not load: {first}{again}") from error


def all_checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in a folder, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(
        path for path in folder.iterdir() if _NAME.search(path.name) and (path / "state.json").exists()
    )


def export(teacher: VisionTransformer, folder: Path) -> None:
    """Write a backbone in Hugging Face format.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    with _one_line(folder):
        save_huggingface(teacher, folder)


def full_teacher(method: SelfDistillation) -> VisionTransformer:
    """The teacher's backbone, whole, in evaluation mode; a copy on the CPU under FSDP."""
    if not _is_sharded(method):
        return method.teacher_backbone().eval()
    return _copy_of_teacher(method)


def _copy_of_teacher(method: SelfDistillation) -> VisionTransformer:
    """The same as a copy on the CPU; every rank calls it, on rank 0 it has the weights."""
    if _is_sharded(method):
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, broadcast_from_rank0=False)
        whole = get_model_state_dict(method.teacher, options=options)
        state = {
            name.removeprefix("backbone."): value
            for name, value in whole.items()
            if name.startswith("backbone.")
        }
    else:
        held = method.teacher_backbone().state_dict()
        state = {name: value.to("cpu", copy=True) for name, value in held.items()}
    with torch.device("meta"):
        backbone = VisionTransformer(method.recipe.vit_config())
    if method.parallel.rank == 0:
        backbone.load_state_dict(state, assign=True)
    return backbone.eval()


def _is_sharded(method: SelfDistillation) -> bool:
    return method.parallel.distributed and method.recipe.run.sharding == "fsdp"


def _state(method: SelfDistillation, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {
        "student": get_model_state_dict(method.student),
        "teacher": get_model_state_dict(method.teacher),
        "optimizer": get_optimizer_state_dict(method.student, optimizer),
        "dino_center": method.dino_center.state_dict(),
        "ibot_center": method.ibot_center.state_dict(),
    }


@contextmanager
def _one_line(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, CheckpointException) as error:
        causes = _causes(error)
        _drop_writers([error, *causes])
        # Torch's writer says at which byte it stood, and no more.
        why = causes[0] if isinstance(causes[0], OSError) else f"{causes[0]} (is the disk full?)"
        raise UserError(f"{folder} cannot be written: {why}; make room, then resume the run") from error


def _causes(error: BaseException) -> list[BaseException]:
    """What torch's checkpoints collect from the ranks, or the error itself."""
    reasons = list(error.failures.values()) if isinstance(error, CheckpointException) else []
    return [reason[0] if isinstance(reason, tuple) else reason for reason in reasons] or [error]


def _drop_writers(errors: list[BaseException]) -> None:
    """Let go of torch's writers to files that are closed, which the tracebacks hold.

    They flush when they are collected; from Python 3.13 on the failure of that is printed, in the midst of other words.
    """
    kept, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        while errors:
            error = errors.pop()
            traceback.clear_frames(error.__traceback__)
            errors += [one for one in (error.__cause__, error.__context__) if one]
        gc.collect()
    finally:
        sys.unraisablehook = kept


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torch.distributed.*")
        warnings.filterwarnings("ignore", message="torch.distributed is")
        yield


def _flush(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    _flush_folder(folder)


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
