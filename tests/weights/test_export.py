"""Every format of `unlabeled export`: what is written gives the model's numbers where it is read."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from unlabeled import cli
from unlabeled.errors import UserError
from unlabeled.vit import VitConfig, resize_matrix
from unlabeled.weights import graph
from unlabeled.weights.export import beside, checked, export
from unlabeled.weights.huggingface import save_huggingface
from unlabeled.weights.load import load_model

from .conftest import random_backbone

GRAPHS = {
    "size": VitConfig(width=16, depth=1, num_heads=2, interpolation="size"),
    "scale, swiglu": VitConfig(width=16, depth=1, num_heads=2, ffn="swiglu", interpolation="scale"),
    "antialias, registers, swiglu, no qkv bias": VitConfig(
        width=16, depth=1, num_heads=1, num_registers=4, ffn="swiglu", qkv_bias=False
    ),
}
RUNNERS = {".onnx": graph.onnx_runner, ".xml": graph.openvino_runner, ".pt2": graph.pt2_runner}
# B, H, W: the side the positions were learned at, half of them, non-square, one image, smallest
SHAPES = [(1, 518, 518), (3, 224, 224), (2, 518, 224), (2, 98, 308), (5, 28, 42)]


@pytest.fixture(scope="module", params=GRAPHS)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A model, and a folder with its graph in each format; traced once, since that takes seconds."""
    model, folder = random_backbone(GRAPHS[request.param]), tmp_path_factory.mktemp("graphs")
    traced = graph.trace(model)
    graph.save_pt2(traced, model.config, folder / "model.pt2")
    graph.save_onnx(traced, model.config, folder / "model.onnx")
    graph.save_openvino(folder / "model.onnx", folder / "model.xml", model.config)
    return model, folder


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    folder = tmp_path / "saved"
    save_huggingface(
        random_backbone(VitConfig(width=64, depth=1, num_heads=1, patch_size=8, image_size=32)), folder
    )
    return folder


def run_cli(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["unlabeled", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.mark.parametrize("suffix", RUNNERS)
def test_graph_gives_the_models_features_at_any_size(written: tuple[Any, Path], suffix: str) -> None:
    model, folder = written
    run = RUNNERS[suffix](folder / f"model{suffix}")
    generator = torch.Generator().manual_seed(1)
    for B, H, W in SHAPES:
        images = torch.randn(B, 3, H, W, generator=generator)
        found = run(images.numpy())
        with torch.no_grad():
            tokens = model(images)
        assert sorted(found) == sorted(graph.output_names(model.config))
        for name, value in found.items():
            np.testing.assert_allclose(value, getattr(tokens, name).numpy(), atol=1e-4, rtol=0)


def test_other_sides_than_multiples_of_the_patch_fail(written: tuple[Any, Path]) -> None:
    _, folder = written
    for suffix, runner in RUNNERS.items():
        run = runner(folder / f"model{suffix}")
        with pytest.raises(Exception, match=r"Reshape|reshape|Guard|multiples of a patch of 14"):
            run(np.zeros((1, 3, 100, 224), np.float32))


def test_files_say_what_they_are(written: tuple[Any, Path]) -> None:
    import onnx
    import openvino

    model, folder = written
    held = onnx.load(folder / "model.onnx")
    onnx.checker.check_model(held, full_check=True)
    properties = {item.key: item.value for item in held.metadata_props}
    assert properties == graph.metadata(model.config)
    assert json.loads(properties["mean"]) == [0.485, 0.456, 0.406] and properties["patch_size"] == "14"
    shapes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*held.graph.input, *held.graph.output)
    }
    assert shapes["images"] == ["batch", 3, "height", "width"]
    assert shapes["cls"] == ["batch", 16] and shapes["patches"] == ["batch", "num_patches", 16]
    read = openvino.Core().read_model(folder / "model.xml")
    assert json.loads(read.get_rt_info(["unlabeled", "patch_size"]).astype(str)) == 14
    extra = {"metadata.json": ""}
    torch.export.load(folder / "model.pt2", extra_files=extra)
    assert json.loads(extra["metadata.json"])["std"] == [0.229, 0.224, 0.225]


