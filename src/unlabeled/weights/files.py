"""What every weight format shares: reading tensors, strict filling, atomic writing."""

import argparse
import os
import pickle
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from unlabeled.atomic import replacing as replacing
from unlabeled.errors import UserError
from unlabeled.vit import VisionTransformer, VitConfig

State = dict[str, Tensor]


def read_tensors(path: Path) -> dict[str, Any]:
    """Return what a weight file holds: a state dict, or for a pickle possibly a dict of state dicts.

    Only tensors and plain containers are read from a pickle; nothing in the file is run.
    Raises UserError for a file that is damaged, or that wants more than weights.
    """
    try:
        path.open("rb").close()  # safetensors calls every file that it may not read missing
        if path.suffix == ".safetensors":
            return load_file(path)
        # DINO's training checkpoints hold their options; a Namespace is a plain container.
        with torch.serialization.safe_globals([argparse.Namespace]):
            held = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    # What a damaged pickle raises depends on the byte it breaks at.
    except Exception as error:
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and refused:
            raise UserError(
                f"{path} wants to run code ({refused[1]}), not only hold weights, so it was not opened; "
                "save its state dict of plain tensors instead."
            ) from error
        raise UserError(f"{path} is damaged or no weight file; fetch or export it anew.") from error
    if not isinstance(held, dict):
        raise UserError(f"{path} holds a {type(held).__name__}; expected a dict of weights by name.")
    return held


def write_tensors(state: State, path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file; raises OSError with its number, which safetensors keeps to itself."""
    try:
        save_file(state, path, metadata=metadata)
    except SafetensorError as error:
        if found := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error
        raise


def fill(
    config: VitConfig, state: Mapping[str, Tensor], source: str, notes: Iterable[str] = ()
) -> VisionTransformer:
    """Return a model in evaluation mode with these weights (our keys), in float32, and these notes.

    Raises UserError, in one line, naming missing, unexpected and wrongly shaped keys of `source`.
    """
    if strange := [name for name, value in state.items() if not _is_weight(value)]:
        raise UserError(
            f"{source} holds more than dense tensors of floating-point numbers ({', '.join(strange[:4])}); "
            "expected weights only."
        )
    num_blocks = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    # One block too many says what is missing; a damaged configuration may ask for a billion.
    config = replace(config, depth=min(config.depth, num_blocks + 1))
    with torch.device("meta"):
        model = VisionTransformer(config)
    check_keys(model, state, source, "a DINOv2 backbone")
    held = {name: value.to("cpu", torch.float32, copy=True).contiguous() for name, value in state.items()}
    model.load_state_dict(held, assign=True)
    model.notes = tuple(notes)
    return model.eval()


def _is_weight(value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and value.layout == torch.strided
        and not value.is_meta
    )


def check_keys(module: nn.Module, state: Mapping[str, Tensor], source: str, what: str) -> None:
    """Raise UserError, in one line, naming missing, unexpected and wrongly shaped keys of `source`."""
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    faults = [
        _few("missing", [name for name in expected if name not in state]),
        _few("unexpected", [name for name in state if name not in expected]),
        _few(
            "of the wrong shape",
            [
                f"{name} {tuple(state[name].shape)} instead of {shape}"
                for name, shape in expected.items()
                if name in state and tuple(state[name].shape) != shape
            ],
        ),
    ]
    if any(faults):
        raise UserError(f"{source} does not fit {what}: {'; '.join(filter(None, faults))}.")


def _few(what: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"{what}: {', '.join(names[:4])}{more}"
