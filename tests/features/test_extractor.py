"""The extractor against the backbone itself and transformers, for every kind, layer, shape and form of input."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from unlabeled import Extractor, UserError
from unlabeled.features.engines import exact_engine, has_8_bit_products, weights_hash
from unlabeled.features.packed import PackedBackbone, can_pack
from unlabeled.features.preprocessing import Preprocessing
from unlabeled.images.transform import evaluation_transform, normalize
from unlabeled.vit import VisionTransformer, vit_config
from unlabeled.weights.huggingface import save_huggingface


@pytest.fixture(scope="module")
def model() -> VisionTransformer:
    torch.manual_seed(0)
    config = vit_config(
        "vit_tiny", width=48, depth=3, num_heads=3, patch_size=8, image_size=32, num_registers=2
    )
    model = VisionTransformer(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture(scope="module")
def saved(model: VisionTransformer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    save_huggingface(model, folder)
    return folder


def plain(model: VisionTransformer, image: np.ndarray, layer: int = -1):
    """Tokens of one image of the crop of 32 pixels, in float64, by the backbone alone."""
    planar = torch.from_numpy(evaluation_transform(image, 32, 32))[None]
    double = VisionTransformer(model.config).double().eval()
    double.load_state_dict(model.state_dict())
    with torch.no_grad():
        return double.intermediate_layers(normalize(planar).double(), [layer])[0]


@pytest.mark.parametrize("layer", [-1, 0, 1])
def test_kinds_are_the_backbones_tokens(model: VisionTransformer, photograph: np.ndarray, layer: int) -> None:
    tokens = plain(model, photograph, layer)
    cls, mean = tokens.cls[0].numpy(), tokens.patches[0].mean(0).numpy()
    expected = {
        "cls": cls,
        "mean": mean,
        "cls+mean": np.concatenate((cls, mean)),
        "patches": tokens.patches[0].view(4, 4, 48).numpy(),
    }
    for kind, value in expected.items():
        found = Extractor(model, kind, layer=layer)(photograph)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, value, atol=2e-5)


@pytest.mark.parametrize("layer", [-1, 0])
def test_attention_is_the_cls_row_on_patches(
    model: VisionTransformer, photograph: np.ndarray, layer: int
) -> None:
    planar = torch.from_numpy(evaluation_transform(photograph, 32, 32))[None]
    with torch.no_grad():
        weights = model.attention(normalize(planar), layer)[0, :, 0, 1 + 2 :].view(3, 4, 4).numpy()
    found = Extractor(model, "attention", layer=layer)(photograph)
    assert found.shape == (3, 4, 4)
    np.testing.assert_allclose(found, weights, atol=1e-6)


def test_features_are_transformers(photograph: np.ndarray, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    config = transformers.Dinov2Config(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=3, image_size=56, patch_size=14, mlp_ratio=4
    )
    theirs = transformers.Dinov2Model(config).eval()
    theirs.save_pretrained(tmp_path)
    image = Image.fromarray(photograph)
    processor = transformers.BitImageProcessor(
        size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, resample=3,
        image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225],
    )  # fmt: skip
    with torch.no_grad():
        expected = theirs(**processor(image, return_tensors="pt")).last_hidden_state[0].numpy()
    np.testing.assert_allclose(Extractor(tmp_path, "cls")(image), expected[0], atol=2e-3)
    patches = Extractor(tmp_path, "patches")(image).reshape(-1, 48)
    np.testing.assert_allclose(patches, expected[1:], atol=2e-3)


def test_every_form_of_an_image_gives_the_same(
    model: VisionTransformer, photograph: np.ndarray, tmp_path: Path
) -> None:
    path = tmp_path / "cat.png"
    Image.fromarray(photograph).save(path)
    extractor = Extractor(model)
    expected = extractor(photograph)
    assert expected.shape == (48,)
    forms = [str(path), path, path.read_bytes(), Image.open(path), torch.from_numpy(photograph.copy())]
    for form in forms:
        np.testing.assert_array_equal(extractor(form), expected)
    found = extractor(forms)
    assert isinstance(found, np.ndarray) and found.shape == (5, 48)
    np.testing.assert_allclose(found, np.tile(expected, (5, 1)), atol=1e-5)
    assert extractor(np.stack((photograph, photograph))).shape == (2, 48)
    assert extractor([path]).shape == (1, 48)
    np.testing.assert_array_equal(extractor(form for form in forms), found)
    with (
        path.open("rb") as file,
        pytest.raises(UserError, match="not BufferedReader"),
    ):  # no generator of images
        extractor(file)


def test_images_of_many_shapes_come_back_in_order(model: VisionTransformer, photograph: np.ndarray) -> None:
    extractor = Extractor(model, "patches", size=24, shape="keep", batch_size=2)
    images = [photograph[: 40 + 13 * (n % 7), : 60 + 29 * (n % 5)] for n in range(23)]
    found = extractor(images)
    assert isinstance(found, list)
    for image, grid in zip(images, found, strict=True):
        alone = extractor(image)
        assert alone.shape == grid.shape
        height, width = image.shape[:2]
        assert min(grid.shape[:2]) == 3
        assert abs(grid.shape[1] / grid.shape[0] - width / height) < 0.5
        np.testing.assert_allclose(grid, alone, atol=1e-5)


def test_stretch_loses_the_aspect(model: VisionTransformer, photograph: np.ndarray) -> None:
    expected = np.asarray(Image.fromarray(photograph).resize((48, 48), Image.Resampling.BICUBIC))
    extractor = Extractor(model, "patches", size=48, shape="stretch")
    np.testing.assert_array_equal(extractor.prepare(photograph), expected.transpose(2, 0, 1))
    assert extractor(photograph).shape == (6, 6, 48)


def test_a_crop_takes_seven_eighths_of_the_short_side() -> None:
    assert Preprocessing(224, "crop", 14).resize == 256
    assert Preprocessing(112, "crop", 14).resize == 128
    assert Preprocessing(98, "crop", 14).resize == 98
    assert Preprocessing(224, "keep", 14).resize == 224


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 5), st.sampled_from([-1, 0, 2]))
def test_packed_products_are_the_backbones(
    model: VisionTransformer, rows: int, columns: int, count: int, layer: int
) -> None:
    if not can_pack():
        pytest.skip("this torch has no packed products")
    images = torch.randn(count, 3, 8 * rows, 8 * columns, generator=torch.Generator().manual_seed(rows))
    with torch.no_grad():
        expected = model.intermediate_layers(images, [layer])[0]
    found = PackedBackbone(model, layer)(images)
    assert found.grid == expected.grid == (rows, columns)
    for name in ("cls", "registers", "patches"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), atol=1e-5, rtol=1e-5)


def test_swiglu_is_packed_too() -> None:
    model = VisionTransformer(vit_config("vit_tiny", width=48, depth=2, num_heads=3, ffn="swiglu")).eval()
    images = torch.randn(2, 3, 28, 42)
    with torch.no_grad():
        torch.testing.assert_close(
            exact_engine(model, -1, torch.device("cpu"))(images).patches,
            model(images).patches,
            atol=1e-5,
            rtol=1e-5,
        )


def test_an_identity_brings_its_extractor_back(
    saved: Path, photograph: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(saved.parent)
    extractor = Extractor(saved.name, "cls+mean", layer=1, size=48, shape="stretch")
    monkeypatch.chdir("/")
    again = Extractor.of(extractor.identity)
    np.testing.assert_array_equal(again(photograph), extractor(photograph))
    gone = extractor.identity | {"model": extractor.identity["model"] | {"name": "/gone/model"}}
    with pytest.raises(UserError, match=r"no file or folder '/gone/model'.* --model for where it is now"):
        Extractor.of(gone)


def test_other_weights_under_the_same_name_are_refused(model: VisionTransformer, tmp_path: Path) -> None:
    save_huggingface(model, tmp_path)
    identity = Extractor(tmp_path).identity
    other = VisionTransformer(model.config).eval()
    save_huggingface(other, tmp_path)
    with pytest.raises(UserError, match="other weights"):
        Extractor.of(identity)
    assert weights_hash(model) != weights_hash(other)


def test_every_parameter_counts_in_the_hash(model: VisionTransformer) -> None:
    expected = weights_hash(model)
    with torch.no_grad():
        for parameter in model.parameters():
            kept = parameter.view(-1)[0].item()
            parameter.view(-1)[0] = kept + 1
            assert weights_hash(model) != expected
            parameter.view(-1)[0] = kept
    assert weights_hash(model) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "clss"}, "no kind 'clss'"),
        ({"layer": 3}, "no layer 3"),
        ({"layer": -4}, "no layer -4"),
        ({"size": 30}, "24 or 32 is"),
        ({"size": 4}, "patch of 8; 8 is"),
        ({"size": 4, "shape": "keep"}, "patch of 8; 8 is"),
        ({"shape": "square"}, "no shape 'square'"),
        ({"fast": True}, "calibrated"),
        ({"fast": True, "kind": "attention", "calibrate": "x"}, "float32 only"),
        ({"batch_size": 0}, "at least one"),
        ({"device": "tpu7"}, "tpu7"),
    ],
)
def test_what_is_impossible_is_said_in_a_line(model: VisionTransformer, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Extractor(model, **options)


def test_images_that_are_none(model: VisionTransformer, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("no")
    extractor = Extractor(model)
    for images, message in (
        ([], "empty"),
        (iter([]), "empty"),
        ("", "'' cannot be read"),
        ("nothing.jpg", "nothing.jpg"),
        ([tmp_path / "a.jpg"], "a.jpg"),
    ):
        with pytest.raises(UserError, match=message):
            extractor(images)
    with pytest.raises(UserError, match="smaller than one patch"):
        Extractor(model, shape="keep")(np.zeros((4, 90, 3), np.uint8))
    with pytest.raises(UserError, match="no model"):
        Extractor("nonsense")


def test_training_mode_is_refused(model: VisionTransformer) -> None:
    other = VisionTransformer(model.config)
    with pytest.raises(UserError, match="eval"):
        Extractor(other)


def test_weights_that_are_not_finite_are_named(model: VisionTransformer, photograph: np.ndarray) -> None:
    broken = VisionTransformer(model.config).eval()
    broken.norm.weight.data[0] = float("nan")
    with pytest.raises(UserError, match="infinities or NaN"):
        Extractor(broken)(photograph)


def test_eight_bits_stay_near(
    model: VisionTransformer,
    tile_folder: Path,
    photograph: np.ndarray,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("openvino")
    pytest.importorskip("nncf")
    monkeypatch.setenv("UNLABELED_CACHE", str(tmp_path))
    images = [photograph[top : top + 60, top : top + 60] for top in range(0, 240, 20)]
    for layer in (-1, 1):
        exact = Extractor(model, layer=layer, device="cpu")(images)
        extractor = Extractor(model, layer=layer, fast=True, calibrate=str(tile_folder), device="cpu")
        fast = extractor(images)
        cosines = (exact * fast).sum(1) / np.linalg.norm(exact, axis=1) / np.linalg.norm(fast, axis=1)
        assert cosines.min() > 0.97 and not np.array_equal(exact, fast)
        assert extractor.identity["precision"] == "int8"
        extractor.batch_size = 2  # each core runs batches of its own
        np.testing.assert_allclose(extractor(images), fast, atol=1e-3)
        graphs = sorted(tmp_path.rglob("*.xml"))
        times = [graph.stat().st_mtime_ns for graph in graphs]
        Extractor(model, layer=layer, fast=True, calibrate=str(tile_folder), device="cpu")
        assert [graph.stat().st_mtime_ns for graph in sorted(tmp_path.rglob("*.xml"))] == times
    assert len(list(tmp_path.rglob("*.xml"))) == 2
    assert not list(tmp_path.rglob("*.onnx")) and not list(tmp_path.rglob("*.part"))


def test_bfloat16_compiles(
    model: VisionTransformer, monkeypatch: pytest.MonkeyPatch, photograph: np.ndarray
) -> None:
    """The path of GPUs, on the CPU, with a backend that needs no compiler."""
    from unlabeled.features import engines

    compiled = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda module, **options: compiled(module, backend="eager", **options)
    )
    monkeypatch.setattr(engines, "can_pack", lambda: False)
    engine = engines.bf16_engine(model, -1, torch.device("cpu"))
    images = normalize(torch.from_numpy(evaluation_transform(photograph, 32, 32))[None])
    with torch.inference_mode():
        cosine = torch.cosine_similarity(engine(images).cls.float(), model(images).cls)
    assert 0.99 < cosine.item() < 1 - 1e-9


def test_what_a_processor_says_of_8_bits(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    assert has_8_bit_products(file)  # not there: it cannot be told
    for flags, expected in (("avx2 fma", False), ("avx2 avx_vnni", True), ("fp asimd asimddp", True)):
        file.write_text(f"processor : 0\nflags\t: {flags}\n")
        assert has_8_bit_products(file) is expected


def test_batches_run_side_by_side_are_the_same_and_in_order(model: VisionTransformer) -> None:
    random = np.random.default_rng(0)
    images = [random.integers(0, 256, (32 + 8 * (i % 3), 32, 3), np.uint8) for i in range(40)]
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            extractor = Extractor(model, size=32, shape="keep", batch_size=4)
            found.append(extractor(images))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    np.testing.assert_array_equal(*found)


def test_a_mistake_in_one_of_several_batches_ends_the_others(model: VisionTransformer) -> None:
    before = torch.get_num_threads()
    extractor = Extractor(model, size=32, batch_size=1)
    extractor.engine = lambda images: (_ for _ in ()).throw(UserError("not this one"))
    try:
        torch.set_num_threads(2)
        with pytest.raises(UserError, match="not this one"):
            extractor([np.zeros((32, 32, 3), np.uint8)] * 9)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
