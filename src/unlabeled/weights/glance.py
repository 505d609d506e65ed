"""What a model is made of, where that can be told without torch, whose import takes longer than all the rest."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from unlabeled.errors import UserError
from unlabeled.vit_config import VitConfig
from unlabeled.weights.layout import read_config, their_shapes, weight_files


@dataclass(frozen=True)
class Glance:
    """What `unlabeled info` tells.

    Attributes:
        config: shape and features of the backbone.
        num_parameters: of all its tensors.
        notes: one line for each thing that its file does not hold.
    """

    config: VitConfig
    num_parameters: int
    notes: tuple[str, ...] = ()


def glance(text: str) -> Glance:
    """Return what a MODEL is made of.

    Raises:
        UserError: as `load_model`.
    """
    if seen := _plain(text):
        return seen
    from unlabeled.weights.load import load_model

    model = load_model(text)
    return Glance(model.config, sum(parameter.numel() for parameter in model.parameters()), model.notes)


def _plain(text: str) -> Glance | None:
    """Return what a run or a folder in Hugging Face format says in its config.json and the header of its weights.

    None where there is more to it: another format, or anything that is not as it should be. `load_model` tells that.
    """
    try:
        folder = Path(text).expanduser()
        if (folder / "model" / "config.json").exists():
            folder = folder / "model"
        config = read_config(folder / "config.json")
        path = folder / "model.safetensors"
        if weight_files(folder) != [path]:
            return None
        with safe_open(path, framework="numpy") as file:
            names = set(file.keys())
            if len(names) < config.depth:  # a damaged configuration may ask for any depth
                return None
            expected = their_shapes(config)
            if names != expected.keys():
                return None
            for name, shape in expected.items():
                held = file.get_slice(name)
                if held.get_dtype() != "F32" or tuple(held.get_shape()) != shape:
                    return None
                if not np.isfinite(file.get_tensor(name)).all():
                    return None
    except (UserError, OSError, RuntimeError, SafetensorError):  # RuntimeError: ~user, who is not there
        return None
    return Glance(config, sum(math.prod(shape) for shape in expected.values()))
