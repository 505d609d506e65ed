"""Training a copy detector: views, the same numbers after a stop, and that it learns."""

import io
import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from unlabeled.cli import main
from unlabeled.curate import copy_detector
from unlabeled.curate.copies import TRANSFORMATIONS
from unlabeled.curate.copy_detector import DetectorRecipe, load_detector, train_copy_detector, with_options
from unlabeled.curate.copy_scores import copy_scores
from unlabeled.curate.views import ViewDataset, ViewRecipe
from unlabeled.errors import UserError
from unlabeled.images.order import ShuffledOrder
from unlabeled.images.sources import open_source
from unlabeled.weights.load import load_model

SMALL = DetectorRecipe(
    depth=1, patch_size=8, views=ViewRecipe(size=32, scale=(0.5, 1.0)), steps=6, batch_size=6, workers=0,
    checkpoint_every=2, lr=2e-3,
)  # fmt: skip


def quiet() -> Console:
    return Console(file=io.StringIO())


def rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in rows(folder)]


def test_views_depend_on_seed_and_position_alone(tile_folder: Path) -> None:
    source = open_source(tile_folder)
    data = ViewDataset(source, ViewRecipe(size=32, collage=0.9), ShuffledOrder(len(source), 3), 3)
    one, again, later = (data.__getitems__(positions) for positions in ([5, 6, 7], [5, 6, 7], [8, 9, 10]))
    assert one.views_VB3HW.shape == (6, 3, 32, 32) and one.views_VB3HW.dtype == torch.uint8
    assert torch.equal(one.views_VB3HW, again.views_VB3HW) and torch.equal(one.shows_VBI, again.shows_VBI)
    assert not torch.equal(one.views_VB3HW, later.views_VB3HW)
    first, second = one.shows_VBI[:3], one.shows_VBI[3:]
    assert (first.sum(0) == 1).all() and (first.sum(1) == 1).all()  # no collage in first views
    assert (second | ~first).all()
    both = torch.cat([data.__getitems__([p, p + 1, p + 2]).shows_VBI[3:] for p in range(0, 24, 3)])
    assert (both.sum(1) == 2).float().mean() > 0.6


def test_an_image_met_twice_in_a_batch_is_no_negative_of_itself(tile_folder: Path) -> None:
    source = open_source(tile_folder)
    order = ShuffledOrder(len(source), 0)
    data = ViewDataset(source, ViewRecipe(size=32, collage=0.0), order, 0)
    first = int(order.indices(np.array([0]))[0])
    again = next(p for p in range(24, 48) if int(order.indices(np.array([p]))[0]) == first)
    shows = data.__getitems__([0, 1, again]).shows_VBI
    assert torch.equal(shows[0], shows[2]) and torch.equal(shows[3], shows[5])
    assert not (shows[0] & shows[1]).any()


