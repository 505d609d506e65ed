"""The loop: what learns and what does not, caches, restarts, numbers that are not finite."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.finetune.conftest import examples_of, small_model
from unlabeled.dense.heads import DepthHead, SegmentationHead
from unlabeled.dense.labelled import depth_images, labelled_images
from unlabeled.dense.losses import depth_loss, segmentation_loss
from unlabeled.errors import UserError
from unlabeled.features.engines import weights_hash
from unlabeled.finetune import feed, train
from unlabeled.finetune.backbone import parameter_groups, prepare
from unlabeled.finetune.batches import mixed_up
from unlabeled.finetune.examples import DenseExamples
from unlabeled.finetune.heads import LinearHead
from unlabeled.finetune.lora import merge_adapters
from unlabeled.finetune.recipe import TrainRecipe, default_recipe
from unlabeled.finetune.tasks import class_figures
from unlabeled.finetune.train import Trained, Validation, train_head
from unlabeled.images.transform import normalize
from unlabeled.signals import StoppedBySignal

SHORT = TrainRecipe(steps=6, batch_size=8, evaluations=2, augment=False, lr=1e-2)


def trained(
    data: Path, recipe: TrainRecipe, model: Any = None, loss: Any = functional.cross_entropy, **options: Any
) -> tuple[Trained, LinearHead]:
    torch.manual_seed(1)
    head = LinearHead(32, 3)
    examples = examples_of(data)
    judge = Validation(examples, class_figures, "accuracy")
    found = train_head(
        model or small_model(), head, examples, loss, recipe, validation=judge, device="cpu",
        num_classes=3, **options,
    )  # fmt: skip
    return found, head


def losses(found: Trained) -> list[float]:
    return [row["loss"] for row in found.history]


@pytest.mark.parametrize("cache", [True, False])
def test_a_frozen_backbone_does_not_change_in_a_bit(colour_folder: Path, cache: bool) -> None:
    model = small_model()
    before = weights_hash(model)
    found, head = trained(colour_folder, replace(SHORT, steps=30, cache=cache), model)
    assert weights_hash(model) == before
    assert found.history[-1]["loss"] < 0.8 * found.history[0]["loss"]
    assert bool(found.saved) == cache
    assert not head.training and not model.training


@pytest.mark.parametrize("backbone", ["lora", "full"])
def test_a_backbone_that_learns_changes(colour_folder: Path, backbone: Any) -> None:
    model = small_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained(colour_folder, replace(SHORT, backbone=backbone, augment=True), model)
    merge_adapters(model)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    if backbone == "lora":
        assert changed == {f"blocks.{i}.attn.{part}.weight" for i in range(3) for part in ("qkv", "proj")}
    else:
        assert set(before) - changed <= {"mask_token"}


def test_layer_wise_decay_groups_are_exact() -> None:
    model, head = small_model(depth=3), LinearHead(32, 3)
    recipe = TrainRecipe(backbone="full", lr=0.5, backbone_lr=0.1, layer_decay=0.5, weight_decay=0.3)
    prepare(model, recipe)
    groups = parameter_groups(model, head, recipe)
    names = {id(one): name for name, one in [*model.named_parameters(), *head.named_parameters()]}
    seen = {
        names[id(one)]: (group["peak_lr"], group["weight_decay"])
        for group in groups
        for one in group["params"]
    }
    assert len(seen) == sum(len(group["params"]) for group in groups)
    assert set(seen) == set(names.values()) - {"mask_token"}
    assert seen["linear.weight"] == (0.5, 0.3) and seen["linear.bias"] == (0.5, 0.0)
    assert seen["norm.weight"] == (0.1, 0.0)
    for block, lr in ((2, 0.05), (1, 0.025), (0, 0.0125)):
        assert seen[f"blocks.{block}.attn.qkv.weight"] == (lr, 0.3)
        assert seen[f"blocks.{block}.ls1.gamma"] == (lr, 0.0)
    assert seen["patch_embed.proj.weight"] == (0.00625, 0.3)
    assert seen["patch_embed.proj.bias"] == (0.00625, 0.0)


def test_cached_training_is_uncached_training(colour_folder: Path) -> None:
    whole = replace(SHORT, cache_dtype="float32")
    cached, first = trained(colour_folder, whole)
    uncached, second = trained(colour_folder, replace(whole, cache=False))
    np.testing.assert_allclose(losses(cached), losses(uncached), rtol=2e-5)
    torch.testing.assert_close(first.linear.weight, second.linear.weight, rtol=1e-3, atol=1e-4)
    assert cached.figures["accuracy"] == uncached.figures["accuracy"]
    halves, _ = trained(colour_folder, SHORT)  # stored in float16
    np.testing.assert_allclose(losses(halves), losses(uncached), rtol=5e-3)


@pytest.mark.parametrize("task", ["segment", "depth"])
def test_cached_maps_of_several_shapes(dense_folder: Path, task: str) -> None:
    if task == "segment":
        data, loss, make = (
            labelled_images(dense_folder),
            segmentation_loss,
            lambda: SegmentationHead(32, 2, 1),
        )
    else:
        data, loss, make = depth_images(dense_folder), depth_loss, lambda: DepthHead(32, "linear4", 0.1, 8.0)
    found = []
    for cache in (True, False):
        torch.manual_seed(1)
        recipe = replace(SHORT, batch_size=4, cache=cache, cache_dtype="float32", steps=4)
        examples = DenseExamples(data, 32, 8)
        found.append(losses(train_head(small_model(), make(), examples, loss, recipe, device="cpu")))
    np.testing.assert_allclose(*found, rtol=2e-4)


def test_cached_views_are_augmented_once(colour_folder: Path) -> None:
    one, _ = trained(colour_folder, SHORT)
    three, _ = trained(colour_folder, replace(SHORT, views=3))
    assert "60 images" in one.saved and "180 images" in three.saved
    assert losses(one) != losses(three)


@pytest.mark.parametrize(
    "fields",
    [
        {"backbone": "freeze"},
        {"backbone": "freeze", "augment": True},
        {"backbone": "lora", "augment": True, "ema": 0.5},
        {"backbone": "full", "augment": True, "drop_path": 0.3, "mixup": 0.4},
    ],
)
def test_stopped_and_resumed_is_uninterrupted(
    colour_folder: Path, tmp_path: Path, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(SHORT, steps=7, **fields)
    whole, head = trained(colour_folder, recipe)
    calls = 0
    real = train._Training._step

    def stopping(self: Any, batch: Any) -> float:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt  # as a kill: after the checkpoint of 4 steps and the row of a fifth
        return real(self, batch)

    monkeypatch.setattr(train._Training, "_step", stopping)
    with pytest.raises(KeyboardInterrupt):
        trained(colour_folder, recipe, folder=tmp_path)
    monkeypatch.setattr(train._Training, "_step", real)
    resumed, again = trained(colour_folder, recipe, folder=tmp_path)
    assert resumed.history[0]["step"] == 4
    assert losses(resumed) == losses(whole)[4:]
    assert resumed.figures == whole.figures and resumed.step == whole.step
    assert all(
        torch.equal(a, b)
        for a, b in zip(head.state_dict().values(), again.state_dict().values(), strict=True)
    )
    rows = [line for line in (tmp_path / "metrics.jsonl").read_text().splitlines() if line]
    assert len(rows) == 7
    assert not (tmp_path / "cache").exists()


def test_a_signal_leaves_a_checkpoint(
    colour_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os
    import signal

    real, calls = train._Training._step, 0

    def noticed(self: Any, batch: Any) -> float:
        nonlocal calls
        calls += 1
        if calls == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, batch)

    monkeypatch.setattr(train._Training, "_step", noticed)
    recipe = replace(SHORT, evaluations=1)
    with pytest.raises(StoppedBySignal, match="stopped after step 2; go on with: again") as stopped:
        trained(colour_folder, recipe, folder=tmp_path, again="again")
    assert stopped.value.number == signal.SIGTERM
    resumed, _ = trained(colour_folder, recipe, folder=tmp_path)
    assert resumed.history[0]["step"] == 2


def test_a_loss_that_is_not_finite_is_skipped_and_a_stubborn_one_stops(colour_folder: Path) -> None:
    calls = 0

    def sometimes(logits: Tensor, labels: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return functional.cross_entropy(logits, labels) * (math.nan if calls == 2 else 1)

    found, head = trained(colour_folder, SHORT, loss=sometimes)
    assert [math.isfinite(value) for value in losses(found)] == [True, False, True, True, True, True]
    assert torch.isfinite(head.linear.weight).all()
    with pytest.raises(UserError, match=r"10 steps in a row had a non-finite loss.*train\.lr"):
        trained(
            colour_folder,
            replace(SHORT, steps=20),
            loss=lambda a, b: functional.cross_entropy(a, b) * math.inf,
        )


def test_the_best_weights_are_kept(colour_folder: Path) -> None:
    figures = iter([0.2, 0.9, 0.5])
    kept: list[Tensor] = []
    head = LinearHead(32, 3)

    def score(batches: Any) -> dict[str, float]:
        list(batches)
        kept.append(head.linear.weight.detach().clone())
        return {"accuracy": next(figures)}

    examples = examples_of(colour_folder)
    recipe = replace(SHORT, evaluations=3)
    judge = Validation(examples, score, "accuracy")
    found = train_head(
        small_model(), head, examples, functional.cross_entropy, recipe, validation=judge, device="cpu"
    )
    assert found.figures == {"accuracy": 0.9} and found.step == 4
    assert torch.equal(head.linear.weight, kept[1]) and not torch.equal(kept[1], kept[2])


def test_mixing_is_the_formula() -> None:
    torch.manual_seed(3)
    images, labels = torch.randn(6, 3, 4, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    torch.manual_seed(5)
    mixed, targets = mixed_up(images, labels, 3, 0.8)
    torch.manual_seed(5)
    share = float(torch.distributions.Beta(0.8, 0.8).sample())
    other = torch.randperm(6)
    torch.testing.assert_close(mixed, share * images + (1 - share) * images[other])
    one_hot = nn.functional.one_hot(labels, 3).float()
    torch.testing.assert_close(targets, share * one_hot + (1 - share) * one_hot[other])


def test_recipes_say_what_is_wrong() -> None:
    recipe = default_recipe("classify", "full", 640, {"epochs": "2", "lr": "1e-2", "lora_mlp": "true"})
    assert (recipe.steps, recipe.lr, recipe.lora_mlp) == (20, 0.01, True)
    assert default_recipe("classify", "freeze", 5).batch_size == 5
    for fields, said in (
        ({"lrr": 1}, r"no train\.lrr; did you mean train\.lr\?"),
        ({"lr": "fast"}, r"train\.lr is 'fast'; it takes a number"),
        ({"steps": "1.5"}, "takes a whole number"),
        ({"augment": "maybe"}, "takes true or false"),
        ({"drop_path": 1.0}, r"in \[0, 1\)"),
        ({"steps": 0}, "at least 1"),
        ({"epochs": 0}, "above 0"),
        ({"lr": "nan"}, "takes a number"),
    ):
        with pytest.raises(UserError, match=said):
            default_recipe("classify", "full", 640, fields)


@pytest.mark.parametrize("bf16", [False, True])
def test_tokens_of_a_cpu_that_is_faster_in_bf16(bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "has_bf16", lambda device: bf16)
    model, device = small_model().eval(), torch.device("cpu")
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    (found,) = feed.Frozen(model, LinearHead(2 * model.config.width, 2), device)(images)
    with torch.no_grad():
        expected = model(normalize(images))
    near = 0.05 if bf16 else 1e-4
    torch.testing.assert_close(found.cls.float(), expected.cls, atol=near, rtol=near)
