"""A student of a frozen teacher."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.nn import functional as F

from tests.pretrain.conftest import TINY, Runner
from unlabeled.errors import UserError
from unlabeled.images.sources import open_source
from unlabeled.images.transform import normalize
from unlabeled.pretrain import loop
from unlabeled.pretrain.auto import small_images
from unlabeled.pretrain.batch import Batch
from unlabeled.pretrain.data import step_masks
from unlabeled.pretrain.frozen_teacher import FeatureTeacher, distillation
from unlabeled.pretrain.method import SelfDistillation
from unlabeled.pretrain.parallel import Parallel
from unlabeled.pretrain.plan import prepared
from unlabeled.pretrain.recipe import override
from unlabeled.pretrain.recipes import named_recipe
from unlabeled.pretrain.schedules import values_at
from unlabeled.pretrain.start import load_start
from unlabeled.vit import VisionTransformer, VitConfig
from unlabeled.weights.huggingface import save_huggingface
from unlabeled.weights.load import load_model

QUIET = Console(quiet=True)
STUDENT = {
    name: value for name, value in TINY.items() if name not in ("model.patch_size", "head.num_prototypes")
}


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    model = VisionTransformer(VitConfig(48, 3, 2, patch_size=8, image_size=32, layer_scale=1.0))
    folder = tmp_path_factory.mktemp("released")
    save_huggingface(model.eval(), folder)
    return folder


def run_here(data: Path, out: Path, teacher: Path, **options: Any) -> loop.Run:
    overrides = STUDENT | {"run.steps": 6} | options.pop("overrides", {})
    return loop.distill(data, out, teacher=teacher, student="vit_tiny", recipe="tiny", overrides=overrides,
                        device="cpu", console=QUIET, **options)  # fmt: skip


def made(data: Path, out: Path, teacher: Path, **fields: Any) -> tuple[SelfDistillation, Batch]:
    values = STUDENT | {"data.train": data, "teacher.model": str(teacher), "model.size": "vit_tiny"} | fields
    plan = prepared(out, "tiny", values, Parallel(), QUIET)
    torch.manual_seed(0)
    method = loop.make_method(plan, Parallel())
    images = torch.randint(256, (16, 3, 32, 32), dtype=torch.uint8)
    local = torch.randint(256, (16, 3, 16, 16), dtype=torch.uint8)
    return method, Batch(images, local, step_masks(plan.recipe, 0, 0, 1), 8)


def test_weights_without_heads_teach_by_likeness_to_images(
    tile_folder: Path, tmp_path: Path, released: Path
) -> None:
    method, batch = made(tile_folder, tmp_path / "run", released, **{"loss.targets": "centering"})
    assert method.recipe.head.num_prototypes == len(open_source(str(tile_folder))) == 24
    assert batch.masks is not None
    assert batch.masks.hidden_VBN.all()
    teacher, backbone = method.frozen_teacher, load_model(released).double()
    assert isinstance(teacher, FeatureTeacher)
    targets = method.teacher_targets(batch, 0.05)
    tokens = backbone(normalize(batch.globals_VB3HW).double())
    for found, seen, head in (
        (targets.dino_VBK, tokens.cls, teacher.dino_head),
        (targets.ibot_MK, tokens.patches.flatten(0, 1), teacher.ibot_head),
    ):
        rows = F.normalize(seen - head.mean.double(), dim=-1) @ head.weight.double().T
        assert found is not None
        torch.testing.assert_close(found[:].double(), (rows / 0.05).softmax(-1), rtol=1e-3, atol=1e-6)


def test_the_prototypes_are_features_of_the_images(tile_folder: Path, tmp_path: Path, released: Path) -> None:
    from unlabeled.features.extract import extract

    method, _ = made(tile_folder, tmp_path / "run", released)
    assert isinstance(method.frozen_teacher, FeatureTeacher)
    cls = torch.from_numpy(
        extract(load_model(released), open_source(str(tile_folder)), resize=32, crop=32).features
    )
    expected = F.normalize(cls - cls.mean(0), dim=-1)
    likeness = expected @ method.frozen_teacher.dino_head.weight.T
    assert likeness.argmax(0).unique().numel() == 24
    torch.testing.assert_close(likeness.amax(0), torch.ones(24), rtol=0, atol=1e-4)


def test_the_student_sees_every_patch_and_its_ema_is_the_result(
    tile_folder: Path, tmp_path: Path, released: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, batch = made(tile_folder, tmp_path / "run", released)
    seen: list[Any] = []
    real = VisionTransformer.all_tokens

    def noted(model: VisionTransformer, groups: list[tuple[torch.Tensor, torch.Tensor | None]]) -> Any:
        seen.extend(masks for _, masks in groups)
        return real(model, groups)

    monkeypatch.setattr(VisionTransformer, "all_tokens", noted)
    optimizer = loop.make_optimizer(method)
    values = values_at(method.recipe, 2)
    loop.apply_schedule(optimizer, values)
    before = {name: value.clone() for name, value in method.teacher.state_dict().items()}
    frozen = {name: value.clone() for name, value in method.frozen_teacher.state_dict().items()}  # type: ignore[union-attr]
    assert method.train_step(batch, optimizer, values)["finite"]
    assert len(seen) == 3
    assert seen == [None] * 3
    for name, value in method.frozen_teacher.state_dict().items():  # type: ignore[union-attr]
        assert torch.equal(value, frozen[name]), name
    student = method.student.state_dict()
    for name, value in method.teacher.state_dict().items():
        m = values.teacher_momentum
        torch.testing.assert_close(value, m * before[name] + (1 - m) * student[name], rtol=1e-5, atol=1e-7)
    assert not method.student.backbone.mask_token.requires_grad  # type: ignore[union-attr]


def test_accumulation_gives_the_same_gradients(tile_folder: Path, tmp_path: Path, released: Path) -> None:
    found = []
    for parts in (1, 3):
        method, batch = made(
            tile_folder, tmp_path / f"{parts}", released, **{"run.accumulation": parts, "loss.koleo": 0}
        )
        losses = method.backward(batch, method.teacher_targets(batch, 0.05))
        found.append([losses["loss"], *(p.grad for p in method.student.parameters() if p.grad is not None)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_run_teaches_with_its_heads(tile_folder: Path, tmp_path: Path) -> None:
    first = loop.pretrain(
        tile_folder, tmp_path / "first", recipe="tiny", steps=4, overrides=TINY, device="cpu", console=QUIET
    )
    fields = {"model.width": 24, "model.depth": 1, "run.steps": 8}
    run = run_here(tile_folder, tmp_path / "second", first.path, overrides=fields, eval=tile_folder)
    assert run.recipe.head.num_prototypes == first.recipe.head.num_prototypes
    assert run.recipe.model.drop_path == 0
    assert load_model(run.path).config.depth == 1
    assert all("knn" in row for row in run.metrics[-1:])
    resumed = loop.pretrain(
        resume=run.path, overrides={"run.steps": 10}, device="cpu", console=QUIET
    )  # the teacher is read again
    assert len(resumed.metrics) == 10


def test_what_cannot_be_compared_is_one_line(tile_folder: Path, tmp_path: Path, released: Path) -> None:
    with pytest.raises(UserError, match=r"teacher's patch is 8 pixels and the student's 16"):
        made(tile_folder, tmp_path / "a", released, **{"model.patch_size": 16})
    with pytest.raises(UserError, match=r"the head has 64 prototypes .*, and .* has 24 images"):
        made(tile_folder, tmp_path / "b", released, **{"head.num_prototypes": 64})
    first = loop.pretrain(
        tile_folder, tmp_path / "first", recipe="tiny", steps=2, overrides=TINY, device="cpu", console=QUIET
    )
    with pytest.raises(UserError, match=r"leave head.num_prototypes"):
        made(tile_folder, tmp_path / "c", first.path, **{"head.num_prototypes": 64})


def test_the_command_distills(
    tile_folder: Path, tmp_path: Path, released: Path, run_pretrain: Runner
) -> None:
    done = run_pretrain(
        str(tile_folder), "--out", str(tmp_path / "run"), "--teacher", str(released), "--student", "vit_tiny",
        "--recipe", "tiny", "--steps", "3", "--json", name="distill", overrides={"head.num_prototypes": 20},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["steps"] == 3
    assert "stays as it is: no masks, drop path 0, 20 prototypes" in done.stderr


def test_the_learning_rate_is_the_papers_or_that_of_small_images(released: Path) -> None:
    start = load_start(str(released))
    large = distillation(override(named_recipe("vits14"), {"run.batch_size": 2048}, "test"), start, 10**6)
    assert large.peak_lr() == pytest.approx(1e-3)
    small = small_images(32)
    assert (
        distillation(small, start, 10**6).peak_lr() == pytest.approx(small.peak_lr()) == pytest.approx(5e-4)
    )
