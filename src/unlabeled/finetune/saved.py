"""A trained head beside its backbone: a folder that predicts by itself.

    head.json           task, classes, palette, preprocessing, figures, and whose tokens it reads
    head.safetensors    its weights
    model/              the backbone in Hugging Face format, unless it is only referred to

Shape suffixes: B images, C classes, F features, H W pixels, h w pixels as the model sees them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from unlabeled.dense import inference
from unlabeled.dense.heads import DepthHead, SegmentationHead
from unlabeled.dense.losses import resized
from unlabeled.dense.masks import IGNORE
from unlabeled.dense.released import load_released_head, read_released_head
from unlabeled.devices import choose_device
from unlabeled.errors import UserError, writing
from unlabeled.features.engines import weights_hash
from unlabeled.features.fitting import evaluating
from unlabeled.features.inputs import ImageLike, as_pixels
from unlabeled.features.preprocessing import Preprocessing, default_preprocessing
from unlabeled.finetune.backbone import reader
from unlabeled.finetune.examples import map_preprocessing
from unlabeled.finetune.heads import KnnHead, LinearHead
from unlabeled.images.transform import normalize
from unlabeled.json_file import read_json
from unlabeled.vit import VisionTransformer
from unlabeled.weights.files import check_keys, read_tensors, replacing, write_tensors
from unlabeled.weights.huggingface import save_huggingface
from unlabeled.weights.load import load_model

Task = Literal["classify", "segment", "depth"]
FORMAT = "unlabeled head 1"
KINDS: dict[str, type[nn.Module]] = {
    "LinearHead": LinearHead,
    "KnnHead": KnnHead,
    "SegmentationHead": SegmentationHead,
    "DepthHead": DepthHead,
}
CLASSES_AT_ONCE = 8  # whose maps are resized to an image
LONG = 2.0  # from this ratio of the sides on, an image is seen through a window that slides along it


@dataclass(frozen=True)
class HeadInfo:
    """What head.json holds.

    Attributes:
        task: classify, segment or depth.
        kind: a name in KINDS; arguments: what makes one of it.
        classes: names; empty of depth.
        palette: (red, green, blue) of each class; empty of depth.
        preprocessing: fields of `Preprocessing`.
        layers: blocks that are read.
        backbone: name, weights (their hash), tuned (freeze, lora, full).
        metrics: of validation, of the weights that were kept.
        ignore, depth_scale: of the labels and depth that it learned from.
    """

    task: Task
    kind: str
    arguments: dict[str, Any]
    classes: list[str]
    preprocessing: dict[str, Any]
    layers: list[int]
    backbone: dict[str, Any]
    palette: list[tuple[int, int, int]] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    ignore: int = 255
    depth_scale: float = 1000.0


class Classified(NamedTuple):
    """One image's class."""

    name: str
    probability: float
    top: list[tuple[str, float]]  # the five most probable classes, or all of fewer
    probabilities: NDArray[np.float32]  # (C,)


