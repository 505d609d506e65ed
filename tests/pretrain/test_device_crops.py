"""Crops made on the device are the crops of the workers: the same draws, and pixels to rounding."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.pretrain.conftest import TINY
from tests.pretrain.test_crops import JITTER, plain
from tests.pretrain.test_crops_pillow import photographs  # noqa: F401  (a fixture)
from tests.pretrain.test_resume import run_here
from tests.pretrain.test_waiting import Waits
from unlabeled.images.bad_files import BadFiles
from unlabeled.images.sources import open_source
from unlabeled.pretrain import device_crops
from unlabeled.pretrain.crops import CropRecipe, apply_parameters, draw_parameters
from unlabeled.pretrain.data import batches
from unlabeled.pretrain.device_crops import Uncropped
from unlabeled.pretrain.parallel import Parallel
from unlabeled.pretrain.recipe import Recipe, override
from unlabeled.pretrain.recipes import named_recipe

RECIPE = CropRecipe(num_locals=4)


def both(
    images: list[np.ndarray], drawn: list[np.ndarray], sizes: tuple[int, int], num_globals: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(ours on the device, the workers') for the crops of each size, view-major."""
    batch = Uncropped.of(images, drawn, sizes, num_globals, None).to(torch.device("cpu"))
    parts = (slice(0, num_globals), slice(num_globals, None))
    expected = [
        np.stack(
            [apply_parameters(image, rows[part], size) for image, rows in zip(images, drawn, strict=True)], 1
        )
        for part, size in zip(parts, sizes, strict=True)
    ]
    return [
        (found.numpy(), by_worker.reshape(-1, *by_worker.shape[2:]))
        for found, by_worker in zip((batch.globals_VB3HW, batch.locals_VB3HW), expected, strict=True)
    ]


def test_pixels_are_the_workers_to_rounding(photographs: list[np.ndarray]) -> None:  # noqa: F811
    rng = np.random.default_rng(3)
    drawn = [draw_parameters(image.shape[0], image.shape[1], RECIPE, rng) for image in photographs]
    for (found, expected), solarised in zip(
        both(photographs, drawn, (RECIPE.global_size, RECIPE.local_size), 2),
        ([rows["solarise"] > 0 for rows in np.stack(drawn, 1)[:2]], None),
        strict=True,
    ):
        difference = np.abs(found.astype(int) - expected.astype(int))
        by_crop = difference.mean((1, 2, 3))
        assert by_crop.mean() < 0.5
        assert (difference <= 2).mean() > 0.99
        # A level across the threshold of solarisation is inverted in one of the two only.
        kept = np.ones(len(found), bool) if solarised is None else ~np.concatenate(solarised)
        assert by_crop[kept].max() < 1
        assert difference[kept].max() <= 24


STEPS = {
    "box": {},
    "flip": {"flip": 1},
    "grey": {"grey": 1},
    "blur": {"sigma": 1.4},
    "solarise": {"solarise": 128},
    "bright first": JITTER | {"brightness": 1.35, "order": [0, 1, 2, 3]},
    "contrast first": JITTER | {"contrast": 0.65, "order": [1, 3, 0, 2]},
    "saturation first": JITTER | {"saturation": 1.2, "order": [2, 0, 3, 1]},
    "hue first": JITTER | {"hue": -0.08, "order": [3, 2, 1, 0]},
    "all": JITTER | {"hue": 0.05, "brightness": 0.7, "contrast": 1.3, "saturation": 0.8, "order": [1, 3, 2, 0],
                     "flip": 1, "sigma": 0.6},
}  # fmt: skip


@pytest.mark.parametrize("values", STEPS.values(), ids=STEPS)
def test_each_step_alone(photographs: list[np.ndarray], values: dict[str, object]) -> None:  # noqa: F811
    image = photographs[0]
    row = np.concatenate([plain(200, 260, top=20, left=35, **values), plain(150, 90, top=5, left=0)])
    (found, expected), _ = both([image], [row], (96, 8), 2)
    difference = np.abs(found.astype(int) - expected.astype(int))
    assert difference.mean() < 0.5
    # A step of hue passes through 8 bits, where a level of rounding before it can be several after it.
    assert difference.max() <= (8 if "jitter" in values else 130 if "solarise" in values else 1)


@settings(max_examples=30, deadline=None)
@given(
    sides=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=3),
    size=st.integers(1, 40),
    local=st.integers(1, 20),
    num_locals=st.integers(0, 2),
    at_once=st.integers(1, 5000),
    seed=st.integers(0, 999),
)
def test_any_shape(
    sides: list[tuple[int, int]], size: int, local: int, num_locals: int, at_once: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    smooth = [np.linspace(0, 255, h * w * 3).reshape(h, w, 3).astype(np.uint8) for h, w in sides]
    recipe = CropRecipe(num_locals=num_locals, jitter=0, solarise=0)
    drawn = [draw_parameters(image.shape[0], image.shape[1], recipe, rng) for image in smooth]
    kept = device_crops.PIXELS_AT_ONCE
    device_crops.PIXELS_AT_ONCE = at_once
    try:
        pairs = both(smooth, drawn, (size, local), 2)
    finally:
        device_crops.PIXELS_AT_ONCE = kept
    for found, expected in pairs:
        assert found.shape == expected.shape
        if found.size:
            assert np.abs(found.astype(int) - expected.astype(int)).max() <= 3


def recipe_of(**fields: object) -> Recipe:
    return override(named_recipe("tiny"), TINY | {"run.steps": 2} | fields, "test")


def test_a_run_has_the_same_crops_masks_and_replacements(tile_folder: Path, tmp_path: Path) -> None:
    import shutil

    data = tmp_path / "data"
    shutil.copytree(tile_folder, data)
    for number in range(20):
        (data / f"bad{number}.png").write_text("no image")
    made = {}
    for where in ("cpu", "device"):
        report = BadFiles(tmp_path / f"{where}.jsonl")
        recipe = recipe_of(**{"run.crops_on": where, "run.workers": int(where == "device")})
        made[where] = list(batches(open_source(str(data)), recipe, Parallel(), 0, report))
    for (step, ours), (other, theirs) in zip(made["device"], made["cpu"], strict=True):
        assert step == other
        assert ours.masks is not None
        assert theirs.masks is not None
        assert torch.equal(ours.masks.hidden_VBN, theirs.masks.hidden_VBN)
        for name in ("globals_VB3HW", "locals_VB3HW"):
            found, expected = getattr(ours, name), getattr(theirs, name)
            assert found.shape == expected.shape
            assert found.dtype == torch.uint8
            near = (found.int() - expected.int()).abs()
            assert near.float().mean() < 0.6
            assert (near <= 2).float().mean() > 0.97
    assert (tmp_path / "device.jsonl").read_text() == (tmp_path / "cpu.jsonl").read_text()


def test_nothing_waits_for_the_device(photographs: list[np.ndarray]) -> None:  # noqa: F811
    rng = np.random.default_rng(0)
    recipe = CropRecipe(global_size=64, local_size=32)
    drawn = [draw_parameters(image.shape[0], image.shape[1], recipe, rng) for image in photographs]
    batch = Uncropped.of(photographs, drawn, (64, 32), 2, None)
    with Waits() as waits:
        batch.to(torch.device("cpu"))
    assert not waits.found
    assert waits.operators > 100


def test_a_run_trains_on_them(tile_folder: Path, tmp_path: Path) -> None:
    losses = [
        [
            row["loss"]
            for row in run_here(tile_folder, tmp_path / where, overrides={"run.crops_on": where}).metrics
        ]
        for where in ("cpu", "device")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert losses[0] != losses[1]
