"""The model card beside a Hugging Face export, and the way to the hub."""

from __future__ import annotations

import json
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

from unlabeled.errors import UserError
from unlabeled.vit import VitConfig
from unlabeled.weights.files import replacing
from unlabeled.weights.load import HUB_NAME

# The rest of an export folder is whatever the user has put there, which is not pushed.
PUSHED = ["README.md", "config.json", "model.safetensors", "preprocessor_config.json"]
RECIPE_ROWS = (
    ("steps", "run", "steps"),
    ("batch size", "run", "batch_size"),
    ("precision", "run", "precision"),
    ("learning rate", "optimizer", "lr"),
    ("teacher targets", "loss", "targets"),
    ("prototypes", "head", "num_prototypes"),
    ("global crops, pixels", "crops", "global_size"),
    ("local crops, pixels", "crops", "local_size"),
    ("local crops per image", "crops", "num_locals"),
    ("drop path", "model", "drop_path"),
    ("seed", "run", "seed"),
)
METRICS = ("loss", "dino", "ibot", "koleo", "knn", "rankme", "images_per_second")

USE = """\
## Use

With transformers:

```python
import torch
from PIL import Image
from transformers import {classes}

{processor}model = AutoModel.from_pretrained("{name}")
with torch.no_grad():
    tokens = model({pixels}).last_hidden_state
cls, patches = tokens[:, 0], tokens[:, {first_patch}:]
```

With [unlabeled](https://pypi.org/project/unlabeled):

```python
import unlabeled

model = unlabeled.load_model("{name}")
tokens = model(images)  # (B, {channels}, H, W), normalised; tokens.cls, tokens.registers, tokens.patches
```
"""


def write_card(config: VitConfig, folder: Path, source: str | Path, name: str) -> bool:
    """Write README.md into an export folder, unless one is there; return whether it was written.

    source: the MODEL that was exported; of a run folder, its recipe.toml and metrics.jsonl are told.
    name: what the card calls the model, and loads it by.
    """
    path = folder / "README.md"
    if path.exists():
        return False
    with replacing(path) as temporary:
        temporary.write_text(card(config, name, source), encoding="utf-8")
    return True


def card(config: VitConfig, name: str, source: str | Path) -> str:
    """Return the text of a model card; `name` stands for the model in the code it shows."""
    run = Path(source).expanduser()
    recipe = _recipe(run)
    data = str(recipe.get("data", {}).get("train", ""))
    parts = [_front_matter(data, source), f"# {name}", _summary(config)]
    if recipe:
        parts.append(_training(recipe, data))
        if metrics := last_metrics(run / "metrics.jsonl"):
            parts.append(_metrics(metrics))
    elif HUB_NAME.fullmatch(str(source)) and not run.exists():
        parts.append(f"The weights are those of [{source}](https://huggingface.co/{source}).")
    parts.append(_use(config, name))
    parts.append(f"Made with unlabeled {version('unlabeled')}.\n")
    return "\n\n".join(parts)


def _front_matter(data: str, source: str | Path) -> str:
    lines = [
        "---",
        "# license: to be chosen by you; see https://huggingface.co/docs/hub/repositories-licenses",
        "library_name: transformers",
        "pipeline_tag: image-feature-extraction",
        "tags:",
        "- dinov2",
        "- self-supervised-learning",
        "- vision",
        "- unlabeled",
    ]
    if data.startswith("hf:"):
        lines += ["datasets:", f"- {json.dumps(data.split(':')[1])}"]
    if HUB_NAME.fullmatch(str(source)) and not Path(source).exists():
        lines += [f"base_model: {json.dumps(str(source))}"]
    return "\n".join([*lines, "---"])


