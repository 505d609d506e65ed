"""A rank that is lost under torchrun: the others and a new one go on by themselves."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.pretrain.conftest import command, environment, losses
from tests.pretrain.test_resume import run_here
from unlabeled.pretrain import checkpoint

STEPS = {"run.steps": 12, "run.checkpoint_every": 3}


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the rank in /proc")
def test_a_killed_rank_comes_back_and_training_goes_on(tile_folder: Path, tmp_path: Path) -> None:
    arguments = (str(tile_folder), "--recipe", "tiny", "--device", "cpu")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run_here(tile_folder, whole, overrides=STEPS)
    line = command(*arguments, "--out", str(broken), overrides=STEPS, ranks=2, restarts=1)
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(line, env=environment(), stdout=log, stderr=log)
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if len(checkpoint.all_checkpoints(broken / "checkpoints")) >= 2:
                break
            time.sleep(0.005)
        os.kill(second_rank(process.pid), signal.SIGKILL)
        assert process.wait(timeout=240) == 0, (tmp_path / "log").read_text()
    assert "resumed from step" in (tmp_path / "log").read_text()
    # Without drop path, which depends on the number of ranks, two give the losses of one to rounding.
    expected = [loss for _, loss in losses(whole)]
    assert [loss for _, loss in losses(broken)] == pytest.approx(expected, rel=2e-4)
    assert [step for step, _ in losses(broken)] == list(range(12))


def second_rank(torchrun: int) -> int:
    """The process of rank 1 among the children of torchrun."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            variables = (folder / "environ").read_bytes().split(b"\0")
        except OSError:  # it has ended meanwhile
            continue
        if parent == torchrun and b"RANK=1" in variables:
            return int(folder.name)
    raise AssertionError("rank 1 is not there")
