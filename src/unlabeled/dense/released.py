"""Meta's released heads: classification, segmentation and depth, as files of weights alone.

| file | holds | task |
|---|---|---|
| dinov2_vits14_linear_head.pth, _linear4_head.pth | weight (1000, 2D) or (1000, 5D), bias | classify |
| dinov2_vits14_ade20k_linear_head.pth, _ms_head.pth, voc2012 | state_dict: decode_head.bn, .conv_seg | segment |
| dinov2_vits14_nyu_linear_head.pth, _linear4_head.pth, kitti | state_dict: decode_head.conv_depth | depth |
| dinov2_vits14_nyu_dpt_head.pth, kitti | state_dict: decode_head.reassemble_blocks, .fusion_blocks, ... | depth |
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from unlabeled.dense.heads import DepthHead, SegmentationHead
from unlabeled.errors import UserError
from unlabeled.weights.files import State, check_keys, read_tensors

PREFIX = "decode_head."
# Meta's key, ours. The release wraps each convolution of DPT in a module, and its last ones too.
DPT_RULES = (
    (r"\.conv\.(weight|bias)$", r".\1"),
    (r"^conv_depth\.head\.", "conv_depth."),
    (r"(readout_projects\.\d+)\.0\.", r"\1."),
)
MAX_DEPTHS = {"nyu": 10.0, "kitti": 80.0}  # metres; by the name of the file, which is all that says it
MIN_DEPTH = 0.001  # metres


@dataclass(frozen=True)
class ReleasedHead:
    """What a file holds, in our names.

    task: classify, segment or depth. arguments: of LinearHead's linear layer, SegmentationHead or DepthHead. state: of
    that module; of classify, of the linear layer alone, which reads CLS of the last one or four blocks and the last
    one's mean patch.
    """

    task: Literal["classify", "segment", "depth"]
    arguments: dict[str, Any]
    state: State


def read_released_head(path: str | Path, width: int, max_depth: float | None = None) -> ReleasedHead:
    """Return what a released head file holds.

    width: of the backbone that it belongs to (384, 768, 1024 or 1536): the files do not say how many layers they read.
    max_depth: metres; by default 10 of NYU and 80 of KITTI, told by the file's name.

    Raises:
        UserError: the file is no such head, or one of another backbone.
    """
    path = Path(path)
    held = read_tensors(path)
    state = held["state_dict"] if isinstance(held.get("state_dict"), dict) else held
    state = {str(key).removeprefix(PREFIX): value for key, value in state.items()}
    if not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} holds more than the weights of a head.")
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    if shapes.keys() == {"weight", "bias"} and len(shapes["weight"]) == 2:
        num_classes, inputs = shapes["weight"]
        num_layers = _num_layers(path, inputs - width, width)
        return ReleasedHead(
            "classify", {"width": width, "num_classes": num_classes, "num_layers": num_layers}, state
        )
    if len(shapes.get("conv_seg.weight", ())) == 4:
        num_classes, inputs, *_ = shapes["conv_seg.weight"]
        num_layers = _num_layers(path, inputs, width)
        return ReleasedHead(
            "segment", {"width": width, "num_classes": num_classes, "num_layers": num_layers}, state
        )
    if len(shapes.get("conv_depth.weight", ())) == 4:
        num_bins, inputs, *_ = shapes["conv_depth.weight"]
        kind = "linear" if _num_layers(path, inputs, 2 * width) == 1 else "linear4"
        arguments = _depth_arguments(path, width, max_depth) | {"kind": kind, "num_bins": num_bins}
        return ReleasedHead("depth", arguments, _below(state, "decoder."))
    if len(shapes.get("project.conv.weight", ())) == 4:
        for pattern, ours in DPT_RULES:
            state = {re.sub(pattern, ours, key): value for key, value in state.items()}
        channels = shapes["project.conv.weight"][0]
        arguments = _depth_arguments(path, width, max_depth) | {"kind": "dpt", "channels": channels}
        return ReleasedHead("depth", arguments, _below(state, "decoder."))
    raise UserError(
        f"{path} is no released head that can be read (classification, linear and multi-scale segmentation, linear and "
        f"DPT depth are); it holds {', '.join(list(shapes)[:4])}."
    )


def load_released_head(
    path: str | Path, width: int, max_depth: float | None = None
) -> SegmentationHead | DepthHead:
    """Return a released segmentation or depth head in evaluation mode; arguments as in `read_released_head`.

    Raises:
        UserError: the file is no such head, one of another backbone, or a key is missing, unexpected or of the wrong
            shape.
    """
    found = read_released_head(path, width, max_depth)
    if found.task == "classify":
        raise UserError(f"{path} is a classification head; one of segmentation or depth is needed here.")
    head = (SegmentationHead if found.task == "segment" else DepthHead)(**found.arguments)
    kind = "a segmentation head" if found.task == "segment" else f"a {found.arguments['kind']} depth head"
    check_keys(head, found.state, str(path), f"{kind} of a backbone of width {width}")
    head.load_state_dict(found.state)
    return head.eval()


def _num_layers(path: Path, inputs: int, of_one: int) -> int:
    """1 or 4."""
    if inputs not in (of_one, 4 * of_one):
        raise UserError(
            f"{path} is of another backbone: it reads {inputs} channels, where one layer has {of_one} and four have "
            f"{4 * of_one}."
        )
    return inputs // of_one


def _depth_arguments(path: Path, width: int, max_depth: float | None) -> dict[str, Any]:
    named = [metres for name, metres in MAX_DEPTHS.items() if name in path.name.lower()]
    if max_depth is None and not named:
        raise UserError(
            f"{path} does not say whether it is of nyu (10 m) or kitti (80 m); give max_depth in metres."
        )
    # The release reads depth from tokens before the last norm.
    return {"width": width, "norm": False, "min_depth": MIN_DEPTH, "max_depth": max_depth or named[0]}


def _below(state: State, prefix: str) -> State:
    return {f"{prefix}{key}": value for key, value in state.items()}
