"""The recipe auto follows the data, the machine and what the user has said."""

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

from unlabeled.errors import UserError
from unlabeled.images.sources import Sample, open_source
from unlabeled.pretrain import auto
from unlabeled.pretrain.method import is_packed
from unlabeled.pretrain.parallel import Parallel
from unlabeled.pretrain.plan import prepared
from unlabeled.pretrain.recipe import check, override
from unlabeled.pretrain.recipes import named_recipe


@pytest.mark.parametrize("side", [8, 32, 47, 48, 64, 80, 96, 300, 4000])
def test_every_size_of_image_gives_a_sound_recipe(side: int) -> None:
    recipe = auto.small_images(side)
    check(recipe, "auto")
    assert recipe.crops.local_size < recipe.crops.global_size <= max(32, side)


def test_choices_have_reasons_and_follow_the_user(tile_folder: Path) -> None:
    source = open_source(tile_folder)
    assert auto.median_side(source) == 40
    recipe, reasons = auto.choose(source, Parallel(), {"run.steps": 77, "run.batch_size": 8})
    assert (recipe.name, recipe.run.steps, recipe.run.batch_size) == ("auto", 77, 8)
    assert recipe.crops.global_size == 32
    assert "24 images, median short side 40" in reasons[0]
    assert any("77 steps" in line and "as asked" in line for line in reasons)
    longer, _ = auto.choose(source, Parallel(), {})
    assert longer.run.steps == 1000


def test_bookkeeping_is_a_share_of_the_run() -> None:
    run = auto.filled(auto.small_images(32)).run
    assert (run.checkpoint_every, run.health_every, run.eval_every) == (100, 20, 200)


