"""Files of the keys and shapes that Meta's release has, written here with random weights."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.dense.conftest import random_tokens
from unlabeled.dense.released import load_released_head, read_released_head
from unlabeled.errors import UserError

D = 16  # stands for 384 to 1536


def linear_depth(num_layers: int) -> dict[str, tuple[int, ...]]:
    return {"conv_depth.weight": (256, 2 * D * num_layers, 1, 1), "conv_depth.bias": (256,)}


def segmentation(num_layers: int) -> dict[str, tuple[int, ...]]:
    return {
        "conv_seg.weight": (150, D * num_layers, 1, 1),
        "conv_seg.bias": (150,),
        **{f"bn.{name}": (D * num_layers,) for name in ("weight", "bias", "running_mean", "running_var")},
        "bn.num_batches_tracked": (),
    }


def dpt(channels: int = 256) -> dict[str, tuple[int, ...]]:
    widths = [D // 8, D // 4, D // 2, D]
    keys: dict[str, tuple[int, ...]] = {}
    for i, width in enumerate(widths):
        keys[f"reassemble_blocks.projects.{i}.conv.weight"] = (width, D, 1, 1)
        keys[f"reassemble_blocks.projects.{i}.conv.bias"] = (width,)
        keys[f"reassemble_blocks.readout_projects.{i}.0.weight"] = (D, 2 * D)
        keys[f"reassemble_blocks.readout_projects.{i}.0.bias"] = (D,)
        keys[f"convs.{i}.conv.weight"] = (channels, width, 3, 3)
        keys[f"fusion_blocks.{i}.project.conv.weight"] = (channels, channels, 1, 1)
        keys[f"fusion_blocks.{i}.project.conv.bias"] = (channels,)
        for unit in ("res_conv_unit1", "res_conv_unit2")[i == 0 :]:
            for conv in ("conv1", "conv2"):
                keys[f"fusion_blocks.{i}.{unit}.{conv}.conv.weight"] = (channels, channels, 3, 3)
    for i, kernel in ((0, 4), (1, 2), (3, 3)):
        keys[f"reassemble_blocks.resize_layers.{i}.weight"] = (widths[i], widths[i], kernel, kernel)
        keys[f"reassemble_blocks.resize_layers.{i}.bias"] = (widths[i],)
    keys |= {"project.conv.weight": (channels, channels, 3, 3), "project.conv.bias": (channels,)}
    for i, shape in (
        (0, (channels // 2, channels, 3, 3)),
        (2, (32, channels // 2, 3, 3)),
        (4, (1, 32, 1, 1)),
    ):
        keys[f"conv_depth.head.{i}.weight"] = shape
        keys[f"conv_depth.head.{i}.bias"] = shape[:1]
    return keys


def write(path: Path, keys: dict[str, tuple[int, ...]], scale: float = 0.05) -> dict[str, Tensor]:
    torch.manual_seed(0)
    state = {f"decode_head.{key}": scale * torch.randn(shape) for key, shape in keys.items()}
    for key in state:
        if key.endswith("running_var"):
            state[key] = state[key].abs() + 1
        if key.endswith("num_batches_tracked"):
            state[key] = torch.tensor(9)
    torch.save({"meta": {"epoch": 1}, "state_dict": state}, path)
    return state


@pytest.mark.parametrize(
    ("name", "keys", "arguments"),
    [
        ("dinov2_vits14_nyu_linear_head.pth", linear_depth(1), {"kind": "linear", "max_depth": 10}),
        ("dinov2_vits14_nyu_linear4_head.pth", linear_depth(4), {"kind": "linear4", "max_depth": 10}),
        ("dinov2_vits14_kitti_linear_head.pth", linear_depth(1), {"kind": "linear", "max_depth": 80}),
        ("dinov2_vits14_nyu_dpt_head.pth", dpt(), {"kind": "dpt", "channels": 256}),
        ("dinov2_vits14_kitti_dpt_head.pth", dpt(32), {"kind": "dpt", "channels": 32}),
        ("dinov2_vits14_ade20k_linear_head.pth", segmentation(1), {"num_layers": 1, "norm": True}),
        ("dinov2_vits14_ade20k_ms_head.pth", segmentation(4), {"num_layers": 4, "num_classes": 150}),
    ],
)
def test_every_weight_arrives(
    tmp_path: Path, name: str, keys: dict[str, tuple[int, ...]], arguments: dict[str, object]
) -> None:
    state = write(tmp_path / name, keys)
    head = load_released_head(tmp_path / name, D)
    assert arguments.items() <= head.arguments.items()
    held = sorted(value.double().sum().item() for value in head.state_dict().values())
    assert held == sorted(value.double().sum().item() for value in state.values())
    assert not head.training
    out = head(random_tokens(D, (2, 3), head.num_layers))
    assert torch.isfinite(out).all()
    assert head.norm is ("ade20k" in name)


def test_a_linear_depth_head_says_what_the_release_says(tmp_path: Path) -> None:
    path = tmp_path / "dinov2_vits14_nyu_linear_head.pth"
    state = write(path, linear_depth(1), scale=1)
    (tokens,) = random_tokens(D, (1, 1), batch=1)
    logits = state["decode_head.conv_depth.weight"][:, :, 0, 0] @ torch.cat(
        (tokens.patches[0, 0], tokens.cls[0])
    )
    weights = torch.relu(logits + state["decode_head.conv_depth.bias"]) + 0.1
    expected = (weights / weights.sum() * torch.linspace(0.001, 10, 256)).sum()
    found = load_released_head(path, D)([tokens])
    torch.testing.assert_close(found, expected.expand(1, 1, 4, 4), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("inputs", "num_layers"), [(2 * D, 1), (5 * D, 4)])
def test_classification(tmp_path: Path, inputs: int, num_layers: int) -> None:
    path = tmp_path / "dinov2_vits14_linear_head.pth"
    torch.save({"weight": torch.randn(1000, inputs), "bias": torch.randn(1000)}, path)
    found = read_released_head(path, D)
    assert found.task == "classify"
    assert found.arguments == {"width": D, "num_classes": 1000, "num_layers": num_layers}
    assert found.state["weight"].shape == (1000, inputs)
    with pytest.raises(UserError, match="is a classification head"):
        load_released_head(path, D)


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "dinov2_vits14_nyu_dpt_head.pth"
    keys = dpt(32)
    missing = dict(keys)
    missing.pop("convs.2.conv.weight")
    write(path, missing | {"extra.weight": (3,)})
    with pytest.raises(
        UserError, match=r"missing: decoder\.convs\.2\.weight; unexpected: decoder\.extra\.weight"
    ):
        load_released_head(path, D)
    write(path, keys)
    with pytest.raises(UserError, match="of the wrong shape"):
        load_released_head(path, 2 * D)
    linear = tmp_path / "dinov2_vits14_linear_head_of_mine.pth"
    write(linear, linear_depth(1))
    with pytest.raises(UserError, match=r"nyu .* or kitti"):
        load_released_head(linear, D)
    assert load_released_head(linear, D, max_depth=5).max_depth == 5
    with pytest.raises(UserError, match=r"of another backbone: it reads 32 channels, where one layer has 64"):
        load_released_head(linear, 2 * D, max_depth=5)
    write(linear, {"query_embed.weight": (3, 4)})
    with pytest.raises(UserError, match="is no released head"):
        load_released_head(linear, D)


def test_nothing_in_a_file_is_run(tmp_path: Path) -> None:
    path = tmp_path / "dinov2_vits14_nyu_linear_head.pth"
    torch.save({"state_dict": {"decode_head.conv_depth.weight": Path("x")}}, path)
    with pytest.raises(UserError, match="wants to run code"):
        load_released_head(path, D)
