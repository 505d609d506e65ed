"""`finetune` and `predict` as they are used, with good and with bad input."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers import AutoModel

import unlabeled
from tests.finetune.conftest import Result, small_model
from unlabeled.dense.labelled import read_depth
from unlabeled.errors import UserError
from unlabeled.features.engines import weights_hash
from unlabeled.finetune.heads import LinearHead
from unlabeled.finetune.saved import load_head, read_info
from unlabeled.weights.huggingface import save_huggingface

Runner = Callable[..., Result]
QUICK = ("--device", "cpu", "--train.steps", 6, "--train.lr", 0.02, "--train.evaluations", 2)


@pytest.fixture(scope="session")
def broken_folder(tmp_path_factory: pytest.TempPathFactory, colour_folder: Path) -> Path:
    """The colours, with a file that is no image and one that is cut."""
    folder = tmp_path_factory.mktemp("broken") / "colours"
    shutil.copytree(colour_folder, folder)
    (folder / "red" / "00.png").write_bytes(b"no image")
    whole = (folder / "blue" / "03.png").read_bytes()
    (folder / "blue" / "03.png").write_bytes(whole[: len(whole) // 2])
    return folder


@pytest.fixture(scope="session")
def head_folder(tmp_path_factory: pytest.TempPathFactory, colour_folder: Path, model_folder: Path) -> Path:
    """A linear head on frozen features, trained well."""
    folder = tmp_path_factory.mktemp("heads") / "colours"
    unlabeled.finetune(
        colour_folder, model_folder, folder, device="cpu", train={"steps": 40, "lr": 0.05, "evaluations": 2}
    )
    return folder


@pytest.mark.parametrize("mode", [(), ("--lora", 4), ("--full",), ("--head", "logreg"), ("--head", "knn")])
def test_a_head_and_its_backbone(
    run_main: Runner, colour_folder: Path, model_folder: Path, tmp_path: Path, mode: tuple[Any, ...]
) -> None:
    out = tmp_path / "head"
    fitted = mode[:1] == ("--head",)
    done = run_main(
        "finetune", colour_folder, "--model", model_folder, "--out", out, *mode, "--json",
        *(QUICK[:2] if fitted else QUICK),
    )  # fmt: skip
    assert done.status == 0, done.err
    result = json.loads(done.out.splitlines()[-1])
    assert result["head"] == str(out) and 0 <= result["accuracy"] <= 1
    info = json.loads((out / "head.json").read_text())
    assert info["classes"] == ["blue", "green", "red"] and info["metrics"]["accuracy"] == result["accuracy"]
    same = weights_hash(unlabeled.load_model(out / "model")) == weights_hash(
        unlabeled.load_model(model_folder)
    )
    assert same == (mode not in (("--lora", 4), ("--full",)))
    loaded = load_head(out, device="cpu")
    image = colour_folder / "red" / "07.png"
    found = loaded(image)
    assert found.probabilities.sum() == pytest.approx(1, abs=1e-5)
    again = loaded(np.asarray(Image.open(image)))
    assert again.name == found.name and again.probability == found.probability
    # transformers reads the backbone: adapters are merged into plain weights.
    theirs = AutoModel.from_pretrained(out / "model").eval()
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        ours = loaded.model(pixels).patches
        torch.testing.assert_close(theirs(pixels).last_hidden_state[:, 1:], ours, rtol=0, atol=2e-5)


def test_the_saved_head_is_the_trained_one(head_folder: Path, colour_folder: Path) -> None:
    head = load_head(head_folder, device="cpu")
    names = [path.parent.name for path in sorted(colour_folder.rglob("*.png"))]
    found = [head(path).name for path in sorted(colour_folder.rglob("*.png"))]
    assert np.mean([a == b for a, b in zip(names, found, strict=True)]) > 0.95
    assert set(torch.load(head_folder / "checkpoints" / "last.pt", weights_only=True)) >= {
        "head",
        "step",
        "best",
    }


def test_predict_writes_a_table(
    run_main: Runner, head_folder: Path, broken_folder: Path, tmp_path: Path
) -> None:
    done = run_main(
        "predict", broken_folder, "--head", head_folder, "--out", tmp_path, "--device", "cpu", "--json"
    )
    assert done.status == 0, done.err
    result = json.loads(done.out.splitlines()[-1])
    assert result["images"] == 58 and result["bad_files"] == 2
    assert {json.loads(line)["key"] for line in (tmp_path / "bad_files.jsonl").read_text().splitlines()} == {
        "red/00.png", "blue/03.png",
    }  # fmt: skip
    table = pq.read_table(tmp_path / "predictions.parquet").to_pylist()
    rows = list(csv.DictReader((tmp_path / "predictions.csv").read_text().splitlines()))
    assert [row["key"] for row in rows] == [row["key"] for row in table] and len(table) == 58
    right = [row["class"] == row["key"].split("/")[0] == row["label"] for row in table]
    assert result["accuracy"] == pytest.approx(np.mean(right))
    head = load_head(head_folder, device="cpu")
    for row in table[::9]:
        found = head(broken_folder / row["key"])
        assert (row["class"], row["class_2"]) == (found.top[0][0], found.top[1][0])
        assert row["probability"] == pytest.approx(found.probability, abs=1e-5)
    with Image.open(tmp_path / "predictions.png") as page:
        assert page.width > 400


def test_predict_goes_on_where_it_stopped(
    head_folder: Path, colour_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict_module = __import__("sys").modules[unlabeled.predict.__module__]
    monkeypatch.setitem(predict_module.BATCH, "classify", 8)
    head = load_head(head_folder, device="cpu")
    whole = unlabeled.predict(colour_folder, head, tmp_path / "whole", pictures=False)
    real, calls = head.outputs, 0

    def failing(images: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return real(images)

    monkeypatch.setattr(head, "outputs", failing)
    with pytest.raises(KeyboardInterrupt):
        unlabeled.predict(colour_folder, head, tmp_path / "broken", pictures=False)
    journal = tmp_path / "broken" / "predictions.jsonl"
    journal.write_bytes(journal.read_bytes()[:-5])  # a crash in the middle of a line
    seen: list[int] = []
    monkeypatch.setattr(head, "outputs", lambda images: (seen.append(len(images)), real(images))[1])
    again = unlabeled.predict(colour_folder, head, tmp_path / "broken", pictures=False)
    assert sum(seen) == 60 - 23
    assert again.figures == whole.figures
    probabilities = [one.rows.column("probability").to_numpy() for one in (again, whole)]
    np.testing.assert_allclose(*probabilities, atol=1e-5)  # the batches are others
    assert again.rows.column("key") == whole.rows.column("key")
    assert again.rows.column("class") == whole.rows.column("class")


@pytest.mark.parametrize("task", ["segment", "depth"])
def test_maps_from_training_to_pictures(
    run_main: Runner, dense_folder: Path, model_folder: Path, tmp_path: Path, task: str
) -> None:
    head, out = tmp_path / "head", tmp_path / "out"
    done = run_main(
        "finetune", dense_folder, "--task", task, "--model", model_folder, "--out", head, "--size", 32,
        "--held-out", 0.2, *QUICK,
    )  # fmt: skip
    assert done.status == 0, done.err
    done = run_main("predict", dense_folder, "--head", head, "--out", out, "--device", "cpu", "--json")
    assert done.status == 0, done.err
    result = json.loads(done.out.splitlines()[-1])
    assert result["images"] == 10
    loaded = load_head(head, device="cpu")
    truths, said = [], []
    for number in range(10):
        path = dense_folder / "images" / f"{number}.png"
        single = loaded(path)
        with Image.open(path) as image:
            assert single.shape == (image.height, image.width)
        if task == "segment":
            written = np.asarray(Image.open(out / "masks" / f"{number}.png"))
            assert (written == single).mean() > 0.999
            assert np.asarray(Image.open(out / "overlays" / f"{number}.png")).shape == (*single.shape, 3)
            truths.append(np.asarray(Image.open(dense_folder / "labels" / f"{number}.png")).ravel())
        else:
            written = read_depth(out / "depth" / f"{number}.png", 1000)
            assert np.abs(written - single).max() < 0.002
            truths.append(read_depth(dense_folder / "depth" / f"{number}.png").ravel())
            assert (out / "pictures" / f"{number}.png").exists()
        said.append(written.ravel())
    if task == "segment":
        truth, found = np.concatenate(truths), np.concatenate(said)
        kept = truth != 255
        ious = [
            ((truth == c) & (found == c) & kept).sum() / (((truth == c) | (found == c)) & kept).sum()
            for c in (0, 1)
        ]
        assert result["miou"] == pytest.approx(np.mean(ious))
    else:
        rmse = [np.sqrt(np.mean((a[b > 0] - b[b > 0]) ** 2)) for a, b in zip(said, truths, strict=True)]
        assert result["rmse"] == pytest.approx(np.mean(rmse), rel=1e-4)
    assert (out / "predictions.png").exists()


def test_a_released_classification_head(model_folder: Path, colour_folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    for factor, num_layers in ((2, 1), (5, 4)):
        weight, bias = torch.randn(7, factor * 32), torch.randn(7)
        torch.save({"weight": weight, "bias": bias}, tmp_path / "head.pth")
        depth = 4
        save_huggingface(small_model(depth), tmp_path / "model")
        loaded = load_head(tmp_path / "head.pth", tmp_path / "model", device="cpu")
        found = loaded(colour_folder / "red" / "00.png")
        image = loaded.preprocessing(np.asarray(Image.open(colour_folder / "red" / "00.png")))
        from unlabeled.images.transform import normalize

        with torch.no_grad():
            layers = loaded.model.intermediate_layers(normalize(torch.from_numpy(image)[None]), num_layers)
            features = torch.cat([*(one.cls for one in layers), layers[-1].patches.mean(1)], 1)
            wanted = (features @ weight.T + bias).softmax(1)[0]
        np.testing.assert_allclose(found.probabilities, wanted, atol=1e-5)
        assert isinstance(loaded.head, LinearHead) and found.name == str(int(wanted.argmax()))
    with pytest.raises(unlabeled.UserError, match="give it with --model"):
        load_head(tmp_path / "head.pth")


def test_released_heads_of_maps(model_folder: Path, colour_folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    bn = {
        f"decode_head.bn.{name}": torch.rand(32) + 0.5
        for name in ("weight", "bias", "running_mean", "running_var")
    }
    conv = {
        "decode_head.conv_seg.weight": torch.randn(21, 32, 1, 1),
        "decode_head.conv_seg.bias": torch.randn(21),
    }
    counted = {"decode_head.bn.num_batches_tracked": torch.tensor(1)}
    torch.save({"state_dict": bn | conv | counted}, tmp_path / "voc2012_linear_head.pth")
    conv = {
        "decode_head.conv_depth.weight": torch.randn(256, 64, 1, 1),
        "decode_head.conv_depth.bias": torch.zeros(256),
    }
    torch.save({"state_dict": conv}, tmp_path / "nyu_linear_head.pth")
    few = tmp_path / "few"
    few.mkdir()
    for number in (0, 1):
        shutil.copy(colour_folder / "red" / f"0{number}.png", few)
    for name, task in (("voc2012", "segment"), ("nyu", "depth")):
        head = load_head(tmp_path / f"{name}_linear_head.pth", model_folder, device="cpu")
        out = unlabeled.predict(few, head, tmp_path / name)
        assert head.info.task == task and out.images == 2
        found = head(colour_folder / "red" / "00.png")
        assert (
            found.shape == (36, 40) and found.min() >= 0 and found.max() <= (20 if task == "segment" else 10)
        )


def test_a_backbone_that_is_only_referred_to(run_main: Runner, colour_folder: Path, tmp_path: Path) -> None:
    save_huggingface(small_model(), tmp_path / "model")
    done = run_main(
        "finetune",
        colour_folder,
        "--model",
        tmp_path / "model",
        "--out",
        tmp_path / "head",
        "--no-copy",
        *QUICK,
    )
    assert done.status == 0 and not (tmp_path / "head" / "model").exists()
    assert load_head(tmp_path / "head", device="cpu")(colour_folder / "red" / "01.png")
    save_huggingface(small_model(seed=1), tmp_path / "model")
    failed = run_main("predict", colour_folder, "--head", tmp_path / "head", "--out", tmp_path / "out")
    assert failed.status == 2 and "is a head of another backbone" in failed.err
    assert failed.err.count("\n") == 1


def test_what_is_no_head(run_main: Runner, colour_folder: Path, model_folder: Path, tmp_path: Path) -> None:
    for head, said in (
        (tmp_path, "holds no trained head (no head.json); unlabeled finetune makes one"),
        (model_folder, "it is a MODEL: unlabeled finetune makes a head"),
        (tmp_path / "gone", "holds no trained head"),
    ):
        failed = run_main("predict", colour_folder, "--head", head, "--out", tmp_path / "out")
        assert failed.status == 2 and said in failed.err, failed.err
    (tmp_path / "head.json").write_text('{"format": "something else"}')
    failed = run_main("predict", colour_folder, "--head", tmp_path, "--out", tmp_path / "out")
    assert "is of no head that this version reads" in failed.err
    torch.save({"weight": torch.zeros(3, 5), "bias": torch.zeros(3)}, tmp_path / "odd.pth")
    failed = run_main(
        "predict",
        colour_folder,
        "--head",
        tmp_path / "odd.pth",
        "--model",
        model_folder,
        "--out",
        tmp_path / "out",
    )
    assert "is of another backbone" in failed.err


def test_predictions_of_another_head(head_folder: Path, colour_folder: Path, tmp_path: Path) -> None:
    head = load_head(head_folder, device="cpu")
    unlabeled.predict(colour_folder, head, tmp_path / "out", pictures=False)
    shutil.copytree(head_folder, tmp_path / "head")
    from safetensors.torch import load_file, save_file

    state = load_file(tmp_path / "head" / "head.safetensors")
    save_file({name: value + 1 for name, value in state.items()}, tmp_path / "head" / "head.safetensors")
    with pytest.raises(unlabeled.UserError, match="holds predictions of another head"):
        unlabeled.predict(colour_folder, tmp_path / "head", tmp_path / "out", device="cpu", pictures=False)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(unlabeled.UserError, match="exists and holds no predictions"):
        unlabeled.predict(colour_folder, head, tmp_path / "full")


def test_bad_data(
    run_main: Runner, colour_folder: Path, dense_folder: Path, model_folder: Path, tmp_path: Path
) -> None:
    flat, other = tmp_path / "flat", tmp_path / "other"
    shutil.copytree(colour_folder / "red", flat)
    shutil.copytree(colour_folder, other)
    (other / "red").rename(other / "purple")
    (tmp_path / "one.csv").write_text(
        "path,label\n" + "".join(f"{path},red\n" for path in sorted((colour_folder / "red").iterdir()))
    )
    cases: list[tuple[tuple[Any, ...], str]] = [
        ((flat,), "has no labels: class folders, a label column or .cls members are needed"),
        ((tmp_path / "one.csv",), "has images of one class, red; two are needed"),
        ((colour_folder, "--val", other), "has labels outside of the 3 classes: purple"),
        (
            (colour_folder, "--head", "dpt"),
            "no classify head 'dpt'; choose one of linear, linear4, logreg, knn",
        ),
        ((colour_folder, "--task", "sing"), "no task 'sing'"),
        ((colour_folder, "--task", "segment"), "has no images/"),
        ((dense_folder, "--task", "segment", "--shots", 2), "--shots is for classes"),
        ((colour_folder, "--lora", 4, "--full"), "exclude each other"),
        ((colour_folder, "--lora", 64), "--lora 64 is no rank of"),
        ((colour_folder, "--train.lrr", 1), "did you mean train.lr"),
        ((colour_folder, "--optimizer.lr", 1), "finetune has no --optimizer.lr"),
        ((colour_folder, "--size", 33), "no multiple of the model's patch of 8"),
        ((colour_folder, "--head", "knn", "--full"), "nothing is trained"),
        ((colour_folder, "--held-out", 1.5), "is no share"),
    ]
    for number, (arguments, said) in enumerate(cases):
        out = tmp_path / f"out{number}"
        failed = run_main("finetune", *arguments, "--model", model_folder, "--out", out, "--device", "cpu")
        assert failed.status == 2 and said in failed.err, (arguments, failed.err)
        assert "Traceback" not in failed.err and not (out / "head.json").exists()
        if 64 in arguments:  # what failed before it began is in nobody's way
            again = run_main("finetune", colour_folder, "--model", model_folder, "--out", out, *QUICK)
            assert again.status == 0, again.err
    assert run_main("finetune", colour_folder, "--model", model_folder).status == 2


def test_unreadable_images_and_an_empty_class(
    run_main: Runner, broken_folder: Path, model_folder: Path, tmp_path: Path
) -> None:
    paths = sorted(broken_folder.rglob("*.png"))
    numbers = {"blue": 0, "green": 1, "red": 3}  # no image is of class 2
    lines = [f"{path},{numbers[path.parent.name]}\n" for path in paths]
    (tmp_path / "list.csv").write_text("path,label\n" + "".join(lines))
    for mode in ((), ("--train.cache", "false")):
        out = tmp_path / f"head{len(mode)}"
        done = run_main(
            "finetune", tmp_path / "list.csv", "--model", model_folder, "--out", out, "--json", *QUICK, *mode
        )
        assert done.status == 0, done.err
        assert "class 2 has no image in" in done.err
        keys = {
            Path(json.loads(line)["key"]).name for line in (out / "bad_files.jsonl").read_text().splitlines()
        }
        assert keys <= {"00.png", "03.png"} and (mode or len(keys) == 2)
        assert json.loads((out / "head.json").read_text())["classes"] == ["0", "1", "2", "3"]


def test_a_class_folder_without_images_is_said(
    run_main: Runner, colour_folder: Path, model_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(colour_folder, tmp_path / "data")
    (tmp_path / "data" / "violet").mkdir()
    done = run_main(
        "finetune", tmp_path / "data", "--model", model_folder, "--out", tmp_path / "head", *QUICK
    )
    assert done.status == 0 and "for violet: learned without" in done.out


def test_resuming_what_is_not_the_same(
    run_main: Runner, colour_folder: Path, model_folder: Path, head_folder: Path, tmp_path: Path
) -> None:
    data, out = tmp_path / "data", tmp_path / "head"
    shutil.copytree(colour_folder, data)
    assert run_main("finetune", data, "--model", model_folder, "--out", out, *QUICK).status == 0
    (out / "head.json").unlink()  # as if it had stopped before
    again = run_main("finetune", "--resume", out, "--device", "cpu")
    assert again.status == 0 and (out / "head.json").exists()
    assert "is finished" in run_main("finetune", "--resume", out).err
    (out / "head.json").unlink()
    (data / "yellow").mkdir()
    shutil.copy(data / "red" / "00.png", data / "yellow" / "00.png")
    failed = run_main("finetune", "--resume", out)
    assert failed.status == 2 and "has 4 classes now and had 3 when this training began: yellow" in failed.err
    shutil.rmtree(data / "yellow")
    (data / "red" / "00.png").unlink()
    (data / "red" / "01.png").unlink()
    assert "training images now and gave" in run_main("finetune", "--resume", out).err
    assert "has its own DATA" in run_main("finetune", data, "--resume", out).err
    assert "no training to go on with" in run_main("finetune", "--resume", tmp_path).err
    failed = run_main("finetune", data, "--model", model_folder, "--out", head_folder)
    assert failed.status == 2 and "exists and is not empty" in failed.err


def test_the_command_that_goes_on_can_be_pasted_where_a_folder_has_spaces(tmp_path: Path) -> None:
    folder = tmp_path / "my head"
    folder.mkdir()
    (folder / "recipe.json").write_text("{}")
    with pytest.raises(UserError, match=f"unlabeled finetune --resume '{folder}'"):
        read_info(folder)
