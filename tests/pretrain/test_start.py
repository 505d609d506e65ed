"""Training on from weights: released ones, a run's, at a larger size."""

import dataclasses
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from tests.pretrain.conftest import TINY, Runner
from unlabeled.errors import UserError
from unlabeled.pretrain import loop
from unlabeled.pretrain.method import Network, SelfDistillation
from unlabeled.pretrain.parallel import Parallel
from unlabeled.pretrain.plan import prepared
from unlabeled.pretrain.start import load_start
from unlabeled.vit import VisionTransformer, VitConfig, vit_config
from unlabeled.weights.huggingface import save_huggingface
from unlabeled.weights.load import load_model

QUIET = Console(quiet=True)
CONFIG = VitConfig(24, 2, 2, patch_size=8, image_size=48, layer_scale=1.0)


def released(folder: Path, **changes: Any) -> Path:
    """A backbone without heads, as a hub serves it."""
    torch.manual_seed(1)
    model = VisionTransformer(dataclasses.replace(CONFIG, interpolation="", **changes))
    torch.nn.init.normal_(model.pos_embed, std=0.5)
    save_huggingface(model.eval(), folder)
    return folder


def run_here(data: Path, out: Path, **options: Any) -> loop.Run:
    overrides = {name: value for name, value in TINY.items() if not name.startswith("model.")}
    overrides |= {"run.steps": 6} | options.pop("overrides", {})
    options = {"recipe": "tiny"} | options
    return loop.pretrain(data, out, overrides=overrides, device="cpu", console=QUIET, **options)


def planned(data: Path, out: Path, start: Path | str, **overrides: Any) -> SelfDistillation:
    recipe = overrides.pop("recipe", "tiny")
    plan = prepared(
        out, recipe, {"data.train": data, "model.start": str(start)} | overrides, Parallel(), QUIET
    )
    return loop.make_method(plan, Parallel())


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize(("size", "learned_at"), [(32, 48), (48, 48), (64, 64)])
def test_both_networks_begin_with_the_features_of_the_weights(
    tile_folder: Path, tmp_path: Path, registers: int, size: int, learned_at: int
) -> None:
    # A large epsilon, so that leaving it behind would show.
    folder = released(tmp_path / "released", num_registers=registers, norm_eps=1e-2)
    method = planned(tile_folder, tmp_path / "run", folder, **{"crops.global_size": size})
    images = torch.randn(2, 3, size, size)
    expected = load_model(folder)(images)
    for network in (method.student, method.teacher):
        assert isinstance(network, Network)
        assert network.backbone.config.image_size == learned_at
        found = network.backbone.eval()(images)
        torch.testing.assert_close(found.patches, expected.patches, rtol=0, atol=1e-5)
        torch.testing.assert_close(found.cls, expected.cls, rtol=0, atol=1e-5)


def test_the_backbone_waits_for_heads_that_start_anew(tile_folder: Path, tmp_path: Path) -> None:
    folder = released(tmp_path / "released")
    fields = {"optimizer.freeze_backbone": 0.5, "run.steps": 12, "teacher.momentum": 0.0, "run.checkpoint_every": 1,
              "run.keep_checkpoints": 12, "optimizer.warmup": 0.0, "optimizer.freeze_last_layer": 0.0}  # fmt: skip
    run = run_here(tile_folder, tmp_path / "run", start=folder, overrides=fields)
    assert run.recipe.model.start == str(folder)
    source = load_model(folder).state_dict()
    checkpoints = tmp_path / "run" / "checkpoints"
    for steps, moved in ((6, False), (7, True)):
        copy = tmp_path / f"after_{steps}"
        shutil.copytree(tmp_path / "run", copy)
        for path in checkpoints.iterdir():
            if path.name > f"step_{steps:08d}":
                shutil.rmtree(copy / "checkpoints" / path.name)
        start = load_start(str(copy))
        assert start.network is not None
        state = start.network.backbone.state_dict()
        same = [torch.equal(state[name], value) for name, value in source.items()]
        assert all(same) is not moved, [name for name in source if not torch.equal(state[name], source[name])]
        assert start.network.dino_head.mlp[0].bias.abs().max() > 0  # heads have learned in both
    assert {row["backbone_lr"] > 0 for row in run.metrics[:6]} == {False}


def test_a_run_brings_its_heads_and_centres(tile_folder: Path, tmp_path: Path) -> None:
    fields = {"loss.targets": "centering", "head.shared": "false", "head.ibot_num_prototypes": 24}
    first = loop.pretrain(
        tile_folder, tmp_path / "first", recipe="tiny", steps=4, overrides=TINY | fields, console=QUIET
    )
    start = load_start(str(first.path))
    method = planned(tile_folder, tmp_path / "second", first.path, recipe="auto")
    assert method.recipe.head == first.recipe.head
    assert method.recipe.optimizer.lr == pytest.approx(0.1 * first.recipe.optimizer.lr)
    assert method.recipe.optimizer.freeze_backbone == 0
    assert start.network is not None
    for name, value in start.network.state_dict().items():
        for network in (method.student, method.teacher):
            assert torch.equal(network.state_dict()[name], value), name
    assert start.centers["dino"].abs().max() > 0
    assert torch.equal(method.dino_center.center, start.centers["dino"])
    assert torch.equal(method.ibot_center.center, start.centers["ibot"])
    other = planned(tile_folder, tmp_path / "third", first.path, recipe="auto", **{"head.num_prototypes": 16})
    assert other.recipe.optimizer.freeze_backbone == 0.1
    assert torch.equal(
        other.teacher_backbone().state_dict()["pos_embed"], start.backbone.state_dict()["pos_embed"]
    )


