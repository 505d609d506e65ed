"""Against transformers, both ways, on random weights; through from_pretrained and save_pretrained only."""

import errno
import json
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from unlabeled.errors import UserError
from unlabeled.images.transform import evaluation_transform, normalize
from unlabeled.vit import VisionTransformer, VitConfig
from unlabeled.weights.files import write_tensors
from unlabeled.weights.huggingface import load_huggingface, save_huggingface
from unlabeled.weights.load import load_model

transformers = pytest.importorskip("transformers")
Make = Callable[..., VisionTransformer]


def whole(tokens) -> Tensor:
    return torch.cat((tokens.cls[:, None], tokens.registers, tokens.patches), dim=1)


def assert_same_features(ours: VisionTransformer, theirs, sizes: list[tuple[int, int]]) -> None:
    """One image of each size; with masks too where that is cheap."""
    torch.manual_seed(1)
    C, p = ours.config.in_channels, ours.config.patch_size
    for H, W in sizes:
        images = torch.randn(1, C, H, W)
        masks = torch.rand(1, (H // p) * (W // p)) < 0.3
        with torch.no_grad():
            assert_same_hidden_states(ours, theirs, images)
            if H * W <= 224 * 224:
                assert_same_hidden_states(ours, theirs, images, masks)


def assert_same_hidden_states(
    ours: VisionTransformer, theirs, images: Tensor, masks: Tensor | None = None
) -> None:
    """Every hidden state and every block's attention, the pooled output and the last hidden state."""
    out = theirs(images, bool_masked_pos=masks, output_hidden_states=True, output_attentions=True)
    hidden = ours.embed(images, masks)[0]
    for layer, block in enumerate(ours.blocks):
        assert_near(hidden, out.hidden_states[layer])
        assert_near(block.attn.weights(block.norm1(hidden)), out.attentions[layer])
        hidden = block(hidden)
    assert_near(hidden, out.hidden_states[-1])
    tokens = ours(images, masks)
    assert_near(whole(tokens), out.last_hidden_state)
    assert_near(tokens.cls, out.pooler_output)
    if masks is None:
        layers = ours.intermediate_layers(images, range(ours.config.depth), norm=False)
        for layer, tokens in enumerate(layers):
            assert_near(whole(tokens), out.hidden_states[layer + 1])
        assert_near(ours.attention(images, 0), out.attentions[0])


def assert_near(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def sizes_of(config: VitConfig) -> list[tuple[int, int]]:
    p, side = config.patch_size, config.image_size
    if side == 518:
        return [(98, 98), (224, 140), (518, 518)]
    return [(side, side), (3 * p, 5 * p), (side + 4 * p, side - p)]


def test_transformers_reads_ours(config: VitConfig, random_model: Make, tmp_path: Path) -> None:
    model = random_model(config)
    assert save_huggingface(model, tmp_path) == []
    theirs, info = transformers.AutoModel.from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info.values()), info
    assert type(theirs).__name__ == "Dinov2WithRegistersModel" if config.num_registers else "Dinov2Model"
    assert_same_features(model, theirs.eval(), sizes_of(config))
    again = load_model(tmp_path)
    assert again.config == config and not again.training
    assert all(torch.equal(again.state_dict()[k], v) for k, v in model.state_dict().items())
    files = ["config.json", "model.safetensors", "preprocessor_config.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == files


def test_we_read_theirs(config: VitConfig, tmp_path: Path) -> None:
    torch.manual_seed(0)
    fields = {
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "mlp_ratio": config.mlp_ratio,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_channels": config.in_channels,
        "qkv_bias": config.qkv_bias,
        "use_swiglu_ffn": config.ffn == "swiglu",
    }
    if config.num_registers:
        theirs = transformers.Dinov2WithRegistersModel(
            transformers.Dinov2WithRegistersConfig(
                **fields, num_register_tokens=config.num_registers, attn_implementation="eager"
            )
        )
    else:
        theirs = transformers.Dinov2Model(transformers.Dinov2Config(**fields, attn_implementation="eager"))
    theirs.eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            is_matrix = parameter.dim() == 2 and "token" not in name
            parameter.copy_(torch.randn_like(parameter) * (parameter.shape[-1] ** -0.5 if is_matrix else 0.3))
    theirs.save_pretrained(tmp_path)
    ours = load_model(str(tmp_path))
    assert replace(ours.config, layer_scale=config.layer_scale) == config
    assert_same_features(ours, theirs, sizes_of(config))


@pytest.mark.parametrize(
    ("registers", "interpolation", "exact"),
    [(0, "antialias", True), (0, "scale", False), (4, "size", False), (4, "antialias", True)],
)
def test_other_interpolations(
    registers: int, interpolation: str, exact: bool, random_model: Make, configs, tmp_path: Path
) -> None:
    config = replace(configs["small images"], num_registers=registers, interpolation=interpolation, fit="pad")
    model = random_model(config)
    notes = save_huggingface(model, tmp_path)
    assert bool(notes) is not exact
    assert load_huggingface(tmp_path).config == config
    theirs = transformers.AutoModel.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert_same_features(model, theirs, [(32, 32), (20, 24)] if exact else [(32, 32)])
    if not exact:
        images = torch.randn(1, 3, 20, 24)
        assert (model(images).cls - theirs(images).pooler_output).abs().max() > 1e-4


def test_a_classifier_is_left_out(configs, tmp_path: Path) -> None:
    config = transformers.Dinov2Config(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=4
    )
    theirs = transformers.Dinov2ForImageClassification(config).eval()
    theirs.save_pretrained(tmp_path)
    images = torch.randn(1, 3, 32, 32)
    assert_near(load_model(tmp_path)(images).cls, theirs.dinov2(images).pooler_output)


def test_half_precision_and_shards_and_pickles(random_model: Make, configs, tmp_path: Path) -> None:
    model = random_model(configs["small images"])
    save_huggingface(model, tmp_path)
    theirs = transformers.AutoModel.from_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    shards = load_model(tmp_path / "shards")
    assert all(torch.equal(shards.state_dict()[k], v) for k, v in model.state_dict().items())

    theirs.half().save_pretrained(tmp_path / "half")
    half = load_model(tmp_path / "half")
    assert half.cls_token.dtype == torch.float32
    assert torch.equal(half.pos_embed, model.pos_embed.half().float())

    from safetensors.torch import load_file

    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    pickled = load_model(tmp_path)
    assert all(torch.equal(pickled.state_dict()[k], v) for k, v in model.state_dict().items())
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match=r"no weights; model\.safetensors"):
        load_model(tmp_path)


def test_a_named_file_is_the_one_that_is_read(random_model: Make, configs, tmp_path: Path) -> None:
    first, second = (random_model(configs["small images"], seed) for seed in (0, 1))
    save_huggingface(first, tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "ema.safetensors")
    save_huggingface(second, tmp_path)
    assert torch.equal(load_model(tmp_path / "ema.safetensors").pos_embed, first.pos_embed)
    assert torch.equal(load_model(tmp_path / "model.safetensors").pos_embed, second.pos_embed)
    (tmp_path / "model.safetensors").unlink()
    assert torch.equal(load_model(tmp_path / "ema.safetensors").pos_embed, first.pos_embed)


def test_one_shard_stands_for_all(random_model: Make, configs, tmp_path: Path) -> None:
    model = random_model(configs["small images"])
    save_huggingface(model, tmp_path)
    shards = tmp_path / "shards"
    transformers.AutoModel.from_pretrained(tmp_path).save_pretrained(shards, max_shard_size="20KB")
    loaded = load_model(sorted(shards.glob("*.safetensors"))[0])
    assert all(torch.equal(loaded.state_dict()[k], v) for k, v in model.state_dict().items())
    index = shards / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    with pytest.raises(UserError, match="names no weight files"):
        load_model(shards)


def test_saving_replaces_whole_files_only(
    random_model: Make, configs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (random_model(configs["small images"], seed) for seed in (0, 1))
    save_huggingface(first, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def disk_full(*args: object, **kwargs: object) -> None:
        Path(str(args[1])).write_bytes(b"half a file")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("unlabeled.weights.huggingface.write_tensors", disk_full)
        with pytest.raises(OSError, match="No space left"):
            save_huggingface(second, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    save_huggingface(second, tmp_path)
    assert torch.equal(load_model(tmp_path).pos_embed, second.pos_embed)


def test_a_write_that_fails_has_its_number(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            write_tensors({"weight": torch.zeros(1000)}, tmp_path / "model.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type 'llama'"),
        ({"hidden_act": "relu"}, "hidden_act 'relu'"),
        ({"hidden_size": "24"}, "hidden_size '24'; expected a whole number"),
        ({"num_attention_heads": 0}, "num_attention_heads 0; expected a whole number from 1"),
        ({"image_size": [32, 64]}, "only square"),
        ({"image_size": [32, [32]]}, "only square"),
        ({"patch_size": 0}, "patch_size 0; expected a whole number from 1"),
        ({"hidden_size": float("nan")}, "hidden_size nan; expected a whole number"),
        ({"num_hidden_layers": float("inf")}, "num_hidden_layers inf; expected a whole number"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000; expected a whole number"),
        ({"num_hidden_layers": 60_000}, r"missing: blocks\.2\.norm1\.weight"),  # at once, not after a minute
        ({"layer_norm_eps": "small"}, "layer_norm_eps 'small'; expected a number"),
        ({"layer_norm_eps": -1.0}, r"layer_norm_eps -1\.0; expected a number"),
        ({"layerscale_value": None}, "layerscale_value None; expected a number"),
        ({"qkv_bias": "no"}, "qkv_bias 'no'; expected one of False, True"),
        ({"use_swiglu_ffn": "yes"}, "use_swiglu_ffn 'yes'; expected one of False, True"),
        ({"unlabeled": {"interpolation": "bilinear"}}, "interpolation 'bilinear'; expected one of 'size'"),
        ({"unlabeled": {"fit": []}}, r"fit \[\]; expected one of 'crop', 'pad'"),
        ({"num_hidden_layers": 3}, r"missing: blocks\.2\.norm1\.weight.* and \d+ more"),
        ({"num_hidden_layers": 1}, r"unexpected: blocks\.1\."),
        ({"image_size": 64}, r"of the wrong shape: pos_embed \(1, 65, 24\) instead of \(1, 257, 24\)"),
    ],
)
def test_what_does_not_fit_is_named(
    change: dict[str, object], message: str, random_model: Make, configs, tmp_path: Path
) -> None:
    save_huggingface(random_model(configs["small images"]), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message) as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_a_lost_third_of_qkv_is_named(random_model: Make, configs, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_huggingface(random_model(configs["small images"]), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["encoder.layer.1.attention.attention.key.weight"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"missing: blocks\.1\.attn\.qkv\.weight; unexpected: .*\(query\)"):
        load_model(tmp_path)


@pytest.mark.parametrize(("image_size", "resize", "crop"), [(518, 256, 224), (224, 256, 224), (32, 36, 32)])
def test_transformers_prepares_images_as_we_do(
    image_size: int, resize: int, crop: int, random_model: Make, configs, photograph, tmp_path: Path
) -> None:
    config = replace(
        configs["plain"], image_size=image_size, patch_size=4 if image_size == 32 else 14, depth=1
    )
    save_huggingface(random_model(config), tmp_path)
    photograph = photograph[:, :300]  # square: where margins are odd, transformers' centre is another
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    theirs = processor(photograph, return_tensors="pt")["pixel_values"]
    ours = normalize(torch.from_numpy(evaluation_transform(photograph, resize, crop))[None])
    assert theirs.shape == (1, 3, crop, crop)
    # One step of 8 bits is 0.017: the crops differ by the rounding of resized pixels at most.
    assert (ours - theirs).abs().max() < 0.02


def test_files_have_the_permissions_that_the_user_gives_new_files(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    config = VitConfig(width=64, depth=1, num_heads=1, patch_size=8, image_size=32)
    save_huggingface(VisionTransformer(config), tmp_path / "model")
    modes = {path.name: path.stat().st_mode for path in (tmp_path / "model").iterdir()}
    assert set(modes.values()) == {(tmp_path / "other").stat().st_mode}, modes
