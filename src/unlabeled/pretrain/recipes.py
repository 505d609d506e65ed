"""The named recipes (DINOv2 appendix B and table 16, DINO), and recipes as TOML files."""

from __future__ import annotations

import dataclasses
import difflib
import json
import tomllib
from pathlib import Path
from typing import Any

from unlabeled.atomic import replacing
from unlabeled.errors import UserError
from unlabeled.pretrain.crops import CropRecipe
from unlabeled.pretrain.recipe import (
    ALL_FIELDS,
    HeadRecipe,
    LossRecipe,
    ModelRecipe,
    OptimizerRecipe,
    Recipe,
    RunRecipe,
    TeacherRecipe,
    field_types,
    override,
    with_fields,
)

_SHORT = OptimizerRecipe(layer_decay=0.9)
_LONG = OptimizerRecipe(lr=2e-4, warmup=0.16, final_weight_decay=0.2, freeze_last_layer=0.002)
_LONG_HEADS = HeadRecipe(
    num_prototypes=131072, bottleneck=384, shared=False, ibot_num_prototypes=131072, ibot_bottleneck=256
)
_LONG_TEACHER = TeacherRecipe(momentum=0.994, temperature_warmup=0.06)


def _named() -> dict[str, Recipe]:
    return {
        "tiny": Recipe(
            name="tiny",
            model=ModelRecipe(size="vit_tiny", patch_size=16),
            head=HeadRecipe(num_prototypes=4096, bottleneck=128, hidden=512),
            crops=CropRecipe(global_size=128, local_size=64, num_locals=4),
            optimizer=OptimizerRecipe(lr=2e-3, patch_embed_multiplier=1.0, weight_decay=0.04, final_weight_decay=0.1),
            teacher=TeacherRecipe(momentum=0.99),
            run=RunRecipe(steps=1000, batch_size=64),
        ),
        "vits14": Recipe(
            name="vits14",
            model=ModelRecipe(size="vit_small", drop_path=0.1),
            optimizer=_SHORT,
            run=RunRecipe(steps=125_000, batch_size=1024),
        ),
        "vitb14": Recipe(
            name="vitb14",
            model=ModelRecipe(size="vit_base", drop_path=0.2),
            optimizer=_SHORT,
            run=RunRecipe(steps=125_000, batch_size=1024),
        ),
        # DINOv2 appendix B, "short": ViT-L/16 on ImageNet-1k.
        "vitl16_short": Recipe(
            name="vitl16_short",
            model=ModelRecipe(size="vit_large", patch_size=16, drop_path=0.3),
            loss=LossRecipe(targets="centering"),
            optimizer=_SHORT,
            crops=CropRecipe(local_size=96),
            run=RunRecipe(steps=125_000, batch_size=2048, checkpoint_blocks=True),
        ),
        # DINOv2 table 16, "long": LVD-142M.
        "vitl14": Recipe(
            name="vitl14",
            model=ModelRecipe(size="vit_large", drop_path=0.4),
            head=_LONG_HEADS,
            teacher=_LONG_TEACHER,
            optimizer=_LONG,
            run=RunRecipe(steps=625_000, batch_size=3072, checkpoint_blocks=True),
        ),
        "vitg14": Recipe(
            name="vitg14",
            model=ModelRecipe(size="vit_giant2", drop_path=0.4),
            head=_LONG_HEADS,
            teacher=_LONG_TEACHER,
            optimizer=_LONG,
            run=RunRecipe(steps=625_000, batch_size=3072, checkpoint_blocks=True, sharding="fsdp"),
        ),
        # DINO (2104.14294), ViT-S/16: no iBOT, no KoLeo, centering, batch 1024 for 100 epochs.
        "dino_vits16": Recipe(
            name="dino_vits16",
            model=ModelRecipe(size="vit_small", patch_size=16, drop_path=0.1, layer_scale=1.0),
            loss=LossRecipe(ibot=0.0, koleo=0.0, targets="centering"),
            teacher=TeacherRecipe(momentum=0.996, final_temperature=0.04),
            optimizer=OptimizerRecipe(
                lr=5e-4, scaling="linear", reference_batch=256, patch_embed_multiplier=1.0, freeze_last_layer=0.01
            ),
            crops=CropRecipe(
                global_scale=(0.4, 1.0), local_scale=(0.05, 0.4), local_size=96, blur=(1.0, 0.1, 0.5), blur_kernel=17
            ),
            run=RunRecipe(steps=125_000, batch_size=1024),
        ),
    }  # fmt: skip


FITTED = ("auto", "highres")  # to data and machine, to the model that a run goes on from: see plan.py
RECIPE_NAMES = (*FITTED, "tiny", "vits14", "vitb14", "vitl16_short", "vitl14", "vitg14", "dino_vits16")


def named_recipe(name: str) -> Recipe:
    """The recipe of that name, as a fresh frozen dataclass.

    "auto" is not among them: it depends on the data (see `unlabeled.pretrain.auto.choose`).

    Raises:
        UserError: the name is unknown.
    """
    recipes = _named()
    if name not in recipes:
        near = difflib.get_close_matches(name, RECIPE_NAMES, 1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(RECIPE_NAMES)}"
        raise UserError(f"no recipe is called {name!r}: {hint}")
    return recipes[name]


def write_recipe(recipe: Any, path: Path) -> None:
    """Write every field of a recipe of any kind as TOML, those without a section first."""
    parts = {item.name: getattr(recipe, item.name) for item in dataclasses.fields(recipe)}
    sections = {name: part for name, part in parts.items() if dataclasses.is_dataclass(part)}
    lines = [f"{name} = {_toml(value)}" for name, value in parts.items() if name not in sections]
    for name, part in sections.items():
        lines += ["", f"[{name}]"]
        lines += [f"{item.name} = {_toml(getattr(part, item.name))}" for item in dataclasses.fields(part)]
    with replacing(path) as partial:
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _toml(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value) if isinstance(value, (str, bool)) else repr(value)


def read_values(path: Path) -> dict[str, Any]:
    """Dotted field name -> value of a TOML file.

    Raises:
        UserError: the file cannot be read or is no TOML.
    """
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the recipe {path} cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"the recipe {path} is not valid TOML: {error}") from error
    return {
        f"{section}.{name}" if isinstance(part, dict) else section: value
        for section, part in tree.items()
        for name, value in (part.items() if isinstance(part, dict) else [("", part)])
    }


def read_recipe(path: Path) -> Recipe:
    """The recipe of a TOML file: the fields it sets, over the recipe its `name` names.

    Raises:
        UserError: unreadable file, unknown name or field, wrong type.
    """
    values, named = read_values(path), _named()
    name = str(values.get("name", "vits14"))
    near = difflib.get_close_matches(name, named, 1, cutoff=0.8)
    if near and name not in named:
        raise UserError(f"{path} has the name {name}, which no recipe has: did you mean {near[0]}?")
    return override(named.get(name, Recipe(name=name)), values, str(path))


def fitted_fields(recipe: Any) -> dict[str, Any]:
    """The fields of a TOML file that leaves the rest to auto or highres by its `name`; empty for anything else.

    A finished run's recipe.toml has such a name too, and all fields: it is a recipe of its own.

    Raises:
        UserError: unreadable file, unknown field, wrong type.
    """
    if not str(recipe).endswith(".toml"):
        return {}
    values = read_values(Path(recipe))
    if values.get("name") not in FITTED or len(values) >= len(field_types(Recipe())):
        return {}
    with_fields(Recipe(), values, str(recipe), ALL_FIELDS)
    return values
