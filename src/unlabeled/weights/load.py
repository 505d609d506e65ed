"""The one way in: a model from whatever text names it."""

import difflib
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch

from unlabeled.errors import UserError, reading
from unlabeled.json_file import read_json
from unlabeled.vit import Interpolation, VisionTransformer
from unlabeled.weights.download import fetch_hub, fetch_meta
from unlabeled.weights.files import read_tensors
from unlabeled.weights.huggingface import load_huggingface
from unlabeled.weights.meta import from_meta, is_original_dino
from unlabeled.weights.timm import from_timm

LETTERS = {"s": "small", "b": "base", "l": "large", "g": "giant"}
# Names of Meta's torch.hub: dinov2_vits14, dinov2_vits14_reg, ...; and where the file is.
META_PLACES = {
    **{
        f"dinov2_vit{x}14{kind}": f"dinov2/dinov2_vit{x}14/dinov2_vit{x}14{file}_pretrain.pth"
        for kind, file in (("", ""), ("_reg", "_reg4"))
        for x in LETTERS
    },
    **{
        f"dino_{size}{patch}": f"dino/dino_{file}{patch}_pretrain/dino_{file}{patch}_pretrain.pth"
        for size, file in (("vits", "deitsmall"), ("vitb", "vitbase"))
        for patch in (16, 8)
    },
}
# The part after the point, which names the training, can be left out.
TIMM_NAME = re.compile(
    r"(?:timm/)?(vit_(?:small|base|large|giant)_patch14_(?:reg4_)?dinov2|vit_(?:small|base)_patch(?:16|8)_224)(\.\w+)?"
)
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
WEIGHT_SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")
HUGGING_FACE_KEYS = ("embeddings.", "dinov2.", "dinov2_with_registers.", "vit.")

KNOWN_NAMES = [
    *(f"facebook/dinov2-{kind}{size}" for kind in ("", "with-registers-") for size in LETTERS.values()),
    *(f"facebook/dino-vit{size}{patch}" for size in "sb" for patch in (16, 8)),
    *META_PLACES,
    *(f"timm/vit_{size}_patch14_{kind}dinov2.lvd142m" for kind in ("", "reg4_") for size in LETTERS.values()),
    *(f"timm/vit_{size}_patch{patch}_224.dino" for size in ("small", "base") for patch in (16, 8)),
]
WAYS = (
    "a run folder, a Hugging Face folder, a .pth, .safetensors or .bin file, or a name such as "
    "facebook/dinov2-small"
)


def load_model(
    text: str | Path, device: str | torch.device = "cpu", interpolation: Interpolation = ""
) -> VisionTransformer:
    """Return a backbone in evaluation mode, in float32, from any text that names a model.

    text: a run folder (its model/ is read), a folder in Hugging Face format, a weight file of Meta (.pth),
    timm or Hugging Face (.safetensors, .bin), or a name: facebook/dinov2-small and any other DINOv2 or DINO
    on the Hugging Face hub, dinov2_vits14, dinov2_vits14_reg and dino_vits16 (Meta's),
    timm/vit_small_patch14_dinov2.lvd142m. Names are downloaded once, into the hubs' own caches.
    interpolation: how to resize the position embedding, see VitConfig; by default as the code does that the
    weights come from.
    Raises UserError where nothing is found, what is found is no such model or not finite, or a download is impossible.
    """
    if interpolation not in get_args(Interpolation):
        ways = ", ".join(filter(None, get_args(Interpolation)))
        raise UserError(f"There is no interpolation {interpolation!r}; choose one of {ways}.")
    path = expanded(text)
    with reading(text):
        if path.is_dir():
            model = load_folder(path)
        elif path.is_file():
            model = load_file(path)
        else:
            model = load_name(str(text))
    if broken := _not_finite(model):
        raise UserError(
            f"{text} has numbers that are not finite, in {broken}; its training or its file went wrong."
        )
    if interpolation:
        model.config = replace(model.config, interpolation=interpolation)
    model.name = str(path.resolve()) if path.exists() else str(text)  # as it is valid from every folder
    return model.to(device)


def _not_finite(model: VisionTransformer) -> str:
    """Return the name of a weight that is infinite or no number, or nothing."""
    state = model.state_dict()
    return next((name for name, value in state.items() if not value.isfinite().all()), "")


def expanded(text: str | Path) -> Path:
    """Return a path with ~ and ~user replaced; a user who is not there stays as written."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path(text)


def load_folder(folder: Path) -> VisionTransformer:
    """Return the model of a run folder, a Hugging Face folder, or a timm folder as the hub serves it."""
    if (folder / "model" / "config.json").exists():
        return load_huggingface(folder / "model")
    if (folder / "recipe.toml").exists():
        raise UserError(f"The run {folder} has written no model yet; it does with its first checkpoint.")
    if not (folder / "config.json").exists():
        raise UserError(
            f"{folder} holds no model: neither model/ (a run) nor config.json (Hugging Face format)."
        )
    if "architecture" not in read_json(folder / "config.json"):
        return load_huggingface(folder)
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).exists():
            return load_file(folder / name)
    raise UserError(
        f"{folder} has a timm config.json but no weights; model.safetensors should lie beside it."
    )


def as_model(model: VisionTransformer | str | Path) -> VisionTransformer:
    """Return a backbone as it is, or load the one that a text names."""
    return load_model(model) if isinstance(model, str | Path) else model


def load_file(path: Path) -> VisionTransformer:
    """Return the model of one weight file; its keys tell whose format it is."""
    if path.suffix not in WEIGHT_SUFFIXES:
        raise UserError(f"{path} is no weight file: {', '.join(WEIGHT_SUFFIXES)} can be read.")
    held = read_tensors(path)
    if any(str(key).startswith(HUGGING_FACE_KEYS) for key in held):
        if not (path.parent / "config.json").exists():
            raise UserError(f"{path} is in Hugging Face format and needs its config.json beside it.")
        return load_huggingface(path.parent, path)
    return from_timm(held, str(path)) if _is_timms(held, path) else from_meta(held, str(path))


def _is_timms(held: dict[str, Any], path: Path) -> bool:
    if "pos_embed" not in held or "mask_token" in held or "register_tokens" in held:
        return False
    # The original DINO has the same keys in both, but Meta publishes no other than .pth files, and timm none.
    return not (is_original_dino(held) and "reg_token" not in held and path.suffix in (".pth", ".pt"))


def load_name(name: str) -> VisionTransformer:
    """Return the model that a name stands for, from the cache or from where it is published."""
    if name in META_PLACES:
        return load_file(fetch_meta(META_PLACES[name]))
    if (match := TIMM_NAME.fullmatch(name)) and match[2] not in WEIGHT_SUFFIXES:
        training = match[2] or (".lvd142m" if "dinov2" in match[1] else ".dino")
        name = f"timm/{match[1]}{training}"
    hint = _did_you_mean(name) or f"expected {WAYS}."
    is_path = name.endswith(WEIGHT_SUFFIXES) or name.startswith((".", "~", "/"))
    if HUB_NAME.fullmatch(name) and not is_path:
        return load_folder(fetch_hub(name, hint))
    if is_path:
        raise UserError(f"There is no file or folder {name!r}; expected {WAYS}.")
    raise UserError(f"There is no model {name!r}; {hint}")


def _did_you_mean(name: str) -> str:
    near = [] if name in KNOWN_NAMES else difflib.get_close_matches(name, KNOWN_NAMES, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(near)}?" if near else ""
