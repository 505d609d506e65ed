"""Checkpoints: everything a run needs to go on, written whole or not at all, read by any number of ranks."""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
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


def save(
    folder: Path, method: SelfDistillation, optimizer: torch.optim.Optimizer, step: int, keep: int
) -> Path:
    """Write the state after `step` steps to folder/step_00000001 and so on, then drop all but the last `keep`.

    It is written beside its place and renamed when whole, so a crash or a full disk leaves the last one good.
    Random state needs no saving: everything random is drawn from (seed, step) or (seed, position).

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    parallel = method.parallel
    target = folder / f"step_{step:08d}"
    partial = folder / f".partial_{step:08d}"
    with _one_line(folder):
        if parallel.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            folder.mkdir(parents=True, exist_ok=True)
        parallel.barrier()
        with _quiet():
            state_dict_saver.save(
                _state(method, optimizer), checkpoint_id=partial, no_dist=not parallel.distributed
            )
        if parallel.rank == 0:
            (partial / "state.json").write_text(json.dumps({"step": step}))
            _flush(partial)
            shutil.rmtree(target, ignore_errors=True)
            partial.replace(target)
            _flush_folder(folder)
            for old in all_checkpoints(folder)[:-keep]:
                shutil.rmtree(old)
    parallel.barrier()
    return target


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


def load_part(path: Path, state: dict[str, Any], distributed: bool = False) -> None:
    """Fill some tensors, by the checkpoint's own names, in place; every rank calls it if distributed.

    Raises:
        UserError: they are not in it, or it is not readable.
    """
    try:
        with _quiet():
            state_dict_loader.load(state, checkpoint_id=path, no_dist=not distributed)
    except (OSError, KeyError, ValueError, RuntimeError, CheckpointException) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"the checkpoint {path} does not load: {first}") from error


def all_checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in a folder, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(
        path for path in folder.iterdir() if _NAME.search(path.name) and (path / "state.json").exists()
    )


def export(method: SelfDistillation, folder: Path) -> None:
    """Write the teacher's backbone in Hugging Face format; every rank calls it, rank 0 writes.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    network = full_teacher(method)
    with _one_line(folder):
        if method.parallel.rank == 0:
            save_huggingface(network, folder)
    method.parallel.barrier()


def full_teacher(method: SelfDistillation) -> VisionTransformer:
    """The teacher's backbone, whole, in evaluation mode; a copy on the CPU under FSDP."""
    if not (method.parallel.distributed and method.recipe.run.sharding == "fsdp"):
        return method.teacher_backbone().eval()
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, broadcast_from_rank0=False)
    state = get_model_state_dict(method.teacher, options=options)
    backbone = VisionTransformer(method.recipe.vit_config())
    if method.parallel.rank == 0:
        backbone.load_state_dict(
            {
                name.removeprefix("backbone."): value
                for name, value in state.items()
                if name.startswith("backbone.")
            }
        )
    return backbone.eval()


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
        reasons = [error] if isinstance(error, OSError) else list(error.failures.values())
        text = next((str(r[0] if isinstance(r, tuple) else r) for r in reasons), str(error))
        raise UserError(f"{folder} cannot be written: {text}; make room, then resume the run") from error


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
