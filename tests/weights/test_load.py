"""load_model: what a text can name, and what it says when it names nothing."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from unlabeled.errors import UserError
from unlabeled.vit import VisionTransformer
from unlabeled.weights.huggingface import save_huggingface
from unlabeled.weights.load import KNOWN_NAMES, META_PLACES, TIMM_NAME, load_model
from unlabeled.weights.meta import save_meta
from unlabeled.weights.timm import save_timm

Make = Callable[..., VisionTransformer]


@pytest.fixture
def model(random_model: Make, configs) -> VisionTransformer:
    return random_model(replace(configs["small with registers"], width=64, num_heads=1))


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache and torch hub folder, and no network."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))
    return tmp_path


def put_into_hub_cache(cache: Path, name: str, write: Callable[[Path], object]) -> None:
    repository = cache / "hub" / f"models--{name.replace('/', '--')}"
    commit = "0" * 40
    write(repository / "snapshots" / commit)
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)


def assert_same(a: VisionTransformer, b: VisionTransformer) -> None:
    assert all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())


def test_run_folder(model: VisionTransformer, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text("")
    with pytest.raises(UserError, match="no model yet"):
        load_model(tmp_path)
    save_huggingface(model, tmp_path / "model")
    assert_same(model, load_model(tmp_path))
    assert_same(model, load_model(f"{tmp_path}/"))
    assert_same(model, load_model(tmp_path / "model" / "model.safetensors"))


def test_hub_names_come_from_the_cache(model: VisionTransformer, offline: Path) -> None:
    put_into_hub_cache(offline, "someone/their-dinov2", lambda folder: save_huggingface(model, folder))
    assert_same(model, load_model("someone/their-dinov2"))


def test_timm_names_come_from_the_cache(model: VisionTransformer, offline: Path) -> None:
    def write(folder: Path) -> None:
        save_timm(model, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"architecture": "vit_small_patch14_reg4_dinov2"}))

    put_into_hub_cache(offline, "timm/vit_small_patch14_reg4_dinov2.lvd142m", write)
    for name in ("timm/vit_small_patch14_reg4_dinov2.lvd142m", "vit_small_patch14_reg4_dinov2"):
        assert torch.equal(load_model(name).register_tokens, model.register_tokens)


def test_meta_names_come_from_the_torch_hub_folder(model: VisionTransformer, offline: Path) -> None:
    cached = offline / "torch" / "checkpoints"
    save_meta(model, cached / "dinov2_vits14_reg4_pretrain.pth")
    assert_same(model, load_model("dinov2_vits14_reg"))
    save_meta(model, cached / "dino_deitsmall16_pretrain.pth")
    assert_same(model, load_model("dino_vits16"))


def test_offline_says_what_to_fetch_and_where_to_put_it(offline: Path) -> None:
    with pytest.raises(
        UserError, match=r"HF_HUB_OFFLINE is set; fetch https://huggingface\.co/facebook/dino"
    ):
        load_model("facebook/dinov2-small")
    for name, address in (
        ("dinov2_vitb14", "dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth"),
        ("dino_vitb8", "dino/dino_vitbase8_pretrain/dino_vitbase8_pretrain.pth"),
    ):
        with pytest.raises(UserError, match="HF_HUB_OFFLINE is set; fetch it where there is") as caught:
            load_model(name)
        path = offline / "torch" / "checkpoints" / Path(address).name
        assert f"put it at {path}: https://dl.fbaipublicfiles.com/{address}." in str(caught.value)
    with pytest.raises(UserError, match="did you mean facebook/dinov2-small"):
        load_model("facebook/dinov2-smal")
    for name in ("vit_small_patch14_dinov2", "timm/vit_small_patch14_dinov2.lvd142m"):  # no other is meant
        with pytest.raises(
            UserError, match=r"fetch https://huggingface\.co/timm/vit_small_patch14_dinov2\.lvd142m"
        ):
            load_model(name)


def test_another_kind_of_model_is_refused_before_its_weights_are_fetched(offline: Path) -> None:
    def write(folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))

    put_into_hub_cache(offline, "someone/huge", write)
    with pytest.raises(UserError, match="model_type 'llama'"):
        load_model("someone/huge")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dinov2_vitz14", "did you mean dinov2_vit"),
        ("dinov2-small", "did you mean facebook/dinov2-small"),
        ("dinov2_vits14_reg4_pretrain.pth", "no file or folder 'dinov2_vits14_reg4_pretrain.pth'"),
        ("vit_small_patch14_dinov2.pth", "no file or folder 'vit_small_patch14_dinov2.pth'"),
        ("./nowhere", "no file or folder"),
        ("a/b/c", "expected a run folder"),
        ("", "expected a run folder|holds no model"),
    ],
)
def test_unknown_text(text: str, message: str, offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(offline)
    with pytest.raises(UserError, match=message) as caught:
        load_model(text)
    assert "\n" not in str(caught.value)


class Payload:
    def __reduce__(self) -> tuple[object, ...]:
        return (shutil.rmtree, ("/nowhere/at/all",))


def test_files_that_are_no_weights(model: VisionTransformer, tmp_path: Path) -> None:
    def message(name: str) -> str:
        with pytest.raises(UserError) as caught:
            load_model(tmp_path / name)
        assert "\n" not in str(caught.value) and str(tmp_path / name) in str(caught.value)
        return str(caught.value)

    torch.save({"weights": Payload()}, tmp_path / "evil.pth")
    assert "wants to run code (shutil.rmtree)" in message("evil.pth")
    save_meta(model, tmp_path / "whole.pth")
    save_timm(model, tmp_path / "whole.safetensors")
    for suffix in ("pth", "safetensors"):
        cut = (tmp_path / f"whole.{suffix}").read_bytes()
        (tmp_path / f"cut.{suffix}").write_bytes(cut[: len(cut) // 2])
        assert "damaged" in message(f"cut.{suffix}")
        (tmp_path / f"empty.{suffix}").write_bytes(b"")
        assert "damaged" in message(f"empty.{suffix}")
        (tmp_path / f"text.{suffix}").write_text("not found\n")
        assert "damaged" in message(f"text.{suffix}")
    (tmp_path / "photo.jpg").write_bytes(b"")
    assert "no weight file" in message("photo.jpg")
    torch.save(torch.ones(3), tmp_path / "tensor.pth")
    assert "holds a Tensor" in message("tensor.pth")
    torch.save({"model": {"a": torch.ones(3)}, "epoch": 3}, tmp_path / "other.pth")
    assert "no DINOv2 backbone" in message("other.pth")
    (tmp_path / "folder").mkdir()
    assert "holds no model" in message("folder")
    save_huggingface(model, tmp_path / "alone")
    (tmp_path / "alone" / "config.json").unlink()
    assert "config.json beside it" in message("alone/model.safetensors")
    (tmp_path / "alone" / "config.json").write_text("{")
    with pytest.raises(UserError, match="no valid JSON"):
        load_model(tmp_path / "alone")
    (tmp_path / "alone" / "config.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="no valid JSON"):
        load_model(tmp_path / "alone")
    (tmp_path / "alone" / "config.json").unlink()
    (tmp_path / "alone" / "config.json").mkdir()
    with pytest.raises(UserError, match=r"config\.json cannot be read: Is a directory"):
        load_model(tmp_path / "alone")
    with pytest.raises(UserError, match="cannot be read: File name too long"):
        load_model("x" * 5000)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(UserError, match="no file or folder"):
        load_model(tmp_path / "loop")
    with pytest.raises(UserError, match="no file or folder '~nobody-of-that-name"):
        load_model("~nobody-of-that-name/model.pth")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(
    value: float, model: VisionTransformer, tmp_path: Path
) -> None:
    with torch.no_grad():
        model.blocks[1].ls2.gamma[3] = value
    save_meta(model, tmp_path / "broken.pth")
    with pytest.raises(UserError, match=r"not finite, in blocks\.1\.ls2\.gamma"):
        load_model(tmp_path / "broken.pth")


def test_names() -> None:
    assert META_PLACES["dinov2_vitl14_reg"] == "dinov2/dinov2_vitl14/dinov2_vitl14_reg4_pretrain.pth"
    assert META_PLACES["dino_vits8"] == "dino/dino_deitsmall8_pretrain/dino_deitsmall8_pretrain.pth"
    assert len(META_PLACES) == 12 and len(set(META_PLACES.values())) == 12
    assert TIMM_NAME.fullmatch("timm/vit_giant_patch14_reg4_dinov2.lvd142m")
    assert TIMM_NAME.fullmatch("vit_small_patch16_224.dino")
    assert {"facebook/dino-vitb8", "facebook/dinov2-with-registers-giant", "dino_vits16"} <= set(KNOWN_NAMES)


def test_interpolation_by_hand(model: VisionTransformer, tmp_path: Path) -> None:
    """It is part of the configuration, so it travels on with the model."""
    save_huggingface(model, tmp_path / "a")
    images = torch.randn(1, 3, 20, 24)
    features = {}
    for mode in ("size", "antialias", "scale"):
        loaded = load_model(tmp_path / "a", interpolation=mode)
        assert loaded.config == replace(model.config, interpolation=mode)
        save_huggingface(loaded, tmp_path / mode)
        again = load_model(tmp_path / mode)
        assert again.config.interpolation == mode
        features[mode] = again(images).cls
        assert torch.equal(features[mode], loaded(images).cls)
    assert not torch.equal(features["size"], features["scale"])
    assert torch.equal(features["antialias"], model(images).cls)
    with pytest.raises(UserError, match="no interpolation 'bicubic'; choose one of size, antialias, scale"):
        load_model(tmp_path / "a", interpolation="bicubic")


def test_device(model: VisionTransformer, tmp_path: Path) -> None:
    save_huggingface(model, tmp_path)
    assert load_model(tmp_path, device="meta").cls_token.device.type == "meta"


def test_info_names_the_interpolation_and_what_the_file_lacks(
    model: VisionTransformer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from unlabeled.cli.models import info

    save_meta(model, tmp_path / "model.pth")
    info(str(tmp_path / "model.pth"))
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert ["interpolation", "antialias"] in lines and ["norm_eps", "1e-06"] in lines
    assert ["patch_size", "4"] in lines and ["num_registers", "5"] in lines
    save_timm(model, tmp_path / "model.safetensors")
    info(str(tmp_path / "model.safetensors"), as_json=True)
    held = json.loads(capsys.readouterr().out)
    assert (
        held["notes"] == ["the file has no mask token: it is zeros"] and held["interpolation"] == "antialias"
    )


@pytest.mark.parametrize("kind", ["small images", "small with registers", "swiglu"])
def test_all_formats_one_after_the_other(kind: str, random_model: Make, configs, tmp_path: Path) -> None:
    """Bit for bit; but timm has no mask token, and with registers no position for CLS."""
    config = replace(configs[kind], width=128, num_heads=2, interpolation="antialias")
    first = random_model(config)
    assert save_huggingface(first, tmp_path / "hf") == []
    second = load_model(tmp_path / "hf")
    notes = save_meta(second, tmp_path / "meta.pth")
    assert [note[:23] for note in notes] == ([] if config.num_registers else ["Meta's code resizes the"])
    third = load_model(tmp_path / "meta.pth", interpolation="antialias")
    assert_same(first, third)
    assert replace(third.config, layer_scale=config.layer_scale) == config
    notes = save_timm(third, tmp_path / "timm.safetensors")
    assert "timm has no mask token" in notes[0]
    last = load_model(tmp_path / "timm.safetensors")
    assert not last.mask_token.any()
    lost = {"mask_token"} | ({"cls_token", "pos_embed"} if config.num_registers else set())
    state = last.state_dict()
    assert all(
        torch.equal(state[name], value) for name, value in first.state_dict().items() if name not in lost
    )
    p = config.patch_size
    images = torch.randn(1, 3, 5 * p, 7 * p)
    for ours, theirs in zip(first(images)[:3], last(images)[:3], strict=True):
        assert torch.equal(ours, theirs)
