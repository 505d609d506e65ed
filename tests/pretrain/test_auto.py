"""The recipe auto follows the data, the machine and what the user has said."""

from pathlib import Path

import pytest

from unlabeled.images.sources import open_source
from unlabeled.pretrain import auto
from unlabeled.pretrain.parallel import Parallel
from unlabeled.pretrain.recipe import check


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
