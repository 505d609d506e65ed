"""What a training with labels needs to go on: one file, written whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from unlabeled.errors import UserError, writing
from unlabeled.finetune.backbone import learning
from unlabeled.weights.files import read_tensors, replacing

PLACE = Path("checkpoints") / "last.pt"


def write_checkpoint(folder: Path, modules: dict[str, Any], step: int, best: dict[str, Any]) -> None:
    """Write the state after `step` steps, and the best weights so far.

    Random state needs no saving: everything random is drawn from (seed, step) or (seed, position).
    Raises UserError for a full disk; the last checkpoint stays good.
    """
    held = {
        "head": modules["head"].state_dict(),
        "backbone": learning(modules["backbone"]),
        "optimizer": modules["optimizer"].state_dict(),
        "average": modules["average"],
        "step": step,
        "best": best,
    }
    with writing(folder / PLACE), replacing(folder / PLACE) as part:
        torch.save(held, part)


def read_checkpoint(folder: Path, modules: dict[str, Any]) -> dict[str, Any] | None:
    """Fill head, backbone, optimizer and average from the folder's checkpoint; None where there is none.

    Returns its step and best weights. Raises UserError where it does not fit.
    """
    path = folder / PLACE
    if not path.exists():
        return None
    held = read_tensors(path)
    try:
        modules["head"].load_state_dict(held["head"])
        expected = learning(modules["backbone"])
        if expected.keys() != held["backbone"].keys():
            raise KeyError("other weights of the backbone learned")
        with torch.no_grad():
            for name, parameter in expected.items():
                parameter.copy_(held["backbone"][name])
            for average, value in zip(modules["average"], held["average"], strict=True):
                average.copy_(value)
        modules["optimizer"].load_state_dict(held["optimizer"])
    except (KeyError, ValueError, RuntimeError) as error:
        first = " ".join(str(error).split())
        raise UserError(f"{path} does not fit what is trained now: {first}") from error
    return {"step": int(held["step"]), "best": held["best"]}
