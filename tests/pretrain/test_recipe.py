"""Recipes: the papers' numbers, overrides, TOML."""

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unlabeled.errors import UserError
from unlabeled.pretrain.auto import filled
from unlabeled.pretrain.field_names import nearest_field
from unlabeled.pretrain.recipe import Recipe, field_types, override
from unlabeled.pretrain.recipes import (
    FITTED,
    RECIPE_NAMES,
    fitted_fields,
    named_recipe,
    read_recipe,
    write_recipe,
)

NAMED = [name for name in RECIPE_NAMES if name not in FITTED]


def test_the_papers_numbers() -> None:
    short, long = named_recipe("vitl16_short"), named_recipe("vitg14")
    assert (short.run.batch_size, short.run.steps) == (2048, 125_000)
    assert (long.run.batch_size, long.run.steps) == (3072, 625_000)
    assert (short.optimizer.lr, long.optimizer.lr) == (4e-3, 2e-4)
    assert (short.optimizer.warmup * short.run.steps, long.optimizer.warmup * long.run.steps) == (
        12_500,
        100_000,
    )
    assert (short.optimizer.final_weight_decay, long.optimizer.final_weight_decay) == (0.4, 0.2)
    assert (short.optimizer.layer_decay, long.optimizer.layer_decay) == (0.9, 1.0)
    assert short.optimizer.patch_embed_multiplier == long.optimizer.patch_embed_multiplier == 0.2
    assert (short.teacher.momentum, long.teacher.momentum) == (0.992, 0.994)
    for recipe in (short, long):
        assert recipe.teacher.temperature_warmup * recipe.run.steps == pytest.approx(37_500)
        assert recipe.optimizer.freeze_last_layer * recipe.run.steps == pytest.approx(1250)
        assert (recipe.teacher.temperature, recipe.teacher.final_temperature) == (0.04, 0.07)
        assert (recipe.optimizer.clip, recipe.optimizer.betas, recipe.loss.koleo) == (3.0, (0.9, 0.999), 0.1)
        assert (recipe.crops.num_globals, recipe.crops.num_locals) == (2, 8)
        assert (recipe.crops.global_scale, recipe.crops.local_scale) == ((0.32, 1.0), (0.05, 0.32))
    assert (short.loss.targets, long.loss.targets) == ("centering", "sinkhorn")
    assert (short.head.shared, short.head.num_prototypes, short.head.bottleneck) == (True, 65536, 256)
    assert not long.head.shared
    assert (long.head.num_prototypes, long.head.bottleneck, long.head.ibot_bottleneck) == (131072, 384, 256)
    assert (short.model.drop_path, long.model.drop_path) == (0.3, 0.4)
    assert (short.crops.local_size, long.crops.local_size) == (96, 98)
    dino = named_recipe("dino_vits16")
    assert (dino.loss.ibot, dino.loss.koleo, dino.loss.targets, dino.model.patch_size) == (
        0,
        0,
        "centering",
        16,
    )


@pytest.mark.parametrize("name", NAMED)
def test_toml_gives_the_recipe_back(name: str, tmp_path: Path) -> None:
    recipe = filled(named_recipe(name))
    write_recipe(recipe, tmp_path / "recipe.toml")
    assert read_recipe(tmp_path / "recipe.toml") == recipe


def test_an_unknown_recipe_suggests_the_near_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean vits14"):
        named_recipe("vit_s14")
    (tmp_path / "mine.toml").write_text('name = "vitb41"')
    with pytest.raises(UserError, match=r"mine\.toml has the name vitb41.*did you mean vitb14"):
        read_recipe(tmp_path / "mine.toml")
    (tmp_path / "mine.toml").write_text('name = "mine"')
    assert read_recipe(tmp_path / "mine.toml").name == "mine"


@pytest.mark.parametrize(
    ("name", "value", "word"),
    [
        ("optimizer.learning_rate", 1e-3, r"no recipe has: did you mean optimizer\.lr"),
        ("optimiser.lr", 1e-3, "optimizer.lr"),
        ("lr", 1e-3, "optimizer.lr"),
        ("run.stepz", 3, "run.steps"),
        ("run.steps", "many", "whole number"),
        ("run.steps", 2.5, "whole number"),
        ("run.steps", 0, "at least 1"),
        ("run.compile", "perhaps", "true or false"),
        ("run.packed", "perhaps", "one of auto, true, false"),
        ("loss.targets", "softmax", "sinkhorn, centering"),
        ("crops.global_scale", "0.3", "2 numbers, as 0.1,0.5"),
        ("crops.blur", "0.3", "3 numbers, as 0.1,0.5,0.9"),
        ("optimizer.lr", "nan", "finite"),
        ("model.size", "vit_huge", "vit_small"),
        ("crops.local_size", 97, "98 is|84 is"),
        ("optimizer.warmup", 1000, "fraction"),
        ("loss.mask_ratio", "0.5,0.1", "low <= high"),
    ],
)
def test_a_wrong_field_is_one_line(name: str, value: object, word: str) -> None:
    with pytest.raises(UserError, match=word) as caught:
        override(named_recipe("vits14"), {name: value}, "the command line")
    assert "\n" not in str(caught.value)
    assert name.split(".")[-1] in str(caught.value)


