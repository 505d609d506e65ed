"""The recipe: every number of a pretraining run, in one place and typed; the named ones are in recipes.py."""

from __future__ import annotations

import dataclasses
import math
import tomllib
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from unlabeled.errors import UserError
from unlabeled.pretrain.crops import CropRecipe
from unlabeled.pretrain.field_names import nearest_field
from unlabeled.pretrain.limits import Limits
from unlabeled.vit_config import SIZES, VitConfig, vit_config

LARGEST_CROP = 8192  # pixels
ALL_FIELDS = "`unlabeled info recipes` lists all fields"

AnyRecipe = TypeVar("AnyRecipe")


@dataclass(frozen=True)
class ModelRecipe:
    """The backbone."""

    size: str = "vit_small"  # a name in unlabeled.vit.SIZES
    width: int = 0  # 0: the size's own
    depth: int = 0  # blocks; 0: the size's own
    num_heads: int = 0  # attention heads; 0: the size's own, or width / 64 where it does not divide it
    patch_size: int = 14  # pixels
    num_registers: int = 0  # register tokens: 0, or 4 and more (2309.16588)
    drop_path: float = 0.0  # one uniform rate, student only
    layer_scale: float = 1e-5  # initial LayerScale
    image_size: int = 0  # pixels the position embedding is learned at; 0: the global crop's
    positions: Literal["random", "sine"] = "random"  # what the position embedding starts as
    ffn: Literal["", "mlp", "swiglu"] = ""  # "": the size's own
    interpolation: Literal["", "size", "antialias", "scale"] = (
        ""  # of the position embedding; "": the kind's own
    )
    norm_eps: float = 1e-6  # of every layer norm
    start: str = ""  # MODEL whose weights student and teacher begin with; "": random numbers


@dataclass(frozen=True)
class HeadRecipe:
    """The projection heads of student and teacher (DINOv2 section 4)."""

    num_prototypes: int = 65536  # outputs of the DINO head
    bottleneck: int = 256  # width before the prototypes
    hidden: int = 2048  # width of the two hidden layers
    shared: bool = True  # iBOT uses the DINO head
    ibot_num_prototypes: int = 65536  # outputs of the iBOT head, when not shared
    ibot_bottleneck: int = 256  # the same of the iBOT head, when not shared


@dataclass(frozen=True)
class LossRecipe:
    """The three losses and the teacher's targets."""

    dino: float = 1.0  # weight of the DINO loss
    ibot: float = 1.0  # weight of the iBOT loss; 0 leaves out masks too
    koleo: float = 0.1  # weight of KoLeo
    targets: Literal["sinkhorn", "centering"] = "sinkhorn"  # how the teacher's outputs become targets
    sinkhorn_iterations: int = 3  # of Sinkhorn-Knopp
    center_momentum: float = 0.9  # EMA of the centre
    student_temperature: float = 0.1  # of the student's softmax
    mask_probability: float = 0.5  # share of the global crops that are masked
    mask_ratio: tuple[float, float] = (0.1, 0.5)  # share of patches masked in such a crop


@dataclass(frozen=True)
class TeacherRecipe:
    """The EMA teacher."""

    momentum: float = 0.992  # at the start, cosine to final_momentum
    final_momentum: float = 1.0  # at the end
    temperature: float = 0.04  # at the start, linear to final_temperature
    final_temperature: float = 0.07  # from the end of the warm-up on
    temperature_warmup: float = 0.3  # fraction of the run
    model: str = (
        ""  # MODEL that is a frozen teacher (distillation, DINOv2 section 5); "": the student's own EMA
    )