def _summary(config: VitConfig) -> str:
    registers = f", {config.num_registers} register tokens" if config.num_registers else ""
    return (
        "A DINOv2 backbone: image features learned without labels "
        "([Oquab et al., 2023](https://arxiv.org/abs/2304.07193)). "
        f"Vision transformer of width {config.width}, depth {config.depth}, {config.num_heads} heads, patches of "
        f"{config.patch_size} pixels{registers}; position embedding learned at {config.image_size} pixels."
    )


def _training(recipe: dict[str, Any], data: str) -> str:
    # A path on the user's own disk says nothing to others but its last name, and may say too much.
    named = data if data.startswith("hf:") else Path(data).name
    rows = [("recipe", recipe.get("name", "")), ("data", f"`{named}`")]
    rows += [
        (title, recipe[section][field])
        for title, section, field in RECIPE_ROWS
        if field in recipe.get(section, {})
    ]
    return "## Training\n\n" + _table(("", ""), rows)


def _metrics(metrics: dict[str, float]) -> str:
    rows = [(name, f"{metrics[name]:.4g}") for name in METRICS if name in metrics]
    step = int(metrics.get("step", 0))
    return f"## Metrics\n\nAs the run last wrote them, up to step {step}.\n\n" + _table(("", "value"), rows)


def _use(config: VitConfig, name: str) -> str:
    is_rgb = config.in_channels == 3
    return USE.format(
        name=name,
        classes="AutoImageProcessor, AutoModel" if is_rgb else "AutoModel",
        processor=f'processor = AutoImageProcessor.from_pretrained("{name}")\n' if is_rgb else "",
        pixels='**processor(Image.open("photo.jpg"), return_tensors="pt")'
        if is_rgb
        else "pixel_values=images",
        first_patch=1 + config.num_registers,
        channels=config.in_channels,
    ).rstrip()


def _table(head: tuple[str, str], rows: list[tuple[str, Any]]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
    return "\n".join(lines)


def _recipe(run: Path) -> dict[str, Any]:
    path = run / "recipe.toml"
    try:
        return tomllib.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} is no valid TOML ({error}); put the run's own back, or export RUN/model."
        ) from error


def last_metrics(path: Path) -> dict[str, float]:
    """Return the last value of every figure in a metrics.jsonl; a cut or empty line is passed over."""
    held: dict[str, float] = {}
    if not path.exists():
        return held
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            held.update((name, value) for name, value in row.items() if isinstance(value, int | float))
    return held


def push_folder(folder: Path, repository: str) -> str:
    """Put an export folder in a repository of the Hugging Face hub; return its address.

    A repository that does not exist is made, as a private one. Honours HF_TOKEN and HF_ENDPOINT.
    Raises UserError where the hub cannot be reached or does not take it.
    """
    # The hub client is slow to import.
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    # What its HTTP library raises where there is no connection; that library changes between versions.
    no_connection = cast("type[Exception]", HfHubHTTPError.__bases__[0])
    api = HfApi()
    try:
        made = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(
            folder_path=folder,
            repo_id=made.repo_id,
            allow_patterns=PUSHED,
            commit_message="Export from unlabeled",
        )
    except HFValidationError as error:
        raise UserError(f"--push {repository!r} is no name of a repository; expected USER/NAME.") from error
    except LocalTokenNotFoundError as error:
        raise UserError(_refused(folder, repository, api.endpoint, "you are not logged in")) from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        reason = "it refuses your token" if status in (401, 403) else str(error).splitlines()[0]
        raise UserError(_refused(folder, repository, api.endpoint, reason)) from error
    except (OSError, RuntimeError, no_connection) as error:
        reason = f"it cannot be reached ({error})"
        raise UserError(_refused(folder, repository, api.endpoint, reason)) from error
    return str(made)


def _refused(folder: Path, repository: str, endpoint: str, reason: str) -> str:
    return (
        f"{folder} was written but not pushed to {repository} at {endpoint}: {reason}. "
        f"Log in with `hf auth login` or set HF_TOKEN, then: hf upload {repository} {folder}"
    )