@settings(deadline=None)
@given(st.floats(1e-9, 1e3), st.integers(1, 10**9), st.booleans())
def test_text_and_value_mean_the_same(rate: float, steps: int, flag: bool) -> None:
    values = {"optimizer.lr": rate, "run.steps": steps, "run.compile": flag}
    texts = {name: repr(value) for name, value in values.items()}
    base = named_recipe("vits14")
    assert override(base, values, "a") == override(base, texts, "b")
    texts = {"run.packed": str(flag).lower()}
    assert override(base, {"run.packed": flag}, "a") == override(base, texts, "b")


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [("optimizer.learning-rate", "optimizer.lr"), ("run.lr", "optimizer.lr"), ("wd", "optimizer.weight_decay"),
     ("optimizer.momentum", "teacher.momentum"), ("teacher.ema", "teacher.momentum"), ("run.epochs", "run.steps"),
     ("model.widht", "model.width"), ("model.patch", "model.patch_size"), ("model.drop_rate", "model.drop_path"),
     ("run.batchsize", "run.batch_size"), ("crops.locals", "crops.num_locals"), ("data.eval", "data.evaluation"),
     ("batch-size", "run.batch_size"), ("data.trian", "data.train"), ("model.x", None), ("nonsense", None)],
)  # fmt: skip
def test_the_field_that_is_meant(wrong: str, meant: str | None) -> None:
    assert nearest_field(wrong, field_types(Recipe())) == meant


def test_tuples_and_short_forms() -> None:
    recipe = override(
        named_recipe("vits14"), {"crops.blur": "1,0.1,0.5", "optimizer.betas": "[0.9, 0.99]"}, "x"
    )
    assert recipe.crops.blur == (1.0, 0.1, 0.5)
    assert recipe.optimizer.betas == (0.9, 0.99)


def test_every_field_can_be_set(tmp_path: Path) -> None:
    recipe = named_recipe("vits14")
    for name in field_types(recipe):
        section, _, field = name.partition(".")
        value = getattr(getattr(recipe, section), field) if field else getattr(recipe, section)
        assert override(recipe, {name: value}, "x") == recipe


def test_broken_toml_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("[run\nsteps = 3")
    with pytest.raises(UserError, match=r"mine\.toml is not valid TOML"):
        read_recipe(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_recipe(tmp_path / "missing.toml")


def test_a_file_may_leave_the_rest_to_auto(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('name = "auto"\n[run]\nsteps = 7\n')
    assert fitted_fields(path) == {"name": "auto", "run.steps": 7}
    path.write_text('name = "auto"\n[run]\nstepz = 7\n')
    with pytest.raises(UserError, match=r"mine\.toml sets run\.stepz.*run\.steps"):
        fitted_fields(path)
    path.write_text('name = "tiny"\n[run]\nsteps = 7\n')
    assert fitted_fields(path) == fitted_fields("auto") == fitted_fields(Recipe()) == {}
    write_recipe(dataclasses.replace(Recipe(), name="auto"), path)  # as a finished run has it
    assert fitted_fields(path) == {}


def test_recipes_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().name = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "value"),
    [("crops.blur_kernel", 19), ("crops.blur_kernel", 8), ("crops.blur", "0,1.5,0"), ("crops.global_scale", "0,1"),
     ("crops.flip", -0.1), ("crops.global_size", 14 * 1000), ("crops.blur_sigma", "2,1"), ("teacher.momentum", 1.1),
     ("teacher.temperature", 0), ("loss.student_temperature", 0), ("head.num_prototypes", 0), ("crops.num_locals", -1),
     ("model.width", -64), ("model.depth", -1), ("model.num_heads", 5), ("model.num_registers", -1),
     ("model.layer_scale", -1), ("model.image_size", 3), ("model.norm_eps", 0), ("data.eval_crop", 3),
     ("crops.brightness", -1), ("crops.hue", 3), ("crops.solarise_threshold", 400), ("loss.dino", -1),
     ("loss.koleo", -1), ("loss.sinkhorn_iterations", 0), ("loss.mask_probability", 2), ("loss.center_momentum", 2),
     ("optimizer.lr", -1), ("optimizer.reference_batch", 0), ("optimizer.betas", "1,1"), ("optimizer.clip", -1),
     ("optimizer.layer_decay", 0), ("run.checkpoint_every", -1), ("run.keep_checkpoints", 0), ("run.workers", -2),
     ("run.seed", -1), ("run.seed", 2**63)],
)  # fmt: skip
def test_numbers_that_cannot_be_are_named(name: str, value: object) -> None:
    with pytest.raises(UserError, match=name):
        override(named_recipe("vits14"), {name: value}, "the command line")


def test_losses_that_are_all_left_out_are_refused() -> None:
    with pytest.raises(UserError, match="nothing to learn from"):
        override(named_recipe("vits14"), {"loss.dino": 0, "loss.ibot": 0}, "the command line")


@pytest.mark.parametrize(("width", "heads"), [(64, 1), (128, 2), (32, 1), (48, 3), (384, 3)])
def test_a_width_alone_has_heads_that_divide_it(width: int, heads: int) -> None:
    config = override(named_recipe("tiny"), {"model.width": width}, "the command line").vit_config()
    assert (config.width, config.num_heads) == (width, heads)