@dataclass(frozen=True)
class OptimizerRecipe:
    """AdamW and its schedules; every length is a fraction of the run."""

    lr: float = 4e-3  # base learning rate, before scaling by batch
    scaling: Literal["sqrt", "linear", "none"] = "sqrt"  # lr * sqrt(batch/reference) or lr * batch/reference
    reference_batch: int = 1024  # batch at which lr holds as it stands
    final_lr: float = 1e-6  # at the end of the cosine
    warmup: float = 0.1  # fraction of the run, linear from 0
    weight_decay: float = 0.04  # at the start, cosine to final_weight_decay
    final_weight_decay: float = 0.4  # at the end
    betas: tuple[float, float] = (0.9, 0.999)  # of AdamW
    clip: float = 3.0  # gradient norm of backbone and of each head; 0: no clipping
    layer_decay: float = 1.0  # learning rate of a block over that of the next
    patch_embed_multiplier: float = 0.2  # learning rate of the patch embedding
    freeze_last_layer: float = 0.01  # fraction of the run in which the prototypes stay as they are
    freeze_backbone: float = 0.0  # fraction of the run in which the backbone stays as it is


@dataclass(frozen=True)
class RunRecipe:
    """Length, batch, precision, bookkeeping."""

    steps: int = 10000  # optimizer steps
    batch_size: int = 64  # images a step, over all ranks
    accumulation: int = 1  # parts the batch of a rank is cut into to save memory
    seed: int = 0  # of everything random
    precision: Literal["auto", "bf16", "float32"] = "auto"  # compute; auto: bf16 where the device has it
    sharding: Literal["ddp", "fsdp"] = "ddp"  # of parameters over ranks
    reduce: Literal["float32", "bf16"] = "float32"  # what fsdp sums gradients of the blocks over ranks in
    compile: bool = False  # torch.compile the blocks of student and teacher
    packed: Literal["auto", True, False] = "auto"  # the student sees all crops in one pass; auto: on CUDA
    checkpoint_blocks: bool = False  # recompute activations of the blocks in the backward pass
    checkpoint_every: int = 0  # steps; 0: a twentieth of the run
    keep_checkpoints: int = 2  # how many of the latest are kept
    health_every: int = 0  # steps between the dearer figures; 0: a hundredth of the run
    eval_every: int = 0  # steps between k-NN evaluations; 0: a tenth of the run
    workers: int = -1  # processes that make crops, a rank; -1: chosen from the cores; 0: none
    crops_on: Literal["cpu", "device"] = "cpu"  # device: the workers only decode, and it makes the same crops


@dataclass(frozen=True)
class DataRecipe:
    """Where the images are."""

    train: str = ""  # DATA to pretrain on
    evaluation: str = ""  # labelled DATA for k-NN on the way, or nothing
    eval_crop: int = 0  # pixels of the evaluation's centre crop; 0: the global crop's
    dense_evaluation: str = ""  # folder of images/ and labels/ for patch k-NN on the way, or nothing
    dense_ignore: int = 255  # label of the pixels that do not count