class TrainedHead:
    """A head with its backbone.

    identity: a hash of the head's weights and its backbone's.

    `head(image)` gives of one image, at its own size: `Classified`; classes int64 (H, W); or metres float32 (H, W).
    """

    def __init__(
        self, info: HeadInfo, model: VisionTransformer, head: nn.Module, device: torch.device
    ) -> None:
        self.info, self.device = info, device
        self.model = model.to(device).eval()
        self.head = head.to(device).eval()
        self.preprocessing = Preprocessing(**info.preprocessing)
        digest = hashlib.sha256(info.backbone["weights"].encode())
        for name, value in sorted(self.head.state_dict().items()):
            digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
        self.identity = digest.hexdigest()
        self._reader = reader(self.model, cast(inference.Head, self.head), device)

    def __call__(self, image: ImageLike) -> Any:
        """Return what one image shows; raises UserError for what is no image, or too small."""
        pixels = as_pixels(image)
        with torch.no_grad():
            outputs = self.outputs(torch.from_numpy(self.preprocessing(pixels))[None])
        return self.results(outputs, [(pixels.shape[0], pixels.shape[1])])[0]

    @torch.no_grad()
    def outputs(self, images_B3hw: Tensor) -> Tensor:
        """Return logits (B, C), logits (B, C, h, w) or metres (B, 1, h, w) of prepared uint8 images."""
        head = cast(inference.Head, self.head)
        if self.info.task == "classify":
            return head(self._reader(images_B3hw)).float()
        h, w = images_B3hw.shape[2:]
        if max(h, w) > LONG * min(h, w):
            images = normalize(images_B3hw.to(self.device))
            with evaluating(self.model):
                return inference.predict(self.model, head, images, window=min(h, w)).float()
        return resized(head(self._reader(images_B3hw)).float(), (h, w))

    def results(self, outputs: Tensor, sizes: list[tuple[int, int]]) -> list[Any]:
        """Return what outputs say, each image at its own size (height, width); see the class.

        Raises UserError for outputs that are NaN or infinite.
        """
        if not bool(torch.isfinite(outputs).all()):
            raise UserError("The model computes infinities or NaN; are its weights whole?")
        if self.info.task == "classify":
            return [self._classified(row) for row in outputs.softmax(dim=1).cpu().numpy()]
        if self.info.task == "depth":
            return [
                resized(one[None], size)[0, 0].cpu().numpy() for one, size in zip(outputs, sizes, strict=True)
            ]
        return [most_likely(one, size).cpu().numpy() for one, size in zip(outputs, sizes, strict=True)]

    def _classified(self, probabilities_C: NDArray[np.float32]) -> Classified:
        order = np.argsort(-probabilities_C, kind="stable")[:5]
        top = [(self.info.classes[one], float(probabilities_C[one])) for one in order]
        return Classified(*top[0], top, probabilities_C)


