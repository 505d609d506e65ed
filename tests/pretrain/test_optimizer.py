"""Parameter groups, clipping, EMA."""

import copy
import math

import pytest
import torch
from torch import nn

from unlabeled.pretrain.head import ProjectionHead
from unlabeled.pretrain.method import SelfDistillation
from unlabeled.pretrain.optimizer import apply_schedule, clip_gradients, guarded_update, parameter_groups
from unlabeled.pretrain.recipe import override
from unlabeled.pretrain.recipes import named_recipe
from unlabeled.pretrain.schedules import StepValues

TINY = {
    "model.depth": 3,
    "model.width": 24,
    "model.num_heads": 2,
    "head.num_prototypes": 8,
    "head.hidden": 16,
}


@pytest.mark.parametrize("registers", [0, 4])
def test_every_parameter_is_in_one_group_with_the_right_multipliers(registers: int) -> None:
    recipe = override(
        named_recipe("tiny"), TINY | {"model.num_registers": registers, "head.shared": False}, "test"
    )
    student = SelfDistillation(recipe).student
    groups = parameter_groups(student, 3, 0.9, 0.2)
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    seen: dict[str, dict[str, float]] = {}
    for group in groups:
        for parameter in group["params"]:
            assert names[id(parameter)] not in seen
            seen[names[id(parameter)]] = group
    assert set(seen) == set(names.values())
    rate = {name: group["lr_multiplier"] for name, group in seen.items()}
    assert rate["backbone.cls_token"] == rate["backbone.pos_embed"] == pytest.approx(0.9**4)
    assert rate["backbone.patch_embed.proj.weight"] == pytest.approx(0.9**4 * 0.2)
    assert rate["backbone.blocks.0.attn.qkv.weight"] == pytest.approx(0.9**3)
    assert rate["backbone.blocks.2.mlp.fc1.bias"] == pytest.approx(0.9)
    assert rate["backbone.norm.weight"] == rate["dino_head.mlp.0.weight"] == rate["ibot_head.mlp.2.bias"] == 1
    if registers:
        assert rate["backbone.register_tokens"] == pytest.approx(0.9**4)
    for name, group in seen.items():
        exempt = name.endswith(".bias") or "norm" in name or ".gamma" in name
        assert group["weight_decay_multiplier"] == (0 if exempt else 1), name
        part = "backbone_lr" if name.startswith("backbone.") else "lr"
        assert group["rate"] == ("last_layer_lr" if "last_layer" in name else part)


def test_schedule_reaches_every_group() -> None:
    student = nn.ModuleDict({"backbone": nn.Linear(4, 4), "dino_head": ProjectionHead(4, 6, 3, 8)})
    optimizer = torch.optim.AdamW(parameter_groups(student, 0, 0.9, 0.2))
    apply_schedule(optimizer, StepValues(0.5, 0.25, 0.125, 0.25, 0.9, 0.04))
    assert {group["rate"]: group["lr"] / group["lr_multiplier"] for group in optimizer.param_groups} == {
        "lr": 0.5, "last_layer_lr": 0.25, "backbone_lr": 0.125,
    }  # fmt: skip
    for group in optimizer.param_groups:
        assert group["weight_decay"] == 0.25 * group["weight_decay_multiplier"]


def test_each_submodule_is_clipped_by_itself() -> None:
    parts = {"large": nn.Linear(3, 3), "small": nn.Linear(3, 3)}
    for name, scale in (("large", 100.0), ("small", 0.01)):
        for parameter in parts[name].parameters():
            parameter.grad = torch.full_like(parameter, scale)
    norms = clip_gradients(parts, 3.0)
    assert float(norms["large"]) == pytest.approx(100 * math.sqrt(12))
    assert float(norms["small"]) == pytest.approx(0.01 * math.sqrt(12))
    total = math.sqrt(
        sum(float(p.grad.square().sum()) for p in parts["large"].parameters() if p.grad is not None)
    )
    assert total == pytest.approx(3.0, rel=1e-4)
    assert all(bool((p.grad == 0.01).all()) for p in parts["small"].parameters() if p.grad is not None)


@pytest.mark.parametrize("fused", [True, False])
def test_an_update_is_adamw_and_the_teachers_average_or_nothing(fused: bool) -> None:
    teacher, student = nn.Linear(4, 3), nn.Linear(4, 3)
    plain = copy.deepcopy(student)
    optimizers = [torch.optim.AdamW(one.parameters(), lr=0.1, fused=fused) for one in (student, plain)]
    yes, no = torch.tensor(True), torch.tensor(False)
    for finite in (yes, no, yes, yes):
        for a, b in zip(student.parameters(), plain.parameters(), strict=True):
            a.grad = torch.randn_like(a) if finite else torch.full_like(a, math.nan)
            b.grad = a.grad.clone()
        before = [p.detach().clone() for network in (teacher, student) for p in network.parameters()]
        guarded_update(optimizers[0], teacher, student, 0.9, finite)
        if not finite:
            after = [p for network in (teacher, student) for p in network.parameters()]
            assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
            continue
        optimizers[1].step()
        for a, b in zip(student.parameters(), plain.parameters(), strict=True):
            assert torch.equal(a, b)  # moments and step counts, too, are as if the skipped step had not been
        for t, was, s in zip(teacher.parameters(), before, student.parameters(), strict=False):
            expected = 0.9 * was.double() + 0.1 * s.detach().double()
            torch.testing.assert_close(t.double(), expected, rtol=1e-6, atol=1e-7)


def test_head_is_the_plain_formula() -> None:
    torch.manual_seed(0)
    head = ProjectionHead(5, 7, 3, 11)
    for parameter in head.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(4, 5)
    hidden = x.double()
    layers = [layer for layer in head.mlp if isinstance(layer, nn.Linear)]
    for index, layer in enumerate(layers):
        hidden = hidden @ layer.weight.double().T + layer.bias.double()
        if index < 2:
            hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    hidden = hidden / hidden.square().sum(1, keepdim=True).sqrt()
    weight = head.last_layer.weight_v.double()
    weight = weight / weight.square().sum(1, keepdim=True).sqrt()
    torch.testing.assert_close(head(x).double(), hidden @ weight.T, rtol=1e-5, atol=1e-6)
    assert set(head.state_dict()) == {
        *(f"mlp.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")),
        "last_layer.weight_v",
        "last_layer.weight_g",
    }