FREED_ELSEWHERE = """
import gc, os, signal, sys, threading, time
from pathlib import Path
from unlabeled.weights.graph import openvino_runner

held = [openvino_runner(Path(sys.argv[1]))]
thread = threading.Thread(target=lambda: (held.clear(), gc.collect()))
thread.start()
thread.join()
received = []
signal.signal(signal.SIGUSR1, lambda number, frame: received.append(number))
os.kill(os.getpid(), signal.SIGUSR1)
assert received
"""


def test_a_graph_freed_in_another_thread_leaves_signals_working(written: tuple[Any, Path]) -> None:
    graph_file = str(written[1] / "model.xml")
    stopped = subprocess.run([sys.executable, "-c", FREED_ELSEWHERE, graph_file], capture_output=True)
    assert stopped.returncode == 0, stopped


@pytest.mark.parametrize("mode", graph.CUBIC)
def test_resize_weights_are_torchs(mode: str) -> None:
    for side in (1, 8, 37):
        for size in (1, 2, 7, 16, 37, 50):
            given = torch.tensor(size + (0.1 if mode == "scale" else 0.0))
            found = graph.resize_weights(torch.arange(size, dtype=torch.float32), given, side, mode)
            torch.testing.assert_close(
                found, resize_matrix(side, size, mode, torch.device("cpu")), atol=1e-5, rtol=0
            )


@pytest.mark.parametrize(("to", "name"), [("hf", "out"), ("meta", "out.pth"), ("timm", "out.safetensors")])
def test_weight_formats_load_again(saved: Path, tmp_path: Path, to: str, name: str) -> None:
    model = load_model(saved)
    result = export(saved, to, tmp_path / name)
    again = load_model(tmp_path / name)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(again(images).patches, model(images).patches)
    assert bool(result.notes) == (to != "hf")  # the position embedding is resized otherwise there
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["saved", name])


def test_losses_of_meta_and_timm_are_said(tmp_path: Path) -> None:
    config = VitConfig(width=48, depth=1, num_heads=2, patch_size=8, image_size=32, fit="pad")
    save_huggingface(random_backbone(config), tmp_path / "saved")
    meta = export(tmp_path / "saved", "meta", tmp_path / "a.pth").notes
    assert [note for note in meta if "attention heads (2)" in note] and [n for n in meta if "fit" in n]
    assert [note for note in meta if "'scale'" in note]
    timm = export(tmp_path / "saved", "timm", tmp_path / "a.safetensors").notes
    assert [note for note in timm if "mask token" in note] and [n for n in timm if "attention heads (2)" in n]
    assert [note for note in timm if "does not hold fit ('pad')" in note]
    assert [note for note in export(tmp_path / "saved", "hf", tmp_path / "a").notes if "padded" in note]