def test_memory_decides_batch_and_accumulation(tile_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(tile_folder)
    monkeypatch.setattr(auto, "median_side", lambda source: 400)
    gpu = Parallel(torch.device("cuda", 0), 0, 2)
    for gigabytes, most in ((80, 128), (24, 128), (8, 64)):
        monkeypatch.setattr(auto, "device_memory", lambda device, size=gigabytes: size * 1e9)
        recipe, reasons = auto.choose(source, gpu, {})
        check(recipe, "auto")
        assert recipe.model.size == "vit_small"
        assert 2 * 8 <= recipe.run.batch_size <= 2 * most
        assert recipe.run.accumulation == 1
        large, _ = auto.choose(source, gpu, {"run.batch_size": 4096})
        fits = auto.images_that_fit(recipe, gigabytes * 1e9, packed=False)
        assert (large.run.batch_size, large.run.accumulation) == (4096, -(-2048 // fits))
        text = "\n".join(reasons)
        for word in (
            "prototypes",
            "momentum",
            "warm-up",
            "batch",
            "steps",
            "12 blocks of width 384",
            "patch 14",
            "LayerScale",
        ):
            assert word in text


def test_what_fits_follows_what_was_measured() -> None:
    recipe = override(named_recipe("vits14"), {"run.precision": "float32"}, "test")
    # 16 images of ViT-S/14 with the real recipe took 5.3 GB.
    assert auto.images_that_fit(recipe, 5.3e9 / 0.8, packed=False) in range(14, 21)
    for packed in (False, True):
        assert auto.images_that_fit(recipe, 1e9, packed) == 1
        slim = override(recipe, {"run.checkpoint_blocks": True}, "test")
        assert auto.images_that_fit(slim, 24e9, packed) > 2 * auto.images_that_fit(recipe, 24e9, packed)
        giant = named_recipe("vitg14")
        assert auto.images_that_fit(giant, 80e9, packed) < auto.images_that_fit(recipe, 80e9, packed)


def test_crops_are_packed_on_a_gpu_that_has_the_memory(
    tile_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(tile_folder)
    monkeypatch.setattr(auto, "median_side", lambda source: 400)
    gpu, recipe = Parallel(torch.device("cuda", 0)), named_recipe("vits14")
    assert is_packed(recipe, gpu.device) and not is_packed(recipe, torch.device("cpu"))
    for device in ("cuda", "cpu", "mps"):
        for wanted in (True, False):
            asked = override(recipe, {"run.packed": wanted}, "test")
            assert is_packed(asked, torch.device(device)) == wanted
    for gigabytes, packed in ((80, "auto"), (8, False)):
        monkeypatch.setattr(auto, "device_memory", lambda device, size=gigabytes: size * 1e9)
        found, reasons = auto.choose(source, gpu, {})
        assert found.run.packed == packed
        assert ("a pass each" in "\n".join(reasons)) == (packed is False)
        asked, reasons = auto.choose(source, gpu, {"run.packed": True})
        assert asked.run.batch_size == found.run.batch_size or packed is False
        assert asked.run.batch_size <= auto.images_that_fit(found, gigabytes * 1e9, packed=True)
        assert "a pass each" not in "\n".join(reasons)


def test_a_batch_that_is_too_large_for_the_memory_is_told(
    tile_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto, "device_memory", lambda device: 16e9)

    def said(**fields: object) -> str:
        text = io.StringIO()
        values = {"data.train": tile_folder} | {
            name.replace("_", ".", 1): value for name, value in fields.items()
        }
        prepared(tmp_path / "run", "vits14", values, Parallel(), Console(file=text))
        return text.getvalue()

    warning = said()  # 1024 images
    parts = int(warning.split("--run.accumulation ")[1].split()[0])
    assert "memory may not do: 16 GB hold about" in warning
    assert said(run_accumulation=parts) == said(run_batch_size=8) == ""
    assert said(run_sharding="fsdp") == warning  # over one rank nothing is sharded


def test_every_rank_has_the_same_share(tile_folder: Path, tmp_path: Path) -> None:
    three = Parallel(torch.device("cpu"), 0, 3)
    assert auto.choose(open_source(tile_folder), three, {})[0].run.batch_size == 66
    values = {"data.train": tile_folder, "run.batch_size": 64}
    with pytest.raises(UserError, match="64 does not divide by 3 ranks; 63 and 66 do"):
        prepared(tmp_path / "run", "tiny", values, three, Console(quiet=True))


def test_reasons_tell_what_the_user_asked_for(tile_folder: Path) -> None:
    source = open_source(tile_folder)
    values = {"model.width": "64", "model.depth": "2", "crops.global_size": "48", "head.num_prototypes": "99",
              "teacher.momentum": "0.9"}  # fmt: skip
    text = "\n".join(auto.choose(source, Parallel(), values)[1])
    for words in ("2 blocks of width 64, 48-pixel crops", "99 prototypes: as asked", "momentum from 0.9,"):
        assert words in text


@pytest.mark.parametrize(
    ("count", "steps", "why"),
    [(100, 1000, "fewer than 1000 steps teach little"), (9600, 3000, "20.0 passes over the images, as is usual"),
     (1_000_000, 5000, "as many as a cpu is given")],
)  # fmt: skip
def test_steps_have_a_reason_that_fits(count: int, steps: int, why: str, tile_folder: Path) -> None:
    class Repeated:
        """So many images, each one of a few."""

        few = open_source(tile_folder)

        def __len__(self) -> int:
            return count

        def read(self, index: int) -> Sample:
            return self.few.read(index % len(self.few))

    recipe, reasons = auto.choose(Repeated(), Parallel(), {})  # type: ignore[arg-type]
    assert recipe.run.steps == steps
    (line,) = (line for line in reasons if line.startswith(f"{steps} steps"))
    assert why in line
    assert "256 prototypes: a batch of 64 tells no more apart" in reasons


@pytest.mark.parametrize(
    ("name", "value"),
    [("run.batch_size", "0"), ("run.batch_size", "many"), ("run.steps", "1e3"), ("crops.global_size", "big")],
)
def test_wrong_values_are_one_line_before_anything_is_chosen(
    tile_folder: Path, name: str, value: str
) -> None:
    with pytest.raises(UserError, match=name):
        auto.choose(open_source(tile_folder), Parallel(), {name: value})


def test_crops_follow_the_patch_and_memory_follows_the_crops(tile_folder: Path) -> None:
    source = open_source(tile_folder)
    recipe, _ = auto.choose(source, Parallel(), {"model.patch_size": 14})
    check(override(recipe, {"model.patch_size": 14}, "test"), "test")
    small, large = (auto.choose(source, Parallel(), {"crops.global_size": size})[1] for size in (32, 320))
    held = [int(line.split("hold ")[1].split()[0]) for line in (small[3], large[3])]
    assert held[1] < held[0] / 20
