"""The one way in: a model from whatever text names it."""

import difflib
import re
from pathlib import Path

import torch

from unlabeled.errors import UserError
from unlabeled.vit import VisionTransformer
from unlabeled.weights.files import read_json, read_tensors
from unlabeled.weights.huggingface import load_huggingface, read_config
from unlabeled.weights.meta import from_meta
from unlabeled.weights.timm import from_timm

LETTERS = {"s": "small", "b": "base", "l": "large", "g": "giant"}
# Names of Meta's torch.hub: dinov2_vits14, dinov2_vits14_reg, ...
META_NAME = re.compile(r"dinov2_vit([sblg])14(_reg)?")
META_URL = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vit{letter}14/{file}"
TIMM_NAME = re.compile(r"(?:timm/)?(vit_(?:small|base|large|giant)_patch14_(?:reg4_)?dinov2)(\.\w+)?")
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
WEIGHT_SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")

KNOWN_NAMES = [
    *(f"facebook/dinov2-{kind}{size}" for kind in ("", "with-registers-") for size in LETTERS.values()),
    *(f"dinov2_vit{letter}14{kind}" for kind in ("", "_reg") for letter in LETTERS),
    *(f"timm/vit_{size}_patch14_{kind}dinov2.lvd142m" for kind in ("", "reg4_") for size in LETTERS.values()),
]
WAYS = (
    "a run folder, a Hugging Face folder, a .pth, .safetensors or .bin file, or a name such as "
    "facebook/dinov2-small"
)


def load_model(text: str | Path, device: str | torch.device = "cpu") -> VisionTransformer:
    """Return a backbone in evaluation mode, in float32, from any text that names a model.

    text: a run folder (its model/ is read), a folder in Hugging Face format, a weight file of Meta (.pth),
    timm or Hugging Face (.safetensors, .bin), or a name: facebook/dinov2-small and any other DINOv2 on the
    Hugging Face hub, dinov2_vits14 and dinov2_vits14_reg (Meta's), timm/vit_small_patch14_dinov2.lvd142m.
    Names are downloaded once, into the hub's own caches.
    Raises UserError where nothing is found, what is found is no such model, or a download is impossible.
    """
    path = Path(text).expanduser()
    if path.is_dir():
        model = load_folder(path)
    elif path.is_file():
        model = load_file(path)
    else:
        model = load_name(str(text))
    return model.to(device)


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


def load_file(path: Path) -> VisionTransformer:
    """Return the model of one weight file; its keys tell whose format it is."""
    if path.suffix not in WEIGHT_SUFFIXES:
        raise UserError(f"{path} is no weight file: {', '.join(WEIGHT_SUFFIXES)} can be read.")
    held = read_tensors(path)
    if any(key.startswith(("embeddings.", "dinov2.", "dinov2_with_registers.")) for key in held):
        if not (path.parent / "config.json").exists():
            raise UserError(f"{path} is in Hugging Face format and needs its config.json beside it.")
        return load_huggingface(path.parent)
    is_flat = "pos_embed" in held
    if is_flat and "mask_token" not in held and "register_tokens" not in held:
        return from_timm(held, str(path))
    return from_meta(held, str(path))


def load_name(name: str) -> VisionTransformer:
    """Return the model that a name stands for, from the cache or from where it is published."""
    if match := META_NAME.fullmatch(name):
        return load_file(fetch_meta(match[1], with_registers=bool(match[2])))
    if match := TIMM_NAME.fullmatch(name):
        return load_folder(fetch_hub(f"timm/{match[1]}{match[2] or '.lvd142m'}"))
    is_path = name.endswith(WEIGHT_SUFFIXES) or name.startswith((".", "~", "/"))
    if HUB_NAME.fullmatch(name) and not is_path:
        return load_folder(fetch_hub(name))
    hint = (not is_path and _did_you_mean(name)) or f"expected {WAYS}."
    raise UserError(f"There is no {'file or folder' if is_path else 'model'} {name!r}; {hint}")


def _did_you_mean(name: str) -> str:
    near = [] if name in KNOWN_NAMES else difflib.get_close_matches(name, KNOWN_NAMES, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(near)}?" if near else ""


def fetch_meta(letter: str, with_registers: bool) -> Path:
    """Return the path of Meta's released .pth in torch's hub cache, downloading it if it is not there."""
    file = f"dinov2_vit{letter}14{'_reg4' if with_registers else ''}_pretrain.pth"
    url = META_URL.format(letter=letter, file=file)
    path = Path(torch.hub.get_dir()) / "checkpoints" / file
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(url, str(path))
    except OSError as error:
        raise UserError(
            f"Cannot download {url} ({error}); fetch it where there is a network and put it at {path}."
        ) from error
    return path


def fetch_hub(name: str) -> Path:
    """Return the folder of a model of the Hugging Face hub in its cache, downloading it if it is not there.

    Honours HF_HOME, HF_HUB_CACHE, HF_TOKEN and HF_HUB_OFFLINE.
    """
    # The hub client is slow to import, and needed for names only.
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    from huggingface_hub.errors import RepositoryNotFoundError as NotFoundError

    def fetch(*patterns: str) -> Path:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))

    try:
        config = fetch("config.json") / "config.json"
        if config.exists() and "architecture" not in read_json(config):
            read_config(config)  # before gigabytes of another kind of model are fetched
        folder = fetch("config.json", "model*.safetensors", "model.safetensors.index.json")
        if not any(folder.glob("model*.safetensors")):
            folder = fetch("config.json", "pytorch_model.bin")
    except (NotFoundError, HFValidationError) as error:
        raise UserError(
            f"{name!r} is no file or folder here, and the Hugging Face hub has no model of that name; "
            f"{_did_you_mean(name) or f'expected {WAYS}.'}"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        offline = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        advice = (
            f"fetch https://huggingface.co/{name} (config.json, model.safetensors) where there is a network, "
            "and give its folder."
        )
        raise UserError(
            f"{name!r} is no file or folder here, is not in {constants.HF_HUB_CACHE}, and {offline}; "
            f"{_did_you_mean(name) or advice}"
        ) from error
    return folder
