"""What a GPU would be waited for: nothing in a step, and the figures of a step one step later."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.pretrain.conftest import TINY
from tests.pretrain.test_method import VALUES, made, recipe_of
from tests.pretrain.test_resume import run_here
from unlabeled.errors import UserError
from unlabeled.pretrain import loop, rows
from unlabeled.pretrain.loop import make_optimizer
from unlabeled.pretrain.method import SelfDistillation
from unlabeled.pretrain.optimizer import apply_schedule

# Operators that hand a number of the device to the host, or whose output has a shape that the host has to ask for; and
# what torch.tensor and new_tensor end in, which on a GPU is a copy that waits.
WAITS = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_dim",
         "unique_consecutive", "repeat_interleave", "bincount", "lift_fresh"}  # fmt: skip


class Waits(TorchDispatchMode):
    """Names of the operators that would make the host wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.operators = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        name = function.overloadpacket.__name__
        self.operators += 1
        by_mask = name in ("index", "index_put_", "_index_put_impl_", "index_put") and any(
            one is not None and one.dtype in (torch.bool, torch.uint8) for one in arguments[1]
        )
        if name in WAITS or by_mask:
            self.found.append(name)
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.sum() > 0),
        lambda x: x[x > 0],
        lambda x: (x > 0).nonzero(),
        lambda x: x.new_tensor(3.0),
        lambda x: torch.tensor([1.0, 2.0]),
    ],
)
def test_the_counter_sees_each_way_of_waiting(work: Any) -> None:
    with Waits() as waits:
        work(torch.randn(5))
    assert waits.found


CASES = {
    "sinkhorn, own heads": {"head__shared": False, "model__num_registers": 4},
    "centering, subsets of the batch": {"loss__targets": "centering", "model__drop_path": 0.3},
    "parts, blocks run again": {"run__accumulation": 2, "run__checkpoint_blocks": True, "model__drop_path": 0.05},
    "packed, subsets of the batch": {"run__packed": True, "model__drop_path": 0.3},
    "packed, parts, blocks run again": {
        "run__packed": True, "run__accumulation": 2, "run__checkpoint_blocks": True, "model__drop_path": 0.05,
    },
    "DINO v1": {"loss__ibot": 0.0, "loss__koleo": 0.0, "loss__targets": "centering"},
}  # fmt: skip


@pytest.mark.parametrize("overrides", CASES.values(), ids=CASES)
def test_a_step_never_waits_for_the_device(overrides: dict[str, Any]) -> None:
    method, batch = made(recipe_of(**overrides))
    optimizer = make_optimizer(method)
    for _ in range(2):  # the first makes the optimizer's state
        apply_schedule(optimizer, VALUES)
        with Waits() as waits:
            result = method.train_step(batch, optimizer, VALUES)
        assert not waits.found
        assert waits.operators > 100
    assert result["finite"]


def test_late_rows_are_the_same_rows(
    tile_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {"run.health_every": 4, "run.checkpoint_every": 3, "run.steps": 8}
    at_once = run_here(tile_folder, tmp_path / "at_once", overrides=fields)
    monkeypatch.setattr(rows, "LATE", ("cpu",))
    late = run_here(tile_folder, tmp_path / "late", overrides=fields)
    times = {"images_per_second", "data_wait"}
    plain = [
        [{k: v for k, v in row.items() if k not in times} for row in run.metrics] for run in (at_once, late)
    ]
    assert plain[0] == plain[1]
    assert all(row["images_per_second"] > 0 and 0 <= row["data_wait"] <= 1 for row in late.metrics)


def test_ten_late_steps_in_a_row_stop_the_run(
    tile_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "LATE", ("cpu",))
    real, begun = SelfDistillation.backward, 0

    def broken(self: SelfDistillation, *arguments: Any) -> dict[str, torch.Tensor]:
        nonlocal begun
        found = real(self, *arguments)
        begun += 1
        return found | {"loss": found["loss"] * float("nan")} if begun > 3 else found

    monkeypatch.setattr(SelfDistillation, "backward", broken)
    fields = {"run.steps": 40, "run.checkpoint_every": 40, "run.health_every": 40}
    with pytest.raises(UserError, match=r"10 steps in a row.*last: 12"):
        run_here(tile_folder, tmp_path / "run", overrides=fields)
    assert begun == 14  # one more was begun before the tenth was read
    assert [row["step"] for row in loop.Run(tmp_path / "run").metrics] == list(range(13))


def test_a_row_is_in_the_file_one_step_later(
    tile_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "LATE", ("cpu",))
    real, seen = SelfDistillation.train_step, []

    def watched(self: SelfDistillation, *arguments: Any) -> dict[str, torch.Tensor]:
        lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        seen.append([json.loads(line)["step"] for line in lines][-1:])
        return real(self, *arguments)

    monkeypatch.setattr(SelfDistillation, "train_step", watched)
    fields = {"run.steps": 6, "run.checkpoint_every": 4, "run.health_every": 100}
    run_here(tile_folder, tmp_path / "run", overrides=TINY | fields)
    # Steps 0 (examined) and 3 (saved) are written at once, the others while the next one is under way.
    assert seen == [[], [0], [0], [1], [3], [3]]