@dataclass(frozen=True)
class Recipe:
    """Everything a run is made of; frozen, and saved as recipe.toml."""

    name: str = "vits14"
    model: ModelRecipe = field(default_factory=ModelRecipe)
    head: HeadRecipe = field(default_factory=HeadRecipe)
    loss: LossRecipe = field(default_factory=LossRecipe)
    teacher: TeacherRecipe = field(default_factory=TeacherRecipe)
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    crops: CropRecipe = field(default_factory=CropRecipe)
    run: RunRecipe = field(default_factory=RunRecipe)
    data: DataRecipe = field(default_factory=DataRecipe)

    def vit_config(self) -> VitConfig:
        """The backbone's configuration."""
        model = self.model
        overrides: dict[str, Any] = {
            "patch_size": model.patch_size,
            "num_registers": model.num_registers,
            "layer_scale": model.layer_scale,
            "norm_eps": model.norm_eps,
            "image_size": model.image_size or self.crops.global_size,
        }
        for name in ("width", "depth", "num_heads", "ffn", "interpolation"):
            if getattr(model, name):
                overrides[name] = getattr(model, name)
        if model.width and not model.num_heads and model.width % SIZES[model.size][2]:
            overrides["num_heads"] = max(1, model.width // 64)
        return vit_config(model.size, **overrides)

    def num_ibot_prototypes(self) -> int:
        """Outputs of the head that the masked patches go through."""
        return self.head.num_prototypes if self.head.shared else self.head.ibot_num_prototypes

    def peak_lr(self) -> float:
        """The learning rate after warm-up, scaled by the batch (DINOv2 appendix B: square root)."""
        ratio = self.run.batch_size / self.optimizer.reference_batch
        scale = {"sqrt": math.sqrt(ratio), "linear": ratio, "none": 1.0}[self.optimizer.scaling]
        return self.optimizer.lr * scale


def field_types(recipe: Any) -> dict[str, Any]:
    """Dotted field name -> type, of a recipe and the recipes in it."""
    hints = typing.get_type_hints(type(recipe))
    result: dict[str, Any] = {}
    for item in dataclasses.fields(recipe):
        value = getattr(recipe, item.name)
        if dataclasses.is_dataclass(value):
            result |= {f"{item.name}.{name}": kind for name, kind in field_types(value).items()}
        else:
            result[item.name] = hints[item.name]
    return result


def override(recipe: Recipe, values: dict[str, Any], where: str) -> Recipe:
    """The recipe with some fields set, and checked; see `with_fields`.

    Raises:
        UserError: a name is unknown, a value has the wrong type, or is out of its range.
    """
    recipe = with_fields(recipe, values, where, ALL_FIELDS)
    check(recipe, where)
    return recipe


def with_fields(recipe: AnyRecipe, values: dict[str, Any], where: str, listed: str) -> AnyRecipe:
    """A recipe of any kind with some fields set.

    Args:
        recipe: frozen dataclasses; the one to start from.
        values: dotted field name ("optimizer.lr") -> value, or its text.
        where: what the values come from, for the error ("the command line", a file).
        listed: where a user finds all fields, for the error.

    Raises:
        UserError: a name is unknown (the near one is suggested) or a value has the wrong type.
    """
    kinds = field_types(recipe)
    for name, value in values.items():
        if name not in kinds:
            near = nearest_field(name, kinds)
            hint = f"did you mean {near}?" if near else listed
            raise UserError(f"{where} sets {name}, which no recipe has: {hint}")
        recipe = _replaced(recipe, name, _converted(name, value, kinds[name], where))
    return recipe


def check(recipe: Recipe, where: str) -> None:
    """Refuse what would otherwise fail late or silently.

    Raises:
        UserError: naming the field and what it may be.
    """

    limits = Limits(recipe, where)
    need, crops, model = limits.need, recipe.crops, recipe.model
    need(model.size in SIZES, "model.size", f"may be one of {', '.join(SIZES)}")
    counts = ("run.steps", "run.batch_size", "run.accumulation", "run.keep_checkpoints")
    limits.at_least(1, "model.patch_size", *counts, "loss.sinkhorn_iterations", "optimizer.reference_batch")
    limits.at_least(
        0, *(f"model.{name}" for name in ("width", "depth", "num_heads", "num_registers", "layer_scale"))
    )
    limits.above(0, "model.norm_eps")
    config = recipe.vit_config()
    width = config.width
    need(width % config.num_heads == 0, "model.num_heads", f"does not divide the width of {width}")
    need(
        model.positions == "random" or width % 4 == 0,
        "model.positions",
        f"needs a width that 4 divides; it is {width}",
    )
    for name, size in (("model.image_size", model.image_size), ("data.eval_crop", recipe.data.eval_crop)):
        need(
            size == 0 or size >= model.patch_size,
            name,
            f"must be 0 or at least a patch of {model.patch_size}",
        )
    need(0 <= model.drop_path < 1, "model.drop_path", "must lie in [0, 1)")
    need(
        recipe.run.reduce == "float32" or recipe.run.sharding == "fsdp",
        "run.reduce",
        "run.sharding ddp sums in float32; fsdp can do it",
    )
    need(crops.num_globals == 2, "crops.num_globals", "must be 2, as the method has it")
    for name, size in (("crops.global_size", crops.global_size), ("crops.local_size", crops.local_size)):
        need(size >= model.patch_size, name, f"must be at least a patch of {model.patch_size} pixels")
        need(size <= LARGEST_CROP, name, f"may be at most {LARGEST_CROP} pixels")
        multiple = size // model.patch_size * model.patch_size
        need(size == multiple, name, f"must be a multiple of the patch ({model.patch_size}); {multiple} is")
    shares = ("optimizer.warmup", "optimizer.freeze_last_layer", "optimizer.freeze_backbone")
    limits.within(0, 1, *shares, "teacher.temperature_warmup", kind="a fraction of the run")
    limits.range_within(1, "loss.mask_ratio", "crops.global_scale", "crops.local_scale")
    limits.range_within(math.inf, "crops.ratio", "crops.blur_sigma")
    limits.within(0, 1, "crops.flip", "crops.jitter", "crops.grey", "crops.solarise", kind="a probability")
    need(all(0 <= chance <= 1 for chance in crops.blur), "crops.blur", "has probabilities, in [0, 1]")
    kernel = crops.blur_kernel
    need(kernel % 2 == 1 and 1 <= kernel <= 17, "crops.blur_kernel", "must be odd, and at most 17 pixels")
    limits.at_least(
        0, "crops.num_locals", *(f"crops.{name}" for name in ("brightness", "contrast", "saturation"))
    )
    limits.within(0, 0.5, "crops.hue")
    limits.within(0, 256, "crops.solarise_threshold")
    limits.at_least(0, "loss.dino", "loss.ibot", "loss.koleo")
    need(
        recipe.loss.dino + recipe.loss.ibot > 0,
        "loss.dino",
        "loss.ibot is 0 too: there is nothing to learn from",
    )
    limits.within(0, 1, "loss.mask_probability", kind="a share")
    limits.within(0, 1, "loss.center_momentum")
    optimizer = ("lr", "final_lr", "weight_decay", "final_weight_decay", "clip", "patch_embed_multiplier")
    limits.at_least(0, *(f"optimizer.{name}" for name in optimizer))
    limits.above(0, "optimizer.layer_decay")
    need(all(0 <= beta < 1 for beta in recipe.optimizer.betas), "optimizer.betas", "must lie in [0, 1)")
    limits.at_least(0, "run.checkpoint_every", "run.health_every", "run.eval_every")
    limits.at_least(-1, "run.workers")
    need(0 <= recipe.run.seed < 2**63, "run.seed", "must lie in [0, 2**63)")
    limits.above(0, "teacher.temperature", "teacher.final_temperature", "loss.student_temperature")
    limits.within(0, 1, "teacher.momentum", "teacher.final_momentum")
    heads = ("num_prototypes", "bottleneck", "hidden", "ibot_num_prototypes", "ibot_bottleneck")
    limits.at_least(1, *(f"head.{name}" for name in heads))


def _replaced(node: Any, name: str, value: Any) -> Any:
    first, _, rest = name.partition(".")
    return dataclasses.replace(
        node, **{first: _replaced(getattr(node, first), rest, value) if rest else value}
    )


def _converted(name: str, value: Any, kind: Any, where: str) -> Any:
    if isinstance(value, str) and kind is not str:
        value = _parsed(value)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        if value in arguments:
            return arguments[arguments.index(value)]  # true for 1
        wanted = "one of " + ", ".join(str(one).lower() if one in (True, False) else one for one in arguments)
    elif origin is tuple:
        if arguments[-1] is ... and not isinstance(value, (list, tuple)):
            value = [value] if value != "" else []
        if isinstance(value, (list, tuple)) and (len(value) == len(arguments) or arguments[-1] is ...):
            one = arguments[0]
            return tuple(_converted(name, item, one, where) for item in value)
        wanted = f"{len(arguments)} numbers, as {','.join(('0.1', '0.5', '0.9')[: len(arguments)])}"
    elif origin is types.UnionType:
        if value is None or value == "none":
            return None
        return _converted(name, value, next(a for a in arguments if a is not types.NoneType), where)
    elif kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if math.isfinite(value):
            return float(value)
        wanted = "a finite number"
    elif type(value) is kind:
        return value
    else:
        wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind]
    raise UserError(f"{where} sets {name} to {value!r}; it takes {wanted}")


def _parsed(text: str) -> Any:
    if "," in text and not text.startswith("["):
        return [_parsed(part.strip()) for part in text.strip("()").split(",")]
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
