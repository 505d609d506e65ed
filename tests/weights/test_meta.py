"""Meta's three shapes of file, bit for bit."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from unlabeled.errors import UserError
from unlabeled.vit import VisionTransformer, VitConfig
from unlabeled.weights.load import load_model
from unlabeled.weights.meta import load_meta, save_meta

Make = Callable[..., VisionTransformer]


def assert_same(a: VisionTransformer, b: VisionTransformer) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def shapes_of_file(state: dict[str, torch.Tensor]) -> dict[str, dict]:
    chunked = {}
    for key, value in state.items():
        if key.startswith("blocks."):
            _, index, rest = key.split(".", 2)
            key = f"blocks.{int(index) // 2}.{index}.{rest}"
        chunked[key] = value
    heads = {f"dino_head.mlp.{i}.{end}": torch.ones(2) for i in (0, 2, 4) for end in ("weight", "bias")}
    heads |= {f"dino_head.last_layer.weight_{end}": torch.ones(2) for end in "gv"}
    heads |= {f"ibot_head.last_layer.weight_{end}": torch.ones(2) for end in "gv"}
    return {
        "flat": state,
        "teacher": {"teacher": {f"backbone.{key}": value for key, value in state.items()} | heads},
        "chunked": chunked,
        "chunked teacher": {"teacher": {f"backbone.{key}": value for key, value in chunked.items()} | heads},
        "bare teacher": {"teacher": state},
    }


@pytest.mark.parametrize("shape", ["flat", "teacher", "chunked", "chunked teacher", "bare teacher"])
def test_three_shapes_of_file(shape: str, config: VitConfig, random_model: Make, tmp_path: Path) -> None:
    model = random_model(config)
    torch.save(shapes_of_file(model.state_dict())[shape], tmp_path / "model.pth")
    loaded = load_meta(tmp_path / "model.pth", num_heads=config.num_heads)
    assert_same(loaded, model)
    interpolation = "antialias" if config.num_registers else "scale"
    side = config.grid_side * config.patch_size
    assert loaded.config == replace(config, interpolation=interpolation, image_size=side)


def test_save_is_what_load_reads(config: VitConfig, random_model: Make, tmp_path: Path) -> None:
    model = random_model(config)
    save_meta(model, tmp_path / "model.pth")
    assert_same(load_meta(tmp_path / "model.pth", num_heads=config.num_heads), model)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pth"]


def test_heads_of_released_sizes_follow_from_the_width(random_model: Make, configs, tmp_path: Path) -> None:
    model = random_model(replace(configs["small images"], width=128))
    save_meta(model, tmp_path / "model.pth")
    assert load_model(tmp_path / "model.pth").config.num_heads == 2


def test_scale_interpolation_is_metas(random_model: Make, configs) -> None:
    """The factor (side + 0.1) / learned side, and no antialiasing."""
    model = random_model(replace(configs["plain"], interpolation="scale", depth=1))
    square = model.pos_embed[:, 1:].reshape(1, 37, 37, -1).permute(0, 3, 1, 2)
    factor = ((16 + 0.1) / 37, (7 + 0.1) / 37)
    theirs = torch.nn.functional.interpolate(square, scale_factor=factor, mode="bicubic", antialias=False)
    ours = model.position_embedding((16, 7))[:, 1:].reshape(1, 16, 7, -1).permute(0, 3, 1, 2)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_what_does_not_fit_is_named(random_model: Make, configs, tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    state = dict(random_model(replace(configs["small images"], width=64)).state_dict())

    def message(change: dict[str, torch.Tensor], without: str = "") -> str:
        torch.save({key: value for key, value in (state | change).items() if key != without}, path)
        with pytest.raises(UserError) as caught:
            load_model(path)
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)
        return str(caught.value)

    assert "missing: blocks.1.ls2.gamma." in message({}, without="blocks.1.ls2.gamma")
    assert "unexpected: head.weight." in message({"head.weight": torch.ones(3)})
    assert "norm.bias (65,) instead of (64,)" in message({"norm.bias": torch.ones(65)})
    assert "mlp.fc1.weight" in message({"blocks.0.mlp.fc1.weight": torch.ones(7, 64)})
    assert "missing: blocks.2.norm1.weight" in message({"blocks.9999999.norm1.bias": torch.ones(64)})
    for strange in (
        torch.ones(64).to_sparse(),
        torch.ones(64, dtype=torch.int64),
        torch.ones(64, device="meta"),
    ):
        assert "floating-point numbers (norm.bias)" in message({"norm.bias": strange})
    for key, odd in (("pos_embed", torch.ones(65, 64)), ("patch_embed.proj.weight", torch.ones(64, 3, 0, 0))):
        assert f"({key} is missing or odd)" in message({key: odd})
    assert "no DINOv2 backbone" in message({}, without="patch_embed.proj.weight")
    assert "no DINOv2 backbone" in message({}, without="blocks.0.mlp.fc2.weight")
    odd = random_model(configs["small images"]).state_dict()
    assert "number of attention heads" in message(odd)