def test_transformers_reads_the_folder_and_its_preprocessing(
    saved: Path, tmp_path: Path, photograph: np.ndarray
) -> None:
    transformers = pytest.importorskip("transformers")
    from unlabeled.images.transform import evaluation_transform, normalize

    export(saved, "hf", tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    kind = settings.pop("image_processor_type")
    # The processor's own default backend needs torchvision, which is no dependency here.
    processor = getattr(transformers, kind + "Pil", None) or getattr(transformers, kind)
    pixels = processor(**settings)(Image.fromarray(photograph), return_tensors="pt")["pixel_values"]
    sides = settings["size"]["shortest_edge"], settings["crop_size"]["height"]
    ours = normalize(torch.from_numpy(evaluation_transform(photograph, *sides)[None]))
    torch.testing.assert_close(pixels.float(), ours, atol=1e-5, rtol=0)
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        expected = load_model(saved)(ours).patches
        torch.testing.assert_close(theirs(pixels).last_hidden_state[:, 1:], expected, atol=1e-4, rtol=0)


def test_command(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "model.onnx"
    assert run_cli(monkeypatch, "export", saved, "--to", "onnx", "--out", out, "--json") == 0
    said = capsys.readouterr()
    held = json.loads(said.out)
    assert held["path"] == str(out) and held["files"] == ["model.onnx"] and held["difference"] < 1e-4
    assert "multiples of 8 pixels" in said.err and "written:" in said.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "saved"]


def test_an_interpolation_set_by_hand_is_kept(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    arguments = ("export", saved, "--to", "hf", "--out", out, "--interpolation")
    assert run_cli(monkeypatch, *arguments, "bilinear") == 2 and not out.exists()
    assert run_cli(monkeypatch, *arguments, "scale") == 0
    assert load_model(out).config.interpolation == "scale" != load_model(saved).config.interpolation


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--to", "tflite", "--out", "a"], "choose one of hf, meta"),
        (["--to", "onnx", "--out", "a.xml"], "should end in .onnx"),
        (["--to", "hf", "--out", "full"], "holds other things"),
        (["--to", "hf", "--out", "file"], "is a file"),
        (["--to", "meta", "--out", "a.pth", "--int8"], "onnx and openvino"),
        (["--to", "onnx", "--out", "a.onnx", "--int8"], "--calibrate DATA"),
        (["--to", "onnx", "--out", "a.onnx", "--calibrate", "x"], "--int8, which was not given"),
        (["--to", "meta", "--out", "a.pth", "--push", "a/b"], "--to hf"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "diary.txt").touch()
    before = sorted(tmp_path.iterdir())
    assert run_cli(monkeypatch, "export", "no-model", *arguments) == 2
    said = capsys.readouterr().err.strip()
    assert words in said and "\n" not in said
    assert sorted(tmp_path.iterdir()) == before


def test_a_missing_package_is_named(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx_ir", None)
    with pytest.raises(UserError, match=r"onnx is needed .* pip install 'unlabeled\[export\]'"):
        export(saved, "onnx", tmp_path / "out.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_a_graph_of_other_features_is_refused(written: tuple[Any, Path]) -> None:
    model, folder = written
    other = random_backbone(model.config, seed=1)
    for to, suffix in (("onnx", ".onnx"), ("openvino", ".xml"), ("pt2", ".pt2")):
        assert checked(model, to, folder / f"model{suffix}") < 1e-4
        with pytest.raises(RuntimeError, match="differs from the model's"):
            checked(other, to, folder / f"model{suffix}")


def test_what_fails_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "model.xml").write_text("before")
    with pytest.raises(RuntimeError), beside(tmp_path / "model.xml") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]


@pytest.mark.parametrize(("to", "name"), [("onnx", "model.onnx"), ("openvino", "model.xml")])
def test_int8_keeps_the_features(
    to: str, name: str, saved: Path, tile_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = export(saved, to, tmp_path / name, int8=True, calibrate=str(tile_folder))
    found = result.int8
    assert found and (found.calibration_images, found.held_out_images) == (18, 6)
    assert (
        found.cls_worst <= found.cls_mean <= 1.00001 and found.cls_worst > 0.95 and found.patches_worst > 0.95
    )
    assert found.cls_mean < 0.9999999  # it is another graph
    assert found.megabytes < 0.6 * found.float_megabytes
    assert result.difference is None and name in result.files
    # Still of any size, and of several images.
    run = RUNNERS[Path(name).suffix](tmp_path / name)
    images = torch.randn(3, 3, 48, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = load_model(saved)(images)
    similarity = torch.cosine_similarity(torch.from_numpy(run(images.numpy())["cls"]), expected.cls)
    assert similarity.min() > 0.9


def test_int8_of_too_few_images(saved: Path, tile_folder: Path, tmp_path: Path) -> None:
    three = tmp_path / "list.txt"
    three.write_text("\n".join(str(path) for path in sorted(tile_folder.rglob("*.png"))[:3]))
    with pytest.raises(UserError, match="has 3 images that can be read; at least 8"):
        export(saved, "openvino", tmp_path / "model.xml", int8=True, calibrate=str(three))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["list.txt", "saved"]
