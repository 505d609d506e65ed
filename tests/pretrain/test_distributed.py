"""Two gloo processes against one: the same losses, and checkpoints that fit either."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import spawn

from tests.pretrain.conftest import Runner, losses
from unlabeled.pretrain.losses import koleo_loss
from unlabeled.pretrain.targets import Center, sinkhorn_knopp

LOGITS = torch.randn(10, 6, generator=torch.Generator().manual_seed(0))
FEATURES = torch.randn(8, 5, generator=torch.Generator().manual_seed(1))


def on_two_ranks(function: Callable[[int], None], port: int) -> None:
    spawn(_started, (function, port), nprocs=2)


def _started(rank: int, function: Callable[[int], None], port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    function(rank)
    dist.destroy_process_group()


def _parts(rank: int) -> None:
    for cut in (5, 3, 10):  # ranks of equal and unequal size, and one with nothing
        mine = LOGITS[:cut] if rank == 0 else LOGITS[cut:]
        whole = _alone(lambda: sinkhorn_knopp(LOGITS, 0.07))
        expected = whole[:cut] if rank == 0 else whole[cut:]
        torch.testing.assert_close(sinkhorn_knopp(mine, 0.07), expected, rtol=1e-4, atol=1e-6)
        center = Center(6)
        center.update(mine)
        torch.testing.assert_close(center.center, 0.1 * LOGITS.mean(0))
    mine = FEATURES[rank * 4 : rank * 4 + 4].clone().requires_grad_()
    loss = koleo_loss(mine, group_wide=True)
    loss.backward()
    whole_features = FEATURES.clone().requires_grad_()
    whole_loss = koleo_loss(whole_features)
    whole_loss.backward()
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    torch.testing.assert_close(mean / 2, whole_loss.detach())
    assert mine.grad is not None
    assert whole_features.grad is not None
    # DDP averages gradients over the ranks.
    torch.testing.assert_close(mine.grad / 2, whole_features.grad[rank * 4 : rank * 4 + 4])


def _alone(function: Callable[[], torch.Tensor]) -> torch.Tensor:
    """As if there were no process group."""
    real = dist.is_initialized
    dist.is_initialized = lambda: False
    try:
        return function()
    finally:
        dist.is_initialized = real


def test_sums_over_ranks() -> None:
    on_two_ranks(_parts, 29511)


STEPS = {"run.steps": 6, "run.checkpoint_every": 3, "model.num_registers": 2, "head.shared": False}


@pytest.mark.parametrize(
    ("sharding", "extra"),
    [
        ("ddp", {}),
        ("ddp", {"run.accumulation": 2, "loss.targets": "centering", "loss.koleo": 0.0}),
        ("ddp", {"loss.ibot": 0.0}),
        ("fsdp", {}),
    ],
)
def test_two_ranks_train_as_one(
    sharding: str, extra: dict[str, object], tile_folder: Path, tmp_path: Path, run_pretrain: Runner
) -> None:
    overrides = STEPS | {"run.sharding": sharding, "head.ibot_num_prototypes": 32} | extra
    arguments = (str(tile_folder), "--recipe", "tiny", "--device", "cpu")
    for name, ranks in (("one", 0), ("two", 2)):
        done = run_pretrain(*arguments, "--out", str(tmp_path / name), overrides=overrides, ranks=ranks)
        assert done.returncode == 0, done.stderr
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert [step for step, _ in two] == list(range(6))
    assert [loss for _, loss in two] == pytest.approx([loss for _, loss in one], rel=2e-4)


@pytest.mark.parametrize(("sharding", "first", "second"), [("ddp", 2, 0), ("fsdp", 2, 0), ("fsdp", 0, 2)])
def test_a_checkpoint_fits_another_number_of_ranks(
    sharding: str, first: int, second: int, tile_folder: Path, tmp_path: Path, run_pretrain: Runner
) -> None:
    overrides = STEPS | {"run.sharding": sharding, "head.ibot_num_prototypes": 32}
    arguments = (str(tile_folder), "--recipe", "tiny", "--device", "cpu")
    done = run_pretrain(*arguments, "--out", str(tmp_path / "whole"), overrides=overrides)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "changed"
    done = run_pretrain(*arguments, "--out", str(out), overrides=overrides, ranks=first)
    assert done.returncode == 0, done.stderr
    # As if it had been stopped after three steps.
    last = out / "checkpoints" / "step_00000006"
    last.rename(out / "checkpoints" / "dropped")
    rows = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(rows[:3]))
    done = run_pretrain("--resume", str(out), "--device", "cpu", overrides={}, ranks=second)
    assert done.returncode == 0, done.stderr
    expected = [loss for _, loss in losses(tmp_path / "whole")]
    assert [loss for _, loss in losses(out)] == pytest.approx(expected, rel=2e-4)