def most_likely(logits_Chw: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the class of each pixel of an image of `size` (H, W), int64; of equals the lower one.

    A few classes are resized at a time: all of them, at the size of a photograph, are gigabytes.
    """
    best, classes = resized(logits_Chw[None, :CLASSES_AT_ONCE], size)[0].max(0)
    for first in range(CLASSES_AT_ONCE, len(logits_Chw), CLASSES_AT_ONCE):
        more, which = resized(logits_Chw[None, first : first + CLASSES_AT_ONCE], size)[0].max(0)
        classes = torch.where(more > best, which + first, classes)
        best = torch.maximum(best, more)
    return classes


def save_head(
    folder: Path, info: HeadInfo, model: VisionTransformer, head: nn.Module, copy_backbone: bool = True
) -> None:
    """Write a head, and its backbone beside it; each file is replaced when the new one is whole, head.json last.

    Raises UserError for a full disk.
    """
    if isinstance(head, LinearHead):
        head = head.folded()
    state = {name: value.detach().cpu().contiguous() for name, value in head.state_dict().items()}
    if isinstance(head, LinearHead):  # folded: no mean and no deviation are left
        del state["mean_F"], state["std_F"]
    with writing(folder):
        if copy_backbone:
            save_huggingface(model, folder / "model")
        with replacing(folder / "head.safetensors") as part:
            write_tensors(state, part)
        with replacing(folder / "head.json") as part:
            held = {"format": FORMAT} | dataclasses.asdict(info)
            part.write_text(json.dumps(held, indent=2) + "\n", encoding="utf-8")


def load_head(
    text: str | Path, model: str | Path | VisionTransformer | None = None, device: str = "auto"
) -> TrainedHead:
    """Return a trained head with its backbone.

    text: a folder that `finetune` wrote, or one of Meta's released heads (.pth: classification, segmentation, depth;
        `dense.released` lists them), which needs its model.
    model: the backbone, where it does not lie in the folder.

    Raises UserError for what is no head, a head of another backbone, or damaged files.
    """
    path, where = Path(text).expanduser(), choose_device(device)
    if path.is_file():
        return _released_head(path, model, where)
    info = read_info(path)
    if model is None and not (path / "model").is_dir() and not info.backbone["name"]:
        raise UserError(f"{path} has no model/, and its backbone had no name; give it with --model.")
    source = (
        model if model is not None else path / "model" if (path / "model").is_dir() else info.backbone["name"]
    )
    backbone = load_model(source) if isinstance(source, str | Path) else source
    hash_here = weights_hash(backbone)
    if hash_here != info.backbone["weights"]:
        named = source if isinstance(source, str | Path) else "the model given"
        raise UserError(
            f"{path} is a head of another backbone: its weights are {info.backbone['weights'][:12]}, those of {named} "
            f"{hash_here[:12]}."
        )
    head = KINDS[info.kind](**info.arguments)
    state, filled = read_tensors(path / "head.safetensors"), head
    if isinstance(head, LinearHead):
        state, filled = {name.removeprefix("linear."): value for name, value in state.items()}, head.linear
    check_keys(filled, state, str(path / "head.safetensors"), "what head.json says")
    filled.load_state_dict(state)
    return TrainedHead(info, backbone, head, where)


def read_info(folder: Path) -> HeadInfo:
    """Return what a folder's head.json holds; raises UserError where there is none."""
    place = folder / "head.json"
    if not place.exists():
        hint = "it is a MODEL: unlabeled finetune makes a head" if (folder / "config.json").exists() else (
            "unlabeled finetune makes one" if not (folder / "recipe.json").exists() else
            f"its training is not over: unlabeled finetune --resume {shlex.quote(str(folder))}"
        )  # fmt: skip
        raise UserError(f"{folder} holds no trained head (no head.json); {hint}.")
    held = read_json(place)
    names = {item.name for item in dataclasses.fields(HeadInfo)}
    if held.get("format") != FORMAT or held.get("kind") not in KINDS or not names <= held.keys():
        raise UserError(f"{place} is of no head that this version reads ({held.get('format')!r}).")
    return HeadInfo(**{name: held[name] for name in names})


def _released_head(
    path: Path, model: str | Path | VisionTransformer | None, device: torch.device
) -> TrainedHead:
    """Return one of Meta's heads with its backbone; classes have numbers for names, which is all the files say."""
    if model is None:
        raise UserError(f"{path} is a head without a backbone; give it with --model.")
    backbone = load_model(model) if isinstance(model, str | Path) else model
    config = backbone.config
    found = read_released_head(path, config.width)
    head: nn.Module
    if found.task == "classify":
        head = LinearHead(**found.arguments)
        check_keys(head.linear, found.state, str(path), f"a head of a backbone of width {config.width}")
        head.linear.load_state_dict(found.state)
    else:
        head = load_released_head(path, config.width)
    num_classes = found.arguments.get("num_classes", 0)
    preprocessing = default_preprocessing(config) if found.task == "classify" else map_preprocessing(config)
    name = str(model) if isinstance(model, str | Path) else ""
    info = HeadInfo(
        found.task, type(head).__name__, found.arguments, [str(number) for number in range(num_classes)],
        dataclasses.asdict(preprocessing), cast(inference.Head, head).layers(config.depth),
        {"name": name, "weights": weights_hash(backbone), "tuned": "freeze"},
        palette(num_classes) if found.task == "segment" else [],
    )  # fmt: skip
    return TrainedHead(info, backbone, head, device)


def palette(num_classes: int) -> list[tuple[int, int, int]]:
    """Return the colour of each class, as masks are shown everywhere."""
    from unlabeled.dense.mask_pictures import class_colour

    colours = [(255 * class_colour(number % IGNORE)).round().astype(int) for number in range(num_classes)]
    return [(int(red), int(green), int(blue)) for red, green, blue in colours]