def test_knn_never_falls_far_below_the_start(tmp_path: Path) -> None:
    """A model that knows something goes on from its weights alone: k-NN stays within 4 points of where it was."""
    from unlabeled.demo import demo_tiles

    train, test = demo_tiles(tmp_path / "tiles")
    base = {"model.depth": 2, "model.width": 96, "run.eval_every": 10, "run.precision": "float32"}
    from unlabeled.pretrain.auto import small_images

    first = loop.pretrain(
        train, tmp_path / "first", recipe=small_images(48), steps=80, eval=test, device="cpu",
        overrides=base | {"model.num_heads": 3}, console=QUIET,
    )  # fmt: skip
    second = loop.pretrain(
        train, tmp_path / "second", start=first.path / "model", steps=60, eval=test, device="cpu",
        overrides={"run.eval_every": 10, "run.precision": "float32"}, console=QUIET,
    )  # fmt: skip
    assert second.recipe.model.width == 96
    found = [row["knn"] for row in second.metrics if "knn" in row]
    before = second.metrics[0]["knn_before"]
    assert len(found) == 6
    assert before == pytest.approx([row["knn"] for row in first.metrics if "knn" in row][-1], abs=0.01)
    assert min(found) > before - 0.04, (before, found)


def test_high_resolution_goes_on_from_a_run(
    tile_folder: Path, tmp_path: Path, photograph: np.ndarray
) -> None:
    dense = tmp_path / "dense"
    for name in ("images", "labels"):
        (dense / name).mkdir(parents=True)
    for number in range(4):
        tile = photograph[40 * number : 40 * number + 48, 60 : 60 + 64]
        Image.fromarray(tile).save(dense / "images" / f"{number}.png")
        bright = (tile[..., 0] > tile[..., 0].mean()).astype(np.uint8)
        Image.fromarray(bright).save(dense / "labels" / f"{number}.png")
    first = loop.pretrain(
        tile_folder, tmp_path / "first", recipe="tiny", steps=3, overrides=TINY, device="cpu", console=QUIET
    )
    said = Console(record=True, file=io.StringIO())
    run = loop.pretrain(
        tile_folder, tmp_path / "second", recipe="highres", start=first.path, steps=4, eval=tile_folder,
        eval_dense=dense, device="cpu", overrides={"crops.global_size": 64, "run.eval_every": 4}, console=said,
    )  # fmt: skip
    recipe = run.recipe
    assert (recipe.name, recipe.crops.global_size, recipe.crops.local_size) == ("highres", 64, 16)
    assert recipe.model.image_size == 64
    assert recipe.head == first.recipe.head
    assert load_model(run.path).config.grid_side == 8
    first_row, last_row = run.metrics[0], run.metrics[-1]
    for name in ("knn", "patch_knn_miou", "patch_knn_accuracy"):
        assert 0 <= first_row[f"{name}_before"] <= 1
        assert 0 <= last_row[name] <= 1
    text = said.export_text()
    assert "before: knn" in text
    assert "patch_knn_miou" in text


def test_a_run_stopped_before_its_first_checkpoint_begins_again_with_the_weights(
    tile_folder: Path, tmp_path: Path
) -> None:
    folder = released(tmp_path / "released")
    whole = run_here(tile_folder, tmp_path / "whole", start=folder)
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints")
    again = loop.pretrain(resume=tmp_path / "again", device="cpu", console=QUIET)
    assert [row["loss"] for row in again.metrics] == [row["loss"] for row in whole.metrics]


def test_a_named_size_keeps_its_name(tile_folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = VisionTransformer(vit_config("vit_tiny", patch_size=8, image_size=32, num_registers=4))
    save_huggingface(model.eval(), tmp_path / "released")
    recipe = planned(tile_folder, tmp_path / "run", tmp_path / "released", recipe="vits14").recipe
    assert (recipe.model.size, recipe.model.depth, recipe.model.num_registers) == ("vit_tiny", 0, 4)
    assert recipe.vit_config() == dataclasses.replace(model.config, image_size=224)


def test_what_does_not_fit_is_one_line(tile_folder: Path, tmp_path: Path) -> None:
    folder = released(tmp_path / "released")
    with pytest.raises(UserError, match=r"width 24, and the recipe 48: leave model.width to the weights"):
        planned(tile_folder, tmp_path / "a", folder, **{"model.width": 48})
    with pytest.raises(UserError, match="highres goes on from a model: --from"):
        loop.pretrain(tile_folder, tmp_path / "b", recipe="highres", console=QUIET)
    with pytest.raises(UserError, match="nowhere"):
        loop.pretrain(tile_folder, tmp_path / "c", start="nowhere", console=QUIET)
    with pytest.raises(UserError, match=r"has no images/"):
        run_here(tile_folder, tmp_path / "d", start=folder, eval_dense=tmp_path)


def test_the_command_trains_on(tile_folder: Path, tmp_path: Path, run_pretrain: Runner) -> None:
    folder = released(tmp_path / "released")
    fields = {name: value for name, value in TINY.items() if not name.startswith("model.")}
    done = run_pretrain(
        str(tile_folder), "--out", str(tmp_path / "run"), "--from", str(folder), "--recipe", "tiny", "--steps", "3",
        "--eval", str(tile_folder), "--json", overrides=fields,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert 0 <= result["knn_before"] <= 1
    assert 0 <= result["knn"] <= 1
    assert "heads start anew" in done.stderr
