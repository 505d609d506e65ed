"""Segmentation and depth by trained heads, on pictures whose colours say both."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from unlabeled import cli
from unlabeled.dense.inference import predict
from unlabeled.dense.labelled import depth_images
from unlabeled.dense.losses import resized
from unlabeled.errors import UserError
from unlabeled.evaluate.dense_heads import chosen_head, maps_of
from unlabeled.evaluate.depth import depth
from unlabeled.evaluate.result import Result
from unlabeled.evaluate.segmentation import segmentation
from unlabeled.finetune.tasks import DataOptions
from unlabeled.images.transform import normalize
from unlabeled.vit import VisionTransformer, VitConfig
from unlabeled.weights.huggingface import save_huggingface

COLOURS = np.array([(200, 30, 30), (30, 200, 30), (30, 30, 200)], np.uint8)
METRES = np.array([1.0, 2.0, 4.0])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train and test: squares of 16 pixels in three colours, their classes, and a depth for each."""
    root, rng = tmp_path_factory.mktemp("dense"), np.random.default_rng(0)
    for part, count in (("train", 24), ("test", 8)):
        for name in ("images", "labels", "depth"):
            (root / part / name).mkdir(parents=True)
        for number in range(count):
            classes = rng.integers(0, 3, (2, 3)).repeat(16, 0).repeat(16, 1)
            pixels = COLOURS[classes].astype(int) + rng.integers(-20, 20, (32, 48, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(root / part / "images" / f"{number:02d}.png")
            millimetres = (METRES[classes] * 1000).astype(np.uint16)
            millimetres[:, :4] = 0
            Image.fromarray(millimetres).save(root / part / "depth" / f"{number:02d}.png")
            classes[:, :4] = 9
            Image.fromarray(classes.astype(np.uint8)).save(root / part / "labels" / f"{number:02d}.png")
    return root


@pytest.fixture(scope="module")
def model() -> VisionTransformer:
    torch.manual_seed(0)
    config = VitConfig(width=32, depth=2, num_heads=2, patch_size=8, image_size=32, layer_scale=1.0)
    return VisionTransformer(config).eval()


@pytest.mark.parametrize("head", ["linear", "linear4"])
def test_segmentation(data: Path, model: VisionTransformer, head: str) -> None:
    found = segmentation(
        model, train=data / "train", test=data / "test", head=head, ignore=9, size=32,
        learning_rates=(1e-5, 3e-2), epochs=10,
    )  # fmt: skip
    assert found.main == "miou"
    assert found.score > 0.9
    assert found.accuracy > 0.95
    assert {"iou_0", "iou_1", "iou_2"} <= found.metrics.keys()
    assert found.score == pytest.approx(np.mean([found.metrics[f"iou_{number}"] for number in range(3)]))
    low, high = found.interval
    assert low <= found.score <= high
    assert found.settings["learning_rate"] == 3e-2
    assert found.settings["held_out"]["0.03"] > found.settings["held_out"]["1e-05"]
    assert found.counts == {"train": 22, "test": 8, "classes": 3, "bad_files": 0}
    assert found.figures["miou"].values_M.sum() == 8 * 32 * 44


@pytest.mark.parametrize("head", ["linear", "regression"])
def test_depth(data: Path, model: VisionTransformer, head: str) -> None:
    found = depth(
        model, train=data / "train", test=data / "test", head=head, size=32, learning_rates=(1e-2,), epochs=25
    )
    assert list(found.metrics) == ["rmse", "abs_rel", "log10", "delta1", "delta2", "delta3"]
    assert found.score < 0.8  # predicting the mean: 1.25
    assert found.metrics["delta1"] > 0.6
    assert found.counts["test"] == 8
    scaled = depth(
        model, train=data / "train", test=data / "test", head=head, size=32, learning_rates=(1e-2,), epochs=1,
        max_depth=3, align="median",
    )  # fmt: skip
    assert scaled.settings["max_depth"] == 3


def test_the_same_seed_gives_the_same_figures(data: Path, model: VisionTransformer) -> None:
    def run() -> Result:
        return segmentation(
            model, train=data / "train", test=data / "test", ignore=9, size=32, learning_rates=(1e-2,),
            epochs=2,
        )  # fmt: skip

    assert run().metrics == run().metrics


def test_bad_test_images_are_named(data: Path, model: VisionTransformer, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(data / "test", tmp_path / "test")
    broken = tmp_path / "test" / "images" / "00.png"
    broken.write_bytes(broken.read_bytes()[:-300])
    outside = Image.fromarray(np.full((32, 48), 7, np.uint8))
    outside.save(tmp_path / "test" / "labels" / "01.png")
    found = segmentation(
        model,
        train=data / "train",
        test=tmp_path / "test",
        ignore=9,
        size=32,
        learning_rates=(1e-2,),
        epochs=1,
    )
    assert found.counts["test"] == 6
    assert sorted(key for key, _ in found.bad_files) == ["00", "01"]
    assert any("outside of the 3 classes" in note for note in found.notes)


def test_test_images_of_several_sizes_and_a_bad_one_keep_their_order(
    data: Path, model: VisionTransformer, tmp_path: Path
) -> None:
    for part in ("images", "depth"):
        (tmp_path / part).mkdir()
    sizes = [(32, 48)] * 10 + [(48, 32), (32, 48), (32, 32), (32, 32)]
    rng = np.random.default_rng(0)
    for number, (height, width) in enumerate(sizes):
        pixels = rng.integers(0, 255, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number:02d}.png")
        metres = np.full((height, width), 1000 + number, np.uint16)
        Image.fromarray(metres).save(tmp_path / "depth" / f"{number:02d}.png")
    opened = depth_images(tmp_path)
    (tmp_path / "images" / "03.png").unlink()
    chosen = chosen_head(
        "depth", "linear", model, DataOptions(str(data / "train")), size=32, learning_rates=(1e-2,), epochs=1
    )
    bad = list[tuple[str, str]]()
    found = list(maps_of(chosen, opened, 0, bad.append, None))
    assert [key for key, *_ in bad] == ["03"]
    assert [key for key, *_ in found] == [f"{number:02d}" for number in range(14) if number != 3]
    for key, metres_1HW, depth_HW in found:
        assert metres_1HW.shape[1:] == depth_HW.shape == sizes[int(key)]
        assert depth_HW[0, 0] == pytest.approx(1 + int(key) / 1000)
        pixels = np.asarray(Image.open(tmp_path / "images" / f"{key}.png"))
        images = normalize(torch.from_numpy(chosen.preprocessing(pixels))[None])
        with torch.no_grad():
            alone = resized(predict(chosen.model, chosen.head, images), depth_HW.shape)[0]
        torch.testing.assert_close(metres_1HW, alone, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_done(data: Path, model: VisionTransformer) -> None:
    both = {"train": data / "train", "test": data / "test"}
    with pytest.raises(UserError, match="no segmentation head 'cubic'"):
        segmentation(model, **both, head="cubic", ignore=9)
    with pytest.raises(UserError, match="no depth head 'cubic'"):
        depth(model, **both, head="cubic")
    with pytest.raises(UserError, match="no learning rate"):
        segmentation(model, **both, learning_rates=(), ignore=9)
    with pytest.raises(UserError, match="ten are needed"):
        segmentation(model, train=data / "test", test=data / "test", ignore=9)


def command(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["unlabeled", *map(str, words)])
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_the_commands(
    data: Path,
    model: VisionTransformer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save_huggingface(model, tmp_path / "model")
    both = ["--train", data / "train", "--test", data / "test", "--size", 32, "--epochs", 1, "--lr", "1e-2"]
    named = ["--model", tmp_path / "model"]
    words = ["evaluate", "segmentation", *both, *named, "--ignore", 9, "--out", tmp_path / "report", "--json"]
    assert command(monkeypatch, *words) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"segmentation_miou", "segmentation_pixel_accuracy", "segmentation_iou_0"} <= found.keys()
    assert "miou" in (tmp_path / "report" / "report.md").read_text()
    assert command(monkeypatch, "evaluate", "depth", *both, *named, "--head", "regression", "--json") == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"depth_rmse", "depth_delta1"} <= found.keys()
    for wrong, said in (
        (["--lr", "fast"], "is no list of learning rates"),
        (["--crop", "kitti"], "There is no crop 'kitti'"),
        (["--train", tmp_path], "has no images/"),
    ):
        assert command(monkeypatch, "evaluate", "depth", *both, *named, *wrong) == 2
        lines = capsys.readouterr().err.splitlines()
        assert said in lines[-1]
