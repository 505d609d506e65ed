"""Every number of a training with labels, in one place and typed."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from unlabeled.errors import UserError

Backbone = Literal["freeze", "lora", "full"]
FEWEST_STEPS = 200  # where nothing is said of their number


@dataclass(frozen=True)
class TrainRecipe:
    """How a head is trained, and its backbone with it; AdamW, linear warm-up, then half a cosine to 0."""

    backbone: Backbone = "freeze"  # freeze: the head alone; lora: low-rank adapters too; full: all weights
    steps: int = 1000  # of the optimizer
    batch_size: int = 64  # images
    lr: float = 1e-3  # of the head
    backbone_lr: float = 3e-4  # of the adapters, or of the last block
    layer_decay: float = 0.75  # full: learning rate of a layer over that of the next one
    weight_decay: float = 0.05  # of matrices; not of adapters, biases, norms
    warmup: float = 0.1  # share of the steps
    clip: float = 1.0  # largest norm of all gradients together; 0 leaves them
    drop_path: float = 0.1  # where the backbone learns
    ema: float = 0.0  # momentum of the average of the weights that is kept instead of the last ones; 0: none
    label_smoothing: float = 0.0  # classify: share of a target that goes to all classes
    mixup: float = 0.0  # classify: both parameters of the Beta distribution that images are mixed by; 0: not
    lora_rank: int = 8
    lora_mlp: bool = False  # adapters of the FFN's matrices too, not only of attention's
    augment: bool = True  # images are cropped, flipped, ... anew each time; without it as in prediction
    cache: bool = True  # tokens of a frozen backbone are computed once, where no image is augmented anew
    cache_dtype: Literal["float16", "float32"] = "float16"
    views: int = 1  # cached: of each image, the first as in prediction and the others augmented
    evaluations: int = 10  # on validation, evenly over the steps; the best weights are kept
    seed: int = 0  # of everything random

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "lora_rank", "views", "evaluations"):
            _need(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("lr", "backbone_lr", "weight_decay", "clip", "mixup"):
            _need(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        for name in ("warmup", "drop_path", "ema", "label_smoothing"):
            _need(0 <= getattr(self, name) < 1, name, getattr(self, name), "in [0, 1)")
        _need(0 < self.layer_decay <= 1, "layer_decay", self.layer_decay, "in (0, 1]")
        _need(self.backbone in get_args(Backbone), "backbone", self.backbone, "freeze, lora or full")
        _need(
            self.cache_dtype in ("float16", "float32"), "cache_dtype", self.cache_dtype, "float16 or float32"
        )

    @property
    def cached(self) -> bool:
        """Whether training runs on tokens that are computed once."""
        return self.backbone == "freeze" and self.cache and not self.augment


def _need(fine: bool, name: str, value: Any, wanted: str) -> None:
    if not fine:
        raise UserError(f"train.{name} is {value}; it is {wanted}.")


def default_recipe(
    task: str, backbone: Backbone, num_images: int, fields: Mapping[str, Any] | None = None
) -> TrainRecipe:
    """Return what needs no tuning on small data, with some fields changed.

    fields: by name, values as they are or as text; `epochs` stands for steps.
    Raises UserError for an unknown field or a value that it does not take.
    """
    given = dict(fields or {})
    recipe = TrainRecipe(backbone=backbone)
    frozen = backbone == "freeze"
    if frozen:
        recipe = replace(recipe, augment=False, weight_decay=0.01)
    elif backbone == "lora":
        recipe = replace(recipe, backbone_lr=1e-3)
    batch_size = 8 if task != "classify" else 256 if frozen else 64
    recipe = replace(recipe, batch_size=batch_size)
    # Passes over the data: a frozen backbone's cost next to nothing on cached tokens.
    epochs = {("classify", True): 60, ("classify", False): 20}.get((task, frozen), 40 if frozen else 30)
    fewest = FEWEST_STEPS
    if "epochs" in given:
        fewest = 1
        epochs = _parsed("epochs", given.pop("epochs"), float)
        _need(epochs > 0, "epochs", epochs, "above 0")
    for name, value in given.items():
        recipe = replace(recipe, **{name: _field(name, value)})
    recipe = replace(recipe, batch_size=max(1, min(recipe.batch_size, num_images)))
    if "steps" in given:
        return recipe
    return replace(recipe, steps=max(fewest, math.ceil(epochs * num_images / recipe.batch_size)))


def _field(name: str, value: Any) -> Any:
    kinds = {item.name: type(item.default) for item in dataclasses.fields(TrainRecipe)}
    if name not in kinds:
        near = difflib.get_close_matches(name, [*kinds, "epochs"], 1)
        hint = f"did you mean train.{near[0]}?" if near else f"there are {', '.join(['epochs', *kinds])}."
        raise UserError(f"There is no train.{name}; {hint}")
    return _parsed(name, value, kinds[name])


def _parsed(name: str, value: Any, kind: type) -> Any:
    words: dict[type, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    try:
        if kind is bool and isinstance(value, str):
            return {"true": True, "false": False}[value.lower()]
        if kind is int and float(value) != int(float(value)):
            raise ValueError
        found = kind(float(value)) if kind is int else kind(value)
        if kind is float and not math.isfinite(found):
            raise ValueError
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise UserError(f"train.{name} is {value!r}; it takes {words[kind]}.") from error
    return found