def test_training_that_was_stopped_gives_the_same_numbers(
    tile_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train_copy_detector(tile_folder, tmp_path / "whole", recipe=SMALL, device="cpu", console=quiet())
    save = copy_detector._save

    def killed(*arguments: object) -> None:
        save(*arguments)  # type: ignore[arg-type]
        if arguments[-1] == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(copy_detector, "_save", killed)
    with pytest.raises(KeyboardInterrupt):
        train_copy_detector(tile_folder, tmp_path / "cut", recipe=SMALL, device="cpu", console=quiet())
    monkeypatch.undo()
    cut = train_copy_detector(tile_folder, tmp_path / "cut", recipe=SMALL, device="cpu", console=quiet())
    assert losses(cut) == losses(whole) and len(losses(cut)) == SMALL.steps
    for one, other in zip(load_model(cut).parameters(), load_model(whole).parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_short_training_finds_more_copies_than_its_start(photograph: np.ndarray, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tiles = [
        photograph[y : y + 60, x : x + 60]
        for y, x in zip(rng.integers(0, 240, 48), rng.integers(0, 390, 48), strict=True)
    ]
    (tmp_path / "tiles").mkdir()
    for number, tile in enumerate(tiles):
        Image.fromarray(tile).save(tmp_path / "tiles" / f"{number:02}.png")
    copies = [
        TRANSFORMATIONS[name](tile, np.random.default_rng([number, kind]))
        for number, tile in enumerate(tiles)
        for kind, name in enumerate(("flip", "colour", "rotation"))
    ]
    recipe = replace(SMALL, steps=240, batch_size=24, checkpoint_every=240, lr=1e-3)
    found = []
    for steps in (1, recipe.steps):  # the first step has a learning rate of 0
        out = tmp_path / str(steps)
        train_copy_detector(
            tmp_path / "tiles", out, recipe=replace(recipe, steps=steps), device="cpu", console=quiet()
        )
        detector = load_detector(out, "cpu")
        vectors = [np.asarray(detector([*images])) for images in (copies, tiles)]
        unit = [part / np.linalg.norm(part, axis=1, keepdims=True) for part in vectors]
        found.append(copy_scores(unit[0] @ unit[1].T, np.repeat(np.arange(48), 3)))
    assert found[1].micro_ap > found[0].micro_ap + 0.05
    assert found[1].recall_at_1 > found[0].recall_at_1
    assert rows(out)[-1]["contrastive"] < rows(out)[0]["contrastive"]


def test_a_detector_goes_on_from_a_model_and_is_one(tile_folder: Path, tmp_path: Path) -> None:
    first = train_copy_detector(
        tile_folder, tmp_path / "a", recipe=replace(SMALL, steps=1), device="cpu", console=quiet()
    )
    recipe = with_options(SMALL, model=str(first), view_size=40, steps=2, lr=None)
    second = train_copy_detector(tile_folder, tmp_path / "b", recipe=recipe, device="cpu", console=quiet())
    assert load_model(second).config == load_model(first).config
    detector = load_detector(second, "cpu")
    assert detector.preprocessing.size == 40 and detector.preprocessing.shape == "stretch"
    assert detector(np.zeros((50, 80, 3), np.uint8)).shape == (192,)


def test_what_is_wrong_is_said_in_one_line(tile_folder: Path, tmp_path: Path) -> None:
    for fields, words in (
        ({"views": ViewRecipe(size=33)}, "multiple of the patch"),
        ({"batch_size": 1}, "nothing to compare"),
        ({"temperature": 0.0}, "temperature"),
        ({"steps": 0}, "steps"),
    ):
        with pytest.raises(UserError, match=words):
            train_copy_detector(tile_folder, tmp_path / "x", recipe=replace(SMALL, **fields), console=quiet())
        assert not (tmp_path / "x").exists()
    (tmp_path / "one").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "one" / "a.png")
    with pytest.raises(UserError, match="two at least"):
        train_copy_detector(tmp_path / "one", tmp_path / "x", recipe=SMALL, console=quiet())
    with pytest.raises(UserError, match="something else"):
        train_copy_detector(tile_folder, tmp_path / "one", recipe=SMALL, console=quiet())
    with pytest.raises(UserError, match="no copy detector"):
        load_detector(tmp_path / "one")


def test_the_command_names_an_unreadable_image_and_takes_another(
    tile_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "data [b] of mine", tmp_path / "out [b] of mine"
    data.mkdir()
    for number, path in enumerate(sorted(tile_folder.rglob("*.png"))[:5]):
        (data / f"{number}.png").write_bytes(path.read_bytes())
    (data / "bad.jpg").write_bytes(b"\xff\xd8\xff no image")
    options = ["--steps", "2", "--batch-size", "4", "--size", "32", "--depth", "1", "--device", "cpu"]
    words = ["unlabeled", "curate", "train-copy-detector", str(data), "--out", str(out), *options]
    monkeypatch.setattr(sys, "argv", words)
    main()
    assert "bad.jpg" in (out / "bad_files.jsonl").read_text()
    said = capsys.readouterr()
    lines = (said.out + said.err).splitlines()
    assert f"1 image could not be read: {out}/bad_files.jsonl" in lines
    assert f"{out}: a copy detector of 2 steps, which is a MODEL" in lines
    following = next(line for line in lines if line.startswith("next: "))
    assert shlex.split(following)[1:5] == ["unlabeled", "curate", "duplicates", str(data)]
