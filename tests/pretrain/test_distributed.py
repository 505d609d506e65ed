"""Two gloo processes against one: the same losses, and checkpoints that fit either."""

import os
import shutil
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rich.console import Console
from torch.multiprocessing import spawn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.pretrain.conftest import TINY, losses
from unlabeled.pretrain import loop, targets
from unlabeled.pretrain.batch import Batch, Masks
from unlabeled.pretrain.losses import koleo_loss
from unlabeled.pretrain.method import SelfDistillation
from unlabeled.pretrain.parallel import Parallel
from unlabeled.pretrain.recipe import override
from unlabeled.pretrain.recipes import named_recipe
from unlabeled.pretrain.targets import Assignment, Center, sinkhorn_knopp

TOKENS, PROTOTYPES = torch.randn(16, 4, generator=torch.Generator().manual_seed(0)).split((10, 6))
LOGITS = TOKENS @ PROTOTYPES.T
FEATURES = torch.randn(8, 5, generator=torch.Generator().manual_seed(1))


def on_two_ranks(function: Callable[..., None], port: int, *arguments: Any) -> None:
    spawn(_started, (function, port, arguments), nprocs=2)


def _started(rank: int, function: Callable[..., None], port: int, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings(
        "error", "FSDP2-wrapped module"
    )  # that its output is a view: gradients could be wrong
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    function(rank, *arguments)
    dist.destroy_process_group()


def _parts(rank: int) -> None:
    for cut in (5, 3, 10):  # ranks of equal and unequal size, and one with nothing
        mine = LOGITS[:cut] if rank == 0 else LOGITS[cut:]
        whole = _alone(lambda: sinkhorn_knopp(LOGITS, 0.07))
        expected = whole[:cut] if rank == 0 else whole[cut:]
        torch.testing.assert_close(sinkhorn_knopp(mine, 0.07), expected, rtol=1e-4, atol=1e-6)
        tokens = TOKENS[:cut] if rank == 0 else TOKENS[cut:]
        for at_once in (2**27, 6 * 2):
            targets.AT_ONCE = at_once
            found = Assignment.by_sinkhorn(tokens, PROTOTYPES, 0.07, 3)[:]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
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


FIELDS = TINY | {
    "run.steps": 6,
    "run.checkpoint_every": 3,
    "model.num_registers": 2,
    "head.shared": False,
    "head.ibot_num_prototypes": 32,
}
CASES = {
    "ddp": {},
    "ddp in parts": {"run.accumulation": 2, "loss.targets": "centering", "loss.koleo": 0.0},
    "ddp without iBOT": {"loss.ibot": 0.0},
    "fsdp": {},
    "fsdp in parts": {"run.accumulation": 2, "loss.koleo": 0.0},
    "fsdp bf16": {"run.reduce": "bf16"},
    "fsdp, blocks run again": {"run.checkpoint_blocks": True},
    "ddp packed": {"run.packed": True, "run.accumulation": 2, "loss.koleo": 0.0},
    "fsdp packed": {"run.packed": True},
    "fsdp packed, blocks run again": {"run.packed": True, "run.checkpoint_blocks": True},
}


def trained(folder: Path, data: Path | None = None, case: str = "") -> None:
    """Train a case from the start, or go on with what is in the folder."""
    fields = FIELDS | {"run.sharding": case[:4].strip(" ,")} | CASES[case] if case else {}
    start = {"data": data, "out": folder, "recipe": "tiny"} if data else {"resume": folder}
    loop.pretrain(**start, overrides=fields, device="cpu", console=Console(quiet=True))  # type: ignore[arg-type]


def _runs(rank: int, folder: Path, data: Path) -> None:
    for case in CASES:
        trained(folder / f"two, {case}", data, case)
    for name in ("ddp", "fsdp"):  # begun by one
        trained(folder / f"one then two, {name}")


@pytest.fixture(scope="module")
def runs(tile_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case on one rank and on two, and runs that change from one to two or back after three steps."""
    folder = tmp_path_factory.mktemp("runs")
    for case in CASES:
        trained(folder / f"one, {case}", tile_folder, case)
    for name in ("ddp", "fsdp"):
        copied_after_three_steps(folder / f"one, {name}", folder / f"one then two, {name}")
    on_two_ranks(_runs, 29513, folder, tile_folder)
    for name in ("ddp", "fsdp"):
        copied_after_three_steps(folder / f"two, {name}", folder / f"two then one, {name}")
        trained(folder / f"two then one, {name}")
    return folder


def copied_after_three_steps(run: Path, copy: Path) -> None:
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoints" / "step_00000006")


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_train_as_one(case: str, runs: Path) -> None:
    one, two = losses(runs / f"one, {case}"), losses(runs / f"two, {case}")
    assert [step for step, _ in two] == list(range(6))
    near = 5e-3 if "bf16" in case else 2e-4
    assert [loss for _, loss in two] == pytest.approx([loss for _, loss in one], rel=near)


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
@pytest.mark.parametrize("ranks", ["one then two", "two then one"])
def test_a_checkpoint_fits_another_number_of_ranks(name: str, ranks: str, runs: Path) -> None:
    expected = [loss for _, loss in losses(runs / f"one, {name}")]
    assert [loss for _, loss in losses(runs / f"{ranks}, {name}")] == pytest.approx(expected, rel=2e-4)


def test_bf16_sums_are_other_numbers(runs: Path) -> None:
    assert losses(runs / "two, fsdp") != losses(runs / "two, fsdp bf16")


class Messages(TorchDispatchMode):
    """Counts what the ranks say to each other, by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if function.namespace == "c10d":
            self.counts[function.overloadpacket.__name__] += 1
        return function(*arguments, **(options or {}))


def _collectives(rank: int) -> None:
    """Packed, the student's blocks are gathered, and their gradients summed, half as often."""
    found = []
    for packed in (False, True):
        fields = FIELDS | {"run.sharding": "fsdp", "run.packed": packed, "run.batch_size": 4}
        recipe = override(named_recipe("tiny"), fields, "test")
        method = SelfDistillation(recipe, Parallel.start("cpu"))
        crops = (torch.randint(256, (4, 3, side, side), dtype=torch.uint8) for side in (32, 16))
        batch = Batch(*crops, Masks.of(torch.rand(4, 16) < 0.5), 2)
        targets = method.teacher_targets(batch, 0.05)
        with Messages() as messages:
            method.backward(batch, targets)
        found.append([messages.counts["_allgather_base_"], messages.counts["_reduce_scatter_base_"]])
    two_passes, packed_pass = found
    # What is no block is gathered once, each block forward and backward; each gradient is summed once.
    assert packed_pass == [1 + 2 * 2, 1 + 2]
    assert two_passes == [2 * count for count in packed_pass]


def test_packed_crops_need_half_the_messages() -> None:
    on_two_ranks(_collectives, 29515)
